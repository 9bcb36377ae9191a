"""When a training run has broken down, and from where to start again: decided from the loss of each step.

The rules and how often they are wrong are in docs/design/stopping.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

#: A third of the learning rate each time, at most twice.
SLOWER, RESTARTS = 3, 2
#: The mean of the FIRST losses is what training began with; from step 2 * FIRST on, a bad start shows.
FIRST, START_ERRORS = 10, 3.0
#: Trouble has to last for so many steps: batches of 8 examples differ a lot.
IN_A_ROW = 6
#: A spike: every one of the last IN_A_ROW losses lies above every one of the REFERENCE losses before them.
REFERENCE = 30
#: … and their median above the reference's by so many of its standard deviations (estimated by the MAD),
#: and by this share of the loss that training began with: smaller bumps are left to the validation loss.
SPIKE_DEVIATIONS, SPIKE_SHARE = 3.0, 0.25
#: Losses remembered, so that going back to a checkpoint leaves a reference.
REMEMBERED = 200


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Training has broken down: what to do, and the sentence that says so."""

    restart_from: int | None  # the checkpoint's step, 0 for the beginning; None: give up
    learning_rate: float  # the peak rate to go on with
    sentence: str


@dataclass
class Guard:
    """Watches the loss and gradient norm of every step; decides, and leaves the doing to the loop.

    A loss or gradient that is not a number: an alarm at once. The mean of ten losses above the mean of the
    first ten by three standard errors, at step 20 and at the five steps after it: an alarm. Later, six
    losses in a row above all 30 before them and by a wide margin: an alarm. An alarm goes back to a
    checkpoint from before the trouble, at a third of the learning rate; the third one gives up.
    """

    planned_rate: float  # the plan's peak learning rate
    restarts: int = 0
    restarted_from: int | None = None
    step: int = 0  # the last step looked at
    first: list[float] = field(default_factory=list)  # losses of steps 1 to FIRST
    recent: list[float] = field(default_factory=list)  # losses of the last steps, `step` included

    @property
    def learning_rate(self) -> float:
        """The peak learning rate now in force."""
        return self.planned_rate / SLOWER**self.restarts

    def look(self, step: int, loss: float, grad_norm: float, checkpoints: Iterable[int]) -> Alarm | None:
        """Take in one step before its update is applied; `checkpoints` are the steps that can be gone back to.

        `loss` is the mean of the step's batch, in nats. After an alarm the guard has gone back as well.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = "training loss" if not math.isfinite(loss) else "gradient"
            return self._alarm(step, step, f"{what} is not a number at step {step}", checkpoints)
        self.step = step
        self.recent = [*self.recent, loss][-REMEMBERED:]
        if step == len(self.first) + 1 <= FIRST:
            self.first.append(loss)
        if self._rose_at_the_start():
            before, now = statistics.fmean(self.first), statistics.fmean(self.recent[-FIRST:])
            what = f"training loss rose from {before:.2g} to {now:.2g} by step {step}"
            return self._alarm(step, 1, what, checkpoints)
        if self._spiked():
            before = statistics.median(self._reference())
            what = f"training loss rose from {before:.2g} to {loss:.2g} at step {step}"
            return self._alarm(step, step - IN_A_ROW + 1, what, checkpoints)
        return None

    def state(self) -> dict[str, Any]:
        """What a resumed job needs to decide the same; JSON gives every number back exactly."""
        return {
            "restarts": self.restarts,
            "restarted_from": self.restarted_from,
            "step": self.step,
            "first": list(self.first),
            "recent": list(self.recent),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.restarts, self.restarted_from, self.step = state["restarts"], state["restarted_from"], state["step"]
        self.first, self.recent = list(state["first"]), list(state["recent"])

    def _rose_at_the_start(self) -> bool:
        if self.step != 2 * FIRST + IN_A_ROW - 1 or len(self.recent) < self.step:
            return False
        ends = range(2 * FIRST, self.step + 1)
        return all(_clearly_above(self.recent[end - FIRST : end], self.first) for end in ends)

    def _spiked(self) -> bool:
        reference, last = self._reference(), self.recent[-IN_A_ROW:]
        if len(reference) < 2 * FIRST or min(last) <= max(reference):
            return False
        middle = statistics.median(reference)
        deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in reference)
        margin = max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * statistics.fmean(self.first))
        return statistics.median(last) > middle + margin

    def _reference(self) -> list[float]:
        return self.recent[-REFERENCE - IN_A_ROW : -IN_A_ROW]

    def _alarm(self, step: int, since: int, what: str, checkpoints: Iterable[int]) -> Alarm:
        """The trouble shows from step `since` on, so the update before it may have caused it already."""
        tried = self.learning_rate
        if step == 1:
            return _give_up(
                tried,
                f"{what}, before any weight was changed: no learning rate can help. "
                "Check that the files of the base model are whole.",
            )
        if self.restarts == RESTARTS:
            return _give_up(
                tried,
                f"{what}, and starting again at a third of the learning rate, {RESTARTS} times, has not helped. "
                f"Set learning_rate below {_rate(tried)}, or look for broken examples in the training file.",
            )
        sound = {0, *(saved for saved in checkpoints if saved < since - 1)}
        # A checkpoint that led here once more is suspect itself.
        target = max(sound - {self.restarted_from} if max(sound) == self.restarted_from else sound, default=0)
        self._go_back(target)
        place = f"the checkpoint of step {target}" if target else "the beginning"
        share = "a third" if self.restarts == 1 else "a ninth of the planned one"
        return Alarm(
            restart_from=target,
            learning_rate=self.learning_rate,
            sentence=f"{what}: starting again from {place} at learning rate {_rate(self.learning_rate)}, {share}",
        )

    def _go_back(self, target: int) -> None:
        self.recent = self.recent[: max(0, len(self.recent) - (self.step - target))]
        self.first = self.first[:target]
        self.step, self.restarted_from = target, target
        self.restarts += 1


def _clearly_above(now: Sequence[float], before: Sequence[float]) -> bool:
    error = math.sqrt(statistics.variance(now) / len(now) + statistics.variance(before) / len(before))
    return statistics.fmean(now) - statistics.fmean(before) > START_ERRORS * error


def _give_up(rate: float, sentence: str) -> Alarm:
    return Alarm(restart_from=None, learning_rate=rate, sentence=sentence)


def _rate(rate: float) -> str:
    """0.00066667 as 6.7e-4."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"
