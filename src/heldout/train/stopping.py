"""When to stop, and which checkpoint is best: by evidence from validation, in numbers alone.

The rules and what they were measured against are in docs/design/stopping.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from heldout.pipeline.evaluate.statistics import paired_difference

#: Evaluations over which the loss of each example is smoothed by its median.
SMOOTHED = 3
#: Two evaluations in a row this far above the best end training without waiting for patience.
RISE, RISE_ERRORS, RISES = 0.10, 3.0, 2


class Evaluation(NamedTuple):
    """One validation: nats of each example, always in the same order, and their mean."""

    step: int
    losses: list[float]
    mean: float  # infinite without examples


@dataclass
class EarlyStopping:
    """Watches the calibrated validation losses of every example (loop.Validation).

    *Best* is the evaluation with the lowest mean loss: a checkpoint that really exists. *Progress* is
    judged more strictly, on the median of each example's last three losses: the mean of these must lie
    below that of the last progress by more than `min_delta` nats and by more than `min_delta_errors`
    standard errors of the paired difference. `reason` says why to stop: `patience` evaluations and at
    least one epoch without progress, validation loss far above the best twice in a row, or no longer a
    number.
    """

    patience: int  # evaluations
    steps_per_epoch: int
    min_delta: float = 0.0  # nats
    min_delta_errors: float = 0.5
    steps: list[int] = field(default_factory=list)  # of all evaluations that gave a number
    recent: list[Evaluation] = field(default_factory=list)  # the last three
    best: Evaluation | None = None
    progress: Evaluation | None = None  # its losses are the smoothed ones
    risen: int = 0  # evaluations in a row far above the best
    top_step: int = 0  # the highest task score so far; at a tie the earlier step, and none while all are 0
    top_score: float | None = None
    relied: dict[int, list[int]] = field(default_factory=dict)  # kept step -> checkpoints that it relies on
    reason: str = ""  # why to stop now, in words; empty while training should go on

    @property
    def best_step(self) -> int:
        """The step to keep; 0 while no validation loss was a number."""
        return self.best.step if self.best else 0

    @property
    def best_loss(self) -> float:
        """Mean nats per example at the best step; infinite before there is one."""
        return self.best.mean if self.best else math.inf

    @property
    def waited(self) -> int:
        """Evaluations since the last progress."""
        since = self.progress.step if self.progress else 0
        return sum(step > since for step in self.steps)

    def update(self, step: int, losses: Sequence[float], score: float | None = None) -> bool:
        """Take in one validation; `score` is its mean task score, if one was computed. True if the best so far.

        Without validation examples `losses` is empty: nothing to choose by, so the last step is the best.
        Raises ValueError when `losses` are not those of the same examples as before.
        """
        self._check(step, losses)
        if not losses:
            self.steps.append(step)
            self.best = _evaluation(step, losses)
            self._remember_what_it_relies_on()
            return True
        if not all(math.isfinite(loss) for loss in losses):
            self.reason = self._not_a_number(step)
            return False
        now = _evaluation(step, losses)
        self.steps.append(step)
        self.recent = [*self.recent, now][-SMOOTHED:]
        self.risen = self.risen + 1 if self._far_above_best(now) else 0
        if score is not None and score > (self.top_score or 0.0):
            self.top_step, self.top_score = step, score
        if is_best := self.best is None or now.mean < self.best.mean:
            self.best = now
        smoothed = self._smoothed()
        if self.progress is None or self._is_progress(smoothed, self.progress):
            self.progress = smoothed
        self.reason = self._why_stop(now)
        self._remember_what_it_relies_on()
        return is_best

    def keep(self) -> set[int]:
        """Steps whose checkpoints may still be needed.

        The best and its two neighbours (to average), the highest task score, and the last four: the newest
        may become the best, and a spike returns to one before it, which may have had another best.
        """
        last = self.steps[-4:]
        return {*last, *self._relies_on(), *(step for one in last for step in self.relied.get(one, ()))}

    def can_go_back_to(self, saved: Iterable[int]) -> list[int]:
        """Those of the saved checkpoints from which training can go on and find all that it may hand over."""
        there = set(saved)
        return [step for step in self.relied if step in there and there.issuperset(self.relied[step])]

    def neighbours(self) -> list[int]:
        """The best step with the evaluated steps just before and after it, in order, where they exist."""
        if self.best is None:
            return []
        at = self.steps.index(self.best.step)
        return self.steps[max(0, at - 1) : at + 2]

    def state(self) -> dict[str, Any]:
        """What a resumed job needs to decide the same; JSON gives every number back exactly."""
        return {
            "steps": list(self.steps),
            "recent": [[one.step, one.losses] for one in self.recent],
            "best": [self.best.step, self.best.losses] if self.best else None,
            "progress": [self.progress.step, self.progress.losses] if self.progress else None,
            "risen": self.risen,
            "top_step": self.top_step,
            "top_score": self.top_score,
            "relied": {str(step): relied for step, relied in self.relied.items()},
            "reason": self.reason,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.steps = list(state["steps"])
        self.recent = [_evaluation(*one) for one in state["recent"]]
        self.best = _evaluation(*state["best"]) if state["best"] else None
        self.progress = _evaluation(*state["progress"]) if state["progress"] else None
        self.risen, self.reason = state["risen"], state["reason"]
        self.top_step, self.top_score = state["top_step"], state["top_score"]
        self.relied = {int(step): list(relied) for step, relied in state["relied"].items()}

    def _relies_on(self) -> list[int]:
        """The last evaluation and those that would be handed over if nothing better came."""
        top = [] if self.top_score is None else [self.top_step]
        return sorted({*self.steps[-1:], *self.neighbours(), *top})

    def _remember_what_it_relies_on(self) -> None:
        self.relied[self.steps[-1]] = self._relies_on()
        kept = self.keep()
        self.relied = {step: relied for step, relied in self.relied.items() if step in kept}

    def _check(self, step: int, losses: Sequence[float]) -> None:
        if self.best and len(losses) != len(self.best.losses):
            raise ValueError(
                f"step {step}: {len(losses)} validation losses after {len(self.best.losses)}; "
                "losses are compared example by example, so all evaluations need the same ones"
            )
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"step {step} is evaluated after step {self.steps[-1]}; restore the state of a checkpoint")

    def _smoothed(self) -> Evaluation:
        by_example = zip(*(one.losses for one in self.recent), strict=True)
        return _evaluation(self.recent[-1].step, [statistics.median(losses) for losses in by_example])

    def _is_progress(self, now: Evaluation, before: Evaluation) -> bool:
        gain, error = paired_difference(before.losses, now.losses)
        # With one example no error is known, and any gain has to do.
        noise = self.min_delta_errors * error if math.isfinite(error) else 0.0
        return gain > max(self.min_delta, noise)

    def _far_above_best(self, now: Evaluation) -> bool:
        if self.best is None:
            return False
        rise, error = paired_difference(now.losses, self.best.losses)
        return rise > RISE * self.best.mean and rise > RISE_ERRORS * error

    def _why_stop(self, now: Evaluation) -> str:
        assert self.best is not None
        assert self.progress is not None
        keeping = f"stopping at step {now.step}, keeping step {self.best.step}"
        if self.risen >= RISES:
            before = self.recent[-2]
            return (
                f"calibrated validation loss rose from {_nats(self.best.mean)} (step {self.best.step}) to "
                f"{_nats(before.mean)} and {_nats(now.mean)}: training has diverged from what generalises; {keeping}"
            )
        if self.waited >= self.patience and now.step - self.progress.step >= self.steps_per_epoch:
            # A later evaluation may be the lowest by less than the noise; it is kept all the same.
            word = "clearly improved" if self.best.step > self.progress.step else "improved"
            return f"calibrated validation loss has not {word} for {self.waited} evaluations; {keeping}"
        return ""

    def _not_a_number(self, step: int) -> str:
        if self.best is None:
            return f"validation loss is not a number at step {step}, and no evaluation before it was; stopping"
        return (
            f"validation loss is not a number at step {step}; stopping there, keeping step {self.best.step} "
            f"(calibrated validation loss {_nats(self.best.mean)})"
        )


def _evaluation(step: int, losses: Sequence[float]) -> Evaluation:
    return Evaluation(step, list(losses), math.fsum(losses) / len(losses) if losses else math.inf)


def _nats(loss: float) -> str:
    return f"{loss:.2f}" if loss >= 0.1 else f"{loss:.2g}"
