"""Generalisation: how much better are answers to what was trained on, and to what the checkpoint was chosen by?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from heldout.errors import ContextLengthExceeded, InvalidValue
from heldout.pipeline.consequences.base import (
    LIKELY,
    Consequence,
    Subject,
    TunedModel,
    not_measured,
    points,
    sample,
    status_of,
)
from heldout.pipeline.evaluate.statistics import mean_interval
from heldout.pipeline.types import Example

NAME = "generalisation"
#: Examples of each part that are asked, and of those with free text.
ITEMS, TEXT_ITEMS, FEWEST = 60, 24, 20
#: Training examples that the baseline is asked, whose shots make each as dear as several of the others.
BASELINE_ITEMS = 30
#: How far train may be ahead of the holdout, and valid.
GAP, OPTIMISM = 0.10, 0.05
DRAWS = 10_000


def measure(subject: Subject) -> Consequence:
    """Scores of the tuned model on train, valid and holdout, on samples of one size.

    Warns, and never fails: a gap does no harm of its own. What the user gets is the holdout's score, which the outcome
    is about; the gap says how much of the training score to believe.
    """
    if subject.budget.used_up:
        return not_measured(NAME, subject.budget.sentence)
    train = subject.learned(min(TEXT_ITEMS if subject.metric.form == "text" else ITEMS, len(subject.answered)), NAME)
    count = len(train)
    if count < FEWEST:
        return not_measured(NAME, f"{FEWEST} training and held-out examples are needed to see a gap")
    places = sample(subject.answered, count, subject.seed, NAME)
    held = [subject.tuned.scores.per_example[i] for i in places]
    parts: dict[str, Sequence[float]] = {"train": _score(subject, train, "train")}
    # Other parts are of one size; a small valid is asked as it is.
    valid = subject.learned(count, NAME, "valid")
    if len(valid) >= FEWEST and not subject.budget.used_up:
        parts["valid"] = _score(subject, valid, "valid")
    parts["holdout"] = held
    beyond = None
    is_itself = subject.baseline.kind == "prompt" and subject.base == subject.model  # weights without a base
    if Difference(parts["train"], held).p_above(GAP) >= LIKELY and not is_itself and not subject.budget.used_up:
        # Dear, so it is asked only where it can put the light out.
        beyond = beyond_the_baseline(subject, train, parts["train"], places)
    return judge(parts, binary=subject.metric.binary, beyond=beyond, baseline=subject.baseline.name)


def beyond_the_baseline(
    subject: Subject, train: Sequence[tuple[TunedModel, Example]], scores: Sequence[float], places: Sequence[int]
) -> Difference | None:
    """How much further train is ahead of the holdout with the tuned model than with the baseline, which has not learned
    these rows: what both have in common lies in the rows. None where its prompt shows nearly all of them, or they
    do not fit behind it."""
    kept = [i for i, (one, row) in enumerate(train) if all(row.line != shot.line for shot in one.shots)]
    kept = [kept[at] for at in sample(kept, BASELINE_ITEMS, subject.seed, NAME)]
    if len(kept) < FEWEST:
        return None
    rows = [train[i] for i in kept]
    if subject.baseline.kind == "constant":
        answers = [subject.baseline.scores.answers[one.places.start] for one, _ in rows]
    else:
        prompts = [(one, row.prompt) for one, row in rows]
        try:
            replies = subject.ask_each(prompts, f"train, {subject.baseline.name}", baseline=True)
        except (ContextLengthExceeded, InvalidValue):
            return None  # the longest training rows do not fit behind the shots: the gap stands as it is
        answers = [reply.text for reply in replies]
    theirs = subject.metric.score_all([row for _, row in rows], answers)
    held = [subject.tuned.scores.per_example[i] - subject.baseline.scores.per_example[i] for i in places]
    return Difference([scores[i] - other for i, other in zip(kept, theirs, strict=True)], held, least=-1.0)


def judge(
    parts: dict[str, Sequence[float]], *, binary: bool, beyond: Difference | None = None, baseline: str = ""
) -> Consequence:
    """The light, from the scores of each part.

    Args:
        beyond: the gap less that of `baseline`, where it was asked. Where it is likelier below the margin than above,
            the gap lies in the rows, and is not warned of.
    """
    means = {part: statistics.fmean(scores) for part, scores in parts.items()}
    gap = Difference(parts["train"], parts["holdout"])
    numbers: dict[str, Any] = {
        "scores": means,
        "n": {part: len(scores) for part, scores in parts.items()},
        "intervals": {part: list(mean_interval(scores, binary=binary)) for part, scores in parts.items()},
        "gap": gap.mean,
        "gap_interval": list(gap.interval),
        "p_gap": gap.p_above(GAP),
    }
    if beyond:
        numbers |= {"beyond": beyond.mean, "beyond_interval": list(beyond.interval), "p_beyond": beyond.p_above(GAP)}
    warns = [numbers["p_gap"] if numbers.get("p_beyond", 1.0) >= 0.5 else 0.0]
    sentence = (
        f"the tuned model scores {means['train']:.1%} on {len(parts['train'])} training examples and "
        f"{means['holdout']:.1%} on {len(parts['holdout'])} held-out ones: a gap of {points(gap.mean)} points (95 % "
        f"interval {points(gap.interval[0])} to {points(gap.interval[1])})"
    )
    if beyond:
        low, high = beyond.interval
        sentence += f", {points(beyond.mean)} beyond that of {baseline} ({points(low)} to {points(high)})"
    if "valid" in parts:
        optimism = Difference(parts["valid"], parts["holdout"])
        numbers |= {
            "optimism": optimism.mean,
            "optimism_interval": list(optimism.interval),
            "p_optimism": optimism.p_above(OPTIMISM),
        }
        warns.append(numbers["p_optimism"])
        sentence += (
            f"; on valid, which chose the checkpoint, {means['valid']:.1%}: {points(optimism.mean)} points of optimism "
            f"({points(optimism.interval[0])} to {points(optimism.interval[1])})"
        )
    return Consequence(name=NAME, status=status_of(warns=max(warns)), sentence=sentence, numbers=numbers)


class Difference:
    """The mean of one list minus that of another, by a Bayesian bootstrap of both (the examples are not the same)."""

    def __init__(self, one: Sequence[float], other: Sequence[float], *, least: float = 0.0) -> None:
        """Values are from `least` to 1."""
        import numpy as np

        rng = np.random.default_rng(0)

        def draws(scores: Sequence[float]) -> Any:
            # Half an imagined example at either end, as everywhere: equal scores are not certainty.
            padded = np.asarray([*scores, least, 1.0])
            weights = rng.standard_exponential((DRAWS, len(padded)))
            weights[:, -2:] *= 0.5
            return weights @ padded / weights.sum(axis=1)

        self._draws = draws(one) - draws(other)
        self.mean = statistics.fmean(one) - statistics.fmean(other)
        low, high = np.quantile(self._draws, [0.025, 0.975])
        self.interval = (float(low), float(high))

    def p_above(self, margin: float) -> float:
        """Posterior probability that it is more than the margin."""
        return float((self._draws > margin).mean())


def _score(subject: Subject, rows: Sequence[tuple[TunedModel, Example]], part: str) -> list[float]:
    replies = subject.ask_each([(one, example.prompt) for one, example in rows], f"{part} again")
    return list(subject.metric.score_all([example for _, example in rows], [reply.text for reply in replies]))
