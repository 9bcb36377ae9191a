"""One pass over the files of a job: what the comparisons of rows need of each row, as numbers in arrays.

Texts are not kept, so that millions of rows fit into memory: a row is about 180 bytes here, 80 of them on disk
when there are many. What is compared in the end is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import tempfile
import unicodedata
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import IO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from heldout.engine.base import Message
from heldout.engine.labels import user_text
from heldout.pipeline.checks.groups import MIN_EXAMPLES_PER_LABEL, are_labels, fold
from heldout.pipeline.spool import roomy_folder
from heldout.pipeline.types import Dataset, Example

Hashes: TypeAlias = npt.NDArray[np.uint64]
Numbers: TypeAlias = npt.NDArray[np.int64]

#: A text is the set of its character 4-grams: long enough to tell words apart, short enough for a typo.
GRAM = 4
#: Two texts of similarity s meet in a band with probability 1 - (1 - s^4)^20: 99.6 % at 0.7, 2 % at 0.18.
BANDS, PER_BAND = 20, 4
#: Longer texts are compared by their first characters; what a job does with such a row is told by its length.
MAX_CHARACTERS = 50_000
#: Texts that are looked at in full (templates, shortcuts, shift): at most this many, evenly over the file.
SAMPLE, SAMPLE_CHARACTERS = 20_000, 4_000
#: With more rows, the bands lie in a temporary file.
IN_MEMORY = 500_000
_BATCH_ROWS, _BATCH_CHARACTERS = 4_096, 500_000

_DIGIT = re.compile(r"\d")
_NUMBER = re.compile(r"\d+(?:[^\w\s]\d+)*")


def plain(text: str) -> str:
    """The text without case, punctuation, extra white space and differences of Unicode's compatible forms.

    A mark between two digits and a minus before one stay: 3.5 is not 35.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    if _DIGIT.search(text):
        found = "".join(sorted(set(text) & _marks()))
        bare = _not_of_numbers(found).sub("", text) if found else text
    else:
        bare = text.translate(_deleted())
    return " ".join(bare.split()) or " ".join(text.split())


@cache  # not at import: going through all of Unicode takes longer than some commands
def _marks() -> frozenset[str]:
    """All punctuation."""
    return frozenset(chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "P")


@cache
def _deleted() -> dict[int, None]:
    return dict.fromkeys(map(ord, _marks()))


@lru_cache(maxsize=4096)  # a pattern of all marks takes ten times longer than one of those that a text has
def _not_of_numbers(marks: str) -> re.Pattern[str]:
    """These marks, where they are not part of a number."""
    some = re.escape(marks)
    but_minus = re.escape(marks.replace("-", ""))
    pattern = f"[{some}](?!\\d)"
    return re.compile(f"{pattern}|(?<!\\d)[{but_minus}](?=\\d)" if but_minus else pattern)


def asked_text(prompt: Sequence[Message]) -> str:
    """What tells one prompt from another: all turns but the system message, plain."""
    return "\n".join(plain(message["content"]) for message in prompt if message["role"] != "system")


def system_text(prompt: Sequence[Message]) -> str:
    """The system message, folded; empty where there is none."""
    return fold(prompt[0]["content"]) if prompt and prompt[0]["role"] == "system" else ""


def canonical(answer: str) -> str:
    """An answer without differences that a reader of it would not see: folded, JSON in one order of keys."""
    text = answer.strip()
    if text.startswith(("{", "[")):
        with contextlib.suppress(ValueError, RecursionError):  # not JSON after all: the text speaks for itself
            text = json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False)
    return fold(text)


def grams(text: str) -> Hashes:
    """The hashes of the text's character 4-grams (of the first MAX_CHARACTERS), each once, in order; a shorter text is
    one gram."""
    count = max(1, min(len(text), MAX_CHARACTERS) - GRAM + 1)
    codes = _codes(text[:MAX_CHARACTERS].ljust(GRAM, "\0"))
    hashed = _hash_grams([codes[shift : shift + count] for shift in range(GRAM)])
    hashed.sort()
    first = np.ones(len(hashed), bool)
    np.not_equal(hashed[1:], hashed[:-1], out=first[1:])
    return hashed[first]


def jaccard(one: Hashes, other: Hashes) -> float:
    """Shared grams over all grams."""
    both = np.concatenate((one, other))
    both.sort()
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)


def _codes(text: str) -> Hashes:
    """The characters as numbers."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)


def _hash_grams(characters: Sequence[Hashes]) -> Hashes:
    """One hash of the first, second, ... characters of each gram."""
    hashed = characters[0]
    for more in characters[1:]:
        hashed = hashed * np.uint64(0x9E3779B97F4A7C15) ^ more
    return hashed


class Sampled(NamedTuple):
    """A row as the checks see it that look at words."""

    line: int
    text: str  # what the user wrote, up to SAMPLE_CHARACTERS
    answer: str


class Bands:
    """BANDS numbers of each row, read band by band. Of many rows they lie in a file, and not mapped into memory: pages
    of a map are kept for as long as there is room, and count as ours."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._memory = np.empty((BANDS, n), np.uint32) if n <= IN_MEMORY else None
        self._file = None if n <= IN_MEMORY else tempfile.TemporaryFile(dir=roomy_folder())  # noqa: SIM115 - gone with this object

    def write(self, start: int, numbers: npt.NDArray[np.uint32]) -> None:
        """Those of some rows (BANDS x rows), from row `start`."""
        if self._memory is not None:
            self._memory[:, start : start + numbers.shape[1]] = numbers
            return
        for band, some in enumerate(numbers):
            self._seek(band, start).write(some.tobytes())

    def __iter__(self) -> Iterator[npt.NDArray[np.uint32]]:
        for band in range(BANDS):
            yield np.fromfile(self._seek(band, 0), np.uint32, self._n) if self._memory is None else self._memory[band]

    def _seek(self, band: int, row: int) -> IO[bytes]:
        assert self._file is not None
        self._file.seek(4 * (band * self._n + row))
        return self._file


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """All rows of the given files, numbered through in their order.

    Equal numbers mean equal texts (64-bit hashes: among 4 million rows a chance meeting has a probability of
    4 in 10 million).
    """

    datasets: tuple[Dataset, ...]
    starts: tuple[int, ...]  # first row of each dataset, and the number of rows
    line: Numbers
    exact: Hashes  # all messages, letter for letter
    prompt: Hashes  # the messages before the answer, letter for letter
    asked: Hashes  # those but the system message, plain
    system: Hashes
    answer: Hashes  # canonical
    numbers: Hashes  # the numbers in the asked text; 0 where there are none
    length: Numbers  # of the asked text
    bands: Bands  # BANDS x rows
    sketch: Hashes  # of two texts with similarity s, about (1 + s) / 2 of the 64 bits are equal
    #: For each answer before the last that a conversation teaches: its row, and the prompt before it.
    shown_by: Numbers
    shown_prompt: Hashes
    shown_key: Hashes
    samples: tuple[tuple[Sampled, ...], ...]  # of each dataset

    @classmethod
    def read(cls, datasets: Sequence[Dataset]) -> Rows:
        """Go through the files once."""
        reader = _Reader(sum(len(dataset) for dataset in datasets))
        starts, samples = [0], []
        for dataset in datasets:
            samples.append(tuple(reader.read(dataset)))
            starts.append(starts[-1] + len(dataset))
        return reader.rows(tuple(datasets), tuple(starts), tuple(samples))

    def __len__(self) -> int:
        return self.starts[-1]

    @cached_property
    def key(self) -> Hashes:
        """Equal for rows that ask the same under the same system message."""
        return mix(self.system, self.asked)

    def of(self, part: int) -> slice:
        """The rows of a dataset."""
        return slice(self.starts[part], self.starts[part + 1])

    def part(self, row: int) -> int:
        """The dataset that a row belongs to."""
        return bisect_right(self.starts, row) - 1

    def example(self, row: int) -> Example:
        """The row itself, read anew."""
        part = self.part(row)
        return self.datasets[part].examples[int(row) - self.starts[part]]

    def labels(self, part: int = 0) -> bool:
        """True when the answers of a dataset look like labels."""
        answers = self.answer[self.of(part)]
        values, counts = np.unique(answers, return_counts=True)
        if len(values) * MIN_EXAMPLES_PER_LABEL > len(answers):  # millions of free answers make no dictionary
            return False
        return are_labels(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def mix(one: Hashes, other: Hashes) -> Hashes:
    """One hash of two."""
    mixed = (one ^ (one >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15) + other
    return (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)


class _Reader:
    """Collects the arrays."""

    def __init__(self, n: int) -> None:
        self.line, self.length, self.shown_by = array("q"), array("q"), array("q")
        self.exact, self.prompt, self.asked, self.system = (array("Q") for _ in range(4))
        self.answer, self.numbers, self.shown_prompt, self.shown_key = (array("Q") for _ in range(4))
        self.bands = Bands(n)
        self.sketch = np.empty(n, np.uint64)
        self.waiting: list[str] = []
        self.characters = 0
        self.signed = 0

    def read(self, dataset: Dataset) -> Iterator[Sampled]:
        n = len(dataset)
        for position, example in enumerate(dataset.examples):
            self._add(example)
            # Evenly over the file, whatever its order.
            if n <= SAMPLE or position * SAMPLE // n != (position - 1) * SAMPLE // n:
                yield Sampled(example.line, user_text(example.prompt)[:SAMPLE_CHARACTERS], example.target)
        self._sign()

    def rows(
        self, datasets: tuple[Dataset, ...], starts: tuple[int, ...], samples: tuple[tuple[Sampled, ...], ...]
    ) -> Rows:
        system, asked = _hashes(self.system), _hashes(self.asked)
        return Rows(
            datasets=datasets,
            starts=starts,
            line=_integers(self.line),
            exact=_hashes(self.exact),
            prompt=_hashes(self.prompt),
            asked=asked,
            system=system,
            answer=_hashes(self.answer),
            numbers=_hashes(self.numbers),
            length=_integers(self.length),
            bands=self.bands,
            sketch=self.sketch,
            shown_by=_integers(self.shown_by),
            shown_prompt=_hashes(self.shown_prompt),
            shown_key=_hashes(self.shown_key),
            samples=samples,
        )

    def _add(self, example: Example) -> None:
        asked = asked_text(example.prompt)
        row = len(self.line)
        self.line.append(example.line)
        self.length.append(len(asked))
        self.prompt.append(_hash_messages(example.prompt))
        self.exact.append(_hash_messages(example.messages))
        self.system.append(_hash_text(system_text(example.prompt)))
        self.asked.append(hash64(asked))
        self.answer.append(hash64(canonical(example.target)))
        found = _NUMBER.findall(asked)
        self.numbers.append(hash64(" ".join(found)) if found else 0)
        if len(example.messages) > 3:
            self._add_earlier(example, row)
        self.waiting.append(asked[:MAX_CHARACTERS])
        self.characters += len(self.waiting[-1])
        if len(self.waiting) == _BATCH_ROWS or self.characters > _BATCH_CHARACTERS:
            self._sign()

    def _add_earlier(self, example: Example, row: int) -> None:
        system = np.array([self.system[row]], np.uint64)
        for position, weight in enumerate(example.weights[:-1]):
            if weight:
                before = example.messages[:position]
                self.shown_by.append(row)
                self.shown_prompt.append(_hash_messages(before))
                asked = np.array([hash64(asked_text(before))], np.uint64)
                self.shown_key.append(int(mix(system, asked)[0]))

    def _sign(self) -> None:
        if self.waiting:
            end = self.signed + len(self.waiting)
            bands, self.sketch[self.signed : end] = sign(self.waiting)
            self.bands.write(self.signed, bands)
            self.signed, self.waiting, self.characters = end, [], 0


class Signed(NamedTuple):
    """BANDS numbers for each text (BANDS x texts), of which two texts share one with the probability that BANDS says;
    and the lowest bits of 64 minima, for a quick look at a pair."""

    bands: npt.NDArray[np.uint32]
    sketch: Hashes


def sign(texts: Sequence[str]) -> Signed:
    """The texts' signatures."""
    # Three zeros between the texts, so that no gram lies in two of them.
    codes = np.concatenate([_codes("\0\0\0".join(texts)), np.zeros(GRAM, np.uint64)])
    lengths = np.array([len(text) for text in texts])
    begins = np.concatenate([[0], np.cumsum(lengths + GRAM - 1)[:-1]])
    counts = np.maximum(1, lengths - GRAM + 1)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    where = np.arange(counts.sum()) + np.repeat(begins - starts, counts)
    hashed = _hash_grams([codes[where + shift] for shift in range(GRAM)])
    hashed = (hashed * np.uint64(0xD6E8FEB86659FD93) >> np.uint64(32)).astype(np.uint32)
    signed = np.empty((BANDS, len(texts)), np.uint32)
    sketch = np.zeros(len(texts), np.uint64)
    for band in range(BANDS):
        value = np.zeros(len(texts), np.uint64)
        for factor, mask in _FUNCTIONS[band * PER_BAND : (band + 1) * PER_BAND]:
            least = np.minimum.reduceat((hashed ^ mask) * factor, starts).astype(np.uint64)
            value = mix(value, least)
            sketch = sketch << np.uint64(1) | mix(least, least) >> np.uint64(63)  # the last 64 stay
        signed[band] = value >> np.uint64(32)
    return Signed(signed, sketch)


def _functions() -> tuple[tuple[np.uint32, np.uint32], ...]:
    # From a hash, not from numpy's generator: the same with every version of numpy, so a job resumes alike.
    def number(name: str) -> np.uint32:
        return np.uint32(hash64(name) >> 32)

    return tuple((number(f"factor {i}") | np.uint32(1), number(f"mask {i}")) for i in range(BANDS * PER_BAND))


def hash64(text: str) -> int:
    """The same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


_hash_text = lru_cache(maxsize=4096)(hash64)  # a file's examples share their system prompt
_FUNCTIONS = _functions()


def _hash_messages(messages: Sequence[Message]) -> int:
    parts = []
    for message in messages:
        text = unicodedata.normalize("NFC", message["content"])
        parts.append(f"{message['role']}:{len(text)}:{text};")  # the length keeps "a" + "bc" apart from "ab" + "c"
    return hash64("".join(parts))


def _hashes(values: array[int]) -> Hashes:
    return np.frombuffer(values, np.uint64) if values else np.empty(0, np.uint64)


def _integers(values: array[int]) -> Numbers:
    return np.frombuffer(values, np.int64) if values else np.empty(0, np.int64)
