"""A job's story on a terminal: one line per sentence, one bar per stage with the time it has left.

Everything goes to stderr, so that stdout is free for the result. Where stderr is no terminal the bars
become plain lines, at most one every few seconds.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from heldout.pipeline.plan import TrainPlan
    from heldout.pipeline.training import CurvePoint

#: Seconds between two plain lines of one stage.
PLAIN_EVERY = 10.0


class TerminalWatch:
    """A Watch for people. Use it as a context manager: the bars end with the block."""

    def __init__(self, *, fleeting: bool = False) -> None:
        """`fleeting`: nothing of the bars is left at the end, and what is quick is not told in plain lines."""
        self._quiet_until = time.monotonic() + PLAIN_EVERY if fleeting else 0.0
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=fleeting,
            disable=not self.console.is_terminal,
        )
        self._stage = ""
        self._task: TaskID | None = None
        self._started = self._told = 0.0
        self._note = ""

    def __enter__(self) -> TerminalWatch:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def message(self, text: str, *, level: str = "info", data: dict[str, Any] | None = None) -> None:
        """See Watch.message."""
        style = {"warn": "yellow", "error": "bold red"}.get(level)
        self.console.print(text, style=style, markup=False)

    def progress(self, stage: str, done: int, total: int) -> None:
        """See Watch.progress."""
        if stage != self._stage:
            self._stage, self._started, self._note = stage, time.monotonic(), ""
            self._task = self._bars.add_task(stage, total=total, note="")
        assert self._task is not None
        self._bars.update(self._task, completed=done, total=total, note=self._note)
        if not self.console.is_terminal:
            self._plain(stage, done, total)

    def planned(self, plan: TrainPlan) -> None:
        """See Watch.planned."""
        self.message(
            f"Plan: at most {plan.n_epochs} epochs of {plan.total_steps // plan.n_epochs} steps, batch "
            f"{plan.batch_size}, learning rate {plan.learning_rate:g}, a validation every {plan.eval_every} steps"
            + (f"; ended after {plan.end_share:.0%} of the steps" if plan.end_share < 1 else "")
        )

    def metrics(self, point: CurvePoint, total_steps: int) -> None:
        """See Watch.metrics."""
        self._note = f"loss {point.train_loss:.3f}"
        if point.valid_loss is not None:
            self.message(
                f"  step {point.step}/{total_steps}: training loss {point.train_loss:.4f}, "
                f"validation loss {point.valid_loss:.4f}, token accuracy {point.valid_accuracy:.1%}"
            )

    def checkpoint(self, step: int, folder: Path, metrics: dict[str, Any], *, again: bool = False) -> None:
        """See Watch.checkpoint."""

    def kept(self) -> None:
        """See Watch.kept."""

    def _plain(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._quiet_until or (done < total and now - self._told < PLAIN_EVERY):
            return
        self._told = now
        left = (now - self._started) / done * (total - done) if done else None
        words = "" if left is None else f", about {left:.0f} s left" if done < total else ", done"
        self.message(f"{stage}: {done}/{total}{words} {self._note}".rstrip())
