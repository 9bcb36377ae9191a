"""Answers that cannot come from their prompts: facts, which belong into the prompt and not into the weights.

What is asked of each row is in docs/checks/facts.md. The base model's own opinion is in pipeline/closed_book.py.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

from heldout.engine.base import Message
from heldout.pipeline.checks.groups import are_labels
from heldout.pipeline.checks.parts import Parts, name_lines, shorten
from heldout.pipeline.types import Dataset, Example, Finding

#: The finding about the file as a whole; a job asks the base model about it (pipeline/closed_book.py).
TEACHES = "teaches_facts"
#: From this share of rows on, the file as a whole teaches facts (SCIENCE §5).
TEACHES_SHARE = 0.2
#: A fact is a short answer to a short question; a long text is composed, and a long prompt brings material.
ANSWER_CHARACTERS, ANSWER_WORDS, ASKED_WORDS = 200, 30, 40
#: Without a question only an answer that is hardly more than the value counts.
VALUE_WORDS = 8
#: Number words also stand in ordinary sentences ("there are two ways"), so these must be short.
COUNTED_WORDS = 6
#: "Who … ?" answered by a few words of which the prompt has none, whether capitals or not.
NAMED_WORDS = 4
#: An answer that so many rows, and such a share of them, give is a format or a label.
SHARED_ROWS, SHARED = 5, 0.1

_WORD = re.compile(r"[^\W_]+(?:['’.,:/&-]+[^\W_]+)*")
_SENTENCE_START = re.compile(r"(?:^|[.!?:…]['\"”’)]*\s+|\n\s*[-*•]?\s*|[\"“(])$")
_STANDING_NUMBER = re.compile(r"(?<![\w-])[$€£]?\d[\d.,:/%]*(?![\w-])")
_CARDINALS = frozenset(
    "two three four five six seven eight nine ten eleven twelve thirteen fifteen sixteen twenty thirty forty fifty "
    "sixty seventy eighty ninety hundred thousand million".split()
)
_ORDINALS = frozenset("third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split())
_COUNTS = _CARDINALS | _ORDINALS
_ASKS = re.compile(
    r"\s*(?:(?:and|so|please|hi|hello|hey)[,!]?\s+)?(?:who|whose|whom|where|when|what|which|how|tell me|give me|"
    r"wer|wo|wann|was|welche[rsmn]?|wie|qui|où|quand|quel(?:le)?s?|combien|quién|dónde|cuándo|qué|cuál|cuánt[oa]s?)\b",
    re.IGNORECASE,
)
_ASKS_FOR_A_NAME = re.compile(
    r"\b(?:who|whose|whom|where|when|which|how (?:many|much|long|far|old|heavy|tall|big|large|often|late|early)|"
    r"in (?:what|which)|at what|wer|wo|wann|qui|où|quand|quién|dónde|cuándo)\b",
    re.IGNORECASE,
)
#: Words that hold sentences together or speak of the talk itself; an answer of these alone tells no fact. The
#: pronouns mark an answer as somebody's turn in a talk ("I am not sure").
_SPEAKS = frozenset("i we you me us my our your sorry yes no not maybe please thanks sure".split())
_SMALL = frozenset("the a an of in on at to from for by with and or is are was were it its this that as be".split())
#: German writes every noun with a capital, so capitals there say nothing about names.
_GERMAN = frozenset("der die das und ist nicht sie ich wir ein eine für mit auf den dem zu ihr ihre es".split())


def find_facts(parts: Parts) -> Iterator[Finding]:
    """Rows of the training file whose answers are nowhere in their prompts, and whether they are much of the file."""
    lines, example = closed_book(parts.train)
    if not lines:
        return
    n = len(parts.train)
    teaches = len(lines) >= TEACHES_SHARE * n
    if teaches:
        yield Finding(
            code=TEACHES,
            severity="warning",
            message=(
                f"{len(lines)} of {n} rows ({len(lines) / n:.0%}) teach facts: their answers cannot be told from their "
                "prompts. Fine-tuning teaches facts slowly and makes a model invent others; put them into the prompt "
                "instead (retrieval), and train on how to answer from there."
            ),
            file=parts.train.name,
            example=example,
        )
    yield Finding(
        code="one_off_fact",
        severity="note" if teaches else "warning",  # one cause, one warning
        message=(
            f"{len(lines)} of {n} rows ask for something that their prompt does not say ({name_lines(lines)}). A model "
            "can only learn these answers by heart: give them in the prompt, or leave these rows out."
        ),
        file=parts.train.name,
        lines=tuple(lines),
        example=example,
    )


def closed_book(dataset: Dataset) -> tuple[list[int], str]:
    """Lines of the rows whose answers cannot come from their prompts, by the cheap rules; what the first looks like."""
    import numpy as np

    answers = array("q")  # a hash for each row: the texts of a big file do not fit into memory
    candidates: list[tuple[int, int, bool]] = []  # (place, line, could it be a label?)
    for place, example in enumerate(dataset.examples):
        target = example.target
        answers.append(hash(target.strip().lower()))
        why = cannot_be_told(example)
        if why:
            # A label that is spelled wrong stands in no prompt either, and is not a fact.
            candidates.append((place, example.line, why == "words" or target.lstrip()[:1] in "{["))
    if not candidates:
        return [], ""
    _, inverse, counts = np.unique(np.frombuffer(answers, dtype=np.int64), return_inverse=True, return_counts=True)
    n = len(answers)
    among_labels = 3 * len(counts) <= n and are_labels(
        {str(place): count for place, count in enumerate(counts.tolist())}
    )
    most = 2 if among_labels else max(SHARED_ROWS, int(SHARED * n))
    lines = [
        line
        for place, line, label_like in candidates
        if counts[inverse[place]] <= most and not (among_labels and label_like)
    ]
    if not lines:
        return [], ""
    first = next(example for example in dataset.examples if example.line == lines[0])
    return lines, f"{shorten(_asked(first))} → {shorten(first.target)}"


def cannot_be_told(example: Example) -> Literal["number", "name", "words"] | None:
    """What a short question is answered by, if its prompt does not hold it; None when the prompt may be enough."""
    target = example.target.strip()
    if not target or len(target) > ANSWER_CHARACTERS or target.count("\n") > 2:
        return None
    asked = _asked(example)
    if asked.count(" ") > ASKED_WORDS:
        return None
    asks = "?" in asked or _ASKS.match(asked) is not None
    if target[0] in "{[":
        if not asks:
            return None
        target = _told(target)
    if target.endswith("?") or "```" in target:
        return None
    words: list[str] = _WORD.findall(target)
    if not 0 < len(words) <= (ANSWER_WORDS if asks else VALUE_WORDS):
        return None
    known = _known(example.prompt)
    new = [word for word in words if word.lower() not in known]
    if not new:
        return None
    if _has_number(new, short=len(words) <= COUNTED_WORDS) and not _gives_numbers(example.prompt):
        return "number"
    if any(_is_code(word) for word in new):
        return "number"
    if not asks:
        return None
    if _has_name(target, words, new):
        return "name"
    asks_for_a_name = len(words) <= NAMED_WORDS and _ASKS_FOR_A_NAME.search(asked) is not None
    return "words" if asks_for_a_name and _is_all_new(words, known) else None


def _has_number(new: Sequence[str], *, short: bool) -> bool:
    return any(_has_digit(word) or (short and word.lower() in _COUNTS) for word in new)


def _has_digit(word: str) -> bool:
    return any(map(str.isdigit, word))


def _is_code(word: str) -> bool:
    """Letters and digits in one word: nothing that can be computed."""
    return _has_digit(word) and any(map(str.isalpha, word))


def _gives_numbers(prompt: Sequence[Message]) -> bool:
    """Numbers to count, convert or compute with. (A number inside a name, "the BX-200", is none.)"""
    said = "\n".join(str(message["content"]) for message in prompt if message["role"] != "system")
    return _STANDING_NUMBER.search(said) is not None or not _CARDINALS.isdisjoint(_WORD.findall(said.lower()))


def _has_name(target: str, words: Sequence[str], new: Sequence[str]) -> bool:
    """A capitalised word within a sentence that the prompt does not have."""
    # JSON, PDF, URL are words of a trade rather than names.
    names = {word for word in new if len(word) >= 3 and word[0].isupper() and not word.isupper()}
    if not names or not _GERMAN.isdisjoint(map(str.lower, words)):
        return False
    if len(words) > NAMED_WORDS and all(word[0].isupper() for word in words):  # a headline
        return False
    return any(
        found.group() in names and not _SENTENCE_START.search(target, max(0, found.start() - 8), found.start())
        for found in _WORD.finditer(target)
        if found.start()
    )


def _is_all_new(words: Sequence[str], known: str) -> bool:
    """Not one word with a meaning is the prompt's."""
    lower = [word.lower() for word in words]
    if not _SPEAKS.isdisjoint(lower):
        return False
    # A count that the prompt lets one compute is none of its words either.
    said = [word for word in lower if word not in _SMALL | _COUNTS and len(word) > 2]
    return bool(said) and not any(word in known for word in said)


def _asked(example: Example) -> str:
    """The last message of the user."""
    return next((str(message["content"]) for message in reversed(example.prompt) if message["role"] == "user"), "")


def _known(prompt: Sequence[Message]) -> str:
    """All that the prompt says, in lower case."""
    return "\n".join(_lower(str(message["content"])) for message in prompt)


@lru_cache(maxsize=256)  # rows share their system prompt
def _lower(text: str) -> str:
    return text.lower()


def _told(target: str) -> str:
    """The texts of a JSON answer. Its numbers are mostly measures of the text, a score or a count, so they are out."""
    try:
        value = json.loads(target)
    except (ValueError, RecursionError):
        return target
    return " ".join(_texts(value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
