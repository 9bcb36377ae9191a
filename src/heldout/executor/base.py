"""Where a job process runs: the contract."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Executor(Protocol):
    """Runs a command line somewhere and knows whether it is still running.

    A handle is a string that survives the process that got it: another worker can poll it.
    """

    def start(self, command: Sequence[str], *, log: Path) -> str:
        """Start the command, its output appended to `log`; the handle."""
        ...

    def poll(self, handle: str) -> int | None:
        """None while it runs, else its exit code (-1 when nobody can know any more)."""
        ...

    def stop(self, handle: str) -> None:
        """End it and everything it started, within a few seconds. Stopping twice is fine."""
        ...
