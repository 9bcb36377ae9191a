"""The labels that a system prompt lists, read from the prompt with the help of the labels that occur."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from heldout.engine.labels import read_label

#: At least so much of what occurs must be named in a prompt for the prompt to list the labels.
NAMED_SHARE = 0.5

_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n\s*\n")
_CONNECTIVE = r"(?:and|or|und|oder|et|ou|y|o|e)"
_SEPARATORS = (
    re.compile(rf"\s*[,;\n]\s*(?P<last>{_CONNECTIVE}\s+)?|\s+(?P<end>{_CONNECTIVE})\s+"),
    re.compile(r"\s*[,;\n]\s*"),
    re.compile(r"\s*\|\s*"),
    re.compile(r"\s*/\s*"),
)
_BULLET = re.compile(r"\s*(?:[-*•–]|\(?\w{1,2}[.)])\s+")
_HEAD_END = re.compile(r"\s*(?::(?!\w)|\s[-–—=]+>?\s|→|\()")
_AROUND = " \t\r\n\"'`´‘’“”«»*_.:()[]{}<>"
_AROUND_KEEPING_UNDERSCORE = _AROUND.replace("_", "")


def is_word_of(word: str, text: str) -> bool:
    """True when the text has the word, not as a part of a longer one."""
    at = text.find(word) if word else -1
    while at >= 0:
        end = at + len(word)
        if not (at > 0 and _is_letter(text[at - 1])) and not (end < len(text) and _is_letter(text[end])):
            return True
        at = text.find(word, at + 1)
    return False


def _is_letter(sign: str) -> bool:
    return sign.isalnum() or sign == "_"


def listed_labels(prompt: str, labels: Collection[str]) -> tuple[str, ...]:
    """The list in a prompt that has most of these labels, with its other items; nothing when there is none."""
    named = {label for label in labels if is_word_of(label, prompt)}
    if len(named) < 2 or len(named) < NAMED_SHARE * len(labels):
        return ()
    lists = [items for items in _lists(prompt, named) if len(named & set(items)) >= max(2, NAMED_SHARE * len(named))]
    if not lists:
        return tuple(sorted(named))
    best = max(lists, key=lambda items: len(named & set(items)))  # of equal ones the first: lines before sentences
    return tuple(dict.fromkeys([*best, *sorted(named)]))


def _lists(prompt: str, named: Collection[str]) -> Iterator[list[str]]:
    """Every way to read the prompt as a list of items that look like these labels."""
    looks = _Looks(named)
    yield looks.run([(_head(line), False) for line in prompt.splitlines() if _BULLET.match(line)], extend=True)
    yield looks.run([(_head(line), False) for line in prompt.splitlines() if line.strip()], extend=False)
    for sentence in _SENTENCE_END.split(prompt):
        first = min((sentence.find(label) for label in named if is_word_of(label, sentence)), default=-1)
        if first < 0:
            continue
        colon = sentence.rfind(": ", 0, first)
        if colon < 0:
            colon = sentence.rfind(":\n", 0, first)
        introduced = colon >= 0
        rest = sentence[colon + 1 :] if introduced else sentence
        for separator in _SEPARATORS:
            yield looks.run(list(_items(rest, separator, named)), extend=introduced)


def _items(text: str, separator: re.Pattern[str], named: Collection[str]) -> Iterator[tuple[str, bool]]:
    """The items of a list, and whether one comes after the "or" that ends a list."""
    start, last = 0, False
    for found in separator.finditer(text):
        yield _item(text[start : found.start()], named), last
        last = any(found.groupdict().values())
        start = found.end()
    yield _item(text[start:], named), last


def _item(text: str, named: Collection[str]) -> str:
    label = read_label(text.strip().rstrip("."))
    if label is not None and label.key is not None:
        return label.name
    item = text.strip(_AROUND_KEEPING_UNDERSCORE)
    if item in named:
        return item
    item = _HEAD_END.split(item, maxsplit=1)[0].strip(_AROUND_KEEPING_UNDERSCORE)
    if item in named:
        return item
    # "Answer with spam": the last words are the item.
    ends = [label for label in named if item.endswith(label) and is_word_of(label, item)]
    return max(ends, key=len) if ends else item


def _head(line: str) -> str:
    """What a line of a list is about: "- spam: unwanted messages" -> "spam"."""
    bare = _BULLET.sub("", line, count=1) if _BULLET.match(line) else line
    return _HEAD_END.split(bare.strip(), maxsplit=1)[0].strip(_AROUND_KEEPING_UNDERSCORE)


class _Looks:
    """What the labels look like, to tell other items of their list from other words."""

    def __init__(self, named: Collection[str]) -> None:
        self.named = named
        self.words = max(len(label.split()) for label in named)
        self.characters = max(len(label) for label in named) * 3 // 2 + 3
        self.lower = all(label == label.lower() for label in named)
        self.upper = all(label == label.upper() for label in named)
        self.capital = all(label[:1] == label[:1].upper() for label in named)

    def fit(self, item: str) -> bool:
        return item in self.named or (
            0 < len(item) <= self.characters
            and len(item.split()) <= self.words
            and (not self.lower or item == item.lower())
            and (not self.upper or item == item.upper())
            and (not self.capital or item[:1] == item[:1].upper())
            and re.fullmatch(r"\w[\w\s.&+/-]*", item) is not None
        )

    def run(self, items: list[tuple[str, bool]], *, extend: bool) -> list[str]:
        """The items from the first known label to the last one. With `extend`, also those on either side that
        look like labels, up to the end of the list."""
        at = [i for i, (item, _) in enumerate(items) if item in self.named]
        if not at:
            return []
        start, stop = at[0], at[-1] + 1
        if extend:
            while start > 0 and self.fit(items[start - 1][0]):
                start -= 1
        ended = any(last for _, last in items[start:stop])
        while not ended and stop < len(items) and self.fit(items[stop][0]) and (extend or items[stop][1]):
            ended = items[stop][1]
            stop += 1
        return [item for item, _ in items[start:stop] if self.fit(item)]
