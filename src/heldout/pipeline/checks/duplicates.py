"""Rows that say the same twice, and rows that contradict each other, within one file."""

from __future__ import annotations

from collections.abc import Iterator

from heldout.pipeline.checks.groups import fingerprint, fold, group_by_prompt
from heldout.pipeline.checks.parts import Parts, name_lines, name_some, shorten
from heldout.pipeline.types import Dataset, Example, Finding

#: Up to this share of extra copies is what any real file has.
WARN_ABOVE = 0.01


def find_exact_duplicates(parts: Parts) -> Iterator[Finding]:
    """Rows whose messages are all equal but for case, white space and Unicode composition."""
    for dataset in parts.given():
        groups: dict[str, list[int]] = {}
        for example in dataset.examples:
            groups.setdefault(fingerprint(example.messages), []).append(example.line)
        copies = [lines for lines in groups.values() if len(lines) > 1]
        if copies:
            yield _duplicates_finding(dataset, copies)


def _duplicates_finding(dataset: Dataset, copies: list[list[int]]) -> Finding:
    extra = sum(len(lines) - 1 for lines in copies)
    where = name_some([name_lines(lines) for lines in copies])
    return Finding(
        code="exact_duplicate",
        severity="warning" if extra > WARN_ABOVE * len(dataset) else "note",
        message=(
            f"{extra} of {len(dataset)} rows repeat another row ({where}). A repeated row weighs more in "
            "training; remove the copies unless that is wanted."
        ),
        file=dataset.name,
        lines=tuple(sorted(line for lines in copies for line in lines)),
    )


def find_conflicting_answers(parts: Parts) -> Iterator[Finding]:
    """Rows that ask the same and are answered differently."""
    for dataset in parts.given():
        groups = group_by_prompt(dataset.examples).values()
        conflicts = [group for group in groups if len({fold(example.target) for example in group}) > 1]
        if conflicts:
            yield Finding(
                code="conflicting_answers",
                severity="warning",
                message=(
                    f"{len(conflicts)} {'prompt has' if len(conflicts) == 1 else 'prompts have'} different "
                    f"answers ({name_some([_describe(group) for group in conflicts])}). A model can learn "
                    "one of them at most; keep the right answer, unless several are right."
                ),
                file=dataset.name,
                lines=tuple(sorted(example.line for group in conflicts for example in group)),
            )


def _describe(group: list[Example]) -> str:
    answers = {fold(example.target): example.target for example in reversed(group)}
    shown = " against ".join(shorten(answer) for answer in list(answers.values())[::-1][:3])
    return f"{name_lines([example.line for example in group])}: {shown}"
