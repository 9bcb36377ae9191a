"""What the cells of `truth.py` come to: each judged by its truth set, and the pass marks. No torch here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.truth_traps import TASKS, TRAPS

from heldout.pipeline.evaluate.statistics import AS_GOOD, wilson

Cell = dict[str, Any]

ARMS = ("best-prompt", "trl-default", "trl-advised", "three-epochs", "ours")
#: Arms that are one training to its end.
TRAINED = ("trl-default", "trl-advised", "three-epochs")
#: Columns of the table before and behind the arms' scores.
FIRST = ("cell", "n", "seed", "verdict", "ends with")
LAST = ("ceiling", "unseen", "interval", "true gain", "minutes")
#: A gain on the truth set that a verdict should not have thrown away.
WORTHWHILE = 0.05
#: Of a one-sided 5 % on either side.
Z = 1.644854
#: Cells without which a coverage within its mark says nothing.
FOR_COVERAGE = 40
PASS, MISSED, OPEN = "PASS", "MISSED", "too few cells to say"


class Mark(NamedTuple):
    """A pass mark and what became of it."""

    name: str
    wanted: str
    found: str
    cells: int
    verdict: str


def gain(cell: Cell) -> float:
    """By how much the tuned model is better than the best baseline of its verdict, on the truth set."""
    return float(cell["truth_tuned"] - cell["truth_rungs"][cell["baseline"]])


def is_false_ship(cell: Cell) -> bool:
    """Shipped as better though it is not, or as cheaper and as good though it is not."""
    is_true = gain(cell) >= -AS_GOOD if cell["because"] == "cheaper" else gain(cell) > 0
    return cell["outcome"] == "ship" and not is_true


def is_false_reject(cell: Cell) -> bool:
    """Refused, and what the user has instead is worse by a worthwhile difference."""
    return cell["outcome"] == "dont_ship" and cell["truth_tuned"] - cell["scores"]["ours"] >= WORTHWHILE


def is_covered(cell: Cell) -> bool:
    """The verdict's interval has the true gain in it."""
    low, high = cell["verdict"]["interval"]
    return bool(low <= gain(cell) <= high)


def is_right(cell: Cell) -> bool:
    """A trap judged right: it is not shipped as a gain, and what the verdict says to do loses nothing on the truth
    set. To be undecided is no loss."""
    trap = next(one for one in TRAPS if one.name == cell["name"])
    if trap.never and cell["outcome"] == "ship":
        return False
    return not is_false_ship(cell) and not is_false_reject(cell)


def is_fair(cell: Cell) -> bool:
    """The user's rows and the truth set are of one kind."""
    return cell["name"] in TASKS or any(one.name == cell["name"] and one.fair for one in TRAPS)


def share_mark(name: str, wanted: str, hits: Sequence[bool], *, most: float = 1.0, least: float = 0.0) -> Mark:
    """PASS or MISSED when the share is surely so: with a one-sided probability of 5 % to be wrong."""
    if not hits:
        return Mark(name, wanted, "", 0, OPEN)
    low, high = wilson(sum(hits), len(hits), Z)
    verdict = PASS if least <= low and high <= most else MISSED if high < least or low > most else OPEN
    return Mark(name, wanted, f"{sum(hits)} of {len(hits)}", len(hits), verdict)


def mean_mark(name: str, wanted: str, values: Sequence[float], *, most: float, least: float = -math.inf) -> Mark:
    """The same for a mean of differences, by Student's t."""
    from scipy.stats import t

    if len(values) < 2:
        return Mark(name, wanted, _points(values[0]) if values else "", len(values), OPEN)
    middle = statistics.fmean(values)
    half = float(t.ppf(0.95, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    inside = least <= middle - half and middle + half <= most
    verdict = PASS if inside else MISSED if middle - half > most or middle + half < least else OPEN
    return Mark(name, wanted, f"{_points(middle)} ± {100 * half:.1f} points", len(values), verdict)


def marks(cells: Sequence[Cell]) -> Iterator[Mark]:
    """Every pass mark. Ordinary tasks are those without a trap."""
    ordinary = [one for one in cells if one["name"] in TASKS]
    fair = [one for one in cells if is_fair(one)]
    shipped = [is_false_ship(one) for one in cells]
    yield share_mark("false ship", "≤ 5 % of cells", shipped, most=0.05)
    covered = [is_covered(one) for one in fair]
    mark = share_mark("interval coverage", "85 to 95 %", covered, least=0.85, most=0.95)
    if mark.verdict == OPEN and len(covered) >= FOR_COVERAGE and 0.85 <= sum(covered) / len(covered) <= 0.95:
        mark = mark._replace(verdict=PASS)
    yield mark
    optimism = [one["verdict"]["tuned"] - one["truth_tuned"] for one in fair]
    yield mean_mark("optimism", "within 1 point", optimism, least=-0.01, most=0.01)
    for n, most in ((64, None), (240, 0.02)):
        regret = [one["ceiling"] - one["scores"]["ours"] for one in ordinary if one["n"] == n]
        mark = mean_mark(
            f"regret, n = {n}", f"≤ {100 * most:.0f} points" if most else "", regret, most=most or math.inf
        )
        yield mark if most else mark._replace(verdict="no mark")
    right = [is_right(one) for one in cells if one["name"] not in TASKS]
    yield share_mark("traps judged right", "≥ 90 %", right, least=0.90)
    behind = [one["scores"]["ours"] - one["scores"]["trl-advised"] for one in ordinary]
    mark = mean_mark("ours over TRL as advised", "≥ -0.5 points", behind, least=-0.005, most=math.inf)
    yield mark
    rejected = [is_false_reject(one) for one in cells if gain(one) >= WORTHWHILE]
    yield share_mark("false reject, of gains ≥ 5 points", "", rejected)._replace(verdict="no mark")
    undecided = [one["outcome"] == "inconclusive" for one in cells if gain(one) >= WORTHWHILE]
    yield share_mark("undecided, of gains ≥ 5 points", "", undecided)._replace(verdict="no mark")


def report(cells: Sequence[Cell], of: int = 0) -> str:
    """All of it as Markdown."""
    lines = [
        f"{len(cells)} cells" + (f" of {of}" if of else ""),
        "",
        f"| {' | '.join((*FIRST, *ARMS, *LAST))} |",
        f"|---|--:|--:|---|---|{'--:|' * len((*ARMS, *LAST))}",
    ]
    for one in sorted(cells, key=lambda one: (_place(one["name"]), one["n"], one["seed"])):
        low, high = one["verdict"]["interval"]
        scores = " | ".join(f"{100 * one['scores'][arm]:.1f}" for arm in ARMS)
        wrong = [word for word, holds in _wrong(one) if holds]
        lines.append(
            f"| {one['name']} | {one['n']} | {one['seed']} | {one['outcome']}, {one['because']}"
            f"{''.join(f' **{word}**' for word in wrong)} | {one['ended_with']} | {scores} | "
            f"{100 * one['ceiling']:.1f} | {100 * one['ceiling_unseen']:.1f} | {100 * low:+.1f} to {100 * high:+.1f} | "
            f"{100 * gain(one):+.1f} | {one['cell_seconds'] / 60:.1f} |"
        )
    lines += ["", *losses(cells)]
    lines += ["", "| measure | pass mark | found | cells | |", "|---|---|--:|--:|---|"]
    lines += [f"| {' | '.join(map(str, mark))} |" for mark in marks(cells)]
    return "\n".join(lines)


def losses(cells: Sequence[Cell]) -> list[str]:
    """Lines of the table of training losses: of an answer's tokens, nats, mean of the last eight steps; TRL's defaults
    learn whole conversations."""
    lines = [
        f"| training loss at the end | n | seed | {' | '.join(TRAINED)} |",
        f"|---|--:|--:|{'--:|' * len(TRAINED)}",
    ]
    for one in sorted(cells, key=lambda one: (_place(one["name"]), one["n"], one["seed"])):
        found = " | ".join(f"{one['train_loss'][arm]:.3f}" for arm in TRAINED)
        lines.append(f"| {one['name']} | {one['n']} | {one['seed']} | {found} |")
    return lines


def _wrong(cell: Cell) -> Iterator[tuple[str, bool]]:
    yield "false ship", is_false_ship(cell)
    yield "false reject", is_false_reject(cell)
    yield "trap not seen", cell["name"] not in TASKS and not is_right(cell)
    yield "outside", is_fair(cell) and not is_covered(cell)


def _place(name: str) -> int:
    return [*TASKS, *(one.name for one in TRAPS)].index(name)


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
