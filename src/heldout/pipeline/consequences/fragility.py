"""Fragility: do the answers stay, when the same thing is said a little differently?"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

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
#: A part of the examples is asked after the other: when time is used up, all perturbations of some examples tell more
#: than some perturbations of all.
LOTS = 3
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

    def __add__(self, more: Asked) -> Asked:
        return Asked(
            places=self.places + more.places,
            flips=self.flips + more.flips,
            drops=self.drops + more.drops,
            answers=self.answers + more.answers,
            texts=self.texts + more.texts,
        )


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

    asking = Asking(subject, perturbations, examples)
    answers = Answers(subject.model, (), before, "the tuned model")
    baseline = _baseline(subject, places)
    clean = [subject.tuned.scores.per_example[place] for place in places]
    baseline_clean = [subject.baseline.scores.per_example[place] for place in places]
    waiting: list[int] = []
    for lot in _lots(len(examples), subject.seed):
        asking.ask(answers, lot)
        waiting += lot
        if baseline and answers.found and may_matter(answers.found, clean, baseline_clean):
            asking.ask(baseline, waiting)
            waiting = []
    tuned = {name: asked for name, asked in answers.found.items() if len(asked.places) >= FEWEST}
    if not tuned:
        few = f"no perturbation changes {FEWEST} of the {len(examples)} holdout examples that were to be asked"
        return not_measured(NAME, "; ".join([few, *answers.left_out.values()]), left_out=answers.left_out)
    if baseline:
        theirs = {name: asked for name, asked in baseline.found.items() if name in tuned}
    else:  # a constant answer
        theirs = {name: _unmoved(asked) for name, asked in tuned.items()}
    missing = [] if baseline is None else [name for name in baseline.left_out if name in tuned]
    not_compared = None
    if baseline and missing:
        which = "asked none of them" if len(missing) == len(tuned) else f"not asked {', '.join(missing)}"
        not_compared = f"{baseline.who} was {which} ({baseline.left_out[missing[0]]})"
    words = {one.name: one.words for one in perturbations}
    return judge(
        tuned,
        theirs,
        clean,
        baseline_clean,
        examples,
        before,
        words=words,
        baseline_name=subject.baseline.name,
        why_not=why_not,
        left_out={name: why for name, why in answers.left_out.items() if name not in tuned},
        not_compared=not_compared,
    )


@dataclass
class Answers:
    """What one model answers to the perturbations, as far as it was asked."""

    model: ModelRef
    shots: Sequence[Example]
    before: Sequence[str]  # what it answered to the examples as they are
    who: str
    found: dict[str, Asked] = field(default_factory=dict)  # by the perturbation's name
    left_out: dict[str, str] = field(default_factory=dict)  # perturbations that were not asked at all, and why


@dataclass(frozen=True)
class Asking:
    """The perturbations of some examples, to be asked of several models."""

    subject: Subject
    perturbations: Sequence[Perturbation]
    examples: Sequence[Example]

    def ask(self, answers: Answers, lot: Sequence[int]) -> None:
        """Ask a model some more of the examples, by their places, under one perturbation after the other."""
        refused = set(answers.left_out) - set(answers.found)
        for one in self.perturbations:
            if one.name in refused:
                continue
            if self.subject.budget.used_up:
                if one.name not in answers.found:
                    answers.left_out[one.name] = self.subject.budget.sentence
                continue
            try:
                more = self._ask(answers, one, lot)
            except (ContextLengthExceeded, InvalidValue) as error:
                # Or a chat template takes no conversation without a system prompt. Those that fit are not all alike.
                answers.found.pop(one.name, None)
                answers.left_out[one.name] = str(error)
                continue
            answers.found[one.name] = answers.found[one.name] + more if one.name in answers.found else more

    def _ask(self, answers: Answers, one: Perturbation, lot: Sequence[int]) -> Asked:
        changed = {i: perturbed(self.examples[i], one, self.subject.seed) for i in lot}
        places = [i for i in lot if changed[i].messages != self.examples[i].messages]
        prompts = [changed[i].prompt for i in places]
        stage = f"{answers.who}, {one.name}"
        replies = self.subject.ask(answers.model, prompts, stage, answers.shots) if prompts else []
        texts = [reply.text for reply in replies]
        metric, asked = self.subject.metric, [self.examples[i] for i in places]
        before = [answers.before[i] for i in places]
        return Asked(
            places=tuple(places),
            flips=tuple(1 - metric.score(text, old) for text, old in zip(texts, before, strict=True)),
            drops=tuple(
                old - new
                for old, new in zip(metric.score_all(asked, before), metric.score_all(asked, texts), strict=True)
            ),
            answers=tuple(texts),
            texts=tuple(str(changed[i].prompt[-1]["content"]) for i in places),
        )


def _lots(examples: int, seed: int) -> list[list[int]]:
    """Places in LOTS parts, at random: files may have an order, and a period."""
    order = random.Random(f"{seed}/{NAME}/lots").sample(range(examples), examples)
    return [sorted(order[number::LOTS]) for number in range(LOTS)]


def _baseline(subject: Subject, places: Sequence[int]) -> Answers | None:
    """Whom the tuned model is compared with; None where that is a constant answer."""
    one = subject.baseline
    if one.kind == "constant":
        return None
    return Answers(subject.base, one.shots, [one.scores.answers[place] for place in places], one.name)


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
    not_compared: str | None = None,
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
    compared = [name for name in tuned if name in baseline and _in_pairs(tuned[name], baseline[name])]
    if compared:
        pairs = {name: _in_pairs(tuned[name], baseline[name]) for name in compared}
        theirs = _by_example({name: [(one.place, one.their_flip) for one in some] for name, some in pairs.items()})
        excess = _by_example(
            {name: [(one.place, one.flip - one.their_flip) for one in some] for name, some in pairs.items()}
        )
        ahead = {i: a - b for i, (a, b) in enumerate(zip(clean, baseline_clean, strict=True))}  # as they are
        both = _by_example(
            {
                name: [(one.place, ahead[one.place] - one.drop + one.their_drop) for one in some]
                for name, some in pairs.items()
            }
        )
        warns.append(p_above(list(excess.values()), MARGIN))
        fails = p_above([-one for one in both.values()], 0.0)
        numbers["baseline"] = {
            "name": baseline_name,
            "flip_rate": statistics.fmean(theirs.values()),
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
    if not_compared:
        numbers["not_compared"] = not_compared
    worst = max(tuned, key=lambda name: (statistics.fmean(tuned[name].drops), statistics.fmean(tuned[name].flips)))
    return Consequence(
        name=NAME,
        status=status_of(fails=fails, warns=max(warns)),
        sentence=_sentence(numbers, worst, words[worst], why_not, not_compared),
        numbers=numbers,
        examples=_examples(tuned[worst], worst, examples, before),
    )


def _sentence(numbers: dict[str, Any], worst: str, words: str, why_not: str | None, not_compared: str | None) -> str:
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
    if left_out := numbers.get("left_out"):
        parts.append(f"left out: {', '.join(left_out)} ({next(iter(left_out.values()))})")
    if not_compared:
        parts.append(not_compared)
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


def _by_example(values: dict[str, list[tuple[int, float]]]) -> dict[int, float]:
    """Means over the perturbations, by the example's place."""
    found: dict[int, list[float]] = {}
    for pairs in values.values():
        for place, value in pairs:
            found.setdefault(place, []).append(value)
    return {place: statistics.fmean(found[place]) for place in sorted(found)}
