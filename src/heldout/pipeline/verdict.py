"""Ship, don't ship, or inconclusive: decided on examples nobody trained on, with the evidence beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from heldout.pipeline.consequences import INFORMING
from heldout.pipeline.consequences.base import Consequence
from heldout.pipeline.crossfit import CrossFit
from heldout.pipeline.evaluate.forgetting import Forgetting
from heldout.pipeline.evaluate.statistics import AS_GOOD, WORTH, Comparison, compare
from heldout.pipeline.ladder import Rung, best_baseline, three_digits

SHIP, DONT_SHIP, INCONCLUSIVE = "ship", "dont_ship", "inconclusive"

#: See docs/design/verdict.md. Fewer examples than this cannot carry a verdict at all.
MINIMUM = 30
UNLIKELY = 0.20
#: The chance of shipping a model that is no better, at the first look; models of folds share training rows.
RISK, RISK_OF_FOLDS = 0.05, 0.025
#: The share of folds in which the tuned model must be ahead.
FOLDS_AHEAD = 0.8
#: A classical model overrules the tuned one when it is better with this probability, at any look: that ships nothing.
SURE = 0.95
#: A model is called faster that takes so many times less.
FASTER = 1.5
#: As good with at most this share of the baseline's prompt tokens is a reason to ship.
SHORTER = 0.5
#: After so many looks at one holdout its answers have been chosen by.
MOST_LOOKS = 5


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do with the tuned model, and why. Every sentence points to a number in `numbers`."""

    outcome: str
    because: str  # better | cheaper | cheaper_is_better | not_better | consequence | unsure | too_few
    reasons: tuple[str, ...]
    best_baseline: str  # the rung the outcome compares with
    cheapest_as_good: str  # the cheapest rung, the tuned one included, at most 3 points worse than the best
    numbers: dict[str, Any]
    forgetting: Forgetting | None = None  # a guardrail: told beside the outcome, and does not change it
    caveats: tuple[str, ...] = ()  # told first: why the numbers may not mean what they seem to

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the report and on the wire."""
        return {
            "caveats": list(self.caveats),
            "outcome": self.outcome,
            "because": self.because,
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
    clusters: Sequence[int] = (),
    look: int = 1,
) -> Verdict:
    """Compare the tuned model with every rung below it, on the same examples: those of a holdout, or, by
    cross-fitting, those that the models of `crossfit` never saw.

    The outcome is about the best prompt (or a constant answer, if that is better): what the user would
    have without training. A classical model that is surely better than the tuned one overrules it.
    A failed consequence overrules any outcome for which there is enough evidence.
    `caveats` are told before everything else and change nothing. `clusters[i]` says which examples are one
    piece of evidence; none: each is. `look` counts the verdicts on these examples, this one included: the more
    often they were looked at, the surer a verdict has to be.
    """
    against = {rung.name: _compare(tuned, rung, clusters) for rung in rungs}
    baseline = best_baseline(rungs)
    case = _Case(
        tuned=tuned,
        baseline=baseline,
        comparison=against[baseline.name],
        better=tuple(rung for rung in rungs if rung.kind == "classical" and 1 - against[rung.name].p_better >= SURE),
        crossfit=crossfit,
        look=look,
    )
    outcome, because, reasons = _outcome(case)
    by_cost = _by_cost(rungs, tuned)
    best = max(by_cost, key=lambda rung: rung.scores.mean)
    as_good, lead = _cheapest_as_good(by_cost, best, lambda rung: _compare(best, rung, clusters))
    if lead:
        reasons.append(_cheaper(as_good, best, lead))
    if crossfit:
        reasons.insert(1, crossfit.sentence)
    if look > 1:
        reasons.append(_looks(case))
    if forgetting and forgetting.dropped:
        reasons.append(f"general skills dropped: {forgetting.sentence}; {forgetting.advice}")
    failed = [one for one in consequences if one.status == "fail" and one.name not in INFORMING]
    told = [f"{one.name} fails: {one.sentence}" for one in failed]
    if failed and case.pieces[0] >= MINIMUM:
        outcome, because, reasons = DONT_SHIP, "consequence", [*told, *reasons]
    else:
        reasons += told
    return Verdict(
        outcome=outcome,
        because=because,
        reasons=tuple(reasons),
        best_baseline=baseline.name,
        cheapest_as_good=as_good.name,
        numbers={
            "n_holdout": case.comparison.n,
            **({"folds": len(crossfit.folds), "groups": crossfit.groups} if crossfit else {}),
            **({"folds_ahead": case.folds_ahead} if crossfit else {}),
            "tuned": tuned.scores.mean,
            "baseline": baseline.scores.mean,
            "best": best.scores.mean,
            "look": look,
            "p_needed": case.sure,
            **case.comparison.as_dict(),
            "more_needed": _more_needed(case),
            "answers": {rung.name: _an_answer(rung) for rung in by_cost},
            "against": {name: one.as_dict() for name, one in against.items()},
        },
        forgetting=forgetting,
        caveats=tuple(caveats),
    )


def _compare(one: Rung, other: Rung, clusters: Sequence[int]) -> Comparison:
    return compare(one.scores.per_example, other.scores.per_example, binary=one.scores.binary, clusters=clusters)


def _by_cost(rungs: Sequence[Rung], tuned: Rung) -> list[Rung]:
    """Cheapest first. Of models that read a prompt those that read less of it; at equal length one that needs no
    training first."""
    plain = [rung for rung in rungs if rung.kind != "prompt"]
    asked = [rung for rung in rungs if rung.kind == "prompt"]
    return [*plain, *sorted([*asked, tuned], key=lambda rung: rung.scores.prompt_tokens)]


def _cheapest_as_good(
    by_cost: Sequence[Rung], best: Rung, lead_over: Callable[[Rung], Comparison]
) -> tuple[Rung, Comparison | None]:
    """The first rung that the best one is surely at most 3 points better than, with its lead; or the best itself."""
    for rung in by_cost:
        if rung is best:
            break
        lead = lead_over(rung)
        if lead.interval[1] <= AS_GOOD:
            return rung, lead
    return best, None


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What is judged: the tuned model against the best baseline, and what weighs the evidence."""

    tuned: Rung
    baseline: Rung
    comparison: Comparison
    better: tuple[Rung, ...]  # classical models that are surely better than the tuned one
    crossfit: CrossFit | None
    look: int

    @property
    def sure(self) -> float:
        """The probability that it takes to ship: so that all looks at one holdout together run the risk of one."""
        return 1 - (RISK_OF_FOLDS if self.crossfit else RISK) / self.look

    @property
    def folds_ahead(self) -> int:
        """Folds in which the tuned model has the higher score."""
        ahead, start = 0, 0
        for fold in self.crossfit.folds if self.crossfit else ():
            end = start + len(fold.scores.per_example)
            ahead += sum(self.tuned.scores.per_example[start:end]) > sum(self.baseline.scores.per_example[start:end])
            start = end
        return ahead

    @property
    def is_ahead_in_most_folds(self) -> bool:
        """True without folds."""
        return self.crossfit is None or self.folds_ahead >= math.ceil(FOLDS_AHEAD * len(self.crossfit.folds))

    @property
    def is_as_good_and_cheaper(self) -> bool:
        """True when it is surely at most 3 points worse than the best prompt, with half of its tokens or fewer."""
        asked, asks = self.baseline.scores.prompt_tokens, self.tuned.scores.prompt_tokens
        return self.comparison.p_not_worse >= self.sure and 0 < asks <= SHORTER * asked

    @property
    def answers(self) -> str:
        """Whose answers are judged."""
        return f"out-of-fold answers of {len(self.crossfit.folds)} models" if self.crossfit else "holdout examples"

    @property
    def these(self) -> str:
        """The same, shorter."""
        return "these answers" if self.crossfit else "this holdout"

    @property
    def pieces(self) -> tuple[int, str]:
        """How many pieces of evidence there are: what belongs together was held out together."""
        clusters, n = self.comparison.clusters, self.comparison.n
        if self.crossfit and self.crossfit.groups <= clusters:
            return self.crossfit.groups, "distinct prompts"
        return clusters, "holdout examples" if clusters == n else f"groups of related examples (of {n} examples)"


def _outcome(case: _Case) -> tuple[str, str, list[str]]:
    """The outcome, why in a word, and why in sentences."""
    tuned, baseline, comparison = case.tuned, case.baseline, case.comparison
    low, high = comparison.interval
    pieces, unit = case.pieces
    facts = (
        f"on {comparison.n} {case.answers} {_the(tuned)} scores {tuned.scores.mean:.1%} "
        f"({tuned.scores.metric}), the best baseline ({baseline.name}) {baseline.scores.mean:.1%}: "
        f"{_points(comparison.difference)} points, 95 % interval {_points(low)} to {_points(high)}"
    )
    sure = f"the probability that it is better at all is {_probability(comparison.p_better)}"
    visible = (
        f"the smallest difference {case.these} could have shown is {comparison.smallest_detectable:.1%} (80 % power)"
    )
    if pieces < MINIMUM:
        few = f"{pieces} {unit} are too few for a verdict; {MINIMUM} are the minimum, so give {MINIMUM - pieces} more"
        return INCONCLUSIVE, "too_few", [few, facts, visible]
    if case.better:
        worse = max(case.better, key=lambda rung: rung.scores.mean)
        lead = 100 * (worse.scores.mean - tuned.scores.mean)
        instead = (
            f"{worse.name} scores {worse.scores.mean:.1%}, {lead:.1f} points more than {_the(tuned)} "
            f"({tuned.scores.mean:.1%}){_faster(worse, tuned)}: use that instead"
        )
        return DONT_SHIP, "cheaper_is_better", [instead, facts, visible]
    is_better = comparison.p_better >= case.sure and comparison.difference >= WORTH
    if is_better and case.is_ahead_in_most_folds:
        return SHIP, "better", [facts, sure, visible]
    if case.is_as_good_and_cheaper:
        saved = (
            f"it is as good and cheaper: the probability that it is at most 3 points worse is "
            f"{_probability(comparison.p_not_worse)}, with {tuned.scores.prompt_tokens:.0f} prompt tokens an answer "
            f"instead of {baseline.scores.prompt_tokens:.0f}"
        )
        return SHIP, "cheaper", [facts, saved, visible]
    if comparison.p_better <= UNLIKELY:
        return DONT_SHIP, "not_better", [facts, sure, visible]
    doubt = (
        f"{sure}, which is neither sure enough to ship ({_probability(case.sure)}) nor low enough to reject "
        f"({UNLIKELY:.0%})"
    )
    if is_better and case.crossfit:
        doubt = (
            f"{sure}, but it is ahead in {case.folds_ahead} of {len(case.crossfit.folds)} folds only, and a model "
            f"that is better is so in {FOLDS_AHEAD:.0%} of them"
        )
    return INCONCLUSIVE, "unsure", [facts, doubt, visible, _more(case)]


def _more_needed(case: _Case) -> int:
    """How many more examples would settle it, to two digits: more would pretend to know. At least as many as a verdict
    needs at all."""
    comparison = case.comparison
    more = max(comparison.needed - comparison.n, MINIMUM - case.pieces[0], 0)
    digits = max(0, len(str(more)) - 2)
    return int(math.ceil(more / 10**digits) * 10**digits)


def _more(case: _Case) -> str:
    """The same in words."""
    more, comparison = _more_needed(case), case.comparison
    if not more:
        return "as many fresh examples again would probably settle it"
    size = f"as large as it seems ({abs(comparison.difference):.1%}"
    if abs(comparison.difference) < WORTH:
        size = f"the least that is worth a model ({WORTH:.1%}"
    return (
        f"to settle it takes about {more} more examples nobody trained on, if the true difference is {size}, "
        "80 % power)"
    )


def _looks(case: _Case) -> str:
    """What repeated looks at one holdout cost."""
    text = (
        f"this is verdict {case.look} on (nearly) the same examples: every further look makes a lucky one likelier, so "
        f"it takes a probability of {_probability(case.sure)} to ship"
    )
    if case.look > MOST_LOOKS:
        text += "; after this many give a holdout file with examples that were never used"
    return text


def _cheaper(rung: Rung, best: Rung, comparison: Comparison) -> str:
    return (
        f"{rung.name} is the cheapest that is as good as the best ({best.name}): {rung.scores.mean:.1%} against "
        f"{best.scores.mean:.1%}, at most {_points(comparison.interval[1])} points behind"
        f"{_per_answer(rung, best)}"
    )


def _per_answer(rung: Rung, best: Rung) -> str:
    """What an answer of each costs, where that was measured."""
    if not best.scores.milliseconds:
        return ""
    return (
        f"; an answer takes it {three_digits(rung.scores.milliseconds)} ms and {rung.scores.prompt_tokens:.0f} prompt "
        f"tokens instead of {three_digits(best.scores.milliseconds)} ms and {best.scores.prompt_tokens:.0f}"
    )


def _the(tuned: Rung) -> str:
    """How sentences call it: not every model that is judged was tuned."""
    return "the tuned model" if tuned.name == "tuned" else "the model"


def _faster(rung: Rung, than: Rung) -> str:
    """What an answer takes instead, where that was measured."""
    if not (rung.scores.milliseconds and than.scores.milliseconds):
        return ", at a fraction of its cost"
    here, there = rung.scores.milliseconds, than.scores.milliseconds
    takes = f"{three_digits(here)} ms an answer, not {three_digits(there)}"
    return f", and is {three_digits(there / here)} times as fast ({takes})" if there >= FASTER * here else f" ({takes})"


def _an_answer(rung: Rung) -> dict[str, float]:
    """What an answer of it is worth, and takes."""
    scores = rung.scores
    return {"score": scores.mean, "milliseconds": scores.milliseconds, "prompt_tokens": scores.prompt_tokens}


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _probability(p: float) -> str:
    return "above 99.9 %" if p > 0.999 else "below 0.1 %" if p < 0.001 else f"{p:.1%}"
