"""Fine-tune open-weight models on your own hardware through OpenAI's API, and ship only what generalises.

    import heldout
    report = heldout.check("tickets.train.jsonl")
    report.findings          # what is wrong with the file, the most harmful first
    result = heldout.tune("tickets.train.jsonl")
    result.verdict.outcome   # "ship", "dont_ship" or "inconclusive"
    heldout.advise("tickets.train.jsonl").recommendation.tool   # before that: is a fine-tune the right tool?
    heldout.evaluate(result.model, "new.jsonl").scores.mean     # any model on any file
    heldout.compare("a", "b", "new.jsonl").conclusion           # which of two is better, and how sure that is

Importing this package is light; torch is loaded by the first call that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heldout.processes.advising import advise
    from heldout.processes.checking import check
    from heldout.processes.foreground import tune
    from heldout.processes.judging import Endpoint, compare, evaluate

__version__ = "0.1.0"
__all__ = ["Endpoint", "advise", "check", "compare", "evaluate", "tune"]


def __getattr__(name: str) -> Any:
    if name == "check":
        from heldout.processes.checking import check

        return check
    if name == "tune":
        from heldout.processes.foreground import tune

        return tune
    if name == "advise":
        from heldout.processes.advising import advise

        return advise
    if name in ("Endpoint", "compare", "evaluate"):
        from heldout.processes import judging

        return getattr(judging, name)
    raise AttributeError(f"module 'heldout' has no attribute {name!r}")
