"""Prompts that are in two of the job's files: a model would be graded on what it has seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from heldout.engine.labels import user_text
from heldout.pipeline.checks.near import Near
from heldout.pipeline.checks.parts import Parts, name_lines, name_some, shorten
from heldout.pipeline.checks.rows import Hashes, Numbers, Rows
from heldout.pipeline.types import Finding

#: (row of one file) -> the first rows of another file that give its prompt away.
Leaks = Mapping[int, list[int]]
_MOST = 10


def find_exact_leaks(parts: Parts) -> Iterator[Finding]:
    """Prompts of the validation or holdout file that another file answers, letter for letter.

    For each pair of files there are two findings: a warning with the lines that are left out, and a note
    with the lines of the other file.
    """
    rows = parts.rows
    for seen, asked, keep_asked in _pairs_of_files(parts):
        yield from _told(rows, "leak_exact", exact_leaks(rows, seen, asked), seen, asked, keep_asked=keep_asked)


def find_near_leaks(parts: Parts) -> Iterator[Finding]:
    """The same for prompts that another file has nearly so, less those of `find_exact_leaks`."""
    rows = parts.rows
    for seen, asked, keep_asked in _pairs_of_files(parts):
        exact = exact_leaks(rows, seen, asked)
        near = {row: by for row, by in near_leaks(rows, parts.near, seen, asked).items() if row not in exact}
        yield from _told(rows, "leak_near", near, seen, asked, keep_asked=keep_asked)


def exact_leaks(rows: Rows, seen: int, asked: int) -> Leaks:
    """Rows of dataset `asked` whose prompt dataset `seen` answers, and where: in a last or an earlier turn."""
    return _matches(rows, rows.prompt, rows.shown_prompt, seen, asked)


def near_leaks(rows: Rows, near: Near, seen: int, asked: int) -> Leaks:
    """Rows of `asked` that `seen` gives away in other words or letters: equal but for case, punctuation and
    white space whatever the answer; or nearly the same, with the same answer where answers are labels."""
    found = dict(_matches(rows, rows.key, rows.shown_key, seen, asked))
    groups = [near.same] if rows.labels() else [near.same, near.joined]
    for numbers in groups:
        for row, by in _matches(rows, numbers, None, seen, asked).items():
            # Where answers are free, "joined" rows must be answered under the same system message.
            alike = [one for one in by if numbers is near.same or rows.system[one] == rows.system[row]]
            if alike:
                found.setdefault(row, alike)
    return dict(sorted(found.items()))


def _matches(rows: Rows, values: Hashes | Numbers, shown: Hashes | None, seen: int, asked: int) -> dict[int, list[int]]:
    """Rows of `asked` with the value of a row of `seen`, or with one that a row of `seen` shows earlier."""
    asking = values[rows.of(asked)]
    given = rows.starts[seen] + np.flatnonzero(np.isin(values[rows.of(seen)], asking))
    pairs = list(zip(given.tolist(), values[given].tolist(), strict=True))
    if shown is not None:
        inside = (rows.shown_by >= rows.starts[seen]) & (rows.shown_by < rows.starts[seen + 1]) & np.isin(shown, asking)
        pairs += zip(rows.shown_by[inside].tolist(), shown[inside].tolist(), strict=True)
    by_value: dict[int, list[int]] = {}
    for row, value in pairs:
        if len(by_value.setdefault(value, [])) < _MOST:
            by_value[value].append(row)
    found = enumerate(asking.tolist(), start=rows.starts[asked])
    return {row: by_value[value] for row, value in found if value in by_value}


def _pairs_of_files(parts: Parts) -> Iterator[tuple[int, int, bool]]:
    """(file that teaches, file that asks, whether the asking one keeps its rows), by position in `Parts.given`."""
    last = len(parts.rows.datasets) - 1
    if last:
        yield 0, 1, False
    if last == 2:
        yield 0, 2, False
        # The holdout carries the verdict, so it stays whole and the validation rows go.
        yield 1, 2, True


def _told(rows: Rows, code: str, leaks: Leaks, seen: int, asked: int, *, keep_asked: bool) -> Iterator[Finding]:
    if not leaks:
        return
    in_asked = (asked, tuple(int(rows.line[row]) for row in leaks))
    in_seen = (seen, tuple(sorted({int(rows.line[row]) for by in leaks.values() for row in by})))
    (left_out, left_lines), (kept, kept_lines) = (in_seen, in_asked) if keep_asked else (in_asked, in_seen)
    names = [dataset.name for dataset in rows.datasets]
    shown = [
        f"{name_lines([int(rows.line[row])])} and {name_lines([int(rows.line[one]) for one in by])} of {names[seen]}"
        for row, by in leaks.items()
    ]
    row, by = next(iter(leaks.items()))
    are_in = "are in" if code == "leak_exact" else "are nearly the same in"
    yield Finding(
        code=code,
        severity="warning",
        message=(
            f"{len(leaks)} of {len(rows.datasets[asked])} prompts of {names[asked]} {are_in} {names[seen]} too "
            f"({name_some(shown, at_most=10)}). A score on them would measure memory; these rows of "
            f"{names[left_out]} are left out of scoring."
        ),
        file=names[left_out],
        lines=left_lines,
        example=" and ".join(
            shorten(user_text(rows.example(one).prompt), at_most=200)
            for one in ([row] if code == "leak_exact" else [row, by[0]])
        ),
    )
    nearly = "" if code == "leak_exact" else "nearly so "
    yield Finding(
        code=code,
        severity="note",
        message=f"These rows are {nearly}in {names[left_out]} too. They are kept here and left out there.",
        file=names[kept],
        lines=kept_lines,
    )
