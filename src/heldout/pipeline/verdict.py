"""Ship, don't ship, or inconclusive: decided on examples nobody trained on, with the evidence beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from heldout.pipeline.consequences import INFORMING
from heldout.pipeline.consequences.base import Consequence
from heldout.pipeline.crossfit import CrossFit
from heldout.pipeline.evaluate.forgetting import Forgetting
from heldout.pipeline.evaluate.statistics import AS_GOOD, Comparison, compare
from heldout.pipeline.ladder import Rung

SHIP, DONT_SHIP, INCONCLUSIVE = "ship", "dont_ship", "inconclusive"

#: See docs/design/verdict.md. Fewer examples than this cannot carry a verdict at all.
MINIMUM = 30
SURE, UNLIKELY = 0.95, 0.20
WORTH = 0.01  # a gain below one point is not worth a model


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do with the tuned model, and why. Every sentence points to a number in `numbers`."""

    outcome: str
    reasons: tuple[str, ...]
    best_baseline: str  # the rung the outcome compares with
    cheapest_as_good: str  # the cheapest rung that is at most 3 points worse than the tuned model
    numbers: dict[str, Any]
    forgetting: Forgetting | None = None  # a guardrail: told beside the outcome, and does not change it
    caveats: tuple[str, ...] = ()  # told first: why the numbers may not mean what they seem to

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the report and on the wire."""
        return {
            "caveats": list(self.caveats),
            "outcome": self.outcome,
            "reasons": list(self.reasons),
            "best_baseline": self.best_baseline,
            "cheapest_as_good": self.cheapest_as_good,
            "numbers": self.numbers,
            "guardrails": {"forgetting": self.forgetting.as_dict()} if self.forgetting else {},
        }


def decide(
    rungs: Sequence[Rung],
    tuned: Rung,
    crossfit: CrossFit | None = None,
    *,
    forgetting: Forgetting | None = None,
    consequences: Sequence[Consequence] = (),
    caveats: Sequence[str] = (),
) -> Verdict:
    """Compare the tuned model with every rung below it, on the same examples: those of a holdout, or, by
    cross-fitting, those that the models of `crossfit` never saw.

    The outcome is about the best prompt (or a constant answer, if that is better): what the user would
    have without training. A classical model that is surely better than the tuned one overrules it.
    A failed consequence overrules any outcome for which there is enough evidence. `caveats` are told before everything
    else and change nothing.
    """
    against = {rung.name: _compare(tuned, rung) for rung in rungs}
    baseline = max((rung for rung in rungs if rung.kind in ("prompt", "constant")), key=lambda rung: rung.scores.mean)
    comparison = against[baseline.name]
    better = [rung for rung in rungs if rung.kind == "classical" and 1 - against[rung.name].p_better >= SURE]
    as_good = next((rung for rung in rungs if _as_good(against[rung.name])), tuned)
    basis = _basis(comparison.n, crossfit)
    outcome, reasons = _outcome(tuned, baseline, comparison, better, basis)
    if as_good is not tuned:
        reasons.append(_cheaper(as_good, tuned, against[as_good.name]))
    if crossfit:
        reasons.insert(1, crossfit.sentence)
    if forgetting and forgetting.dropped:
        reasons.append(f"general skills dropped: {forgetting.sentence}; {forgetting.advice}")
    failed = [one for one in consequences if one.status == "fail" and one.name not in INFORMING]
    told = [f"{one.name} fails: {one.sentence}" for one in failed]
    if failed and basis.pieces >= MINIMUM:
        outcome, reasons = DONT_SHIP, [*told, *reasons]
    else:
        reasons += told
    return Verdict(
        outcome=outcome,
        reasons=tuple(reasons),
        best_baseline=baseline.name,
        cheapest_as_good=as_good.name,
        numbers={
            "n_holdout": comparison.n,
            **({"folds": len(crossfit.folds), "groups": crossfit.groups} if crossfit else {}),
            "tuned": tuned.scores.mean,
            "baseline": baseline.scores.mean,
            **comparison.as_dict(),
            "against": {name: one.as_dict() for name, one in against.items()},
        },
        forgetting=forgetting,
        caveats=tuple(caveats),
    )


def _compare(tuned: Rung, rung: Rung) -> Comparison:
    return compare(tuned.scores.per_example, rung.scores.per_example, binary=tuned.scores.binary)


def _as_good(comparison: Comparison) -> bool:
    """True when the tuned model is surely at most 3 points better than the other."""
    return comparison.interval[1] <= AS_GOOD


class _Basis(NamedTuple):
    """Whose answers are judged: in words, and how many pieces of evidence they are."""

    answers: str
    these: str
    pieces: int
    unit: str


def _basis(n: int, crossfit: CrossFit | None) -> _Basis:
    if crossfit is None:
        return _Basis("holdout examples", "this holdout", n, "holdout examples")
    # Rows with the same prompt are one piece of evidence: they were held out together.
    answers = f"out-of-fold answers of {len(crossfit.folds)} models"
    return _Basis(answers, "these answers", crossfit.groups, "distinct prompts")


def _outcome(
    tuned: Rung, baseline: Rung, comparison: Comparison, better: Sequence[Rung], basis: _Basis
) -> tuple[str, list[str]]:
    low, high = comparison.interval
    facts = (
        f"on {comparison.n} {basis.answers} the tuned model scores {tuned.scores.mean:.1%} "
        f"({tuned.scores.metric}), the best baseline ({baseline.name}) {baseline.scores.mean:.1%}: "
        f"{_points(comparison.difference)} points, 95 % interval {_points(low)} to {_points(high)}"
    )
    sure = f"the probability that it is better at all is {_probability(comparison.p_better)}"
    visible = (
        f"the smallest difference {basis.these} could have shown is {comparison.smallest_detectable:.1%} (80 % power)"
    )
    if basis.pieces < MINIMUM:
        return INCONCLUSIVE, [
            f"{basis.pieces} {basis.unit} are too few for a verdict; {MINIMUM} are the minimum",
            facts,
            visible,
        ]
    if better:
        worse = max(better, key=lambda rung: rung.scores.mean)
        return DONT_SHIP, [
            f"{worse.name} scores {worse.scores.mean:.1%} and is better than the tuned model "
            f"({tuned.scores.mean:.1%}) at a fraction of its cost: use that instead",
            facts,
            visible,
        ]
    if comparison.p_better >= SURE and comparison.difference >= WORTH:
        return SHIP, [facts, sure, visible]
    if comparison.p_better <= UNLIKELY:
        return DONT_SHIP, [facts, sure, visible]
    return INCONCLUSIVE, [
        facts,
        f"{sure}, which is neither sure enough to ship ({SURE:.0%}) nor low enough to reject ({UNLIKELY:.0%})",
        visible,
    ]


def _cheaper(rung: Rung, tuned: Rung, comparison: Comparison) -> str:
    return (
        f"{rung.name} is cheaper and as good: {rung.scores.mean:.1%} against {tuned.scores.mean:.1%}; the tuned "
        f"model is ahead by at most {_points(comparison.interval[1])} points"
    )


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _probability(p: float) -> str:
    return "above 99.9 %" if p > 0.999 else "below 0.1 %" if p < 0.001 else f"{p:.1%}"
