"""Dataset -> Folds: what a file too small for a holdout is judged by, every row by a model that never saw it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from heldout.errors import InvalidTrainingFile
from heldout.pipeline.checks.groups import group_by_prompt, prompt_fingerprint
from heldout.pipeline.checks.parts import name_lines
from heldout.pipeline.giveaways import find_giveaways
from heldout.pipeline.given import Files, clean
from heldout.pipeline.split import (
    SMALL,
    affordable,
    distinct,
    in_order,
    once,
    part_sizes,
    pick,
    sources,
    strata,
    too_small,
)
from heldout.pipeline.types import Dataset, Example, Finding, Split
from heldout.pipeline.units import Unit, find_units

FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Folds:
    """One small training file for cross-fitting.

    The holdouts of `splits` are disjoint and together the whole file, less repeated rows and those of the
    finding `never_held_out`; no split trains on or stops by a unit (see units.py) of its own holdout. `whole`
    has all rows to train on, the given validation rows or none, and no holdout.
    """

    splits: tuple[Split, ...]
    whole: Split

    @property
    def groups(self) -> int:
        """Distinct prompts that are held out once."""
        return len({prompt_fingerprint(row.prompt) for split in self.splits for row in split.holdout})


def is_small(train: Dataset) -> bool:
    """True when a holdout split off this file would say little."""
    prompts: set[str] = set()
    for row in train.examples:
        prompts.add(prompt_fingerprint(row.prompt))
        if len(prompts) >= SMALL:
            return False
    return True


def split_into_folds(
    train: Dataset, valid: Dataset | None, *, seed: int, keep_leaks: bool = False
) -> tuple[Folds, tuple[Finding, ...]]:
    """The splits for cross-fitting, and what was left out of them.

    Units stay together: rows that ask the same or nearly so, of one passage, declared group or conversation.
    Labels keep their shares in every fold. Of what a fold does not hold out, 15 % (at least 10 units, at most
    half) are valid, or else `valid` is: the given file less what leaks, or with it (`keep_leaks`), and as many of its
    rows as cost little. Held-out questions are asked without codes that give their answers away (giveaways.py), unless
    `keep_leaks`. Same files and seed, same folds.

    Raises InvalidTrainingFile when there are fewer units than folds, InvalidValidationFile when all of `valid`
    leaks.
    """
    prompts = group_by_prompt(train.examples)
    files = Files.compare(train, valid, None)
    given = clean(files, drawn=prompts.keys(), keep_leaks=keep_leaks)
    found = find_units(train, files.near, most=len(prompts) / FOLDS)
    units = found.units
    if len(units) < FOLDS:
        raise InvalidTrainingFile(
            too_small(train, len(prompts), holdout=True, valid=valid is None, findings=found.findings)
        )
    held_once = {prompt for unit in units for prompt in unit}
    findings = [*found.findings, *_never_held_out(train, held_once, found.findings)]
    rows = once(tuple(train.examples), train.name, findings)
    findings += given.findings
    valid_rows: tuple[Example, ...] = ()
    if valid is not None:
        valid_rows = affordable(once(given.valid, valid.name, findings), len(train), valid.name, seed, findings)
    scored = tuple(row for row in rows if prompt_fingerprint(row.prompt) in held_once)
    giveaways = find_giveaways(files.rows, with_valid=valid is not None, keep=keep_leaks)
    told, caveats = giveaways.told(scored, train.name)
    findings += told
    asked = {row.line: row for row in giveaways.asked(scored)}
    stratum_of = strata(train, found)
    rng = random.Random(f"{seed}/folds")

    def split(held_units: Sequence[Unit]) -> Split:
        rest = [unit for unit in units if unit not in held_units]
        rng.shuffle(rest)
        n_valid = part_sizes(len(rest), holdout=False, valid=valid is None)[1]
        held = {prompt for unit in held_units for prompt in unit}
        validating = {prompt for unit in pick(rest, n_valid, stratum_of) for prompt in unit}
        return Split(
            train=in_order(train, lambda prompt: prompt not in held | validating),
            valid=valid_rows or distinct(in_order(train, validating.__contains__)),
            holdout=tuple(asked[row.line] for row in in_order(train, held.__contains__) if row.line in asked),
            seed=seed,
            groups=len(prompts),
            sources=sources(train, valid, None),
            caveats=(*given.caveats, *caveats),
            giveaways=giveaways,
        )

    splits = tuple(split(held_units) for held_units in _deal(units, stratum_of, rng))
    whole = Split(
        train=tuple(train.examples),
        valid=valid_rows,
        holdout=(),
        seed=seed,
        groups=len(prompts),
        sources={
            "train": f"training file {train.name}",
            "valid": "none" if valid is None else f"validation file {valid.name}",
            "holdout": f"none: every row of {train.name} is answered by the one of {FOLDS} models that never saw it",
        },
        caveats=(*given.caveats, *caveats),
        giveaways=giveaways,
    )
    return Folds(splits=splits, whole=whole), tuple(findings)


def _deal(units: Sequence[Unit], stratum_of: Callable[[Unit], str], rng: random.Random) -> list[list[Unit]]:
    """The units dealt to FOLDS folds of nearly equal size, each stratum evenly."""
    order = list(units)
    rng.shuffle(order)
    order.sort(key=len, reverse=True)
    folds: list[list[Unit]] = [[] for _ in range(FOLDS)]
    sizes = [0] * FOLDS
    of_stratum = [Counter[str]() for _ in range(FOLDS)]
    for unit in order:
        stratum = stratum_of(unit)
        least = min(range(FOLDS), key=lambda k: (of_stratum[k][stratum], sizes[k]))
        folds[least].append(unit)
        sizes[least] += len(unit)
        of_stratum[least][stratum] += len(unit)
    return folds


def _never_held_out(train: Dataset, held_once: set[str], told: Sequence[Finding]) -> Iterator[Finding]:
    """Rows in no unit, less those that are told already."""
    known = {line for finding in told if finding.code == "group_not_held_out" for line in finding.lines}
    lines = tuple(
        row.line for row in train.examples if prompt_fingerprint(row.prompt) not in held_once and row.line not in known
    )
    if lines:
        yield Finding(
            code="never_held_out",
            severity="note",
            message=(
                f"{len(lines)} of {len(train)} rows of {train.name} are trained on but not scored: too many other "
                f"rows answer their prompts in an earlier turn to hold them all out together ({name_lines(lines)})."
            ),
            file=train.name,
            lines=lines,
        )
