"""How a job tells what it is doing: to a terminal, to the database, or to nobody."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from heldout.pipeline.plan import TrainPlan
    from heldout.pipeline.training import CurvePoint


class Watch(Protocol):
    """Told what happens. Every method may raise JobCancelled: that is how a job is stopped."""

    def message(self, text: str, *, level: str = "info", data: dict[str, Any] | None = None) -> None:
        """A sentence of the job's story."""
        ...

    def progress(self, stage: str, done: int, total: int) -> None:
        """How far the current stage is, in units of the stage."""
        ...

    def planned(self, plan: TrainPlan) -> None:
        """Every "auto" has become a number."""
        ...

    def metrics(self, point: CurvePoint, total_steps: int) -> None:
        """One step of training was taken."""
        ...

    def checkpoint(self, step: int, folder: Path, metrics: dict[str, Any], *, again: bool = False) -> None:
        """An adapter was saved in `folder` and may be called by a name of its own. `again`: training is taken up from
        it, and it may have been told before."""
        ...

    def kept(self) -> None:
        """Work that is nobody's checkpoint was saved: a job that is taken up again need not repeat it."""
        ...


class InFold(NamedTuple):
    """A stage of one fold of cross-fitting."""

    number: int  # from 1
    of: int  # folds
    stage: str


_IN_FOLD = re.compile(r"fold (\d+) of (\d+): (.+)")


def in_fold(stage: str) -> InFold | None:
    """What FoldWatch made of a fold's stage, taken apart again; None for a stage of the job itself."""
    found = _IN_FOLD.fullmatch(stage)
    return InFold(int(found[1]), int(found[2]), found[3]) if found else None


class Silent:
    """A watch nobody looks at."""

    def message(self, text: str, *, level: str = "info", data: dict[str, Any] | None = None) -> None: ...

    def progress(self, stage: str, done: int, total: int) -> None: ...

    def planned(self, plan: TrainPlan) -> None: ...

    def metrics(self, point: CurvePoint, total_steps: int) -> None: ...

    def checkpoint(self, step: int, folder: Path, metrics: dict[str, Any], *, again: bool = False) -> None: ...

    def kept(self) -> None: ...


class Within:
    """Passes on what a part of a job tells, under the part's name.

    Steps and checkpoints are kept back: a client plots steps and calls checkpoints of the served model, and
    those of a fold or a rung are not its.
    """

    def __init__(self, watch: Watch, name: str) -> None:
        self._watch, self._name = watch, name

    def message(self, text: str, *, level: str = "info", data: dict[str, Any] | None = None) -> None:
        """See Watch.message."""
        self._watch.message(f"{self._name}: {text}", level=level, data=data)

    def progress(self, stage: str, done: int, total: int) -> None:
        """See Watch.progress."""
        self._watch.progress(f"{self._name}: {stage}", done, total)

    def planned(self, plan: TrainPlan) -> None:
        """See Watch.planned. The job's plan is told by the job."""

    def metrics(self, point: CurvePoint, total_steps: int) -> None:
        """See Watch.metrics."""

    def checkpoint(self, step: int, folder: Path, metrics: dict[str, Any], *, again: bool = False) -> None:
        """See Watch.checkpoint. The job got somewhere, though."""
        if not again:
            self._watch.kept()

    def kept(self) -> None:
        """See Watch.kept."""
        self._watch.kept()
