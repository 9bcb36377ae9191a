"""Prompts that are in two of the job's files: a model would be graded on what it has seen."""

from __future__ import annotations

from collections.abc import Iterator

from heldout.pipeline.checks.groups import prompt_fingerprint, shown_prompts
from heldout.pipeline.checks.parts import Parts, name_lines, name_some
from heldout.pipeline.types import Dataset, Finding


def find_exact_leaks(parts: Parts) -> Iterator[Finding]:
    """Prompts of the validation or holdout file that another file answers.

    For each pair of files there are two findings: a warning with the lines that are left out, and a note
    with the lines of the other file.
    """
    train, valid, holdout = parts.train, parts.valid, parts.holdout
    if valid is not None:
        yield from _leaks(seen=train, asked=valid)
    if holdout is not None:
        yield from _leaks(seen=train, asked=holdout)
    if valid is not None and holdout is not None:
        # The holdout carries the verdict, so it stays whole and the validation rows go.
        yield from _leaks(seen=valid, asked=holdout, keep_asked=True)


def _leaks(*, seen: Dataset, asked: Dataset, keep_asked: bool = False) -> Iterator[Finding]:
    """Where a prompt that `asked` ends with has an answer in `seen`."""
    pairs = _pairs(seen, asked)
    if not pairs:
        return
    in_asked = (asked, tuple(line for line, _ in pairs))
    in_seen = (seen, tuple(sorted({line for _, lines in pairs for line in lines})))
    (left_out, left_lines), (kept, kept_lines) = (in_seen, in_asked) if keep_asked else (in_asked, in_seen)
    shown = [f"{name_lines([line])} and {name_lines(lines)} of {seen.name}" for line, lines in pairs]
    yield Finding(
        code="leak_exact",
        severity="warning",
        message=(
            f"{len(pairs)} of {len(asked)} prompts of {asked.name} are in {seen.name} too "
            f"({name_some(shown, at_most=10)}). A score on them would measure memory; these rows of "
            f"{left_out.name} are left out of scoring."
        ),
        file=left_out.name,
        lines=left_lines,
    )
    yield Finding(
        code="leak_exact",
        severity="note",
        message=f"These rows are in {left_out.name} too. They are kept here and left out there.",
        file=kept.name,
        lines=kept_lines,
    )


def _pairs(seen: Dataset, asked: Dataset) -> list[tuple[int, list[int]]]:
    """(line of `asked`, lines of `seen` that answer it)."""
    lines_by_prompt: dict[str, list[int]] = {}
    for example in seen.examples:
        for prompt in shown_prompts(example):
            lines_by_prompt.setdefault(prompt, []).append(example.line)
    found = ((example.line, prompt_fingerprint(example.prompt)) for example in asked.examples)
    return [(line, lines_by_prompt[prompt]) for line, prompt in found if prompt in lines_by_prompt]
