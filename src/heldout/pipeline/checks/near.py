"""Which rows ask the same or nearly the same: candidates by MinHash, each judged by its true similarity.

See docs/design/near-duplicates.md.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from heldout.pipeline.checks.rows import Hashes, Numbers, Rows, asked_text, grams, jaccard, mix, plain, system_text

#: Shared 4-grams. One typo in a text of 30 characters leaves 0.75; different questions on one subject, below 0.45.
SIMILAR = 0.7
#: Texts with other numbers in them ask something else, unless there are this many other characters, nearly all
#: the same, and the same answer: a letter with another date.
WORDY, SAME_WORDS = 60, 0.9
#: Free answers to the same question are worded freely; above this they say the same.
ALIKE_ANSWERS = 0.5
#: Of the 64 bits of two sketches, so many may differ among up to so many texts: at similarity 0.7 more than 20 do in
#: 3 of 10,000 pairs, more than 16 in 1 of 100, more than 12 in 15 of 100 (at 0.8 in 1 of 100); at 0.2, 9 of 10 differ
#: in more than 20 (binomial with (1 - similarity) / 2). Spares most texts from being read again: among many texts,
#: most candidates are just not alike enough.
DIFFERENT_BITS = ((50_000, 20), (500_000, 16), (sys.maxsize, 12))
#: In a bucket of more texts than this, each is compared with a few that stand for the others.
SMALL_BUCKET, REPRESENTATIVES = 12, 4
#: A text that was compared so often in vain is not compared any more: in a big bucket, and at all. The latter is
#: less where there are many texts, so that not many more than IN_ALL comparisons of all of them are in vain.
FEW_FAILED, MOST_FAILED, LEAST_FAILED, IN_ALL = 8, 40, 1, 2_000_000
_CACHED_CHARACTERS = 5_000_000
_REMEMBERED = 500_000

_DIGITS = re.compile(r"[\d]+")


class Relation(Enum):
    """What two rows are to each other."""

    NONE = 0
    SAME = 1  # nearly the same question, the same answer
    OTHER_ANSWER = 2  # nearly the same question, another answer


@dataclass(frozen=True, kw_only=True, eq=False)
class Near:
    """Rows by what they ask. Rows with equal numbers in `same` (or `joined`) belong together."""

    same: Numbers  # nearly the same question, the same answer
    joined: Numbers  # nearly the same question, whatever the answer
    contrasts: tuple[tuple[int, int], ...]  # pairs of rows: nearly the same question, another answer
    given_up: int  # texts like so many others that they were not compared with all of them


def find_near(rows: Rows) -> Near:
    """Compare all rows of all files."""
    # Rows that are equal after normalising are one text here.
    _, first, text = np.unique(mix(rows.key, rows.answer), return_index=True, return_inverse=True)
    search = _Search(rows, first, labels=rows.labels())
    for band in rows.bands:
        for bucket in _buckets(band[first]):
            search.compare_all(bucket)
    return Near(
        same=search.same.roots()[text],
        joined=search.joined.roots()[text],
        contrasts=tuple((int(first[one]), int(first[other])) for one, other in search.contrasts),
        given_up=search.given_up,
    )


def groups_of(numbers: Numbers | Hashes) -> Iterator[Numbers]:
    """The positions of equal numbers, where there are two or more, by first position."""
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    borders = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    starts = np.concatenate([[0], borders])
    sizes = np.diff(np.concatenate([starts, [len(ordered)]]))
    starts, sizes = starts[sizes > 1], sizes[sizes > 1]
    for which in np.argsort(order[starts], kind="stable").tolist():
        yield order[starts[which] : starts[which] + sizes[which]]


def in_groups(numbers: Numbers | Hashes) -> npt.NDArray[np.bool_]:
    """Whether another position has the same number."""
    _, which, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return counts[which] > 1


def _buckets(values: np.ndarray) -> Iterator[list[int]]:
    """The texts that share a band's value."""
    for group in groups_of(values):
        yield group.tolist()


def _quick(numbers: Any) -> memoryview[int]:
    """The same numbers, read and written one by one faster than numpy does."""
    return memoryview(numbers)


class _Sets:
    """Disjoint sets of texts; the root of a set is its first text."""

    def __init__(self, n: int) -> None:
        self._numbers = np.arange(n)
        self._parent = _quick(self._numbers)

    def root(self, text: int) -> int:
        parent = self._parent
        while (above := parent[text]) != text:
            parent[text] = parent[above]
            text = above
        return text

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low

    def roots(self) -> Numbers:
        found = self._numbers
        while True:
            above = found[found]
            if (above == found).all():
                return found
            found = above


class _Search:
    """Compares the texts of each bucket, and remembers what came out."""

    def __init__(self, rows: Rows, first: Numbers, *, labels: bool) -> None:
        self._rows, self._first, self._labels = rows, _quick(first), labels
        self._n = len(first)
        self.same, self.joined = _Sets(len(first)), _Sets(len(first))
        self.contrasts: list[tuple[int, int]] = []
        self._failed = array("H", bytes(2 * len(first)))  # how often a text was compared in vain
        self._most = max(LEAST_FAILED, min(MOST_FAILED, IN_ALL // max(1, len(first))))
        self._few = min(FEW_FAILED, self._most)
        self._different_bits = next(bits for texts, bits in DIFFERENT_BITS if len(first) <= texts)
        self._known: dict[int, Relation] = {}
        self._same_system: dict[tuple[int, int], bool] = {}  # few, however many rows
        self._grams: OrderedDict[tuple[str, int], Hashes] = OrderedDict()
        self._characters = 0
        self._answer, self._numbers, self._system, self._asked, self._length, self._sketch = (
            _quick(values) for values in (rows.answer, rows.numbers, rows.system, rows.asked, rows.length, rows.sketch)
        )

    def compare_all(self, bucket: Sequence[int]) -> None:
        """Join what belongs together: by all pairs, or, in a big bucket, by a few texts that stand for others."""
        if len(bucket) > 2:
            bucket = list({self.same.root(text): text for text in bucket}.values())
        if len(bucket) > SMALL_BUCKET:
            self._compare_with_few(bucket)
            return
        for position, text in enumerate(bucket):
            for other in bucket[:position]:
                if self._failed[text] < self._most and self.same.root(text) != self.same.root(other):
                    self._compare(other, text)

    @property
    def given_up(self) -> int:
        """How many texts reached the limit."""
        return int((np.frombuffer(self._failed, np.uint16) >= self._most).sum()) if self._failed else 0

    def _compare_with_few(self, bucket: Sequence[int]) -> None:
        """Only texts with the same numbers (and label) can be the same: those are compared with the first few
        of them. Of the others, the first of each kind with the first of a few other kinds."""
        kinds: dict[tuple[int, int], list[int]] = {}
        heads: dict[int, list[int]] = {}
        for text in bucket:
            row = self._first[text]
            label = self._answer[row] if self._labels else 0
            numbers = 0 if label and self._length[row] >= WORDY else self._numbers[row]
            few = kinds.setdefault((label, numbers), [])
            if not few and len(others := heads.setdefault(numbers, [])) < REPRESENTATIVES:
                for other in others:
                    if self._failed[text] < self._most:
                        self._compare(other, text)
                others.append(text)
            for other in few:
                if self._failed[text] >= self._few or self._compare(other, text) is Relation.SAME:
                    break
            else:
                if len(few) < REPRESENTATIVES:
                    few.append(text)

    def _compare(self, one: int, other: int) -> Relation:
        if not self._may_ask_the_same(self._first[one], self._first[other]):
            return Relation.NONE
        pair = one * self._n + other
        relation = self._known.get(pair)
        if relation is not None:
            return relation
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        relation = self._known[pair] = self._relation(self._first[one], self._first[other])
        if relation is Relation.SAME:
            self.same.join(one, other)
        elif self._failed[other] < self._most:
            self._failed[other] += 1
        if relation is not Relation.NONE:
            self.joined.join(one, other)
        if relation is Relation.OTHER_ANSWER:
            self.contrasts.append((one, other))
        return relation

    def _relation(self, one: int, other: int) -> Relation:
        if not self._ask_the_same(one, other):
            return Relation.NONE
        same_answer = self._answer[one] == self._answer[other]
        if same_answer or (not self._labels and self._similarity("answer", one, other) >= ALIKE_ANSWERS):
            return Relation.SAME
        return Relation.OTHER_ANSWER

    def _may_ask_the_same(self, one: int, other: int) -> bool:
        """What the numbers in memory say, before the rows are read again."""
        short, long = self._length[one], self._length[other]
        if short > long:
            short, long = long, short
        if short * 2 < long:
            return False
        if self._numbers[one] != self._numbers[other]:
            may = short >= WORDY and self._answer[one] == self._answer[other]
        else:
            may = (self._sketch[one] ^ self._sketch[other]).bit_count() <= self._different_bits
        return may and self._have_the_same_system(one, other)

    def _have_the_same_system(self, one: int, other: int) -> bool:
        pair = (self._system[one], self._system[other])
        if pair[0] == pair[1]:
            return True
        known = self._same_system.get(pair)
        if known is None:
            if len(self._same_system) >= _REMEMBERED:
                self._same_system.clear()
            known = self._same_system[pair] = self._similarity("system", one, other) >= SIMILAR
        return known

    def _ask_the_same(self, one: int, other: int) -> bool:
        if self._asked[one] == self._asked[other]:
            return True
        if self._numbers[one] == self._numbers[other]:
            return self._similarity("asked", one, other) >= SIMILAR
        return self._similarity("words", one, other) >= SAME_WORDS

    def _similarity(self, what: str, one: int, other: int) -> float:
        return jaccard(self._grams_of(what, one), self._grams_of(what, other))

    def _grams_of(self, what: str, row: int) -> Hashes:
        """The grams of one of a row's texts; those asked for last are kept."""
        found = self._grams.get((what, row))
        if found is None:
            found = self._grams[what, row] = grams(self._text(what, row))
            self._characters += len(found)
            while self._characters > _CACHED_CHARACTERS and len(self._grams) > 2:
                self._characters -= len(self._grams.popitem(last=False)[1])
        else:
            self._grams.move_to_end((what, row))
        return found

    def _text(self, what: str, row: int) -> str:
        example = self._rows.example(row)
        if what == "answer":
            return plain(example.target)
        if what == "system":
            return system_text(example.prompt)
        asked = asked_text(example.prompt)
        if what == "words":
            words = _DIGITS.sub("0", asked)
            return words if len(words) >= WORDY else asked
        return asked
