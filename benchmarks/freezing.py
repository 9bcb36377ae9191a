"""What frozen lower layers cost in accuracy and save in time: `full`, `fast` and `turbo` on real tasks.

    .venv/bin/python benchmarks/freezing.py [--tasks banking12 snips-slots sms-spam clinc10-oos] [--seeds 0 1 2]
        [--rows 0 0 0] [--epochs 3]

Every run is a job's training with its defaults: early stopping, selection on validation. The score is the
share of holdout answers whose every token is the argmax, which greedy decoding would give. With fewer rows,
those of a seed are the same for every profile.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import MODEL, mean, part_of, plan_of, split_of, trainee_of

from heldout.pipeline.watch import Silent
from heldout.train import loop
from heldout.train.candidates import choose
from heldout.train.memory import keep_freed_memory

TASKS = ("banking12", "snips-slots", "sms-spam", "clinc10-oos")
PROFILES = ("full", "fast", "turbo")


def run(
    task: str, seed: int, profile: str, rows: Sequence[int], asked: dict[str, Any], directory: Path
) -> dict[str, Any]:
    """Train once and score the selected checkpoint on the holdout."""
    split = part_of(split_of(task, seed), *rows)
    plan = plan_of(split, seed, MODEL, freeze_layers=profile, **asked)
    trainee, train, valid, holdout = trainee_of(plan, split, directory / "activations")
    keep_freed_memory()
    course = loop.run(plan, trainee, train, valid, checkpoints=directory / "checkpoints", watch=Silent())
    selection, folders = choose(trainee, valid, course, checkpoints=directory / "checkpoints")
    trainee.load(folders[selection.chosen.kind])
    return {
        "task": task,
        "seed": seed,
        "profile": profile,
        "asked": asked,
        "rows": [len(split.train), len(split.valid), len(split.holdout)],
        "score": mean(loop.validate(trainee, holdout).right),
        "examples_per_second": course.examples / course.step_seconds,
        "kept": selection.chosen.step,
        "steps": course.step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=PROFILES)
    parser.add_argument("--epochs", type=int, help="instead of the plan's own")
    parser.add_argument("--rows", nargs=3, type=int, default=[0, 0, 0], help="of train, valid, holdout; 0: all")
    parser.add_argument("--out", type=Path, help="append each run as a line of JSON")
    asked = parser.parse_args()
    more = {"n_epochs": asked.epochs} if asked.epochs else {}
    print("| task | seed | profile | holdout | examples/s | step kept, of |")
    print("|---|--:|---|--:|--:|--:|")
    for seed in asked.seeds:
        for task in asked.tasks:
            for profile in asked.profiles:
                with tempfile.TemporaryDirectory() as directory:
                    found = run(task, seed, profile, asked.rows, more, Path(directory))
                print(
                    f"| {task} | {seed} | {profile} | {found['score']:.1%} | {found['examples_per_second']:.2f} | "
                    f"{found['kept']}, {found['steps']} |",
                    flush=True,
                )
                if asked.out:
                    with asked.out.open("a") as file:
                        file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
