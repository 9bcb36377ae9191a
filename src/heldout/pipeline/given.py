"""Validation and holdout files that the user gave: what another part gives away is left out by name, or kept
and told first in the verdict."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from heldout.errors import InvalidHoldoutFile, InvalidValidationFile
from heldout.pipeline.checks.groups import all_shown_prompts, prompt_fingerprint, shown_prompts
from heldout.pipeline.checks.leakage import near_leaks
from heldout.pipeline.checks.near import Near, find_near
from heldout.pipeline.checks.parts import name_lines
from heldout.pipeline.checks.rows import Rows
from heldout.pipeline.types import Dataset, Example, Finding

_Examples = tuple[Example, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Files:
    """The files of a job, and which rows of all of them ask nearly the same."""

    train: Dataset
    valid: Dataset | None
    holdout: Dataset | None
    rows: Rows
    near: Near

    @classmethod
    def compare(cls, train: Dataset, valid: Dataset | None, holdout: Dataset | None) -> Files:
        """Read and compare them."""
        rows = Rows.read([dataset for dataset in (train, valid, holdout) if dataset is not None])
        return cls(train=train, valid=valid, holdout=holdout, rows=rows, near=find_near(rows))


@dataclass(frozen=True, kw_only=True)
class Given:
    """The given files' rows that may be scored."""

    valid: _Examples
    holdout: _Examples
    findings: tuple[Finding, ...]
    caveats: tuple[str, ...]  # what the verdict must say first


def clean(files: Files, *, drawn: Set[str], keep_leaks: bool = False) -> Given:
    """The given files less the rows whose prompts, or nearly their prompts, another part has.

    `drawn` are the prompts that were split off the training file to be judged. The training file keeps its
    rows; of a validation and a holdout row that are alike the holdout's stays. With `keep_leaks` all rows stay,
    and a caveat counts those of the holdout and of valid.

    Raises InvalidValidationFile or InvalidHoldoutFile when nothing would be left of a file.
    """
    train, valid, holdout, rows, near = files.train, files.valid, files.holdout, files.rows, files.near
    taught = all_shown_prompts(train.examples)
    findings: list[Finding] = []
    caveats: list[str] = []

    def cleaned(dataset: Dataset, part: str, leaks: Set[int], where: str) -> _Examples:
        """`leaks` are positions in the file."""
        if leaks:
            lines = tuple(sorted(dataset.examples[position].line for position in leaks))
            findings.append((_kept if keep_leaks else _removed)(dataset, part, lines, where))
        if keep_leaks:
            if leaks:
                caveats.append(_caveat(part, len(leaks), len(dataset), where))
            return tuple(dataset.examples)
        rest = tuple(row for position, row in enumerate(dataset.examples) if position not in leaks)
        if not rest:
            kind = InvalidHoldoutFile if part == "holdout" else InvalidValidationFile
            raise kind(_nothing_left(dataset, part, train))
        return rest

    def near_to(seen: int, asked: int) -> set[int]:
        return {row - rows.starts[asked] for row in near_leaks(rows, near, seen, asked)}

    holdout_rows: _Examples = ()
    if holdout is not None:
        at = len(rows.datasets) - 1
        leaks = {i for i, row in enumerate(holdout.examples) if prompt_fingerprint(row.prompt) in taught}
        holdout_rows = cleaned(holdout, "holdout", leaks | near_to(0, at), f"in {train.name}")
    valid_rows: _Examples = ()
    if valid is not None:
        judged = drawn | {prompt_fingerprint(row.prompt) for row in holdout_rows}
        leaks = {
            i
            for i, row in enumerate(valid.examples)
            if prompt_fingerprint(row.prompt) in taught or not judged.isdisjoint(shown_prompts(row))
        }
        leaks |= near_to(0, 1)
        if holdout is not None:
            leaks |= near_to(2, 1)  # the holdout carries the verdict, so it stays whole
        where = f"in {train.name}" + ("" if holdout is None else " or the holdout")
        valid_rows = cleaned(valid, "validation", leaks, where)
    return Given(valid=valid_rows, holdout=holdout_rows, findings=tuple(findings), caveats=tuple(caveats))


def _removed(dataset: Dataset, part: str, lines: tuple[int, ...], where: str) -> Finding:
    return Finding(
        code="leak_removed",
        severity="note",
        message=(
            f"{len(lines)} of {len(dataset)} rows of {dataset.name} were left out because their prompts are, or "
            f"nearly are, {where} ({name_lines(lines)}). The training file keeps all of its rows. To score these "
            "rows all the same: --keep-leaks (x_keep_leaks)."
        ),
        file=dataset.name,
        lines=lines,
    )


def _kept(dataset: Dataset, part: str, lines: tuple[int, ...], where: str) -> Finding:
    return Finding(
        code="leak_kept",
        severity="warning",
        message=f"{_caveat(part, len(lines), len(dataset), where)} ({name_lines(lines)}), as you asked.",
        file=dataset.name,
        lines=lines,
    )


def _caveat(part: str, n: int, of: int, where: str) -> str:
    means = "the score may measure memory" if part == "holdout" else "training may be stopped too late"
    where = where.replace("in ", "in the training file ", 1)
    return f"{n} of {of} {part} rows are, or nearly are, {where} and were kept: {means}"


def _nothing_left(dataset: Dataset, part: str, train: Dataset) -> str:
    return (
        f"The {part} file {dataset.name} has no row that is not, or not nearly, in {train.name} or another part: "
        "nothing is left to measure with. Give rows with other prompts, leave the file out to have a part split off, "
        "or keep such rows (--keep-leaks)."
    )
