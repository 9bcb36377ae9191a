"""Fragility: do the answers stay, when the same thing is said a little differently?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from heldout.pipeline.consequences.base import (
    LIKELY,
    Consequence,
    Subject,
    in_lots,
    not_measured,
    points,
    sample,
    short,
    status_of,
)
from heldout.pipeline.consequences.perturbations import Perturbation, allowed
from heldout.pipeline.consequences.perturbed_answers import Answers, Asked, Asking
from heldout.pipeline.evaluate.statistics import p_above, paired_interval
from heldout.pipeline.ladder import Rung
from heldout.pipeline.types import Example

NAME = "fragility"
#: Holdout examples that are asked again, and of those with free text, whose answers are long.
ITEMS, TEXT_ITEMS = 100, 30
#: A part of the examples is asked after the other: when time is used up, all perturbations of some examples tell more
#: than some perturbations of all.
LOTS = 3
#: Fewer examples that a perturbation changes say nothing about it.
FEWEST = 10
#: Excess of changed answers, and drop of the score, to warn from.
MARGIN = 0.05


def measure(subject: Subject) -> Consequence:
    """Ask again, perturbed, what was answered on the holdout.

    Warns when answers flip by more than MARGIN more than the baseline's, or when a perturbation costs more than
    MARGIN. Fails when the tuned model, perturbed, is worse than the perturbed baseline.
    """
    if subject.budget.used_up:
        return not_measured(NAME, subject.budget.sentence)
    # The dearest of all: what comes after it must have its turn.
    subject = replace(subject, budget=subject.budget.half())
    perturbations, why_not = allowed(subject.split.train, is_encoder=subject.is_encoder)
    if not perturbations:
        return not_measured(NAME, why_not or "there is nothing to perturb")
    places = sample(subject.answered, TEXT_ITEMS if subject.metric.form == "text" else ITEMS, subject.seed, NAME)
    examples = [subject.answered[place] for place in places]
    clean = [subject.tuned.scores.per_example[place] for place in places]
    baseline_clean = [subject.baseline.scores.per_example[place] for place in places]
    ours, baseline = ask_both(subject, perturbations, places, clean, baseline_clean)
    tuned, left_out = enough(ours, len(examples), subject.budget.sentence)
    if not tuned:
        few = f"no perturbation changes {FEWEST} of the {len(examples)} held-out examples that were to be asked"
        return not_measured(NAME, "; ".join(dict.fromkeys(left_out.values())) or few, left_out=left_out)
    if baseline:
        theirs = {name: asked for name, asked in baseline.found.items() if name in tuned}
    else:
        theirs = {name: _unmoved(asked) for name, asked in tuned.items()}
    return judge(
        tuned,
        theirs,
        clean,
        baseline_clean,
        examples,
        ours.before,
        words={one.name: one.words for one in perturbations},
        baseline_name=subject.baseline.name,
        why_not=why_not,
        left_out=left_out,
        refused=baseline.left_out if baseline and (baseline.found or baseline.left_out) else None,
        late=subject.budget.sentence,
    )


def enough(answers: Answers, examples: int, late: str) -> tuple[dict[str, Asked], dict[str, str]]:
    """The perturbations that were asked often enough to tell something; those that were not, and why. One that changes
    few of all examples is neither."""
    found = {name: asked for name, asked in answers.found.items() if len(asked.places) >= FEWEST}
    left_out = {name: why for name, why in answers.left_out.items() if name not in answers.found}
    for name, asked in answers.found.items():
        if name not in found and asked.places and len(asked.tried) < examples:
            left_out[name] = late
    return found, left_out


def ask_both(
    subject: Subject,
    perturbations: Sequence[Perturbation],
    places: Sequence[int],
    clean: Sequence[float],
    baseline_clean: Sequence[float],
) -> tuple[Answers, Answers | None]:
    """What the tuned model and the baseline say to the examples at these places. The baseline is only asked where its
    answers can change the light, and None where it is a constant answer."""

    def answers_of(rung: Rung, who: str) -> Answers:
        return Answers(rung is not subject.tuned, [rung.scores.answers[place] for place in places], who)

    asking = Asking(subject, perturbations, subject.unseen(places))
    ours = answers_of(subject.tuned, "the tuned model")
    baseline = None
    if subject.baseline.kind != "constant":
        baseline = answers_of(subject.baseline, subject.baseline.name)
    waiting: list[int] = []
    lots = max(1, min(LOTS, len(places) // (2 * FEWEST)))
    for lot in in_lots(len(places), lots, subject.seed, NAME):
        asking.ask(ours, lot)
        waiting += lot
        # Once asked, always asked: a part that was chosen because it looks bad would look worse than the whole.
        if baseline and ours.found and (baseline.found or may_matter(ours.found, clean, baseline_clean)):
            asking.ask(baseline, waiting, ours.found)
            waiting = []
    return ours, baseline


def may_matter(tuned: dict[str, Asked], clean: Sequence[float], baseline_clean: Sequence[float]) -> bool:
    """Whether the baseline's answers could change the light. They are the dearest: shots make long prompts.

    A perturbed baseline is hardly better than the same baseline as it is.
    """
    whole = _tried(tuned)
    flips = list(_by_example({name: _pairs(asked, asked.flips) for name, asked in tuned.items()}, whole).values())
    drops = _by_example({name: _pairs(asked, asked.drops) for name, asked in tuned.items()}, whole)
    below = [baseline_clean[i] - (clean[i] - drop) for i, drop in drops.items()]
    return p_above(flips, MARGIN) >= LIKELY or p_above(below, 0.0) >= 0.5


def judge(
    tuned: dict[str, Asked],
    baseline: dict[str, Asked],
    clean: Sequence[float],
    baseline_clean: Sequence[float],
    examples: Sequence[Example],
    before: Sequence[str],
    *,
    words: dict[str, str],
    baseline_name: str,
    why_not: str | None = None,
    left_out: dict[str, str] | None = None,
    refused: dict[str, str] | None = None,
    late: str = "",
) -> Consequence:
    """The light, from the answers. An example's flips and drops are means over the perturbations that change it, so
    that every example is one piece of evidence; means are of examples that all of them were tried on, since the
    perturbations are not alike.

    Args:
        refused: the perturbations that the baseline could not be asked, and why; None where it need not be asked.
        late: what to say of examples that there was no time for.
    """
    whole = _tried(tuned)
    flips = _by_example({name: _pairs(asked, asked.flips) for name, asked in tuned.items()}, whole)
    drops = _by_example({name: _pairs(asked, asked.drops) for name, asked in tuned.items()}, whole)
    numbers: dict[str, Any] = {
        "n": len(flips),
        "flip_rate": statistics.fmean(flips.values()),
        "drop": statistics.fmean(drops.values()),
        "score": statistics.fmean(clean[i] for i in drops),
        "perturbed_score": statistics.fmean(clean[i] - drop for i, drop in drops.items()),
        "perturbations": {name: _numbers(asked) for name, asked in tuned.items()},
    }
    warns = [p_above(asked.drops, MARGIN) for asked in tuned.values()]
    fails = 0.0
    pairs = {name: _in_pairs(tuned[name], asked) for name, asked in baseline.items()}
    pairs = {name: some for name, some in pairs.items() if len(some) >= FEWEST}
    if pairs:
        both_tried = whole & _tried({name: baseline[name] for name in pairs})
        theirs = _by_example(
            {name: [(one.place, one.their_flip) for one in some] for name, some in pairs.items()}, both_tried
        )
        excess = _by_example(
            {name: [(one.place, one.flip - one.their_flip) for one in some] for name, some in pairs.items()}, both_tried
        )
        ahead = {i: a - b for i, (a, b) in enumerate(zip(clean, baseline_clean, strict=True))}  # as they are
        both = _by_example(
            {
                name: [(one.place, ahead[one.place] - one.drop + one.their_drop) for one in some]
                for name, some in pairs.items()
            },
            both_tried,
        )
        warns.append(p_above(list(excess.values()), MARGIN))
        fails = p_above([-one for one in both.values()], 0.0)
        numbers["baseline"] = {
            "name": baseline_name,
            "n": len(both),
            "flip_rate": statistics.fmean(theirs.values()),
            "flip_excess": statistics.fmean(excess.values()),
            "ahead": statistics.fmean(both.values()),
            "ahead_interval": list(paired_interval(list(both.values()))),
            "perturbations": list(pairs),
        }
    numbers |= {"p_warn": max(warns), "p_fail": fails}
    if why_not:
        numbers["only_some"] = why_not
    if left_out:
        numbers["left_out"] = left_out
    missing = {} if refused is None else {name: refused.get(name, late) for name in tuned if name not in pairs}
    if missing:
        which = "none of these perturbations" if not pairs else f"all but {', '.join(missing)}"
        numbers["not_compared"] = f"{baseline_name} was asked {which}{_because(missing, late)}"
    if len(whole) < len(examples):
        numbers["only_part"] = f"{len(whole)} of {len(examples)} examples were asked under all perturbations"
    was_late = late in (*(left_out or {}).values(), *missing.values()) or "only_part" in numbers
    worst = max(tuned, key=lambda name: (statistics.fmean(tuned[name].drops), statistics.fmean(tuned[name].flips)))
    return Consequence(
        name=NAME,
        status=status_of(fails=fails, warns=max(warns)),
        sentence=_sentence(numbers, worst, words[worst], late if was_late else ""),
        numbers=numbers,
        examples=_examples(tuned[worst], worst, examples, before),
    )


def _because(reasons: dict[str, str], late: str) -> str:
    """Why something was not asked, in brackets; that there was no time is told once, at the end."""
    others = [why for why in dict.fromkeys(reasons.values()) if why != late]
    return f" ({'; '.join(others)})" if others else ""


def _sentence(numbers: dict[str, Any], worst: str, words: str, late: str) -> str:
    one = numbers["perturbations"][worst]
    low, high = one["interval"]
    kinds, before, after = len(numbers["perturbations"]), numbers["score"], numbers["perturbed_score"]
    parts = [
        f"asked in other words ({kinds} perturbation{'' if kinds == 1 else 's'} of {numbers['n']} held-out examples), "
        f"the tuned model changes {numbers['flip_rate']:.1%} of its answers and scores {after:.1%} instead of "
        f"{before:.1%}; worst {words}: {points(-one['drop'])} points (95 % interval "
        f"{points(-high)} to {points(-low)})"
    ]
    if other := numbers.get("baseline"):
        parts.append(
            f"perturbed, it is {points(other['ahead'])} points ahead of {other['name']}"
            + (f" on {other['n']} of them" if other["n"] < numbers["n"] else "")
            + f", which changes {other['flip_rate']:.1%} of its answers"
        )
    if numbers["p_warn"] >= LIKELY:
        parts.append("rows in other wordings, or augmentation: robust, may steady it")
    if "only_some" in numbers:
        parts.append(f"other perturbations could change the right answer: {numbers['only_some']}")
    if left_out := numbers.get("left_out"):
        parts.append(f"left out: {', '.join(left_out)}{_because(left_out, late)}")
    parts += [numbers[name] for name in ("not_compared", "only_part") if name in numbers]
    parts += [late] if late else []
    return "; ".join(parts)


def _examples(asked: Asked, name: str, examples: Sequence[Example], before: Sequence[str]) -> tuple[str, ...]:
    """The worst case: what was asked, and both answers."""
    worst = max(range(len(asked.places)), key=lambda i: (asked.drops[i], asked.flips[i]))
    place, answer = asked.places[worst], asked.answers[worst]
    if answer == before[place]:
        return ()
    return (
        f"{name}: held-out line {examples[place].line} as {short(asked.texts[worst], 100)!r}: "
        f"{short(before[place], 60)!r} became {short(answer, 60)!r}",
    )


def _numbers(asked: Asked) -> dict[str, Any]:
    return {
        "n": len(asked.places),
        "flip_rate": statistics.fmean(asked.flips),
        "drop": statistics.fmean(asked.drops),
        "interval": list(paired_interval(asked.drops)),
    }


def _unmoved(asked: Asked) -> Asked:
    """What a constant answer does."""
    zeros = (0.0,) * len(asked.places)
    return Asked(
        tried=asked.tried,
        places=asked.places,
        flips=zeros,
        drops=zeros,
        answers=("",) * len(asked.places),
        texts=asked.texts,
    )


def _pairs(asked: Asked, values: Sequence[float]) -> list[tuple[int, float]]:
    return list(zip(asked.places, values, strict=True))


class _Pair(NamedTuple):
    """What both models did with one perturbation of the example at a place."""

    place: int
    flip: float
    drop: float
    their_flip: float
    their_drop: float


def _in_pairs(asked: Asked, theirs: Asked) -> list[_Pair]:
    """The examples that both models were asked."""
    other = {place: (flip, drop) for place, flip, drop in zip(theirs.places, theirs.flips, theirs.drops, strict=True)}
    return [
        _Pair(place, flip, drop, *other[place])
        for place, flip, drop in zip(asked.places, asked.flips, asked.drops, strict=True)
        if place in other
    ]


def _tried(asked: dict[str, Asked]) -> set[int]:
    """The examples that all of these perturbations were tried on."""
    return set.intersection(*(set(one.tried) for one in asked.values()))


def _by_example(values: dict[str, list[tuple[int, float]]], places: set[int]) -> dict[int, float]:
    """Means over the perturbations, by the example's place: of these places."""
    found: dict[int, list[float]] = {}
    for pairs in values.values():
        for place, value in pairs:
            if place in places:
                found.setdefault(place, []).append(value)
    return {place: statistics.fmean(found[place]) for place in sorted(found)}
