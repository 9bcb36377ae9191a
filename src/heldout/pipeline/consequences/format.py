"""Format: do the answers still have the form of those that were trained on? No model is asked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from heldout.engine.labels import read_label
from heldout.pipeline.consequences.base import Consequence, Subject, not_measured, short, status_of
from heldout.pipeline.evaluate.statistics import p_above, wilson

Found = TypeVar("Found")

NAME = "format"
#: Share of answers out of form beyond the baseline's, to warn or fail from.
MARGIN = 0.05
#: Answers out of form that are shown.
SHOWN = 3


def measure(subject: Subject) -> Consequence:
    """Answers of the tuned model that do not fit the form of the training answers, against the best baseline's."""
    fits = form_of([example.target for example in subject.split.train], subject.metric.form)
    if fits is None:
        return not_measured(NAME, "the answers are free text, which has no form to keep")
    tuned, baseline = subject.tuned.scores.answers, subject.baseline.scores.answers
    misfit = [not fits(answer) for answer in tuned]
    excess = [float(one) - float(not fits(answer)) for one, answer in zip(misfit, baseline, strict=True)]
    p = p_above(excess, MARGIN)
    n, bad = len(misfit), sum(misfit)
    low, high = wilson(n - bad, n)
    theirs = 1 - sum(map(fits, baseline)) / n
    out = Counter(answer for answer, wrong in zip(tuned, misfit, strict=True) if wrong)
    return Consequence(
        name=NAME,
        status=status_of(fails=p, warns=p),
        sentence=(
            f"{n - bad} of {n} answers have the form of the training answers ({subject.metric.form}): "
            f"{1 - bad / n:.1%}, 95 % interval {low:.1%} to {high:.1%}; of the best baseline's answers "
            f"({subject.baseline.name}) {1 - theirs:.1%} have it"
        ),
        numbers={
            "n": n,
            "fit": 1 - bad / n,
            "interval": [low, high],
            "baseline": 1 - theirs,
            "excess": bad / n - theirs,
            "p_excess": p,
        },
        examples=tuple(f"{short(answer, 80)!r} ({count} times)" for answer, count in out.most_common(SHOWN)),
    )


def form_of(targets: Sequence[str], form: str) -> Callable[[str], bool] | None:
    """Whether an answer fits the form of the training answers; None for free text.

    A label must be one that was trained on. A JSON record must parse, and have a set of keys that one in a hundred
    training answers has (or, of few, any); and where training answers have a value, at any depth, its kind must be one
    that one in a hundred of them has.
    """
    if form == "label":
        known = {read_label(target) or target for target in targets}
        return lambda answer: (read_label(answer) or answer) in known
    if form == "json":
        return _Records([record for target in targets if (record := _record(target)) is not None]).fits
    return None


#: Where a value stands: the keys on the way to it, and None for any element of a list.
Place = tuple[str | None, ...]


class _Records:
    """What training answers that are records have in common."""

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self.keys = _usual(Counter(frozenset(record) for record in records))
        kinds: dict[Place, Counter[str]] = {}
        for record in records:
            for place, kind in _kinds(record):
                kinds.setdefault(place, Counter())[kind] += 1
        self.kinds = {place: _usual(seen) for place, seen in kinds.items()}

    def fits(self, answer: str) -> bool:
        """Whether an answer is a record of their keys and kinds of values. What no training answer has, below a key
        that all have, may be anything: keys can be data."""
        record = _record(answer)
        return (
            record is not None
            and frozenset(record) in self.keys
            and all(kind in self.kinds[place] for place, kind in _kinds(record) if place in self.kinds)
        )


def _usual(seen: Counter[Found]) -> set[Found]:
    return {one for one, count in seen.items() if count >= seen.total() / 100}


def _kinds(record: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    """The kind of every value in a record, at any depth."""
    waiting: list[tuple[Place, Any]] = [((), record)]
    while waiting:
        place, value = waiting.pop()
        for key, one in value.items() if isinstance(value, dict) else ((None, one) for one in value):
            inside = (*place, key)
            # True is an int to Python, and a file may write 1.0 or 1.
            yield inside, "number" if type(one) in (int, float) else type(one).__name__
            if isinstance(one, dict | list):
                waiting.append((inside, one))


def _record(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
