"""Does the kept checkpoint generalise? Every evaluation of a long run is scored on the holdout.

    .venv/bin/python benchmarks/early_stopping.py [--tasks sentiment3 label_noise30] [--seeds 0 1 2]
        [--model smollm2-135m-instruct] [--set freeze_layers=turbo]

A run goes as a job's would, until it stops and its checkpoint is selected; then it goes on to its last epoch
from where it stopped, as if nothing had stopped it. The holdout decides nothing; it is looked at to judge the
rule. The best of so many looks is too high by luck: "best, unseen" is chosen on one half of the holdout and scored on
the other.
Scores are shares of answers whose every token is the argmax, which greedy decoding would give.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import MODEL, best_unseen, hyperparameters_of, mean, plan_of, split_of, trainee_of

from heldout.pipeline.training import CurvePoint
from heldout.pipeline.watch import Silent
from heldout.train import checkpoint, loop
from heldout.train.averaging import Average
from heldout.train.candidates import choose


class Looking(Silent):
    """Scores the holdout whenever validation was looked at, with the averaged weights that are saved then."""

    def __init__(self, trainee: Any, holdout: list[Any], decay: float) -> None:
        self.trainee, self.holdout = trainee, holdout
        self.average = Average(trainee.parameters, decay)
        self.right: dict[int, list[float]] = {}  # step -> 1 for each answer that is right
        self.losses: dict[int, tuple[float, float]] = {}  # on validation, and calibrated

    def metrics(self, point: CurvePoint, total_steps: int) -> None:
        self.average.update(point.step)
        if point.valid_loss is not None and point.valid_calibrated_loss is not None:
            self.losses[point.step] = (point.valid_loss, point.valid_calibrated_loss)
            with self.average.in_place():
                self.right[point.step] = list(map(float, loop.validate(self.trainee, self.holdout).right))


def run(task: str, seed: int, epochs: int, model: str, asked: dict[str, Any], directory: Path) -> dict[str, Any]:
    """One long run: as a job would run it, and then on to the end as if nothing had stopped it."""
    split = split_of(task, seed)
    plan = plan_of(split, seed, model, n_epochs=epochs, **asked)
    trainee, train, valid, holdout = trainee_of(plan, split, directory / "activations", model)
    watch, checkpoints = Looking(trainee, holdout, plan.ema_decay), directory / "checkpoints"
    course = loop.run(plan, trainee, train, valid, checkpoints=checkpoints, watch=watch)
    stopped = course.step
    selection, folders = choose(trainee, valid, course, checkpoints=checkpoints)
    trainee.load(folders[selection.chosen.kind])
    kept_score = mean(loop.validate(trainee, holdout).right)
    if stopped < plan.total_steps:
        _, state = checkpoint.latest(checkpoints) or (None, {})
        checkpoint.rewind(checkpoints, stopped, {**state, "stopped": ""})
        on = replace(plan, early_stopping=False)
        loop.run(on, trainee, train, valid, checkpoints=checkpoints, watch=watch)
    scores = {step: mean(right) for step, right in watch.right.items()}
    best = max(scores, key=lambda step: scores[step])
    return {
        "task": task,
        "seed": seed,
        "model": model,
        "asked": asked,
        "stopped_at": stopped,
        "of": plan.total_steps,
        "kept": selection.chosen.step,
        "kind": selection.chosen.kind,
        "kept_score": kept_score,
        "best_score": scores[best],
        "best_unseen": best_unseen(list(watch.right.values())),
        "best_step": best,
        "last_score": scores[plan.total_steps],
        "losses": watch.losses,
        "scores": scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["sentiment3", "label_noise30"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--set", nargs="*", default=[], help="hyperparameters, name=value")
    parser.add_argument("--out", type=Path, help="append each run as a line of JSON")
    asked = parser.parse_args()
    chosen = hyperparameters_of(asked.set)
    print("| task | seed | stopped at | kept | kept, holdout | best of the run | best, unseen | last of the run |")
    print("|---|--:|--:|---|--:|--:|--:|--:|")
    for task in asked.tasks:
        for seed in asked.seeds:
            with tempfile.TemporaryDirectory() as directory:
                found = run(task, seed, asked.epochs, asked.model, chosen, Path(directory))
            print(
                f"| {task} | {seed} | {found['stopped_at']} of {found['of']} | {found['kept']} ({found['kind']}) | "
                f"{found['kept_score']:.1%} | {found['best_score']:.1%} (step {found['best_step']}) | "
                f"{found['best_unseen']:.1%} | "
                f"{found['last_score']:.1%} |",
                flush=True,
            )
            if asked.out:
                with asked.out.open("a") as file:
                    file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
