"""When two examples count as the same, and when answers count as labels: one rule for checks and split."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from heldout.engine.base import Message
from heldout.pipeline.types import Example

#: On average; and most labels occur more than once.
MIN_EXAMPLES_PER_LABEL = 3

_CLOSING_MARKS = re.compile(r"[\s.?!…。？！]+$")


@lru_cache(maxsize=4096)  # a file's examples share their system prompt
def fold(text: str) -> str:
    """The text without differences of Unicode composition, case and white space."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split())


def fingerprint(messages: Sequence[Message]) -> str:
    """Equal for conversations whose messages are equal after `fold`."""
    digest = hashlib.sha256()
    for message in messages:
        digest.update(_encoded(message["role"], fold(message["content"])))
    return digest.hexdigest()


def prompt_fingerprint(prompt: Sequence[Message]) -> str:
    """Like `fingerprint`, and blind to closing punctuation of user messages.

    "Where is my card" and "where is my card?" are one question: an answer learned for one is known for
    the other.
    """
    digest = hashlib.sha256()
    for message in prompt:
        digest.update(_encoded_prompt(message))
    return digest.hexdigest()


def shown_prompts(example: Example) -> frozenset[str]:
    """Fingerprints of all prompts whose answers this example gives away.

    That is the last one and, in a conversation of several turns, each one before an answer that is
    learned: another row that asks only for that earlier answer asks nothing new.
    """
    digest = hashlib.sha256()
    shown = set()
    last = len(example.messages) - 1
    for position, (message, weight) in enumerate(zip(example.messages, example.weights, strict=True)):
        if weight or position == last:
            shown.add(digest.hexdigest())
        digest.update(_encoded_prompt(message))
    return frozenset(shown)


def all_shown_prompts(examples: Iterable[Example]) -> frozenset[str]:
    """The prompts that are no news for a model that learned these examples."""
    return frozenset().union(*(shown_prompts(example) for example in examples))


def group_by_prompt(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Examples by prompt fingerprint, groups and examples in the file's order."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(prompt_fingerprint(example.prompt), []).append(example)
    return groups


def count_labels(examples: Sequence[Example]) -> Counter[str] | None:
    """How often each answer occurs, if the answers look like labels; else None."""
    counts = Counter(fold(example.target) for example in examples)
    return counts if are_labels(counts) else None


def are_labels(counts: Mapping[str, int]) -> bool:
    """True when answers that occur so often look like labels: many rows for each, however many labels.

    A few answers that are given all the time do not make labels of a thousand that are given once.
    """
    once = sum(count == 1 for count in counts.values())
    enough = sum(counts.values()) >= MIN_EXAMPLES_PER_LABEL * len(counts)
    return len(counts) >= 2 and enough and 2 * once <= len(counts)


def _encoded_prompt(message: Message) -> bytes:
    text = fold(message["content"])
    if message["role"] == "user":
        text = _CLOSING_MARKS.sub("", text) or text  # a lone "?" stays a question of its own
    return _encoded(message["role"], text)


def _encoded(role: str, text: str) -> bytes:
    # The length keeps "a" + "bc" apart from "ab" + "c".
    return f"{role}:{len(text)}:{text};".encode("utf-8", "surrogatepass")
