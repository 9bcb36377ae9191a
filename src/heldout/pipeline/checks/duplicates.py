"""Rows that say the same twice or nearly so, and rows that contradict each other, within one file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from heldout.engine.labels import user_text
from heldout.pipeline.checks.near import Near, groups_of, in_groups
from heldout.pipeline.checks.parts import Parts, name_lines, name_some, shorten
from heldout.pipeline.checks.rows import Hashes, Numbers, Rows, mix
from heldout.pipeline.types import Dataset, Example, Finding, Severity

#: Up to this share of extra copies is what any real file has.
WARN_ABOVE = 0.01
_SHOWN = 5
_VARIANTS_LEARNED = (
    "They add weight but little to learn; keep the best of each group, unless such variants are wanted. A split keeps "
    "each group in one part."
)
_VARIANTS_SCORED = "Each group counts as several rows in scores, though it asks one question."


def find_exact_duplicates(parts: Parts) -> Iterator[Finding]:
    """Rows whose messages are all equal, letter for letter (but for Unicode composition and JSON's spelling)."""
    rows = parts.rows
    for part, dataset in enumerate(rows.datasets):
        here = rows.of(part)
        copied, count, groups = _repeated(np.arange(here.start, here.stop), rows.exact[here])
        if count:
            extra = len(copied) - count
            shown = [name_lines(_lines(rows, group)) for group in groups]
            yield Finding(
                code="exact_duplicate",
                severity=_severity(extra, dataset),
                message=(
                    f"{extra} of {len(dataset)} rows repeat another row ({name_some(shown, of=count)}). A repeated row "
                    "weighs more in training; remove the copies unless that is wanted."
                ),
                file=dataset.name,
                lines=_all(rows.line[copied]),
            )


def find_conflicting_answers(parts: Parts) -> Iterator[Finding]:
    """Rows that ask the same (but for case, punctuation and white space) and are answered differently."""
    rows = parts.rows
    for part, dataset in enumerate(rows.datasets):
        answers = rows.answer[rows.of(part)]
        groups = [group for group in groups_of(rows.key[rows.of(part)]) if len(set(answers[group].tolist())) > 1]
        if groups:
            shown = [_conflict(rows, rows.starts[part] + group) for group in groups[:_SHOWN]]
            yield Finding(
                code="conflicting_answers",
                severity="warning",
                message=(
                    f"{len(groups)} {'prompt has' if len(groups) == 1 else 'prompts have'} different "
                    f"answers ({name_some(shown, of=len(groups))}). A model can learn "
                    "one of them at most; keep the right answer, unless several are right."
                ),
                file=dataset.name,
                lines=_all(rows.line[rows.starts[part] + np.concatenate(groups)]),
                example=shorten(user_text(rows.example(rows.starts[part] + groups[0][0]).prompt), at_most=200),
            )


def find_near_duplicates(parts: Parts) -> Iterator[Finding]:
    """Rows that ask nearly the same and are answered the same, copies letter for letter apart."""
    rows, near = parts.rows, parts.near
    for part, dataset in enumerate(rows.datasets):
        first = rows.starts[part] + np.sort(np.unique(rows.exact[rows.of(part)], return_index=True)[1])
        similar, count, groups = _repeated(first, near.same[first])
        if not count:
            continue
        extra = len(similar) - count
        equal = len(similar) - _distinct(mix(near.same[similar].view(np.uint64), rows.key[similar]))
        where = name_some([name_lines(_lines(rows, group)) for group in groups], of=count)
        but = f", {equal} of them in all but case, punctuation and white space" if equal else ""
        yield Finding(
            code="near_duplicate",
            # Where rows are only scored, variants give one question more weight, and no more than that.
            severity=_severity(extra, dataset) if part == 0 else "note",
            message=(
                f"{extra} of {len(dataset)} rows say nearly the same as another row and have its answer{but} "
                f"({where}). {_VARIANTS_LEARNED if part == 0 else _VARIANTS_SCORED}{_given_up(near)}"
            ),
            file=dataset.name,
            lines=_all(rows.line[similar]),
            example=_side_by_side(rows, groups[0][:2]),
        )


def find_near_conflicts(parts: Parts) -> Iterator[Finding]:
    """Rows that ask nearly the same, with the same numbers, and are answered differently."""
    rows, near = parts.rows, parts.near
    for part, dataset in enumerate(rows.datasets):
        here = [
            pair
            for pair in near.contrasts
            if all(rows.part(row) == part for row in pair) and rows.key[pair[0]] != rows.key[pair[1]]
        ]
        if here:
            where = name_some([name_lines(_lines(rows, pair)) for pair in here[: _SHOWN + 1]], of=len(here))
            yield Finding(
                code="near_conflict",
                severity="note",
                message=(
                    f"{len(here)} {'pair of rows looks' if len(here) == 1 else 'pairs of rows look'} nearly the same "
                    f"and {'is' if len(here) == 1 else 'are'} answered differently ({where}). Where the small "
                    "difference explains the answers (a negation, a name), such pairs are the most useful rows there "
                    "are: keep both. Where it does not, one answer is wrong: correct it."
                ),
                file=dataset.name,
                lines=_all(rows.line[np.asarray(here).ravel()]),
                example=_side_by_side(rows, here[0]),
            )


def _given_up(near: Near) -> str:
    if not near.given_up:
        return ""
    return (
        f" {near.given_up} texts are like so many others that they were not compared with all of them: there may "
        "be more."
    )


def _severity(extra: int, dataset: Dataset) -> Severity:
    return "warning" if extra > WARN_ABOVE * len(dataset) else "note"


def _lines(rows: Rows, which: Iterable[int]) -> list[int]:
    return [int(rows.line[row]) for row in which]


def _all(lines: Numbers) -> tuple[int, ...]:
    return tuple(np.unique(lines).tolist())


def _distinct(values: Numbers | Hashes) -> int:
    return len(np.unique(values))


def _repeated(rows: Numbers, values: Numbers | Hashes) -> tuple[Numbers, int, list[Numbers]]:
    """The rows whose value another one has; how many groups of equal values they are; and the first of these groups."""
    again = in_groups(values)
    rows, values = rows[again], values[again]
    return rows, _distinct(values), [rows[group] for group in islice(groups_of(values), _SHOWN + 1)]


def _side_by_side(rows: Rows, which: Iterable[int]) -> str:
    return " and ".join(shorten(user_text(rows.example(row).prompt), at_most=200) for row in which)


def _conflict(rows: Rows, group: Numbers) -> str:
    """The first rows of a group with their different answers."""
    first: dict[int, Example] = {}
    for row in group:
        if int(rows.answer[row]) not in first and len(first) < 3:
            first[int(rows.answer[row])] = rows.example(row)
    shown = " against ".join(shorten(example.target) for example in first.values())
    return f"{name_lines(_lines(rows, group))}: {shown}"
