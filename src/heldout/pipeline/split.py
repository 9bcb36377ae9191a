"""Dataset -> Split: three disjoint parts, so that no score comes from a prompt the model was shown."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from heldout.errors import InvalidTrainingFile
from heldout.pipeline.checks.groups import fingerprint, fold, prompt_fingerprint
from heldout.pipeline.checks.near import Near
from heldout.pipeline.checks.parts import name_lines
from heldout.pipeline.checks.rows import Rows
from heldout.pipeline.giveaways import find_giveaways
from heldout.pipeline.given import Files, clean
from heldout.pipeline.types import Dataset, Example, Finding, Split
from heldout.pipeline.units import Unit, Units, find_units

#: Below this many distinct prompts a holdout of their own says little: cross-fitting uses every row twice.
SMALL = 300
LARGE = 1000
#: What a validation row costs, as a share of a training row: no backward pass, larger packs.
VALIDATION_COST = 0.4
#: The two validations of an epoch (plan.py) may take this share of its training, and have so many rows in any case:
#: with fewer, which step is the best is a matter of luck (a share of right answers has a standard error of 3.5 points).
VALIDATION_SHARE, LEAST_VALID = 0.5, 200

_Examples = tuple[Example, ...]
_T = TypeVar("_T")


def split_dataset(
    train: Dataset, valid: Dataset | None, holdout: Dataset | None, *, seed: int, keep_leaks: bool = False
) -> tuple[Split, tuple[Finding, ...]]:
    """The parts of a job, and what was left out of them.

    Rows that ask the same or nearly the same, are about one long passage, belong to one group the user declared
    or to one conversation are in one part: no unit (see units.py) is divided. Files that are given are used as
    they are, less the rows that another part gives away, or with them (`keep_leaks`; the split says so), and of
    `valid` as many rows as cost little; what is not given is split off `train`. Rows are never left out of `train`,
    where repeated rows stay too; in the other parts they count once. Questions that are held out of `train` are asked
    without codes that give their answers away (giveaways.py), unless `keep_leaks`. Same files and seed, same split.

    Raises the file's InvalidTrainingFile, InvalidValidationFile or InvalidHoldoutFile when a part would be
    empty.
    """
    files = Files.compare(train, valid, holdout)
    findings: list[Finding] = []
    drawn = _draw(
        train, files.near, holdout=holdout is None, valid=valid is None, rng=random.Random(seed), findings=findings
    )
    judged = {prompt_fingerprint(row.prompt) for row in drawn.holdout}
    given = clean(files, drawn=judged, keep_leaks=keep_leaks)
    findings += given.findings
    if valid is None:
        valid_rows = once(drawn.valid, train.name, findings)
    else:
        valid_rows = affordable(once(given.valid, valid.name, findings), len(drawn.train), valid.name, seed, findings)
    held_file = (train if holdout is None else holdout).name
    held = once(drawn.holdout if holdout is None else given.holdout, held_file, findings)
    giveaways = find_giveaways(
        files.rows, with_valid=valid is not None, with_holdout=holdout is not None, keep=keep_leaks
    )
    told, caveats = giveaways.told(held, held_file)
    findings += told
    split = Split(
        train=drawn.train,
        valid=valid_rows,
        holdout=giveaways.asked(held),
        seed=seed,
        groups=len({prompt_fingerprint(row.prompt) for row in train.examples}),
        sources=sources(train, valid, holdout),
        caveats=(*given.caveats, *caveats),
        giveaways=giveaways,
    )
    return split, tuple(findings)


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


def _draw(
    train: Dataset, near: Near, *, holdout: bool, valid: bool, rng: random.Random, findings: list[Finding]
) -> _Drawn:
    """Whole units, by label or form of answer; every label keeps a unit to learn from."""
    n = len({prompt_fingerprint(row.prompt) for row in train.examples})
    for_holdout, for_valid = part_sizes(n, holdout=holdout, valid=valid)
    if not (holdout or valid):
        if not n:
            raise InvalidTrainingFile(too_small(train, n, holdout=holdout, valid=valid))
        return _Drawn(train=tuple(train.examples), valid=(), holdout=())
    found = find_units(train, near, most=for_holdout or for_valid)
    findings += found.findings
    stratum_of = strata(train, found)

    order = list(found.units)
    rng.shuffle(order)
    held = pick(order, for_holdout, stratum_of, size_of=len)
    validating = pick([unit for unit in order if unit not in held], for_valid, stratum_of, size_of=len)
    in_holdout, in_valid = ({prompt for unit in units for prompt in unit} for units in (held, validating))

    is_train_empty = len(in_holdout) + len(in_valid) == n
    if is_train_empty or (holdout and not held) or (valid and not validating):
        raise InvalidTrainingFile(too_small(train, n, holdout=holdout, valid=valid, findings=found.findings))
    return _Drawn(
        train=in_order(train, lambda prompt: prompt not in in_holdout and prompt not in in_valid),
        valid=in_order(train, in_valid.__contains__),
        holdout=in_order(train, in_holdout.__contains__),
    )


def strata(train: Dataset, found: Units) -> Callable[[Unit], str]:
    """What keeps its share in the parts: a unit's label, or the form of its answer where answers are no labels."""
    are_labels = Rows.read([train]).labels() if train.examples else False

    def stratum_of(unit: Unit) -> str:
        answer = found.prompts[unit[0]][0].target
        return fold(answer) if are_labels else form_of(answer)

    return stratum_of


def form_of(answer: str) -> str:
    """JSON with its keys, a list, code, or text."""
    text = answer.strip()
    if text.startswith(("{", "[")):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return "text"
        return f"JSON {sorted(value)}" if isinstance(value, dict) else "JSON list"
    return "code" if text.startswith("```") else "text"


def pick(
    order: Sequence[_T], k: int, stratum_of: Callable[[_T], str], *, size_of: Callable[[_T], int] = lambda _: 1
) -> frozenset[_T]:
    """The first ones in this order whose sizes add up to k at most and that keep the strata's shares."""
    sizes: Counter[str] = Counter()
    for one in order:
        sizes[stratum_of(one)] += size_of(one)
    if sum(sizes.values()) - len(sizes) < k:  # too many rare labels for shares
        return _first(order, k, size_of)
    shares = allocate(sizes, k)
    picked: list[_T] = []
    for one in order:
        stratum = stratum_of(one)
        if shares[stratum] >= size_of(one):
            shares[stratum] -= size_of(one)
            picked.append(one)
    missing = sum(shares.values())
    if missing:  # units that no share had room for; each stratum still keeps something to learn from
        left = sizes - Counter(stratum for one in picked for stratum in [stratum_of(one)] * size_of(one))
        for one in [one for one in order if one not in picked]:
            stratum, size = stratum_of(one), size_of(one)
            if size <= missing and size < left[stratum]:
                missing, left[stratum] = missing - size, left[stratum] - size
                picked.append(one)
    return frozenset(picked)


def _first(order: Iterable[_T], k: int, size_of: Callable[[_T], int]) -> frozenset[_T]:
    picked = []
    for one in order:
        if size_of(one) <= k:
            k -= size_of(one)
            picked.append(one)
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


def in_order(dataset: Dataset, chosen: Callable[[str], bool]) -> _Examples:
    """The rows whose prompts are chosen, in the file's order."""
    return tuple(example for example in dataset.examples if chosen(prompt_fingerprint(example.prompt)))


def once(examples: _Examples, name: str, findings: list[Finding]) -> _Examples:
    """The examples less exact repetitions: one question must not be counted as two pieces of evidence."""
    distinct_ones = distinct(examples)
    kept = {example.line for example in distinct_ones}
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
    return distinct_ones


def distinct(examples: _Examples) -> _Examples:
    """The first of each exact repetition."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(fingerprint(example.messages), example)
    return tuple(first.values())


def affordable(valid: _Examples, n: int, name: str, seed: int, findings: list[Finding]) -> _Examples:
    """As many rows of a validation file, in its order, as cost little beside training on n rows."""
    most = max(LEAST_VALID, int(VALIDATION_SHARE * n / (2 * VALIDATION_COST)))
    if len(valid) <= most:
        return valid
    chosen = random.Random(f"{seed}/valid").sample(range(len(valid)), most)
    findings.append(
        Finding(
            code="valid_drawn",
            severity="note",
            message=(
                f"{most} of the {len(valid)} rows of {name} are drawn to stop training by: with all of them validation "
                f"would take more than half of the time that training on {n} rows does. The others would say more in a "
                "holdout file."
            ),
            file=name,
        )
    )
    return tuple(valid[row] for row in sorted(chosen))


def sources(train: Dataset, valid: Dataset | None, holdout: Dataset | None) -> dict[str, str]:
    """Where each part comes from, in words."""
    split_off = f"split from {train.name}"
    is_whole = valid is not None and holdout is not None
    return {
        "train": f"training file {train.name}" if is_whole else f"the rest of {train.name}",
        "valid": split_off if valid is None else f"validation file {valid.name}",
        "holdout": split_off if holdout is None else f"holdout file {holdout.name}",
    }


def too_small(train: Dataset, n: int, *, holdout: bool, valid: bool, findings: Sequence[Finding] = ()) -> str:
    """Why this file of n prompts cannot be split."""
    wanted = [name for name, is_wanted in (("a validation part", valid), ("a holdout", holdout)) if is_wanted]
    if not wanted:
        return f"{train.name} has no examples to train on. Add some."
    grouped = "".join(f" {finding.message}" for finding in findings)
    return (
        f"{train.name} has {len(train)} rows with {n} different prompts: too few to split off "
        f"{' and '.join(wanted)} and still train. Add examples with other prompts.{grouped}"
    )
