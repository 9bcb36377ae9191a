"""Which data must not be augmented: answers that a changed prompt would make wrong. No model is asked.

Every rule looks at train alone and needs no word list, so that it holds for any language and any labels.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from heldout.engine.labels import read_label
from heldout.pipeline.checks.groups import fold
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.types import Example

#: Rows that the rules look at; of a larger file a sample that is always the same.
LOOKED_AT = 5_000
#: Share of the rows that may be of a blocked form before the whole file is.
TOLERATED = 0.10
#: A mean over rows: this share of the answer's words stands in the prompt when the answer is the prompt rewritten.
REWRITTEN = 0.5
#: How well one mark of spelling may tell a label from the others: the mean of both shares that are right.
TOLD = 0.9
#: A label needs this many rows before a mark of spelling can be said to tell it.
ENOUGH = 8

_CODE = re.compile(
    r"```|^\s*(?:def |class |import |from \w+ import |#include|public |function |SELECT |<\w+[^>]*>\s*$)|[;{]\s*$", re.M
)
#: What a change takes away or adds.
_MARKS_OF_SPELLING: dict[str, Callable[[str], bool]] = {
    "a capital letter": lambda text: text != text.lower(),
    "small letters": lambda text: text != text.upper(),
    "a closing mark": lambda text: bool(re.search(r"[.?!…。？！]\s*\Z", text)),
    "a closing question mark": lambda text: bool(re.search(r"[?？]\s*\Z", text)),
    "an exclamation mark": lambda text: "!" in text,
    "a comma": lambda text: "," in text,
    "a word in capitals": lambda text: bool(re.search(r"\b[A-Z]{3,}\b", text)),
}


def why_blocked(train: Sequence[Example], *, labels_only: bool = False) -> str | None:
    """Why copies of these rows with changed prompts could have wrong answers; None when nothing speaks against it.

    `labels_only`: also where answers are no labels, since nobody could tell whether they still fit.
    """
    rows = _some(train)
    form = choose_metric([row.target for row in rows]).form
    if form == "label":
        return _same_but_for_case(rows) or _told_by_spelling(rows) or _told_by_one_word(rows)
    if labels_only:
        return "the answers are no labels, so nobody can tell whether they fit a paraphrase of their prompt"
    return _code(rows) or _copied(rows) or _rewritten(rows)


def asked(example: Example) -> str:
    """All that the user wrote: what a copy changes."""
    return "\n".join(str(message["content"]) for message in example.prompt if message["role"] == "user")


def _some(train: Sequence[Example]) -> list[Example]:
    if len(train) <= LOOKED_AT:
        return list(train)
    return [train[i] for i in sorted(random.Random("augmentation").sample(range(len(train)), LOOKED_AT))]


def _label(row: Example) -> str:
    label = read_label(row.target)
    return label.name if label else row.target


def _same_but_for_case(rows: Sequence[Example]) -> str | None:
    """Labels of which two differ in case or punctuation only, or prompts that do and have different labels."""
    seen: dict[str, str] = {}
    for name in sorted({_label(row) for row in rows}):
        other = seen.setdefault(_bare(name), name)
        if other != name:
            return f"the labels {other!r} and {name!r} differ in case or punctuation only"
    prompts: dict[str, dict[str, tuple[str, int]]] = defaultdict(dict)
    lines = []
    for row in rows:
        text = asked(row)
        others = prompts[_bare(text)]
        # The very same text with two labels is a contradiction, which another check tells.
        if any(label != _label(row) and written != text for written, (label, _) in others.items()):
            lines.append(row.line)
        others.setdefault(text, (_label(row), row.line))
    if len(lines) > max(1, TOLERATED / 10 * len(rows)):
        return (
            f"the label depends on case or punctuation: {len(lines)} prompts differ from another one in that only, and "
            f"have another label (line {lines[0]}, for instance)"
        )
    return None


def _told_by_spelling(rows: Sequence[Example]) -> str | None:
    """A label that a mark of spelling tells from all the others."""
    counts = Counter(_label(row) for row in rows)
    texts = [(asked(row), _label(row)) for row in rows]
    for words, holds in _MARKS_OF_SPELLING.items():
        marked = Counter(label for text, label in texts if holds(text))
        for label, n in counts.items():
            others = len(rows) - n
            if min(n, others) < ENOUGH:
                continue
            right = marked[label] / n + 1 - (marked.total() - marked[label]) / others
            if max(right, 2 - right) / 2 >= TOLD:
                rest = (marked.total() - marked[label]) / others
                return (
                    f"the label {label!r} can be told by {words}: {marked[label] / n:.0%} of its prompts have one, and "
                    f"{rest:.0%} of the others"
                )
    return None


def _told_by_one_word(rows: Sequence[Example]) -> str | None:
    """Prompts that differ in one word only and have different labels: grammar, negation, minimal pairs."""
    found: dict[tuple[str, ...], list[tuple[int, str]]] = defaultdict(list)
    for number, row in enumerate(rows):
        words = tuple(_bare(asked(row)).split())
        for key in _neighbours(words):
            found[key].append((number, _label(row)))
    differing = {number for same in found.values() if len({label for _, label in same}) > 1 for number, _ in same}
    if len(differing) > max(3, TOLERATED * len(rows)):
        first = rows[min(differing)].line
        return (
            f"the label may depend on a single word: {len(differing)} of {len(rows)} prompts differ from one with "
            f"another label in one word only (line {first}, for instance)"
        )
    return None


def _neighbours(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Equal for texts that differ in one word, replaced or left out. Of long texts one word decides nothing."""
    if 3 <= len(words) <= 30:
        yield words
        yield from {(*words[:i], *words[i + 1 :]) for i in range(len(words))}


def _code(rows: Sequence[Example]) -> str | None:
    lines = [row.line for row in rows if _CODE.search(row.target)]
    if len(lines) > TOLERATED * len(rows):
        return f"{len(lines)} of {len(rows)} answers look like code (line {lines[0]}, for instance)"
    return None


def _copied(rows: Sequence[Example]) -> str | None:
    """Records whose values are copied out of the prompt, letter for letter."""
    lines = []
    for row in rows:
        text = asked(row)
        values = [value for value in _values(row.target) if len(value) >= 3]
        if any(value in text for value in values):
            lines.append(row.line)
    if len(lines) > TOLERATED * len(rows):
        return (
            f"{len(lines)} of {len(rows)} answers hold values that are copied from the prompt (line {lines[0]}, for "
            "instance), and a changed prompt would no longer hold them"
        )
    return None


def _rewritten(rows: Sequence[Example]) -> str | None:
    shares = []
    for row in rows:
        answer, prompt = _bare(row.target).split(), set(_bare(asked(row)).split())
        if answer:
            shares.append(sum(word in prompt for word in answer) / len(answer))
    mean = sum(shares) / len(shares) if shares else 0.0
    if mean > REWRITTEN:
        return f"the answers are the prompts rewritten: {mean:.0%} of their words stand in the prompt"
    return None


def _values(answer: str) -> Iterator[str]:
    """The strings in a JSON answer, however deep; of another answer nothing."""
    try:
        todo: list[Any] = [json.loads(answer)]
    except (ValueError, RecursionError):
        return
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list):
            todo += value
        elif isinstance(value, str):
            yield value


def _bare(text: str) -> str:
    """Words alone, without case."""
    return " ".join(re.sub(r"[^\w\s]|_", " ", fold(text)).split())
