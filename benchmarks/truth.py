"""Does the verdict tell the truth? Jobs on few rows, judged on many rows that no job has seen.

    .venv/bin/python benchmarks/truth.py --small                     two tasks, two traps, n = 64, one seed
    .venv/bin/python benchmarks/truth.py --small --cells noise30 --truth 200    as weak, of other cells
    .venv/bin/python benchmarks/truth.py [--cells banking12 noise30] [--n 64 240] [--seeds 0 1 2] [--out cells.jsonl]
    .venv/bin/python benchmarks/truth.py --report cells.jsonl        the table, without running anything
    .venv/bin/python benchmarks/truth.py --same-curve                TRL's own loss curves beside ours (needs trl)

A cell is a task or a trap (truth_traps.py), n rows that a user has, and a seed. Its arms are the best prompt, TRL's
defaults, TRL as its pages advise for LoRA, three epochs at our rate, ours (a job with its verdict), and a ceiling: the
best of all of them and of every look at trainings with several learning rates, chosen *on* the truth set. All arms have
the same rows, base model, number of trained layers and truth set.

Each finished cell is a line of `--out`; cells that stand there with the same settings are not run again, so an
interrupted run goes on where it was. What the numbers mean: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import MODEL, best_unseen, mean
from benchmarks.truth_report import report
from benchmarks.truth_traps import TASKS, TRAPS, TRUTH, rows_for

from heldout.settings import Settings

#: Changes when a cell's numbers mean something else; older ones are run again then.
VERSION = 3
SIZES, SEEDS = (64, 240), (0, 1, 2)
#: The cells of --small: those with the shortest prompts.
SMALL = ("sms-spam", "sentiment3", "invented-facts", "solved-by-prompt")
#: So that they end within minutes, at the price of weaker training in all arms: fewer layers, steps and truth rows.
SMALL_DEPTH = "0.9"
SMALL_CELL: dict[str, Any] = {"truth": 60, "epochs": 3, "rates": (1.0,)}
#: Times our learning rate, for the ceiling.
RATES = (1 / 3, 1.0, 3.0)
#: For all arms alike. Adapters on the upper quarter of the layers train three to four times faster (freezing.py).
DEPTH = "turbo"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is run once. Equal cells have equal numbers, but for time."""

    name: str  # of a task or a trap
    n: int
    seed: int
    model: str = MODEL
    depth: str = DEPTH
    truth: int = TRUTH  # rows, at most
    epochs: int | None = None  # at most, of ours and the ceiling; None: as a job plans them
    rates: tuple[float, ...] = RATES

    @property
    def key(self) -> str:
        """A fingerprint of all settings."""
        content = json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The finished cells of a file; a line that a killed process left unfinished is none."""
    if not path.is_file():
        return []
    cells = []
    for line in path.read_text().split("\n")[:-1]:  # what is behind the last line feed is unfinished
        try:
            cells.append(json.loads(line))
        except ValueError:
            print(f"{path}: passed over a line that is no cell: {line[:60]!r}", file=sys.stderr)
    return cells


def append(path: Path, found: dict[str, Any]) -> None:
    """One line, in one write; on a line of its own even behind one that a killed process left unfinished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    start = b"" if not content or content.endswith(b"\n") else b"\n"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(handle, start + json.dumps(found).encode() + b"\n")
        os.fsync(handle)
    finally:
        os.close(handle)


def left(cells: Sequence[Cell], done: Sequence[dict[str, Any]]) -> list[Cell]:
    """The cells that are not finished yet."""
    finished = {one["key"] for one in done}
    return [cell for cell in cells if cell.key not in finished]


def run(cell: Cell, directory: Path) -> dict[str, Any]:
    """Every arm of a cell on the same rows."""
    from benchmarks import truth_arms as arms

    from heldout.engine.base import ModelRef

    rows = rows_for(cell.name, cell.n, cell.seed, cell.truth)
    depth: dict[str, Any] = {"freeze_layers": number_or_name(cell.depth)}
    ours_asked = depth | ({"n_epochs": cell.epochs} if cell.epochs else {})
    # Read as the files they are: what cannot be read would not be trained on either.
    trained_on, truth = arms.examples(rows.train), arms.examples(rows.truth)
    engine = arms.Forced(trained_on, [*arms.examples(rows.valid or []), *truth], depth)
    started = time.perf_counter()
    outcome = arms.run_ours(rows, cell.seed, ours_asked, engine, directory / "job")
    seconds = {"ours": time.perf_counter() - started}
    verdict = outcome.verdict
    tuned = engine.right(ModelRef(base_model=MODEL, adapter=str(outcome.adapter.directory)), truth)
    rungs = arms.rungs_on_truth(rows, truth, cell.seed, engine)
    engine.close()

    def train(name: str, asked: dict[str, Any], looks: int) -> Any:
        plan = arms.plan_for(trained_on, cell.seed, depth | asked)
        key = arms.same_plan(plan)
        if key not in trained:
            trained[key] = arms.train(plan, trained_on, truth, looks, directory / name, directory / "activations")
        return trained[key]

    trained: dict[str, Any] = {}
    ceiling = {"early_stopping": False} | ({"n_epochs": cell.epochs} if cell.epochs else {})
    looked = {
        f"{rate:.2g}": train(f"rate-{rate:.2g}", ceiling | {"learning_rate_multiplier": rate}, arms.LOOKS)
        for rate in cell.rates
    }
    others = {
        "trl-default": train("trl-default", arms.TRL_DEFAULT, 1),
        "trl-advised": train("trl-advised", arms.TRL_ADVISED, 1),
        "three-epochs": train("three-epochs", arms.THREE_EPOCHS, 1),
    }
    seconds |= {name: one.seconds for name, one in others.items()}
    baseline = arms.plain_name(verdict.best_baseline)
    ended = ends_with(verdict.outcome, verdict.because, baseline, outcome)
    answers = {
        "best-prompt": rungs[baseline],
        **{name: one.last for name, one in others.items()},
        "ours": tuned if ended == "tuned" else rungs[ended],
    }
    seen = [right for one in looked.values() for right in one.right.values()]
    candidates = [list(map(float, one)) for one in (*answers.values(), tuned, *rungs.values(), *seen)]
    return {
        "key": cell.key,
        "version": VERSION,
        **asdict(cell),
        "truth_rows": len(truth),
        "scores": {name: mean(list(map(float, one))) for name, one in answers.items()},
        "ceiling": max(map(mean, candidates)),
        "ceiling_unseen": best_unseen(candidates),
        "seconds": seconds,
        "outcome": verdict.outcome,
        "because": verdict.because,
        "ended_with": ended,
        "baseline": baseline,
        "verdict": {
            name: verdict.numbers[name]
            for name in ("n_holdout", "tuned", "baseline", "difference", "interval", "p_better")
        },
        "truth_tuned": mean(list(map(float, tuned))),
        "truth_rungs": {name: mean(one) for name, one in rungs.items()},
        "truth_looks": {
            rate: {step: mean(list(map(float, r))) for step, r in one.right.items()} for rate, one in looked.items()
        },
        "train_loss": {name: mean(one.losses[-8:]) for name, one in others.items()},
        "ours_steps": [outcome.adapter.best_step, outcome.adapter.last_step],
        "findings": sorted({one.code for one in outcome.findings if one.severity != "note"}),
    }


def run_and_keep(cell: Cell, out: Path, threads: int) -> str:
    """Run a cell and append it to `out`; a sentence about it."""
    import torch

    torch.set_num_threads(threads)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        found = run(cell, Path(directory))
    seconds = time.perf_counter() - started
    append(out, found | {"threads": threads, "cell_seconds": seconds})
    return f"{cell.name} n={cell.n} seed={cell.seed}: {found['outcome']} ({found['because']}), {seconds:.0f} s"


def number_or_name(depth: str) -> float | str:
    """A share of the layers, or the name of a profile."""
    return float(depth) if depth[0].isdigit() else depth


def ends_with(outcome: str, because: str, baseline: str, job: Any) -> str:
    """What a user has who does as the verdict says: the tuned model, the classical model that is better, or the best
    prompt."""
    if outcome == "ship":
        return "tuned"
    if because == "cheaper_is_better":
        return str(max((one for one in job.rungs if one.kind == "classical"), key=lambda one: one.scores.mean).name)
    return baseline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*TASKS, *(trap.name for trap in TRAPS)]
    parser.add_argument(
        "--small", action="store_true", help="weak and quick settings, of four cells unless others are named"
    )
    parser.add_argument("--cells", nargs="+", choices=names, help="default: all")
    parser.add_argument("--n", nargs="+", type=int, help=f"default: {SIZES}")
    parser.add_argument("--seeds", nargs="+", type=int, help=f"default: {SEEDS}")
    parser.add_argument("--truth", type=int, help=f"rows of the truth set, at most; default: {TRUTH}")
    parser.add_argument("--depth", help=f"freeze_layers of all arms: full, fast, turbo or a share; {DEPTH}")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, each with its share of the cores")
    parser.add_argument("--out", type=Path, help="default: truth.jsonl in the cache folder")
    parser.add_argument("--report", type=Path, metavar="FILE", help="only print what is in this file")
    parser.add_argument("--same-curve", action="store_true", help="only compare loss curves with TRL's")
    asked = parser.parse_args()
    if asked.report:
        print(report(read_cells(asked.report)))
        return
    if asked.same_curve:
        from benchmarks.truth_trl import same_curve

        same_curve()
        return
    settings: dict[str, Any] = {"depth": SMALL_DEPTH, **SMALL_CELL} if asked.small else {}
    given = {"depth": asked.depth, "truth": asked.truth}
    settings |= {name: value for name, value in given.items() if value is not None}
    # Seed by seed, so that a run which is ended early has some of everything.
    cells = [
        Cell(name=name, n=n, seed=seed, **settings)
        for seed in asked.seeds or ([0] if asked.small else SEEDS)
        for n in asked.n or ([64] if asked.small else SIZES)
        for name in asked.cells or (SMALL if asked.small else names)
    ]
    out = asked.out or Settings().cache / ("truth-small.jsonl" if asked.small else "truth.jsonl")
    todo = left(cells, read_cells(out))
    print(f"{len(cells) - len(todo)} of {len(cells)} cells stand in {out}", file=sys.stderr)
    threads = max(1, Settings().job_threads // asked.jobs)
    # Processes of their own, begun afresh: torch is not to be forked.
    with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn")) as pool:
        for finished in as_completed([pool.submit(run_and_keep, cell, out, threads) for cell in todo]):
            print(finished.result(), file=sys.stderr, flush=True)
    keys = {cell.key for cell in cells}
    print(report([one for one in read_cells(out) if one["key"] in keys], of=len(cells)))


if __name__ == "__main__":
    main()
