"""Right or wrong: texts, labels, numbers and SQL, each compared as what it is."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

#: Labels are imbalanced when the commonest is so many times as frequent as the rarest.
IMBALANCED = 3

# 1,234.5 or 1234.5 or 0.5 or 1e6; 007 is a name, not a number.
_NUMBER = re.compile(
    r"(?=[-+−]?\.?\d)[-+−]?(?:[1-9]\d{0,2}(?:[,\u202f\u00a0]\d{3})+|0|[1-9]\d*)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?"
)
_UNITS = "$€£¥% \t\n\r"
# Not the end of a word or of another number, as in T5 or 2024-05-01.
_NUMBER_INSIDE = re.compile(r"(?<![\w.,-])[-+−]?\d[\d,\u202f\u00a0]*(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?![\w-])")

_SQL = re.compile(
    r"\s*(?:select\b.*\bfrom\b|select\s+[\d(]|with\s+\S+\s+as\s*\(|insert\s+into\b|update\s+\S+\s+set\b|"
    r"delete\s+from\b|(?:create|alter|drop)\s+(?:table|view|index)\b)",
    re.I | re.S,
)
_SQL_TOKEN = re.compile(
    r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\w+(?:\.\d+)?|<>|[<>!=]=|\|\||\S", re.S
)
_FENCED = re.compile(r"\s*```[\w-]*[ \t]*\n(.*?)\n?[ \t]*```\s*", re.S)


def exact_match(answer: str, target: str) -> float:
    """1 if the answers are the same text or the same JSON value, else 0."""
    return float(canonical(answer) == canonical(target))


def label_accuracy(answer: str, target: str) -> float:
    """1 if the answers are the same but for case, quotes around them and a full stop at their end."""
    return float(_bare(answer) == _bare(target))


def same_number(answer: str, target: str) -> float:
    """1 if both are the same number, however it is written; else 0.

    Of an answer with words, the number behind `####` counts, or the only number there is. Without a number in
    the target the texts are compared.
    """
    wanted = number(target)
    return exact_match(answer, target) if wanted is None else float(number_in(answer) == wanted)


def same_sql(answer: str, target: str) -> float:
    """1 if both are the same statement but for white space, comments, the case of words outside quotes, a code
    fence and a closing semicolon; else 0. Nothing is run: another way to ask the same is not recognised."""
    return float(_sql_tokens(answer) == _sql_tokens(target))


def macro_f1(answers: Sequence[str], targets: Sequence[str]) -> float:
    """The mean of every label's F1: a rare label weighs as much as a common one."""
    got, wanted = [canonical(one) for one in answers], [canonical(one) for one in targets]
    said, are = Counter(got), Counter(wanted)
    right = Counter(one for one, other in zip(got, wanted, strict=True) if one == other)
    return sum(2 * right[label] / (said[label] + are[label]) for label in are) / len(are)


def are_imbalanced(targets: Sequence[str]) -> bool:
    """True when a model that knows only the common labels could look good."""
    counts = Counter(map(canonical, targets)).values()
    return len(counts) > 1 and max(counts) >= IMBALANCED * min(counts)


def number(text: str) -> Decimal | None:
    """The number a text is, without signs of currency and percent; None when it is none."""
    bare = text.strip(_UNITS)
    bare = re.sub("^([-+−])[$€£¥]", r"\1", bare)  # -$5
    if not _NUMBER.fullmatch(bare):
        return None
    return Decimal(re.sub("[,\u202f\u00a0]", "", bare).replace("−", "-"))


def number_in(answer: str) -> Decimal | None:
    """The number an answer gives: all of it, what is behind `####`, or the only number in it; None if unclear."""
    whole = number(answer)
    if whole is not None:
        return whole
    _, marked, last = answer.rpartition("####")
    if marked and (behind := number(last)) is not None:
        return behind
    found = {number(one.rstrip(",\u202f\u00a0")) for one in _NUMBER_INSIDE.findall(answer)}
    return found.pop() if len(found) == 1 else None


def is_sql(text: str) -> bool:
    """True when a text begins like an SQL statement, perhaps in a code fence."""
    return bool(_SQL.match(_unfenced(text)))


def canonical(text: str) -> str:
    """The same for all spellings of one JSON value, and for texts that differ by white space around them."""
    value = json_value(text)
    return text.strip() if value is None else json.dumps(value, sort_keys=True, ensure_ascii=False)


def json_value(text: str) -> Any:
    """The JSON object or array a text is, or None."""
    stripped = text.strip()
    if not stripped.startswith(("{", "[")):
        return None
    try:
        return json.loads(stripped)
    except (ValueError, RecursionError):
        return None


def _bare(text: str) -> str:
    previous, bare = "", canonical(text).casefold()
    while bare != previous:
        previous, bare = bare, bare.strip().removesuffix(".").strip("\"'`“”‘’«»")
    return bare


def _sql_tokens(text: str) -> list[str]:
    tokens = [
        token if token[0] in "'\"`" else token.lower()
        for token in _SQL_TOKEN.findall(_unfenced(text))
        if not token.startswith(("--", "/*"))
    ]
    while tokens and tokens[-1] == ";":
        tokens.pop()
    return ["!=" if token == "<>" else token for token in tokens]


def _unfenced(text: str) -> str:
    fenced = _FENCED.fullmatch(text)
    return fenced[1] if fenced else text
