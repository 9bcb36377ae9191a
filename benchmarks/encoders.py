"""How well and how fast encoder classifiers train: holdout accuracy and wall time of a job's training.

    .venv/bin/python benchmarks/encoders.py [--tasks banking12 banking77] [--seeds 0 1 2] [--freeze auto]

Time is that of everything between the split and the checkpoint to hand over: tokens, the head's start from the
frozen encoder, steps, validations, checkpoints, selection. "Frozen" is the encoder that nobody trained under a
logistic regression, with which the head starts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import mean, plan_of, split_of, trainee_of

from heldout.pipeline.watch import Silent
from heldout.train import loop
from heldout.train.candidates import choose
from heldout.train.memory import keep_freed_memory

ENCODER = "all-minilm-l6-v2"


def run(task: str, seed: int, freeze: str, model: str, directory: Path) -> str:
    """Train once, as a job does; a row of the table."""
    split = split_of(task, seed)
    plan = plan_of(split, seed, model, freeze_layers=freeze)
    keep_freed_memory()
    began = time.monotonic()
    trainee, train, valid, holdout = trainee_of(plan, split, directory / "activations", model)
    frozen = mean(loop.validate(trainee, holdout).right)
    looked = time.monotonic() - began
    course = loop.run(plan, trainee, train, valid, checkpoints=directory / "checkpoints", watch=Silent())
    selection, folders = choose(trainee, valid, course, checkpoints=directory / "checkpoints")
    seconds = time.monotonic() - began
    trainee.load(folders[selection.chosen.kind])
    score = mean(loop.validate(trainee, holdout).right)
    print(f"{course.stopped}; {selection.reason}", file=sys.stderr)
    return (
        f"| {task} | {seed} | {freeze} | {len(train)} | {len(holdout)} | {frozen:.1%} | {score:.1%} | "
        f"{seconds:.0f} s | {looked:.0f} s | {selection.chosen.step}, {course.step} of {plan.total_steps} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["banking12", "banking77"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--freeze", default="auto", help="freeze_layers: auto, full, fast, turbo")
    parser.add_argument("--model", default=ENCODER)
    asked = parser.parse_args()
    print("| task | seed | layers | train | holdout | frozen | trained | all | of it start | step kept, of |")
    print("|---|--:|---|--:|--:|--:|--:|--:|--:|--:|")
    for task in asked.tasks:
        for seed in asked.seeds:
            with tempfile.TemporaryDirectory() as directory:
                print(run(task, seed, asked.freeze, asked.model, Path(directory)), flush=True)


if __name__ == "__main__":
    main()
