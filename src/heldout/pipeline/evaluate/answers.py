"""What the answers of a data set are (labels, JSON records, free text), and how one answer is scored."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

#: An answer longer than this is not a label, however often it occurs.
LABEL_CHARACTERS = 120


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How an answer is compared with the one in the data: 1 is right, 0 is wrong.

    `binary` says that there is nothing in between.
    """

    name: str
    form: str  # label | json | text
    binary: bool
    score: Callable[[str, str], float]


def choose_metric(targets: Sequence[str]) -> Metric:
    """The metric that fits the training answers.

    label: few distinct answers, each seen several times; exact match (JSON is compared as a value).
    json: every answer is a JSON object; F1 over its (key, value) pairs.
    text: anything else; ROUGE-L F1 over words.
    """
    distinct = {_canonical(target) for target in targets}
    longest = max(len(target) for target in targets)
    if longest <= LABEL_CHARACTERS and len(distinct) >= 2 and len(distinct) * 3 <= len(targets):
        return Metric(name="exact match", form="label", binary=True, score=exact_match)
    if all(isinstance(_value(target), dict) for target in targets):
        return Metric(name="field F1", form="json", binary=False, score=field_f1)
    return Metric(name="ROUGE-L", form="text", binary=False, score=rouge_l)


def exact_match(answer: str, target: str) -> float:
    """1 if the answers are the same text or the same JSON value, else 0."""
    return float(_canonical(answer) == _canonical(target))


def field_f1(answer: str, target: str) -> float:
    """F1 over the (key, value) pairs of two JSON objects; 0 when the answer is not an object."""
    value, record = _value(answer), _value(target)
    if not isinstance(record, dict):  # a holdout may hold what train did not
        return exact_match(answer, target)
    if not isinstance(value, dict):
        return 0.0
    got, wanted = _pairs(value), _pairs(record)
    if not got and not wanted:
        return 1.0
    return 2 * len(got & wanted) / (len(got) + len(wanted))


def rouge_l(answer: str, target: str) -> float:
    """F1 of the longest common subsequence of lower-cased words (Lin 2004, beta 1)."""
    got, wanted = answer.lower().split(), target.lower().split()
    if not got or not wanted:
        return float(got == wanted)
    row = [0] * (len(wanted) + 1)
    for word in got:
        before = 0  # the value of the previous row, one column to the left
        for i, other in enumerate(wanted, start=1):
            before, row[i] = row[i], before + 1 if word == other else max(row[i], row[i - 1])
    return 2 * row[-1] / (len(got) + len(wanted))


def _canonical(text: str) -> str:
    value = _value(text)
    return text.strip() if value is None else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _value(text: str) -> Any:
    """The JSON object or array a text is, or None."""
    stripped = text.strip()
    if not stripped.startswith(("{", "[")):
        return None
    try:
        return json.loads(stripped)
    except (ValueError, RecursionError):
        return None


def _pairs(value: dict[str, Any]) -> set[tuple[str, str]]:
    return {(key, json.dumps(one, sort_keys=True)) for key, one in value.items()}
