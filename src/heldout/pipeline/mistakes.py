"""The tuned model's most instructive wrong answers, beside what was expected and what the best baseline said."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heldout.engine.labels import user_text
from heldout.pipeline.ladder import Rung
from heldout.pipeline.types import Example

MOST = 10


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A wrong answer. `alike` counts the wrong answers of its kind, itself included: the same answer in the same
    place."""

    line: int
    asked: str
    expected: str
    tuned: str
    baseline: str
    score: float  # of the tuned model's answer
    baseline_score: float
    alike: int

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the report."""
        return {
            "line": self.line,
            "asked": self.asked,
            "expected": self.expected,
            "tuned": self.tuned,
            "baseline": self.baseline,
            "score": self.score,
            "baseline_score": self.baseline_score,
            "alike": self.alike,
        }


def instructive_mistakes(
    answered: Sequence[Example], tuned: Rung, baseline: Rung, most: int = MOST
) -> tuple[Mistake, ...]:
    """At most so many wrong answers, one of a kind: first those that training made worse than the baseline's, then
    the commonest."""
    scores, before = tuned.scores, baseline.scores
    kinds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, example in enumerate(answered):
        if scores.per_example[i] < 1:
            kinds[example.target, scores.answers[i]].append(i)

    def loss(i: int) -> float:
        return before.per_example[i] - scores.per_example[i]

    # The one of a kind where the baseline did best: what was given up is what can be learned from.
    chosen = [(max(alike, key=lambda i: (loss(i), -i)), len(alike)) for alike in kinds.values()]
    chosen.sort(key=lambda one: (-max(0.0, loss(one[0])), -one[1], scores.per_example[one[0]], one[0]))
    return tuple(
        Mistake(
            line=answered[i].line,
            asked=user_text(answered[i].prompt),
            expected=answered[i].target,
            tuned=scores.answers[i],
            baseline=before.answers[i],
            score=scores.per_example[i],
            baseline_score=before.per_example[i],
            alike=alike,
        )
        for i, alike in chosen[:most]
    )
