"""Format: do the answers still have the form of those that were trained on? No model is asked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence

from heldout.engine.labels import read_label
from heldout.pipeline.consequences.base import Consequence, Subject, not_measured, short, status_of
from heldout.pipeline.evaluate.statistics import p_above, wilson

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

    A label must be one that was trained on; a JSON record must parse, and have a set of keys that one in a hundred
    training answers has (or, of few, any).
    """
    if form == "label":
        known = {read_label(target) or target for target in targets}
        return lambda answer: (read_label(answer) or answer) in known
    if form == "json":
        counts = Counter(_keys(target) for target in targets)
        usual = {keys for keys, count in counts.items() if keys is not None and count >= len(targets) / 100}
        return lambda answer: _keys(answer) in usual
    return None


def _keys(text: str) -> frozenset[str] | None:
    """The keys of the JSON object that a text is, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return frozenset(value) if isinstance(value, dict) else None
