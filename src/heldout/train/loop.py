"""The training loop, in time order: step, report, validate, save, stop."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from heldout.engine.template import Tokens
from heldout.errors import InvalidTrainingFile
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.training import CurvePoint
from heldout.pipeline.watch import Watch
from heldout.train import checkpoint, sft
from heldout.train.packing import micro_batches
from heldout.train.sft import Trainee
from heldout.train.stopping import EarlyStopping

#: Packed tokens of one validation pack: no backward, so more fits than in training.
VALID_TOKENS = 4096


@dataclass
class Course:
    """What a training run has done so far; saved with every checkpoint."""

    step: int = 0
    trained_tokens: int = 0
    examples: int = 0
    step_seconds: float = 0.0  # spent in steps, validation and saving not counted
    seconds: float = 0.0  # spent in all
    stopped: str = ""
    curve: list[CurvePoint] = field(default_factory=list)


def run(
    plan: TrainPlan,
    trainee: Trainee,
    train: Sequence[Tokens],
    valid: Sequence[Tokens],
    *,
    checkpoints: Path,
    watch: Watch,
) -> tuple[Course, EarlyStopping]:
    """Train to the end, from the last checkpoint below `checkpoints` if there is one."""
    optimizer = torch.optim.AdamW(
        trainee.parameters.values(), lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True
    )
    steps_per_epoch = math.ceil(len(train) / plan.batch_size)
    stopping = EarlyStopping(plan.patience, steps_per_epoch, plan.min_delta, plan.min_delta_errors)
    course = _resume(checkpoints, trainee, optimizer, stopping, watch)
    started = time.monotonic() - course.seconds
    while course.step < plan.total_steps and not course.stopped:
        course.step += 1
        rows = batch_rows(plan, len(train), course.step)
        clock = time.perf_counter()
        train_loss, train_accuracy = train_step(plan, trainee, optimizer, train, rows, course.step)
        course.step_seconds += time.perf_counter() - clock
        course.examples += len(rows)
        course.trained_tokens += sum(len(train[row]) for row in rows)
        ends_epoch = course.step % steps_per_epoch == 0
        due = (course.step % steps_per_epoch) % plan.eval_every == 0 or course.step == plan.total_steps
        losses, accuracy = validate(trainee, valid) if due and valid else ([], 0.0)
        point = CurvePoint(
            step=course.step,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            valid_loss=sum(losses) / len(losses) if losses else None,
            valid_accuracy=accuracy if losses else None,
        )
        course.curve.append(point)
        watch.metrics(point, plan.total_steps)
        watch.progress("train", course.step, plan.total_steps)
        if due:
            stopping.update(course.step, losses)
            if plan.early_stopping:
                course.stopped = stopping.reason
            course.seconds = time.monotonic() - started
            folder = _save(checkpoints, trainee, optimizer, course, stopping)
            if ends_epoch:
                watch.checkpoint(course.step, folder, point.as_dict())
    if stopping.best_step == 0:
        raise _diverged(plan, course.step, "no validation loss was a number")
    course.stopped = course.stopped or (
        f"all {plan.total_steps} steps taken; keeping step {stopping.best_step}"
        f"{' with the lowest validation loss' if valid else ', the last'}"
    )
    course.seconds = time.monotonic() - started
    return course, stopping


def batch_rows(plan: TrainPlan, n: int, step: int) -> list[int]:
    """The rows of a step. Depends on (seed, step) alone, so a resumed job sees the same order."""
    steps_per_epoch = math.ceil(n / plan.batch_size)
    epoch, within = divmod(step - 1, steps_per_epoch)
    order = list(range(n))
    random.Random(f"{plan.seed}/{epoch}").shuffle(order)
    return order[within * plan.batch_size : (within + 1) * plan.batch_size]


def learning_rate(plan: TrainPlan, step: int) -> float:
    """Linear warm-up, then linear to 0 just after the last step."""
    if step <= plan.warmup_steps:
        return plan.learning_rate * step / plan.warmup_steps
    left = plan.total_steps + 1 - step
    return plan.learning_rate * left / (plan.total_steps + 1 - plan.warmup_steps)


def train_step(
    plan: TrainPlan,
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    train: Sequence[Tokens],
    rows: Sequence[int],
    step: int,
) -> tuple[float, float]:
    """One optimizer step; mean loss per supervised token and token accuracy of its batch.

    The mean is over the supervised tokens of the whole batch, however it is cut into packs.
    """
    trainee.peft.train()
    trainee.dropout.start(step)
    supervised = sum(sum(train[row].supervised[1:]) for row in rows)
    total, right = 0.0, 0
    for pack in micro_batches(train, rows):
        losses = sft.loss(trainee, sft.collate(trainee, [train[row] for row in pack]))
        loss = losses.nll.sum() / supervised
        loss.backward()
        total += float(loss.detach())
        right += int(losses.right.sum())
    norm = torch.nn.utils.clip_grad_norm_(trainee.parameters.values(), plan.max_grad_norm)
    if not (math.isfinite(total) and math.isfinite(float(norm))):
        raise _diverged(plan, step, f"loss {total}, gradient norm {float(norm)}")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(plan, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, right / supervised


def _diverged(plan: TrainPlan, step: int, what: str) -> InvalidTrainingFile:
    return InvalidTrainingFile(
        f"training diverged at step {step} ({what}): nothing of this step was kept. "
        f"Try a smaller learning_rate than {plan.learning_rate:g}.",
        param="hyperparameters.learning_rate",
    )


@torch.no_grad()
def validate(trainee: Trainee, valid: Sequence[Tokens]) -> tuple[list[float], float]:
    """Mean loss per supervised token of each example (nats, in order), and token accuracy over all."""
    trainee.peft.eval()
    trainee.dropout.stop()
    losses = [0.0] * len(valid)
    right = count = 0
    for rows in micro_batches(valid, range(len(valid)), limit=VALID_TOKENS):
        pack = sft.collate(trainee, [valid[row] for row in rows])
        result = sft.loss(trainee, pack)
        sums = torch.zeros(pack.size, device=result.nll.device).index_add_(0, pack.owners, result.nll)
        counts = torch.bincount(pack.owners, minlength=pack.size)
        for row, mean in zip(rows, (sums / counts).tolist(), strict=True):
            losses[row] = mean
        right += int(result.right.sum())
        count += len(result.right)
    return losses, right / count


def _save(
    root: Path, trainee: Trainee, optimizer: torch.optim.Optimizer, course: Course, stopping: EarlyStopping
) -> Path:
    state: dict[str, Any] = {
        "trained_tokens": course.trained_tokens,
        "examples": course.examples,
        "step_seconds": course.step_seconds,
        "seconds": course.seconds,
        "stopped": course.stopped,
        "curve": [point.as_dict() for point in course.curve],
        "stopping": stopping.state(),
    }
    folder = checkpoint.save(root, course.step, trainee, optimizer, state)
    # The one before stays until this one has proven readable: at the next save.
    steps = sorted(int(one.name.removeprefix("step-")) for one in root.glob("step-*"))
    checkpoint.prune(root, {stopping.best_step, *steps[-2:]})
    return folder


def _resume(
    root: Path, trainee: Trainee, optimizer: torch.optim.Optimizer, stopping: EarlyStopping, watch: Watch
) -> Course:
    found = checkpoint.latest(root)
    if found is None:
        return Course()
    folder, state = found
    checkpoint.restore(folder, trainee, optimizer)
    stopping.restore(state["stopping"])
    watch.message(f"Training continues from the checkpoint of step {state['step']}", level="warn")
    return Course(
        step=state["step"],
        trained_tokens=state["trained_tokens"],
        examples=state["examples"],
        step_seconds=state["step_seconds"],
        seconds=state["seconds"],
        stopped=state["stopped"],
        curve=[CurvePoint(**point) for point in state["curve"]],
    )
