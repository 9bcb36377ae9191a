"""Calibration: is the model right as often as it is sure? By the probabilities of labels: a classifier's own, or how
likely a chat model finds each label as the answer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from heldout.engine.base import Message, Reply
from heldout.errors import ContextLengthExceeded, InvalidValue
from heldout.pipeline.consequences.base import (
    LIKELY,
    Consequence,
    Subject,
    TunedModel,
    not_measured,
    sample,
    status_of,
)
from heldout.pipeline.evaluate.statistics import p_above
from heldout.pipeline.types import Example

NAME = "calibration"
#: Answers for a calibration error: with fewer its bins make one up.
ENOUGH, BINS = 200, 10
#: Validation answers for a temperature.
FITTED = 100
#: Labels that a chat model reads behind prompts of the holdout; as many again behind those of valid, and behind shots.
#: And behind how many prompts it is worth it.
READINGS, FEWEST = 3_000, 30
#: Calibration error to warn of, and what the lower end of its interval must be above.
WARN, WARN_LOW = 0.10, 0.05
DRAWS = 1_000


class Said(NamedTuple):
    """The probabilities of one answer: of every label, and which was right (None: a label that is not known)."""

    log_probs: tuple[float, ...]
    right: int | None


def measure(subject: Subject) -> Consequence:
    """Brier score and log loss always, the calibration error from ENOUGH answers on. Warns, and never fails: the
    answers are the same."""
    if subject.metric.form != "label":
        return not_measured(NAME, "the answers are no labels, so none of them has one probability to be right with")
    if subject.budget.used_up:
        return not_measured(NAME, subject.budget.sentence)
    if not subject.is_encoder:
        return _of_a_chat_model(subject)
    held = _answers(subject, subject.unseen(range(len(subject.answered))), "label probabilities")
    if all(one.right is None for one in held):
        return not_measured(NAME, "no right answer of a held-out example is a label that was trained on")
    temperature = None
    # One that is fitted on the models of folds would be none of the served model's.
    if len(subject.split.valid) >= FITTED and not subject.folds and not subject.budget.used_up:
        valid = subject.learned(len(subject.split.valid), NAME, "valid")
        temperature = best_temperature(_answers(subject, valid, "label probabilities of valid"))
    return judge(held, temperature)


def _of_a_chat_model(subject: Subject) -> Consequence:
    """Its probabilities of the training file's labels, which add up to 1."""
    labels = sorted({row.target for row in subject.split.train})
    count = READINGS // len(labels)
    rows = subject.unseen(sample(subject.answered, count, subject.seed, NAME))
    if len(rows) < FEWEST:
        return not_measured(
            NAME,
            f"a chat model has to read each of the {len(labels)} labels behind a prompt, at most {READINGS:,} in all, "
            f"and {FEWEST} prompts are needed; there are {len(rows)}",
        )
    held = read_labels(subject, rows, labels)
    if all(one.right is None for one in held):
        return not_measured(NAME, "no right answer of a held-out example is a label that was trained on")
    found = judge(held, None)
    if found.status == "warn" and len(held) == len(rows):
        found = against_the_baseline(subject, found, held, rows, labels)
    found = with_temperature(found, held, _temperature_of_a_chat_model(subject, labels, count))
    if len(held) == len(rows):
        return found
    return replace(found, sentence=f"{found.sentence}; {subject.budget.sentence}: {len(rows)} would have been read")


def _temperature_of_a_chat_model(subject: Subject, labels: Sequence[str], count: int) -> float | None:
    """What its label probabilities on valid ask for; None where too few of them can be read."""
    if subject.folds or min(count, len(subject.split.valid)) < FITTED or subject.budget.used_up:
        return None
    valid = read_labels(subject, subject.learned(count, NAME, "valid"), labels)
    return best_temperature(valid) if len(valid) >= FITTED else None


def against_the_baseline(
    subject: Subject,
    found: Consequence,
    held: Sequence[Said],
    rows: Sequence[tuple[TunedModel, Example]],
    labels: Sequence[str],
) -> Consequence:
    """The light goes out where the best prompt's probabilities are likelier worse than better, by Brier scores in
    pairs: then training has not made them so. Dear, so it is asked only where there is a light, and time."""
    if subject.baseline.kind != "prompt" or subject.base == subject.model or subject.budget.used_up:
        return found
    try:
        theirs = read_labels(subject, rows, labels, baseline=True)
    except (ContextLengthExceeded, InvalidValue):
        return found  # what fits behind the shots is not like the rest
    if len(theirs) < len(held):
        return found
    worse = [(brier([ours]) - brier([other])) / 2 for ours, other in zip(held, theirs, strict=True)]
    p = p_above(worse, 0.0)
    return replace(
        found,
        status="warn" if p >= 0.5 else "ok",
        sentence=f"{found.sentence}; those of {subject.baseline.name} have a Brier score of {brier(theirs):.3f}",
        numbers={**found.numbers, "baseline_brier": brier(theirs), "p_worse_than_baseline": p},
    )


def read_labels(
    subject: Subject, rows: Sequence[tuple[TunedModel, Example]], labels: Sequence[str], *, baseline: bool = False
) -> list[Said]:
    """How likely the tuned chat model, or the baseline, finds each label behind each prompt, as a share of them all.

    FEWEST prompts or a few more at a time, each lot from all over the rows, until the time for probes is used up.
    """
    held: dict[int, Said] = {}  # by the row's place
    lots = max(1, len(rows) // FEWEST)
    for number in range(lots):
        lot = range(number, len(rows), lots)
        if held and subject.budget.used_up:
            break
        conversations: list[tuple[TunedModel, list[Message]]] = [
            (rows[at][0], [*rows[at][1].prompt, {"role": "assistant", "content": label}])
            for at in lot
            for label in labels
        ]
        stage = f"likelihood of labels{', baseline' if baseline else ''}, part {number + 1} of {lots}"
        found = subject.read_each(conversations, stage, baseline=baseline)
        of_rows = (found[start : start + len(labels)] for start in range(0, len(found), len(labels)))
        for at, log_probs in zip(lot, of_rows, strict=True):
            # At 1, only made to add up to 1.
            held[at] = cool(Said(tuple(log_probs), _right(labels, rows[at][1], subject)), 1.0)
    return [held[at] for at in sorted(held)]


def judge(held: Sequence[Said], temperature: float | None) -> Consequence:
    """The light, from the probabilities on the holdout."""
    n = len(held)
    numbers: dict[str, Any] = {"n": n, "brier": brier(held), "log_loss": log_loss(held), "temperature": None}
    sentence = (
        f"on {n} held-out examples the label probabilities have a Brier score of {numbers['brier']:.3f} (0 is best, "
        "2 worst)"
    )
    warns = False
    if n >= ENOUGH:
        error, (low, high) = calibration_error(held), calibration_interval(held)
        numbers |= {"calibration_error": error, "interval": [low, high]}
        warns = error > WARN and low > WARN_LOW
        sentence += (
            f" and are off by {100 * error:.1f} points on average (calibration error, 95 % interval {100 * low:.1f} to "
            f"{100 * high:.1f})"
        )
    else:
        sentence += f"; a calibration error needs {ENOUGH} examples"
    status = status_of(warns=LIKELY if warns else 0.0)
    return with_temperature(
        Consequence(name=NAME, status=status, sentence=sentence, numbers=numbers), held, temperature
    )


def with_temperature(found: Consequence, held: Sequence[Said], temperature: float | None) -> Consequence:
    """The same, and what the losses are with the logarithms divided by this temperature."""
    if temperature is None:
        return found
    cooled = [cool(one, temperature) for one in held]
    numbers = {"temperature": temperature, "cooled_log_loss": log_loss(cooled), "cooled_brier": brier(cooled)}
    return replace(
        found,
        sentence=(
            f"{found.sentence}; with their logarithms divided by {temperature:.2f}, fitted on valid, the log loss is "
            f"{numbers['cooled_log_loss']:.3f} instead of {found.numbers['log_loss']:.3f}"
        ),
        numbers={**found.numbers, **numbers},
    )


def brier(held: Sequence[Said]) -> float:
    """Mean squared distance of the probabilities from certainty of the right label, 0 to 2."""
    return statistics.fmean(
        sum((math.exp(p) - (i == one.right)) ** 2 for i, p in enumerate(one.log_probs)) + (one.right is None)
        for one in held
    )


def log_loss(held: Sequence[Said]) -> float:
    """Mean nats of the right label, of those that the classifier knows."""
    return statistics.fmean(-one.log_probs[one.right] for one in held if one.right is not None)


def calibration_error(held: Sequence[Said]) -> float:
    """How far confidence is from the share that is right, on average over BINS bins of equally many answers."""
    answers = sorted(
        ((math.exp(max(one.log_probs)), one.log_probs.index(max(one.log_probs)) == one.right) for one in held),
        key=lambda one: one[0],  # wrong ones first among the equally sure would fill bins of their own
    )
    n = len(answers)
    bins = [answers[i * n // BINS : (i + 1) * n // BINS] for i in range(BINS)]
    return (
        sum(abs(sum(confidence for confidence, _ in one) - sum(right for _, right in one)) for one in bins if one) / n
    )


def calibration_interval(held: Sequence[Said]) -> tuple[float, float]:
    """95 % bootstrap interval (seeded). Bins of so few answers are off by chance alone: what they would be off by if
    every answer were as sure as it is right is taken away, in the mean."""
    import numpy as np

    confidence = np.asarray([math.exp(max(one.log_probs)) for one in held])
    right = np.asarray([one.log_probs.index(max(one.log_probs)) == one.right for one in held], dtype=float)
    rng = np.random.default_rng(0)
    n = len(held)

    def error(places: Any, outcome: Any) -> float:
        order = places[np.argsort(confidence[places], kind="stable")]
        gaps = confidence[order] - outcome[order]
        return float(sum(abs(part.sum()) for part in np.array_split(gaps, BINS)) / n)

    everyone = np.arange(n)
    chance = np.mean([error(everyone, (rng.random(n) < confidence).astype(float)) for _ in range(DRAWS // 5)])
    draws = [error(rng.integers(0, n, n), right) for _ in range(DRAWS)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return max(0.0, float(low - chance)), max(0.0, float(high))


def best_temperature(held: Sequence[Said]) -> float | None:
    """What the logarithms have to be divided by for the least log loss; None when no right label is known."""
    known = [one for one in held if one.right is not None]
    if not known:
        return None
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log: log_loss([cool(one, math.exp(log)) for one in known]), bounds=(-3.0, 3.0), method="bounded"
    )
    return math.exp(float(found.x))


def cool(one: Said, temperature: float) -> Said:
    """The probabilities at another temperature."""
    scaled = [p / temperature for p in one.log_probs]
    highest = max(scaled)
    total = highest + math.log(sum(math.exp(p - highest) for p in scaled))
    return Said(tuple(p - total for p in scaled), one.right)


def _answers(subject: Subject, rows: Sequence[tuple[TunedModel, Example]], stage: str) -> list[Said]:
    replies = subject.ask_each([(one, row.prompt) for one, row in rows], stage)
    return [_of(reply, row, subject) for reply, (_, row) in zip(replies, rows, strict=True)]


def _of(reply: Reply, row: Example, subject: Subject) -> Said:
    [choice] = reply.tokens  # a classifier's whole answer is one
    return Said(tuple(log_prob for _, log_prob in choice.top), _right([text for text, _ in choice.top], row, subject))


def _right(labels: Sequence[str], row: Example, subject: Subject) -> int | None:
    return next((i for i, label in enumerate(labels) if subject.metric.score(label, row.target) == 1.0), None)
