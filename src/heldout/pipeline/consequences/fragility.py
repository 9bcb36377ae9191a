"""Fragility: do the answers stay, when the same thing is said a little differently?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from heldout.engine.base import ModelRef
from heldout.errors import ContextLengthExceeded, InvalidValue
from heldout.pipeline.consequences.base import (
    LIKELY,
    NONE_UNSEEN,
    Consequence,
    Subject,
    not_measured,
    points,
    sample,
    short,
    status_of,
)
from heldout.pipeline.consequences.perturbations import Perturbation, allowed, perturbed
from heldout.pipeline.evaluate.statistics import p_above, paired_interval
from heldout.pipeline.types import Example

NAME = "fragility"
#: Holdout examples that are asked again, and of those with free text, whose answers are long.
ITEMS, TEXT_ITEMS = 100, 30
#: Fewer examples that a perturbation changes say nothing about it.
FEWEST = 10
#: Excess of changed answers, and drop of the score, to warn from.
MARGIN = 0.05


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What one model answered to one perturbation of the examples. `places` are those that it changed."""

    places: tuple[int, ...]  # in the list of sampled examples
    flips: tuple[float, ...]  # how far the answer is from the one before, 0 to 1; of `places`
    drops: tuple[float, ...]  # score before minus score after; of `places`
    answers: tuple[str, ...]
    texts: tuple[str, ...]  # what the user wrote last, as it was asked


def measure(subject: Subject) -> Consequence:
    """Ask again, perturbed, what was answered on the holdout.

    Warns when answers flip by more than MARGIN more than the baseline's, or when a perturbation costs more than
    MARGIN. Fails when the tuned model, perturbed, is worse than the perturbed baseline.
    """
    if subject.crossfit:
        return not_measured(NAME, NONE_UNSEEN)
    if subject.budget.used_up:
        return not_measured(NAME, subject.budget.sentence)
    # The dearest of all: what comes after it must have its turn.
    subject = replace(subject, budget=subject.budget.half())
    perturbations, why_not = allowed(subject.split.train, is_encoder=subject.is_encoder)
    if not perturbations:
        return not_measured(NAME, why_not or "there is nothing to perturb")
    places = sample(subject.answered, TEXT_ITEMS if subject.metric.form == "text" else ITEMS, subject.seed, NAME)
    examples = [subject.answered[place] for place in places]
    before = [subject.tuned.scores.answers[place] for place in places]

    tuned, left_out = ask_all(subject, subject.model, (), examples, before, perturbations, "the tuned model")
    tuned = {name: asked for name, asked in tuned.items() if len(asked.places) >= FEWEST}
    if not tuned:
        few = f"no perturbation changes {FEWEST} of the {len(examples)} holdout examples that were to be asked"
        return not_measured(NAME, "; ".join([few, *left_out.values()]), left_out=left_out)

    clean = [subject.tuned.scores.per_example[place] for place in places]
    baseline_clean = [subject.baseline.scores.per_example[place] for place in places]
    baseline: dict[str, Asked] = {}
    if subject.baseline.kind == "constant":
        baseline = {name: _unmoved(asked) for name, asked in tuned.items()}
    elif may_matter(tuned, clean, baseline_clean):
        said = [subject.baseline.scores.answers[place] for place in places]
        shots = subject.baseline.shots
        again = tuple(one for one in perturbations if one.name in tuned)
        baseline, more = ask_all(subject, subject.base, shots, examples, said, again, subject.baseline.name)
        left_out |= {f"{name} ({subject.baseline.name})": why for name, why in more.items()}
    words = {one.name: one.words for one in perturbations}
    return judge(
        tuned,
        baseline,
        clean,
        baseline_clean,
        examples,
        before,
        words=words,
        baseline_name=subject.baseline.name,
        why_not=why_not,
        left_out=left_out,
    )


def ask_all(
    subject: Subject,
    model: ModelRef,
    shots: Sequence[Example],
    examples: Sequence[Example],
    before: Sequence[str],
    perturbations: Sequence[Perturbation],
    who: str,
) -> tuple[dict[str, Asked], dict[str, str]]:
    """What a model answers to every perturbation, by name; and the perturbations that were left out, with the reason.
    `before` is what it answered to the examples as they are."""
    found: dict[str, Asked] = {}
    left_out: dict[str, str] = {}
    for one in perturbations:
        if subject.budget.used_up:
            left_out[one.name] = subject.budget.sentence
            continue
        changed = [perturbed(example, one, subject.seed) for example in examples]
        places = [i for i, example in enumerate(examples) if changed[i].messages != example.messages]
        try:
            prompts = [changed[i].prompt for i in places]
            replies = subject.ask(model, prompts, f"{who}, {one.name}", shots) if prompts else []
        except (ContextLengthExceeded, InvalidValue) as error:
            left_out[one.name] = str(error)  # or a chat template takes no conversation without a system prompt
            continue
        score = subject.metric.score
        answers = tuple(reply.text for reply in replies)
        found[one.name] = Asked(
            places=tuple(places),
            flips=tuple(1 - score(answer, before[i]) for i, answer in zip(places, answers, strict=True)),
            drops=tuple(
                old - new
                for old, new in zip(
                    subject.metric.score_all([examples[i] for i in places], [before[i] for i in places]),
                    subject.metric.score_all([examples[i] for i in places], answers),
                    strict=True,
                )
            ),
            answers=answers,
            texts=tuple(str(changed[i].prompt[-1]["content"]) for i in places),
        )
    return found, left_out


def may_matter(tuned: dict[str, Asked], clean: Sequence[float], baseline_clean: Sequence[float]) -> bool:
    """Whether the baseline's answers could change the light. They are the dearest: shots make long prompts.

    A perturbed baseline is hardly better than the same baseline as it is.
    """
    flips = list(_by_example({name: _pairs(asked, asked.flips) for name, asked in tuned.items()}).values())
    drops = _by_example({name: _pairs(asked, asked.drops) for name, asked in tuned.items()})
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
) -> Consequence:
    """The light, from the answers. An example's flips and drops are means over the perturbations that change it, so
    that every example is one piece of evidence."""
    flips = _by_example({name: _pairs(asked, asked.flips) for name, asked in tuned.items()})
    drops = _by_example({name: _pairs(asked, asked.drops) for name, asked in tuned.items()})
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
    compared = [name for name in tuned if name in baseline]
    if compared:
        theirs = {name: _pairs(baseline[name], baseline[name].flips) for name in compared}
        excess = _by_example(
            {
                name: [(i, a - b) for (i, a), (_, b) in zip(_pairs(tuned[name], tuned[name].flips), own, strict=True)]
                for name, own in theirs.items()
            }
        )
        both = _by_example(
            {
                name: [
                    (i, (clean[i] - ours) - (baseline_clean[i] - other))
                    for i, ours, other in zip(tuned[name].places, tuned[name].drops, baseline[name].drops, strict=True)
                ]
                for name in compared
            }
        )
        warns.append(p_above(list(excess.values()), MARGIN))
        fails = p_above([-one for one in both.values()], 0.0)
        numbers["baseline"] = {
            "name": baseline_name,
            "flip_rate": statistics.fmean(_by_example(theirs).values()),
            "flip_excess": statistics.fmean(excess.values()),
            "ahead": statistics.fmean(both.values()),
            "ahead_interval": list(paired_interval(list(both.values()))),
            "perturbations": compared,
        }
    numbers |= {"p_warn": max(warns), "p_fail": fails}
    if why_not:
        numbers["only_some"] = why_not
    if left_out:
        numbers["left_out"] = left_out
    worst = max(tuned, key=lambda name: (statistics.fmean(tuned[name].drops), statistics.fmean(tuned[name].flips)))
    return Consequence(
        name=NAME,
        status=status_of(fails=fails, warns=max(warns)),
        sentence=_sentence(numbers, worst, words[worst], why_not, left_out or {}),
        numbers=numbers,
        examples=_examples(tuned[worst], worst, examples, before),
    )


def _sentence(numbers: dict[str, Any], worst: str, words: str, why_not: str | None, left_out: dict[str, str]) -> str:
    one = numbers["perturbations"][worst]
    low, high = one["interval"]
    parts = [
        f"asked in other words ({len(numbers['perturbations'])} perturbations of {numbers['n']} holdout examples), the "
        f"tuned model changes {numbers['flip_rate']:.1%} of its answers and scores {numbers['perturbed_score']:.1%} "
        f"instead of {numbers['score']:.1%}; worst {words}: {points(-one['drop'])} points (95 % interval "
        f"{points(-high)} to {points(-low)})"
    ]
    if other := numbers.get("baseline"):
        parts.append(
            f"perturbed, it is {points(other['ahead'])} points ahead of {other['name']}, which changes "
            f"{other['flip_rate']:.1%} of its answers"
        )
    if numbers["p_warn"] >= LIKELY:
        parts.append("rows in other wordings, or augmentation: robust, may steady it")
    if why_not:
        parts.append(f"other perturbations could change the right answer: {why_not}")
    if left_out:
        parts.append(f"left out: {', '.join(left_out)} ({next(iter(left_out.values()))})")
    return "; ".join(parts)


def _examples(asked: Asked, name: str, examples: Sequence[Example], before: Sequence[str]) -> tuple[str, ...]:
    """The worst case: what was asked, and both answers."""
    worst = max(range(len(asked.places)), key=lambda i: (asked.drops[i], asked.flips[i]))
    place, answer = asked.places[worst], asked.answers[worst]
    if answer == before[place]:
        return ()
    return (
        f"{name}: holdout line {examples[place].line} as {short(asked.texts[worst], 100)!r}: "
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
    return Asked(places=asked.places, flips=zeros, drops=zeros, answers=("",) * len(asked.places), texts=asked.texts)


def _pairs(asked: Asked, values: Sequence[float]) -> list[tuple[int, float]]:
    return list(zip(asked.places, values, strict=True))


def _by_example(values: dict[str, list[tuple[int, float]]]) -> dict[int, float]:
    """Means over the perturbations, by the example's place."""
    found: dict[int, list[float]] = {}
    for pairs in values.values():
        for place, value in pairs:
            found.setdefault(place, []).append(value)
    return {place: statistics.fmean(found[place]) for place in sorted(found)}
