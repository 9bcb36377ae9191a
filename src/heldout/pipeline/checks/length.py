"""Rows that are longer than a model reads, or far longer than the rest of their file."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from heldout.engine.catalogue import ENCODER
from heldout.pipeline.checks.parts import Parts, name_lines, name_some, shorten
from heldout.pipeline.types import Dataset, Example, Finding

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: Tokens that a job reads of an example at most, unless it is told otherwise; what an estimate is held against.
USUAL_LIMIT = 4096
#: Characters of a token where no tokenizer is at hand: English has 4 to 5, most other languages fewer.
CHARACTERS_PER_TOKEN = 4
#: A row stands out when the logarithm of its length is so many robust standard deviations above the median …
OUTLYING = 5.0
#: … which are never taken to be smaller than this (files of one form hardly vary: a label, a sentence) …
SMALLEST_SPREAD = 0.35
#: … and when it is long at all. Shorter rows cost nothing and cannot be cut.
LONG_CHARACTERS, LONG_TURNS = 2_000, 20
#: What a tenth of the file does is no outlier.
OUTLIERS = 0.1
#: As evaluate/scores.answer_room: so much more than the longest answer that was learned is let through.
ROOM, SPARE = 1.25, 4 * CHARACTERS_PER_TOKEN
_BATCH = 256


def find_too_long(parts: Parts) -> Iterator[Finding]:
    """Rows of more tokens than the model reads; without a model, rows that will be by an estimate (a note)."""
    if parts.model.count_tokens is None or parts.model.limit is None:
        for dataset in parts.given():
            yield from _estimated(dataset)
        return
    read_system = parts.model.kind != ENCODER or _varies_in_system(parts)
    for dataset in parts.given():
        lines, tokens = _count(parts, dataset, read_system=read_system)
        yield from _beyond_limit(parts, dataset, lines, tokens)


def find_overlong_examples(parts: Parts) -> Iterator[Finding]:
    """Rows far longer than the others of their file: a pasted log, a text that ran away, a talk of 60 turns."""
    for dataset in parts.given():
        lines, characters, turns = array("q"), array("q"), array("q")
        for example in dataset.examples:
            said = [len(str(message["content"])) for message in example.messages if message["role"] != "system"]
            lines.append(example.line)
            characters.append(sum(said))
            turns.append(len(said))
        yield from _overlong(dataset, lines, characters, turns)


def find_cut_answers(parts: Parts) -> Iterator[Finding]:
    """Answers of a given holdout file that are longer than a job lets an evaluated model write."""
    if parts.holdout is None:
        return
    learned = (example for dataset in (parts.train, parts.valid) if dataset for example in dataset.examples)
    room = ROOM * max((len(example.target) for example in learned), default=0) + SPARE
    cut = [example.line for example in parts.holdout.examples if len(example.target) > room]
    if cut:
        yield Finding(
            code="answer_cut",
            severity="warning",
            message=(
                f"The answers of {name_lines(cut)} are longer than any that is learned by more than a quarter. A model "
                f"is stopped there (after about {room:.0f} characters), so they would count as wrong: add rows with "
                "answers as long to the training file, or leave these out."
            ),
            file=parts.holdout.name,
            lines=tuple(cut),
        )


def _beyond_limit(parts: Parts, dataset: Dataset, lines: Sequence[int], tokens: Sequence[int]) -> Iterator[Finding]:
    import numpy as np

    limit = parts.model.limit
    assert limit is not None
    counted = np.asarray(tokens)
    long = [line for line, count in zip(lines, tokens, strict=True) if count > limit]
    refused = [line for line, count in zip(lines, tokens, strict=True) if count == 0]
    if long:
        shown = [f"line {line} ({count} tokens)" for line, count in zip(lines, tokens, strict=True) if count > limit]
        is_encoder = parts.model.kind == ENCODER
        cure = "use a chat model with a longer context" if is_encoder else "raise max_length as far as the model reads"
        yield Finding(
            code="too_long",
            severity="error",
            message=(
                f"{len(long)} of {len(lines)} rows are longer than max_length ({limit} tokens): "
                f"{name_some(shown, at_most=10)}. Nothing is cut: shorten them, leave them out, or {cure}."
            ),
            file=dataset.name,
            lines=tuple(long),
        )
    if refused:
        yield Finding(
            code="not_in_template",
            severity="warning",
            message=(
                f"The chat template of this model cannot take {name_lines(refused)}. A job refuses them and says why "
                "for each: mostly the order of roles, or several answers in one conversation."
            ),
            file=dataset.name,
            lines=tuple(refused),
        )
    known = counted[counted > 0]
    if known.size:
        yield Finding(
            code="token_counts",
            severity="note",
            message=(
                f"Half of the rows have up to {np.median(known):.0f} tokens, 95 % up to "
                f"{np.quantile(known, 0.95):.0f}, the longest {known.max()} ({limit} may be read); all together "
                f"{known.sum()}."
            ),
            file=dataset.name,
        )


def _estimated(dataset: Dataset) -> Iterator[Finding]:
    long, most = [], 0
    for example in dataset.examples:
        characters = sum(len(str(message["content"])) for message in example.messages)
        if characters > USUAL_LIMIT * CHARACTERS_PER_TOKEN:
            long.append(example.line)
            most = max(most, characters)
    if long:
        yield Finding(
            code="too_long",
            severity="note",
            message=(
                f"{name_lines(long).capitalize()}: up to {most} characters, about {most // CHARACTERS_PER_TOKEN} "
                f"tokens ({CHARACTERS_PER_TOKEN} characters each). A job refuses rows of more than {USUAL_LIMIT} "
                "tokens, or of more than its model reads; name the model (--model) to have them counted."
            ),
            file=dataset.name,
            lines=tuple(long),
        )


def _overlong(
    dataset: Dataset, lines: Sequence[int], characters: Sequence[int], turns: Sequence[int]
) -> Iterator[Finding]:
    import numpy as np

    if not len(lines):
        return
    length, count = np.asarray(characters), np.asarray(turns)
    standing_out = (_outlying(length) & (length > LONG_CHARACTERS)) | (_outlying(count) & (count > LONG_TURNS))
    places = np.flatnonzero(standing_out)
    if not places.size or places.size > max(1, OUTLIERS * len(lines)):
        return
    found = [lines[place] for place in places.tolist()]
    shown = [
        f"line {lines[place]} {characters[place]}" + (f" in {turns[place]} turns" if turns[place] > LONG_TURNS else "")
        for place in places[:3].tolist()
    ]
    first = next(example for example in dataset.examples if example.line == found[0])
    longest = max((str(message["content"]) for message in first.messages if message["role"] != "system"), key=len)
    yield Finding(
        code="overlong_example",
        severity="warning",
        message=(
            f"{len(found)} of {len(lines)} rows are far longer than the others: {name_lines(found)}. Half of the rows "
            f"have {np.median(length):.0f} characters or fewer; {', '.join(shown)}. They cost most of the memory and, "
            "if the answer is long, most of the loss: see whether they belong here, and shorten or leave them out."
        ),
        file=dataset.name,
        lines=tuple(found),
        example=shorten(longest),
    )


def _outlying(values: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Far above the median on the scale of logarithms, by the median absolute deviation."""
    import numpy as np

    logs = np.log1p(values)
    middle = np.median(logs)
    # 1.4826 makes it the standard deviation of a normal distribution.
    spread = max(SMALLEST_SPREAD, 1.4826 * float(np.median(np.abs(logs - middle))))
    outlying: Any = logs > middle + OUTLYING * spread
    return outlying


def _count(parts: Parts, dataset: Dataset, *, read_system: bool) -> tuple[array[int], array[int]]:
    """Lines and tokens of all rows."""
    assert parts.model.count_tokens is not None
    lines, tokens = array("q"), array("q")
    rows = iter(dataset.examples)
    while batch := list(islice(rows, _BATCH)):
        lines.extend(example.line for example in batch)
        tokens.extend(parts.model.count_tokens(batch if read_system else [_without_system(one) for one in batch]))
    return lines, tokens


def _varies_in_system(parts: Parts) -> bool:
    first: str | None = None
    for dataset in parts.given():
        for example in dataset.examples:
            said = "\0".join(str(message["content"]) for message in example.prompt if message["role"] == "system")
            if first is not None and said != first:
                return True
            first = said
    return False


def _without_system(example: Example) -> Example:
    """As an encoder reads a row of a file whose rows share their system prompt."""
    kept = [
        (message, weight)
        for message, weight in zip(example.messages, example.weights, strict=True)
        if message["role"] != "system"
    ]
    return replace(example, messages=tuple(one for one, _ in kept), weights=tuple(weight for _, weight in kept))
