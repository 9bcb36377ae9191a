"""`lr_search: light`: three learning rates, the worse ones dropped early, judged by validation loss."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from heldout.errors import InvalidTrainingFile, InvalidValue
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.watch import Watch
from heldout.train import loop
from heldout.train.averaging import copy, put
from heldout.train.method import Trainee

Row = TypeVar("Row")

#: The rates that are tried, as multiples of the plan's.
MULTIPLES = (1 / 3, 1.0, 3.0)
#: The three rates take this share of an epoch each; the two that are left take as much again.
SHARE, AT_LEAST = 0.25, 10
RECORD = "learning_rate.json"


@dataclass
class Trial:
    """A rate, and everything that was trained with it so far."""

    rate: float
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any] | None = None
    loss: float = math.inf  # mean nats per valid example; infinite once something was not a number


def learning_rate(
    plan: TrainPlan,
    trainee: Trainee[Row],
    train: Sequence[Row],
    valid: Sequence[Row],
    *,
    copies: Sequence[Sequence[Row]] = (),
    directory: Path,
    watch: Watch,
) -> TrainPlan:
    """The plan with the rate whose validation loss is lowest; the trainee is as it was before.

    What was found is written into `directory`: a job that is taken up again does not search again.
    Raises InvalidTrainingFile when no rate leads to a number.
    """
    if not valid:
        raise InvalidValue("lr_search needs validation examples to compare rates by", param="hyperparameters.lr_search")
    record = directory / RECORD
    if record.is_file():
        return _with_rate(plan, json.loads(record.read_text()), watch)
    fresh = copy(trainee.parameters)
    trials = [Trial(plan.learning_rate * multiple, fresh) for multiple in MULTIPLES]
    steps = max(AT_LEAST, round(SHARE * math.ceil(len(train) / plan.batch_size)))
    total, done = steps * (len(trials) + 2), 0

    def tell() -> None:
        nonlocal done
        done += 1
        watch.progress("choosing a learning rate", done, total)

    for first in (1, steps + 1):
        for trial in trials:
            end = done + steps  # also of a trial that breaks down before
            sound = _train(plan, trainee, train, copies, trial, range(first, first + steps), tell)
            trial.loss = _loss(trainee, valid) if sound else math.inf
            done = end
        trials = sorted(trials, key=lambda trial: trial.loss)[:2]
    best = min(trials, key=lambda trial: trial.loss)
    if not math.isfinite(best.loss):
        raise InvalidTrainingFile(
            f"no learning rate from {min(MULTIPLES) * plan.learning_rate:.2g} to "
            f"{max(MULTIPLES) * plan.learning_rate:.2g} leads to a validation loss that is a number",
            param="hyperparameters.learning_rate",
        )
    put(trainee.parameters, fresh)
    found = {
        "rate": best.rate,
        "reason": f"lr_search: the lowest validation loss of three rates after {2 * steps} steps ({best.loss:.3g})",
    }
    directory.mkdir(parents=True, exist_ok=True)
    temporary = record.with_suffix(".writing")
    temporary.write_text(json.dumps(found))
    os.replace(temporary, record)
    return _with_rate(plan, found, watch)


def _train(
    plan: TrainPlan,
    trainee: Trainee[Row],
    train: Sequence[Row],
    copies: Sequence[Sequence[Row]],
    trial: Trial,
    steps: range,
    tell: Callable[[], None],
) -> bool:
    """Take these steps at the trial's rate after a warm-up, from where the trial was left. False if one of
    them was not a number."""
    put(trainee.parameters, trial.weights)
    optimizer = loop.optimizer_of(plan, trainee)
    if trial.optimizer:
        optimizer.load_state_dict(trial.optimizer)
    for step in steps:
        found = loop.gradients(trainee, loop.batch(plan, train, copies, step), step)
        if not (math.isfinite(found.loss) and math.isfinite(found.norm)):
            optimizer.zero_grad(set_to_none=True)
            return False
        loop.update(plan, trainee, optimizer, trial.rate * min(1.0, step / max(1, plan.warmup_steps)), found.norm)
        tell()
    trial.weights = copy(trainee.parameters)
    trial.optimizer = optimizer.state_dict()
    return True


def _loss(trainee: Trainee[Row], valid: Sequence[Row]) -> float:
    losses = loop.validate(trainee, valid).calibrated
    mean = sum(losses) / len(losses)
    return mean if math.isfinite(mean) else math.inf


def _with_rate(plan: TrainPlan, found: dict[str, Any], watch: Watch) -> TrainPlan:
    chosen = replace(plan, learning_rate=found["rate"], reasons={**plan.reasons, "learning_rate": found["reason"]})
    watch.message(f"Learning rate {chosen.learning_rate:.2g}: {found['reason']}")
    watch.planned(chosen)
    return chosen
