"""How long a training takes here: a few of its own steps, a look at valid, a checkpoint. Nothing of it is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from heldout.engine import device
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.training import Timings
from heldout.pipeline.watch import Silent
from heldout.train import checkpoint, loop
from heldout.train.averaging import Average
from heldout.train.method import Trainee

Row = TypeVar("Row")

#: A step may be slow by chance: at least so many are measured.
LEAST_STEPS = 3
#: Valid examples that are looked at: several packs' worth.
VALIDATED = 48


def time_parts(
    plan: TrainPlan,
    trainee: Trainee[Row],
    train: Sequence[Row],
    valid: Sequence[Row],
    *,
    directory: Path,
    seconds: float,
    build: float,
) -> Timings:
    """Measure the parts of this training. `build` is what it took to come here."""
    lengths = [len(row) for row in train]  # type: ignore[arg-type]
    order = typical_steps(plan, lengths)
    looked_at = valid[:VALIDATED]
    sample = [train[row] for step in order[:LEAST_STEPS] for row in loop.batch_rows(plan, len(train), step)]
    prepare = _seconds(lambda: trainee.prepare([*sample, *looked_at], Silent())) / (len(sample) + len(looked_at))
    optimizer = loop.optimizer_of(plan, trainee)
    average = Average(trainee.parameters, plan.ema_decay)

    def take(step: int) -> None:
        found = loop.gradients(trainee, [train[row] for row in loop.batch_rows(plan, len(train), step)], step)
        loop.update(plan, trainee, optimizer, loop.learning_rate(plan, step, plan.learning_rate), found.norm)
        average.update(step)

    take(order[0])  # the first one also makes malloc's heap
    if device.is_gpu():  # and there the second step of a size is recorded (train/graphs.py), once in a training
        for first in (*order[:LEAST_STEPS], *order[:LEAST_STEPS]):
            take(first)
    taken, began = 0, time.perf_counter()
    while taken < LEAST_STEPS or time.perf_counter() - began < seconds:
        take(order[taken % len(order)])
        taken += 1
        if taken >= max(LEAST_STEPS, len(order)):
            break
    step = (time.perf_counter() - began) / taken
    with average.in_place():
        validation = _seconds(lambda: loop.validate(trainee, looked_at)) / max(1, len(looked_at))
    state: dict[str, Any] = loop.Course.of(plan, len(train)).state()
    save = _seconds(lambda: checkpoint.save(directory / "checkpoints", 1, trainee, optimizer, average, state))
    adapter = directory / "adapter"
    adapter.mkdir(parents=True)
    trainee.save(adapter)
    return Timings(
        build=build,
        prepare=prepare,
        step=step,
        validation=validation,
        save=save,
        steps=taken,
        tokens=sum(lengths),
        supervised=round(sum(map(trainee.weight, train))),
        adapter=adapter,
    )


def typical_steps(plan: TrainPlan, lengths: Sequence[int]) -> list[int]:
    """The steps of the first epoch, those with nearly the mean number of tokens first: a few of them stand for all."""
    steps = range(1, math.ceil(len(lengths) / plan.batch_size) + 1)
    tokens = {step: sum(lengths[row] for row in loop.batch_rows(plan, len(lengths), step)) for step in steps}
    mean = sum(tokens.values()) / len(tokens)
    return sorted(steps, key=lambda step: (abs(tokens[step] - mean), step))


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
