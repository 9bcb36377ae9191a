"""What kind of task a file is, from its examples alone."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from heldout.pipeline.checks.groups import MIN_EXAMPLES_PER_LABEL, fold
from heldout.pipeline.evaluate.answers import LABEL_CHARACTERS
from heldout.pipeline.types import Dataset, Example

Kind = Literal["labels", "extraction", "rewriting", "facts", "text", "preference", "tools"]

WORDS: dict[Kind, str] = {
    "labels": "labels",
    "extraction": "structured extraction (JSON)",
    "rewriting": "rewriting",
    "facts": "closed-book facts",
    "text": "free text",
    "preference": "preference pairs",
    "tools": "tool calls",
}

#: Rows that are read for their wording, evenly spread over the file.
READ = 2_000
#: Share of the rows that must be of a kind: some answers of a labelled file are misspelt, some records broken.
MOST = 0.75
#: Share of words that a rewritten answer has in common with its input, in the median row; length likewise.
CLOSE, ALIKE_IN_LENGTH = 0.6, (0.4, 2.0)
#: Facts: from so many rows on whose answers cannot come from the prompt (SCIENCE §5).
FACTS = 0.20
#: Answers of more words are explanations; a number or a name in them proves nothing.
SHORT = 30
#: Rows of a file that tell a preference or tool file apart, and bytes of each that are read.
PEEKED, PEEKED_BYTES = 50, 1 << 20

_WORD = re.compile(r"\w+")
_NAMED = re.compile(r"\b\w*\d[\w.,:/-]*|(?<=[a-z,;] )[A-Z]\w+")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the answers are, and how that was seen."""

    kind: Kind
    why: str
    labels: int = 0  # distinct ones, where answers are labels
    commonest: float = 0.0  # share of the commonest label
    closed_book: float = 0.0  # share of answers that cannot come from their prompts

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the JSON document."""
        return {
            "kind": self.kind,
            "why": self.why,
            "labels": self.labels,
            "commonest": self.commonest,
            "closed_book": self.closed_book,
        }


def infer_task(dataset: Dataset) -> Task:
    """The kind of task, of at least one example. Labels go before facts: a label need not stand in the prompt."""
    rows = spread(dataset)
    counts = Counter(fold(one.target) for one in rows if len(one.target) <= LABEL_CHARACTERS)
    labels = {answer: count for answer, count in counts.items() if count >= MIN_EXAMPLES_PER_LABEL}
    if len(labels) >= 2 and sum(labels.values()) >= MOST * len(rows):
        commonest = max(labels.values()) / len(rows)
        others = len(rows) - sum(labels.values())
        why = f"{len(labels)} different answers in {len(rows)} rows, the commonest {commonest:.0%} of them"
        why += f"; {others} rows have an answer of their own" if others else ""
        return Task(kind="labels", why=why, labels=len(labels), commonest=commonest)
    records = sum(one.target.lstrip().startswith("{") for one in rows)
    if records >= MOST * len(rows):
        return Task(kind="extraction", why=f"{records} of {len(rows)} answers are JSON objects, and most differ")
    closed = closed_book_share(dataset)
    if closed >= FACTS:
        why = f"{closed:.0%} of the answers hold numbers or names that their prompts do not"
        return Task(kind="facts", why=why, closed_book=closed)
    shared = statistics.median(_shared_words(one) for one in rows)
    lengths = statistics.median(len(one.target) / max(1, len(_asked(one))) for one in rows)
    if shared >= CLOSE and ALIKE_IN_LENGTH[0] <= lengths <= ALIKE_IN_LENGTH[1]:
        why = f"in the median row answer and input share {shared:.0%} of their words"
        return Task(kind="rewriting", why=why, closed_book=closed)
    why = f"answers differ from row to row, and share {shared:.0%} of their words with the input in the median row"
    return Task(kind="text", why=why, closed_book=closed)


def closed_book_share(dataset: Dataset) -> float:
    """Share of examples with a short answer that holds a number or a name which its prompt does not. Of labels
    and of JSON it says nothing."""
    rows = spread(dataset)
    return sum(map(_is_closed_book, rows)) / len(rows)


def kind_of_rows(content: BinaryIO) -> Literal["preference", "tools"] | None:
    """What the first rows say of themselves when they are no plain conversations; None when they are, or are not
    JSON. Half of them must agree."""
    rows = list(_first_rows(content))
    preferred = sum({"preferred_output", "chosen"} & row.keys() != set() for row in rows)
    tools = sum(_has_tools(row) for row in rows)
    if 2 * max(preferred, tools) <= len(rows) or not rows:
        return None
    return "preference" if preferred >= tools else "tools"


def spread(dataset: Dataset) -> list[Example]:
    """Up to READ examples, evenly spread over the file."""
    step = -(-len(dataset) // READ)
    return [example for i, example in enumerate(dataset.examples) if i % step == 0]


def _first_rows(content: BinaryIO) -> Iterator[dict[str, Any]]:
    for _ in range(PEEKED):
        line = content.readline(PEEKED_BYTES)
        if not line:
            return
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def _has_tools(row: dict[str, Any]) -> bool:
    messages = row.get("messages")
    calls = isinstance(messages, list) and any(isinstance(one, dict) and one.get("tool_calls") for one in messages)
    return bool(row.get("tools") or row.get("functions") or calls)


def _asked(example: Example) -> str:
    """The last thing that the user wrote."""
    return next((str(one["content"]) for one in reversed(example.prompt) if one["role"] == "user"), "")


def _shared_words(example: Example) -> float:
    """F1 of the words of the answer and of the input, order left aside."""
    answer, asked = _words(example.target), _words(_asked(example))
    total = answer.total() + asked.total()
    return 2 * (answer & asked).total() / total if total else 0.0


def _words(text: str) -> Counter[str]:
    return Counter(_WORD.findall(text.casefold()))


def _is_closed_book(example: Example) -> bool:
    target = example.target
    if target.lstrip().startswith(("{", "[")) or len(target.split()) > SHORT:
        return False
    known = "\n".join(str(one["content"]) for one in example.prompt).casefold()
    return any(named.casefold().rstrip(".,:") not in known for named in _named(target))


def _named(text: str) -> Iterable[str]:
    """Numbers, codes, and capitalised words inside a sentence."""
    return (found.group() for found in _NAMED.finditer(text))
