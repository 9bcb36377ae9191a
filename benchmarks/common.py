"""What the benchmarks share: real tasks as splits, the bundled model, a trainee for a plan."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.plan import TrainPlan, make_plan
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Silent
from heldout.settings import Settings

if TYPE_CHECKING:
    from heldout.train.trainer import TorchTrainer

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
OWN = Path(__file__).parents[1] / "examples"
MODEL = "smollm2-135m-instruct"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; ends the program with a sentence when it is not there."""
    if not path.is_file():
        sys.exit(f"{path} is not there; the tickets in {OWN} come with the project (--task tickets)")
    return [json.loads(line) for line in path.read_text().splitlines()]


def examples_of(path: Path) -> tuple[Example, ...]:
    """Its rows as examples whose assistant messages are learned."""
    return tuple(
        Example(
            messages=tuple(row["messages"]),
            weights=tuple(int(message["role"] == "assistant") for message in row["messages"]),
            line=line,
        )
        for line, row in enumerate(rows_of(path), start=1)
    )


def split_of(task: str, seed: int = 0) -> Split:
    """A task's own train, validation and test files. `label_noise30` is banking12 with 30 % wrong labels in train."""
    if task == "tickets":
        files = {name: OWN / f"tickets.{name}.jsonl" for name in ("train", "validation", "holdout")}
    else:
        folder = SHARED / "tasks" / ("banking12" if task == "label_noise30" else task)
        files = {"train": folder / "train.jsonl", "validation": folder / "validation.jsonl"}
        files["holdout"] = folder / "test.jsonl"
        if task == "label_noise30":
            files["train"] = SHARED / "dirty" / "label_noise30.jsonl"
    parts = {name: examples_of(path) for name, path in files.items()}
    train = parts["train"]
    return Split(train=train, valid=parts["validation"], holdout=parts["holdout"], seed=seed, groups=len(train))


def part_of(split: Split, train: int, valid: int, holdout: int) -> Split:
    """That many rows of each part, drawn by the split's seed; 0: all of them."""

    def some(rows: tuple[Example, ...], count: int, name: str) -> tuple[Example, ...]:
        return tuple(random.Random(f"{split.seed}/{name}").sample(rows, min(count, len(rows)))) if count else rows

    return replace(
        split,
        train=some(split.train, train, "train"),
        valid=some(split.valid, valid, "valid"),
        holdout=some(split.holdout, holdout, "holdout"),
    )


def trainer(precision: str = "auto", *, use_kernels: bool = True) -> TorchTrainer:
    """Trains in this process; in the precision that this machine multiplies fastest, unless one is named, and with
    kernels where they can be compiled."""
    from heldout.train.trainer import TorchTrainer  # torch: what only reads rows needs none

    settings = Settings()
    return TorchTrainer(
        cache=settings.cache, aliases={}, allow_paths=True, precision=precision, use_kernels=use_kernels
    )


def plan_of(split: Split, seed: int, model: str = MODEL, **asked: Any) -> TrainPlan:
    """The plan that a job would make."""
    facts = trainer().facts(model)
    return make_plan(Hyperparameters.parse(asked), split, facts, seed=seed)


def trainee_of(
    plan: TrainPlan, split: Split, cache: Path | None, model: str = MODEL
) -> tuple[Any, list[Any], list[Any], list[Any]]:
    """A trainee and the rows of train, valid and holdout."""
    trainee = trainer().build(plan, split, model, cache)
    train, valid, holdout = (
        trainee.rows(part, name)
        for part, name in ((split.train, "train"), (split.valid, "valid"), (split.holdout, "holdout"))
    )
    trainee.prepare([*train, *valid, *holdout], Silent())
    return trainee, train, valid, holdout


def base_folder(model: str = MODEL) -> Path:
    """Where the bundled model lies unpacked."""
    from heldout.engine import catalogue, weights

    return weights.prepare(catalogue.resolve(model, {}, allow_paths=True), Settings().cache)


def hyperparameters_of(pairs: Sequence[str]) -> dict[str, Any]:
    """What `--set name=value …` asks for: JSON, or else text."""

    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    return {name: value(text) for name, text in (one.split("=", 1) for one in pairs)}


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")


def best_unseen(candidates: Sequence[Sequence[float]]) -> float:
    """The score of the best candidate on rows that did not choose it: every other row chooses for the rest. The best
    of many on the rows that chose it is too high by luck."""
    halves = []
    for chooses in (0, 1):
        best = max(candidates, key=lambda one: mean(one[chooses::2]))
        halves.append(mean(best[1 - chooses :: 2]))
    return mean(halves)
