"""Does the learning curve know what twice as many examples give? `python benchmarks/learning_curve.py [--rung tfidf]`

Of each task with labels, a file of n rows is drawn; the curve is drawn from it and read at 2n. The truth is the error
of models taught by the file and n further rows, on all rows that are left, the mean of three draws of the further rows.
The true gain is that error against the file's alone, the mean over all seeds: of a single one it would be noise. Cells
whose labels have fewer than three rows each are left out: such a file does not count as labelled.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import SHARED, examples_of

from heldout.engine.local import LocalEngine
from heldout.pipeline.advise.learning_curve import WORTH, Fit, MoreData, draw_curve, predict
from heldout.pipeline.advise.rungs import frozen_fit, tfidf_fit
from heldout.pipeline.checks.groups import MIN_EXAMPLES_PER_LABEL, fold, group_by_prompt
from heldout.pipeline.ladder import one_thread
from heldout.pipeline.types import Example
from heldout.pipeline.watch import Silent
from heldout.settings import DEFAULT_ENCODER, Settings

TASKS = ("sms-spam", "sentiment3", "banking12", "clinc10-oos", "banking77")
SHARES = (0.15, 0.3)
DRAWS = 3


class Trial(NamedTuple):
    """One file: what the curve said, and the errors with n and with 2n rows."""

    said: MoreData
    now: float
    double: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--rung", default="frozen", choices=["frozen", "tfidf"])
    parser.add_argument("--seeds", type=int, default=8)
    asked = parser.parse_args()
    print("| task | n | error at 2n | median miss | covered | gain | median miss | covered | advised |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    everything: list[tuple[list[Trial], float]] = []
    for task in asked.tasks:
        rows = rows_of(task)
        labels = [fold(row.target) for row in rows]
        fit = fit_of(asked.rung, rows, labels)
        for share in SHARES:
            n = int(share * len(rows))
            if n < MIN_EXAMPLES_PER_LABEL * len(set(labels)):
                continue
            with one_thread():
                trials = [trial(task, labels, fit, n, seed) for seed in range(asked.seeds)]
            gain = statistics.fmean(one.now - one.double for one in trials)
            everything.append((trials, gain))
            print(f"| {task} | {n} | {row_of([(trials, gain)])} |", flush=True)
    print(f"| all | | {row_of(everything)} |")


def rows_of(task: str) -> list[Example]:
    """All rows of a task, one for each prompt."""
    folder = SHARED / "tasks" / task
    rows = [row for part in ("train", "validation", "test") for row in examples_of(folder / f"{part}.jsonl")]
    return [group[0] for group in group_by_prompt(rows).values()]


def fit_of(rung: str, rows: Sequence[Example], labels: Sequence[str]) -> Fit:
    """The rung as the product fits it."""
    if rung == "tfidf":
        return tfidf_fit(rows, labels)
    engine = LocalEngine(cache=Settings().cache, aliases={})
    found = frozen_fit(rows, labels, lambda texts: engine.embed(DEFAULT_ENCODER, texts), Silent())
    assert found is not None
    return found


def trial(task: str, labels: Sequence[str], fit: Fit, n: int, seed: int) -> Trial:
    """Draw a file, say what twice as many rows give, and see."""
    rng = random.Random(f"{task}{seed}")
    order = rng.sample(range(len(labels)), len(labels))
    file, rest = order[:n], order[n:]

    def within(taught: Sequence[int], asked: Sequence[int]) -> Sequence[str]:
        return fit([file[row] for row in taught], [file[row] for row in asked])

    curve = draw_curve([labels[row] for row in file], within, seed=seed)
    now, double = [], []
    for _ in range(DRAWS):
        shuffled = rng.sample(rest, len(rest))
        more, left = shuffled[:n], shuffled[n:]
        for taught, errors in ((file, now), ([*file, *more], double)):
            answers = fit(taught, left)
            errors.append(statistics.fmean(answer != labels[row] for answer, row in zip(answers, left, strict=True)))
    return Trial(predict(curve, n, rung="", seed=seed), statistics.fmean(now), statistics.fmean(double))


def row_of(cells: Sequence[tuple[list[Trial], float]]) -> str:
    """Misses in points; shares of 80 % intervals that cover; how often collecting was advised, and rightly so."""
    found = [(one, gain) for trials, gain in cells for one in trials]
    said = [one.said for one, _ in found]
    errors = [abs(one.said.error_at_double - one.double) for one, _ in found]
    covered = [one.said.error_interval.low <= one.double <= one.said.error_interval.high for one, _ in found]
    gains = [abs(one.said.gain - gain) for one, gain in found]
    inside = [one.said.interval.low <= gain <= one.said.interval.high for one, gain in found]
    right = sum(one.said.pays and gain >= WORTH for one, gain in found)
    return (
        f"{100 * statistics.fmean(one.double for one, _ in found):.1f} % | {100 * statistics.median(errors):.2f} | "
        f"{statistics.fmean(covered):.0%} | {100 * statistics.fmean(gain for _, gain in found):.1f} | "
        f"{100 * statistics.median(gains):.2f} | {statistics.fmean(inside):.0%} | "
        f"{sum(one.pays for one in said)} of {len(said)}, {right} rightly"
    )


if __name__ == "__main__":
    main()
