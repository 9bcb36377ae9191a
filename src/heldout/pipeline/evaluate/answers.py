"""What the answers of a data set are (labels, JSON records, numbers, SQL, free text), and which metric fits them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from heldout.errors import InvalidValue
from heldout.pipeline.evaluate.metrics.exact import (
    canonical,
    exact_match,
    is_sql,
    json_value,
    label_accuracy,
    number,
    same_number,
    same_sql,
)
from heldout.pipeline.evaluate.metrics.overlap import chrf, rouge_l, token_f1
from heldout.pipeline.evaluate.metrics.records import field_f1

if TYPE_CHECKING:
    from heldout.pipeline.types import Example

#: An answer longer than this is not a label, however often it occurs.
LABEL_CHARACTERS = 120


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How an answer is compared with the one in the data: 1 is right, 0 is wrong.

    `binary` says that there is nothing in between. A grader looks at more than the two texts: it has `grade`, which
    scores all answers to rows at once; `score` is for two answers then.
    """

    name: str
    form: str  # of the answers in the data: label | json | number | sql | text
    binary: bool
    score: Callable[[str, str], float]
    grade: Callable[[Sequence[Example], Sequence[str]], list[float]] | None = None

    @property
    def is_told_by_tokens(self) -> bool:
        """Whether an answer scores 1 where each of its tokens is the likeliest one, and 0 elsewhere: of labels that are
        compared exactly, which training knows without an answer being written."""
        return self.form == "label" and self.score is exact_match and not self.grade

    def score_all(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[float, ...]:
        """A score for the answer that was given to each example."""
        if self.grade:
            return tuple(self.grade(examples, answers))
        return tuple(self.score(answer, example.target) for example, answer in zip(examples, answers, strict=True))


class Scorer(NamedTuple):
    """A way to compare two texts, as reports call it."""

    name: str
    binary: bool
    score: Callable[[str, str], float]


#: What a user may ask for by name (docs/metrics.md).
SCORERS: dict[str, Scorer] = {
    "exact_match": Scorer("exact match", True, exact_match),
    "label_accuracy": Scorer("label accuracy", True, label_accuracy),
    "number": Scorer("same number", True, same_number),
    "sql": Scorer("same SQL", True, same_sql),
    "field_f1": Scorer("field F1", False, field_f1),
    "token_f1": Scorer("token F1", False, token_f1),
    "rouge_l": Scorer("ROUGE-L", False, rouge_l),
    "chrf": Scorer("chrF", False, chrf),
}

#: What is taken when nobody asks.
USUAL = {"label": "exact_match", "json": "field_f1", "number": "number", "sql": "sql", "text": "rouge_l"}


def choose_metric(targets: Sequence[str], name: str | None = None) -> Metric:
    """The metric called `name`, or else the one that fits the answers in the data (docs/metrics.md).

    Raises InvalidValue for a name that is none.
    """
    form = form_of_answers(targets)
    scorer = SCORERS.get(name or USUAL[form])
    if scorer is None:
        raise InvalidValue(f"There is no metric {name!r}. Metrics: {', '.join(SCORERS)}.", param="metric")
    return Metric(name=scorer.name, form=form, binary=scorer.binary, score=scorer.score)


def form_of_answers(targets: Sequence[str]) -> str:
    """What the answers are.

    label: few distinct answers, each seen several times. json: every answer is a JSON object. number, sql: every
    answer is one. text: anything else.
    """
    distinct = {canonical(target) for target in targets}
    longest = max(len(target) for target in targets)
    if longest <= LABEL_CHARACTERS and len(distinct) >= 2 and len(distinct) * 3 <= len(targets):
        return "label"
    if all(isinstance(json_value(target), dict) for target in targets):
        return "json"
    if all(number(target) is not None for target in targets):
        return "number"
    return "sql" if all(is_sql(target) for target in targets) else "text"
