"""Fine-tune open-weight models on your own hardware through OpenAI's API, and ship only what generalises.

    import heldout
    report = heldout.check("tickets.train.jsonl")
    report.findings          # what is wrong with the file, the most harmful first
    result = heldout.tune("tickets.train.jsonl")
    result.verdict.outcome   # "ship", "dont_ship" or "inconclusive"

Importing this package is light; torch is loaded by the first `tune`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heldout.processes.checking import check
    from heldout.processes.foreground import tune

__version__ = "0.1.0"
__all__ = ["check", "tune"]


def __getattr__(name: str) -> Any:
    if name == "check":
        from heldout.processes.checking import check

        return check
    if name == "tune":
        from heldout.processes.foreground import tune

        return tune
    raise AttributeError(f"module 'heldout' has no attribute {name!r}")
