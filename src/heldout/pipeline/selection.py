"""Which checkpoint of a finished training to ship: the lowest validation loss, unless another is clearly better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from heldout.pipeline.evaluate.statistics import paired_difference

Kind = Literal["best_loss", "best_metric", "last", "average"]

#: Paired standard errors by which a candidate's score must be better than that of the lowest validation loss.
ERRORS = 1.0
#: Where the losses speak against it: the last checkpoint has trained on while validation loss did not improve, and one
#: from before the lowest loss was not yet as far; its score was the highest of many by luck, more often than not.
ERRORS_AGAINST = 2.0

_WORDS: dict[Kind, str] = {
    "best_loss": "the lowest validation loss",
    "best_metric": "the highest score during training",
    "last": "the last",
    "average": "the average of three around the lowest validation loss",
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint that could be shipped, as validation sees it."""

    kind: Kind
    step: int  # of an average: the middle one
    valid_loss: float  # calibrated, nats per example, each with the same weight; may not be a number
    scores: tuple[float, ...]  # task metric of each validation example, 0 to 1; all candidates in one order

    @property
    def score(self) -> float | None:
        """Mean task metric; None without scores."""
        return math.fsum(self.scores) / len(self.scores) if self.scores else None

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the report; a loss that is not a number is None."""
        return {
            "kind": self.kind,
            "step": self.step,
            "valid_loss": self.valid_loss if math.isfinite(self.valid_loss) else None,
            "score": self.score,
        }

    def __str__(self) -> str:
        return f"step {self.step} ({_WORDS[self.kind]})"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The candidate to ship and why, among all that were considered."""

    chosen: Candidate
    reason: str
    candidates: tuple[Candidate, ...]
    metric: str | None = None  # of their scores; None without validation examples
    complete: bool = True  # False: a checkpoint that would have been a candidate cannot be read

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the report."""
        return {
            "chosen": self.chosen.as_dict(),
            "reason": self.reason,
            "metric": self.metric,
            "candidates": [candidate.as_dict() for candidate in self.candidates],
        }


def select(candidates: Sequence[Candidate], *, metric: str, complete: bool = True) -> Selection:
    """Choose by the one-standard-error rule (docs/design/stopping.md); `metric` names the scores in the reason, which
    says so where the candidates are not `complete`.

    Raises ValueError when there is no best_loss or two of a kind, when scores are not of the same examples
    or not within 0 and 1, and when the loss of best_loss is not a number.
    """
    best = _check(candidates)
    others = _others(candidates, best)
    passed = [one for one in others if _is_better(one, best, _bar(one, best, others))]
    # Where scores tie, the lower validation loss decides.
    chosen = max(passed, key=lambda one: (one.score or 0.0, -one.valid_loss), default=best)
    reason = _why_other(chosen, best, others, metric) if passed else _why_best(best, others, metric)
    return Selection(
        chosen=chosen,
        reason=reason if complete else f"of the checkpoints that can be read, {reason}",
        candidates=tuple(candidates),
        metric=metric,
        complete=complete,
    )


def in_question(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The lowest validation loss, and those whose score could put them before it, whatever the scores are."""
    best = next((one for one in candidates if one.kind == "best_loss"), None)
    if best is None:
        return tuple(candidates)
    return (best, *(one for one in _others(candidates, best) if not _is_barred(one, best)))


def _others(candidates: Sequence[Candidate], best: Candidate) -> list[Candidate]:
    return [one for one in candidates if not _same(one, best) and math.isfinite(one.valid_loss)]


def _is_barred(one: Candidate, best: Candidate) -> bool:
    """An average was never trained as it is: it has to hold on both counts."""
    return one.kind == "average" and one.valid_loss > best.valid_loss


def _check(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate of lowest validation loss."""
    kinds = [one.kind for one in candidates]
    if kinds.count("best_loss") != 1 or len(set(kinds)) != len(kinds):
        raise ValueError(f"candidates are {kinds}: give exactly one best_loss, and at most one of each other kind")
    best = candidates[kinds.index("best_loss")]
    if not math.isfinite(best.valid_loss):
        raise ValueError(f"{best} has validation loss {best.valid_loss}: nothing of this training can be shipped")
    for one in candidates:
        if len(one.scores) != len(best.scores):
            raise ValueError(
                f"{one} has {len(one.scores)} scores, {best} {len(best.scores)}: score the same validation examples"
            )
        if not all(0 <= score <= 1 for score in one.scores):
            raise ValueError(f"{one} has scores outside 0 to 1: {min(one.scores)} to {max(one.scores)}")
    return best


def _same(one: Candidate, other: Candidate) -> bool:
    """The same weights, under whatever names."""
    return one.step == other.step and "average" not in (one.kind, other.kind)


def _bar(one: Candidate, best: Candidate, others: Sequence[Candidate]) -> float:
    """Standard errors that `one` needs; the last checkpoint keeps its bar under any other name."""
    is_last = any(other.kind == "last" and _same(other, one) for other in others)
    return ERRORS_AGAINST if is_last or one.step < best.step else ERRORS


def _is_better(one: Candidate, best: Candidate, bar: float) -> bool:
    if _is_barred(one, best):
        return False
    gain, error = paired_difference(one.scores, best.scores)
    # A single example that differs gives a gain of exactly one error; rounding must not decide that.
    return gain > bar * error * (1 + 1e-9)


def _why_other(chosen: Candidate, best: Candidate, others: Sequence[Candidate], metric: str) -> str:
    gain, error = paired_difference(chosen.scores, best.scores)
    return (
        f"{chosen} is chosen: {metric} {chosen.score:.3f} on {len(best.scores)} validation examples, against "
        f"{best.score:.3f} for {best}; the gain of {gain:.3f} is more than {_errors(_bar(chosen, best, others), error)}"
    )


def _why_best(best: Candidate, others: Sequence[Candidate], metric: str) -> str:
    kept = f"{best} is chosen (validation loss {best.valid_loss:.3g})"
    if not others:
        return f"{kept}: there is no other candidate"
    n = len(best.scores)
    if n < 2:
        return f"{kept}: {n or 'no'} scored validation example{'s' * (n != 1)} cannot show that another one is better"
    rival = max(others, key=lambda one: one.score or 0.0)
    gain, error = paired_difference(rival.scores, best.scores)
    if gain <= 0:
        return f"{kept}: no other candidate has a higher {metric} than its {best.score:.3f}"
    if _is_barred(rival, best):
        return f"{kept}: {rival} has {metric} {rival.score:.3f} against {best.score:.3f}, but a higher validation loss"
    return (
        f"{kept}: {rival} has {metric} {rival.score:.3f} against {best.score:.3f} on {n} validation examples, "
        f"which is not more than {_errors(_bar(rival, best, others), error)}"
    )


def _errors(times: float, error: float) -> str:
    count = "one standard error" if times == 1 else f"{times:g} standard errors"
    return f"{count} of the paired difference ({times * error:.3f})"
