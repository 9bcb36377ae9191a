"""Dataset -> Split: three disjoint parts, so that no score comes from a prompt the model was shown."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from heldout.errors import InvalidHoldoutFile, InvalidTrainingFile, InvalidValidationFile
from heldout.pipeline.checks.groups import (
    all_shown_prompts,
    count_labels,
    fingerprint,
    fold,
    group_by_prompt,
    prompt_fingerprint,
    shown_prompts,
)
from heldout.pipeline.checks.parts import name_lines
from heldout.pipeline.types import Dataset, Example, Finding, Split

#: Below this many distinct prompts a holdout of their own says little: cross-fitting uses every row twice.
SMALL = 300
LARGE = 1000
FOLDS = 5

_Examples = tuple[Example, ...]
_Unit = tuple[str, ...]  # groups that are held out together
_T = TypeVar("_T", str, _Unit)


def split_dataset(
    train: Dataset, valid: Dataset | None, holdout: Dataset | None, *, seed: int
) -> tuple[Split, tuple[Finding, ...]]:
    """The parts of a job, and what was left out of them.

    Examples with the same prompt form a group; no group is in two parts, and no prompt that ends a row of
    `holdout` or `valid` is answered in a row of `train` (or, for the holdout, of `valid`). Files that are
    given are used as they are, less the rows that would break this; what is not given is split off `train`.
    Rows are never left out of `train`, where repeated rows stay too; in the other parts they count once.
    Same files and seed, same split.

    Raises the file's InvalidTrainingFile, InvalidValidationFile or InvalidHoldoutFile when a part would be
    empty.
    """
    drawn = _draw(train, holdout=holdout is None, valid=valid is None, rng=random.Random(seed))
    findings: list[Finding] = []
    taught = all_shown_prompts(train.examples)

    holdout_rows = drawn.holdout
    if holdout is not None:
        holdout_rows = _leave_out(
            holdout, lambda row: _asked(row) in taught, f"their prompts are in {train.name}", findings
        )
        if not holdout_rows:
            raise InvalidHoldoutFile(_nothing_left(holdout, "holdout", train))

    if valid is None:
        valid_rows = _once(drawn.valid, train.name, findings)
    else:
        valid_rows = _valid_beside(train, valid, judged={_asked(row) for row in holdout_rows}, findings=findings)

    split = Split(
        train=drawn.train,
        valid=valid_rows,
        holdout=_once(holdout_rows, (train if holdout is None else holdout).name, findings),
        seed=seed,
        groups=len(group_by_prompt(train.examples)),
        sources=_sources(train, valid, holdout),
    )
    return split, tuple(findings)


@dataclass(frozen=True, kw_only=True)
class Folds:
    """One small training file for cross-fitting.

    The holdouts of `splits` are disjoint and together the whole file, less repeated rows and those of the
    finding `never_held_out`; no split trains on or stops by a prompt of its own holdout. `whole` has all
    rows to train on, the given validation rows or none, and no holdout.
    """

    splits: tuple[Split, ...]
    whole: Split

    @property
    def groups(self) -> int:
        """Distinct prompts that are held out once."""
        return len({_asked(row) for split in self.splits for row in split.holdout})


def is_small(train: Dataset) -> bool:
    """True when a holdout split off this file would say little."""
    return len(group_by_prompt(train.examples)) < SMALL


def split_into_folds(train: Dataset, valid: Dataset | None, *, seed: int) -> tuple[Folds, tuple[Finding, ...]]:
    """The splits for cross-fitting, and what was left out of them.

    Rows with the same prompt stay together, and so do rows of which one answers the other's prompt in an
    earlier turn. Labels keep their shares in every fold. Of what a fold does not hold out, 15 % (at least
    10 prompts, at most half) are valid, or else `valid` is: the given file less what leaks. Same files and
    seed, same folds.

    Raises InvalidTrainingFile when there are fewer prompts than folds, InvalidValidationFile when all of
    `valid` leaks.
    """
    groups = group_by_prompt(train.examples)
    units = _inseparable(groups, most=math.ceil(len(groups) / FOLDS))
    if len(units) < FOLDS:
        raise InvalidTrainingFile(_too_small(train, len(groups), holdout=True, valid=valid is None))
    findings = list(_never_held_out(train, {group for unit in units for group in unit}))
    once = {row.line for row in _once(tuple(train.examples), train.name, findings)}
    valid_rows: _Examples = ()
    if valid is not None:
        valid_rows = _valid_beside(train, valid, judged=set(groups), findings=findings)

    are_labels = count_labels(train.examples) is not None

    def stratum_of(unit: _Unit) -> str:
        return fold(groups[unit[0]][0].target) if are_labels else ""

    rng = random.Random(f"{seed}/folds")

    def split(held_units: Sequence[_Unit]) -> Split:
        rest = [unit for unit in units if unit not in held_units]
        rng.shuffle(rest)
        n_valid = part_sizes(len(rest), holdout=False, valid=valid is None)[1]
        held = {group for unit in held_units for group in unit}
        validating = {group for unit in _pick(rest, n_valid, stratum_of) for group in unit}
        return Split(
            train=_in_order(train, lambda group: group not in held | validating),
            valid=valid_rows or _distinct(_in_order(train, lambda group: group in validating)),
            holdout=tuple(row for row in _in_order(train, lambda group: group in held) if row.line in once),
            seed=seed,
            groups=len(groups),
            sources=_sources(train, valid, None),
        )

    splits = tuple(split(held_units) for held_units in _deal(units, stratum_of, rng))
    sources = {
        "train": f"training file {train.name}",
        "valid": "none" if valid is None else f"validation file {valid.name}",
        "holdout": f"none: every row of {train.name} is answered by the one of {FOLDS} models that never saw it",
    }
    whole = Split(
        train=tuple(train.examples), valid=valid_rows, holdout=(), seed=seed, groups=len(groups), sources=sources
    )
    return Folds(splits=splits, whole=whole), tuple(findings)


def part_sizes(n: int, *, holdout: bool, valid: bool) -> tuple[int, int]:
    """How many of n groups go to the holdout and to valid, where they are wanted (docs/design/three-way-split.md).

    Below 300 the holdout can show large differences only, and the verdict will mostly be inconclusive. Below
    40 even the least useful parts would eat the training data, so training keeps at least half.
    """
    if n < SMALL:
        sizes = (max(10, n * 25 // 100), max(10, n * 15 // 100))
    elif n < LARGE:
        sizes = (150, max(40, n * 12 // 100))
    else:
        sizes = (min(500, max(200, n * 20 // 100)), min(200, n * 10 // 100))
    for_holdout, for_valid = sizes[0] * holdout, sizes[1] * valid
    wanted = for_holdout + for_valid
    if n < SMALL and wanted > n // 2:
        for_valid = for_valid * (n // 2) // wanted
        for_holdout = n // 2 - for_valid if holdout else 0
    return for_holdout, for_valid


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """The training file in three; together they are all of it."""

    train: _Examples
    valid: _Examples
    holdout: _Examples


def _draw(train: Dataset, *, holdout: bool, valid: bool, rng: random.Random) -> _Drawn:
    """Whole groups, by label where answers are labels; every label keeps a group to learn from."""
    groups = group_by_prompt(train.examples)
    for_holdout, for_valid = part_sizes(len(groups), holdout=holdout, valid=valid)
    are_labels = count_labels(train.examples) is not None

    def stratum_of(group: str) -> str:
        return fold(groups[group][0].target) if are_labels else ""

    order = list(groups)
    rng.shuffle(order)
    held = _pick(order, for_holdout, stratum_of)
    validating = _pick([group for group in order if group not in held], for_valid, stratum_of)
    held, validating = _without_known_prompts(groups, held, validating)

    is_train_empty = len(held) + len(validating) == len(groups)
    if is_train_empty or (holdout and not held) or (valid and not validating):
        raise InvalidTrainingFile(_too_small(train, len(groups), holdout=holdout, valid=valid))
    return _Drawn(
        train=_in_order(train, lambda group: group not in held and group not in validating),
        valid=_in_order(train, lambda group: group in validating),
        holdout=_in_order(train, lambda group: group in held),
    )


def _pick(order: Sequence[_T], k: int, stratum_of: Callable[[_T], str]) -> frozenset[_T]:
    """The first k groups (or units of groups) in this order that keep the strata's shares."""
    sizes = Counter(stratum_of(group) for group in order)
    if sum(sizes.values()) - len(sizes) < k:  # too many rare labels for shares
        return frozenset(order[:k])
    shares = allocate(sizes, k)
    picked = []
    for group in order:
        stratum = stratum_of(group)
        if shares[stratum] > 0:
            shares[stratum] -= 1
            picked.append(group)
    return frozenset(picked)


def allocate(sizes: Mapping[str, int], k: int) -> dict[str, int]:
    """k places shared among strata in proportion to their sizes, by largest remainder.

    Every stratum keeps one member back; k must not exceed what is left then.
    """
    total = sum(sizes.values())
    shares = {stratum: k * size // total for stratum, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda stratum: (-(k * sizes[stratum] % total), stratum))
    missing = k - sum(shares.values())
    while missing:
        for stratum in by_remainder:
            if missing and shares[stratum] < sizes[stratum] - 1:
                shares[stratum] += 1
                missing -= 1
    return shares


def _without_known_prompts(
    groups: Mapping[str, list[Example]], held: frozenset[str], validating: frozenset[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """Move to train what another part answers in an earlier turn of a longer conversation.

    A row that moves brings earlier turns of its own, so this repeats until nothing moves.
    """

    def shown(chosen: Sequence[str]) -> frozenset[str]:
        return all_shown_prompts(row for group in chosen for row in groups[group])

    while True:
        taught = shown([group for group in groups if group not in held and group not in validating])
        known = (held | validating) & taught | held & shown([*validating])
        if not known:
            return held, validating
        held, validating = held - known, validating - known


def _inseparable(groups: Mapping[str, list[Example]], *, most: int) -> list[_Unit]:
    """The groups in units that can be held out: no row outside a unit answers a prompt of it.

    A unit that grew above `most` groups loses the one that most other groups answer (an opening that all
    conversations share, say): that one is in no unit, and so are those that its own rows answer.
    """
    answers = {group: set(all_shown_prompts(rows)) & groups.keys() for group, rows in groups.items()}
    answered_by = Counter(shown for group in groups for shown in answers[group])
    free = dict.fromkeys(groups)  # a set in the file's order
    while True:
        units = _connected(free, answers)
        biggest = max(units, key=len, default=())
        if len(biggest) <= most:
            return units
        leaving = [max(biggest, key=lambda group: answered_by[group])]
        while leaving:
            group = leaving.pop()
            del free[group]
            leaving += [shown for shown in answers[group] if shown in free and shown not in leaving]


def _connected(groups: Mapping[str, None], answers: Mapping[str, set[str]]) -> list[_Unit]:
    """The groups in sets that no answer joins to another set, all in the file's order."""
    unit_of = {group: [group] for group in groups}
    for group in groups:
        for shown in answers[group] & groups.keys():
            one, other = unit_of[group], unit_of[shown]
            if one is not other:
                one += other
                unit_of.update(dict.fromkeys(other, one))
    place = {group: i for i, group in enumerate(groups)}
    units = {id(unit): tuple(sorted(unit, key=place.__getitem__)) for unit in unit_of.values()}
    return sorted(units.values(), key=lambda unit: place[unit[0]])


def _deal(units: Sequence[_Unit], stratum_of: Callable[[_Unit], str], rng: random.Random) -> list[list[_Unit]]:
    """The units dealt to FOLDS folds of nearly equal size, each stratum evenly."""
    order = list(units)
    rng.shuffle(order)
    order.sort(key=len, reverse=True)
    folds: list[list[_Unit]] = [[] for _ in range(FOLDS)]
    sizes = [0] * FOLDS
    of_stratum = [Counter[str]() for _ in range(FOLDS)]
    for unit in order:
        stratum = stratum_of(unit)
        least = min(range(FOLDS), key=lambda k: (of_stratum[k][stratum], sizes[k]))
        folds[least].append(unit)
        sizes[least] += len(unit)
        of_stratum[least][stratum] += len(unit)
    return folds


def _never_held_out(train: Dataset, held_once: set[str]) -> Iterator[Finding]:
    lines = tuple(row.line for row in train.examples if _asked(row) not in held_once)
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


def _valid_beside(train: Dataset, valid: Dataset, *, judged: set[str], findings: list[Finding]) -> _Examples:
    """The rows of a given validation file that neither train nor the judged prompts give away."""
    taught = all_shown_prompts(train.examples)
    rows = _leave_out(
        valid,
        lambda row: _asked(row) in taught or not judged.isdisjoint(shown_prompts(row)),
        f"their prompts are in {train.name} or the holdout",
        findings,
    )
    if not rows:
        raise InvalidValidationFile(_nothing_left(valid, "validation", train))
    return _once(rows, valid.name, findings)


def _in_order(dataset: Dataset, chosen: Callable[[str], bool]) -> _Examples:
    return tuple(example for example in dataset.examples if chosen(_asked(example)))


def _asked(example: Example) -> str:
    return prompt_fingerprint(example.prompt)


def _leave_out(dataset: Dataset, leaks: Callable[[Example], bool], why: str, findings: list[Finding]) -> _Examples:
    """The file's examples that do not leak; the others become a finding."""
    leaking = {example.line for example in dataset.examples if leaks(example)}
    if leaking:
        lines = tuple(sorted(leaking))
        findings.append(
            Finding(
                code="leak_removed",
                severity="note",
                message=(
                    f"{len(lines)} of {len(dataset)} rows of {dataset.name} were left out because {why} "
                    f"({name_lines(lines)}). The training file keeps all of its rows."
                ),
                file=dataset.name,
                lines=lines,
            )
        )
    return tuple(example for example in dataset.examples if example.line not in leaking)


def _once(examples: _Examples, name: str, findings: list[Finding]) -> _Examples:
    """The examples less exact repetitions: one question must not be counted as two pieces of evidence."""
    distinct = _distinct(examples)
    kept = {example.line for example in distinct}
    lines = tuple(example.line for example in examples if example.line not in kept)
    if lines:
        findings.append(
            Finding(
                code="duplicate_removed",
                severity="note",
                message=(
                    f"{len(lines)} repeated rows of {name} are left out of scoring, so that each counts once there "
                    f"({name_lines(lines)})."
                ),
                file=name,
                lines=lines,
            )
        )
    return distinct


def _distinct(examples: _Examples) -> _Examples:
    """The first of each exact repetition."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(fingerprint(example.messages), example)
    return tuple(first.values())


def _sources(train: Dataset, valid: Dataset | None, holdout: Dataset | None) -> dict[str, str]:
    split_off = f"split from {train.name}"
    is_whole = valid is not None and holdout is not None
    return {
        "train": f"training file {train.name}" if is_whole else f"the rest of {train.name}",
        "valid": split_off if valid is None else f"validation file {valid.name}",
        "holdout": split_off if holdout is None else f"holdout file {holdout.name}",
    }


def _too_small(train: Dataset, n: int, *, holdout: bool, valid: bool) -> str:
    wanted = [name for name, is_wanted in (("a validation part", valid), ("a holdout", holdout)) if is_wanted]
    if not wanted:
        return f"{train.name} has no examples to train on. Add some."
    return (
        f"{train.name} has {len(train)} rows with {n} different prompts: too few to split off "
        f"{' and '.join(wanted)} and still train. Add examples with other prompts."
    )


def _nothing_left(dataset: Dataset, what: str, train: Dataset) -> str:
    return (
        f"The {what} file {dataset.name} has no row that is not in {train.name} or another part: nothing is "
        "left to measure with. Give rows with other prompts, or leave the file out to have a part split off."
    )
