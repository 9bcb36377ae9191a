"""The training loop, in time order: step, guard, validate, report, save, stop. The same for every kind of model."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from heldout.errors import CheckpointDamaged, InvalidTrainingFile, JobPaused
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.training import CurvePoint
from heldout.pipeline.watch import Watch
from heldout.train import checkpoint
from heldout.train.averaging import Average
from heldout.train.guard import Alarm, Guard
from heldout.train.method import TEMPERATURES, Trainee
from heldout.train.stopping import EarlyStopping

Row = TypeVar("Row")


@dataclass
class Course:
    """What a training run has done so far; all of it is saved with every checkpoint."""

    stopping: EarlyStopping
    guard: Guard
    step: int = 0
    trained_tokens: int = 0
    examples: int = 0
    step_seconds: float = 0.0  # spent in steps, validation and saving not counted
    seconds: float = 0.0  # spent in all
    stopped: str = ""
    curve: list[CurvePoint] = field(default_factory=list)
    answered: dict[int, list[bool]] = field(default_factory=dict)  # step -> valid examples that were all right
    kept: dict[int, list[float]] = field(default_factory=dict)  # kept step -> calibrated losses of valid examples

    @staticmethod
    def of(plan: TrainPlan, examples: int) -> Course:
        """A run that has not begun."""
        steps_per_epoch = math.ceil(examples / plan.batch_size)
        return Course(
            EarlyStopping(plan.patience, steps_per_epoch, plan.min_delta, plan.min_delta_errors),
            Guard(plan.learning_rate),
        )

    def state(self) -> dict[str, Any]:
        """What a resumed job needs to go on the same; JSON gives every number back exactly."""
        return {
            "step": self.step,
            "trained_tokens": self.trained_tokens,
            "examples": self.examples,
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
            "stopped": self.stopped,
            "curve": [point.as_dict() for point in self.curve],
            "answered": {str(step): right for step, right in self.answered.items()},
            "kept": {str(step): losses for step, losses in self.kept.items()},
            "stopping": self.stopping.state(),
            "guard": self.guard.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for name in ("step", "trained_tokens", "examples", "step_seconds", "seconds", "stopped"):
            setattr(self, name, state[name])
        self.curve = [CurvePoint(**point) for point in state["curve"]]
        self.answered = {int(step): right for step, right in state["answered"].items()}
        self.kept = {int(step): losses for step, losses in state["kept"].items()}
        self.stopping.restore(state["stopping"])
        self.guard.restore(state["guard"])


class Step(NamedTuple):
    """What one batch said, before its update is applied."""

    loss: float  # mean nats per supervised token
    accuracy: float  # share of supervised tokens that are the argmax
    norm: float  # of the gradient, before clipping


class Validation(NamedTuple):
    """One look at valid. Per example, in order."""

    losses: list[float]  # mean nats per supervised token
    right: list[bool]  # every supervised token is the argmax: greedy decoding would give this answer
    accuracy: float  # share of all supervised tokens that are the argmax
    calibrated: list[float]  # losses at the one temperature at which their mean is lowest
    temperature: float


def run(
    plan: TrainPlan,
    trainee: Trainee[Row],
    train: Sequence[Row],
    valid: Sequence[Row],
    *,
    copies: Sequence[Sequence[Row]] = (),
    checkpoints: Path,
    watch: Watch,
) -> Course:
    """Train to the end, from the last checkpoint below `checkpoints` if there is one.

    copies[i], where there are any, take turns with train[i]: as many steps as without.

    Raises InvalidTrainingFile when training breaks down at every learning rate that is tried.
    """
    optimizer = optimizer_of(plan, trainee)
    average = Average(trainee.parameters, plan.ema_decay)
    course = Course.of(plan, len(train))
    _resume(checkpoints, trainee, optimizer, average, course, watch)
    started = time.monotonic() - course.seconds
    while course.step < plan.end_step and not course.stopped:
        step, clock = course.step + 1, time.perf_counter()
        rows = batch(plan, train, copies, step)
        found = gradients(trainee, rows, step)
        if alarm := course.guard.look(step, found.loss, found.norm, _to_go_back_to(course, checkpoints)):
            watch.message(alarm.sentence, level="warn")
            _start_again(alarm, checkpoints, trainee, optimizer, average, course)
            continue
        update(plan, trainee, optimizer, learning_rate(plan, step, course.guard.learning_rate), found.norm)
        average.update(step)
        course.step = step
        course.step_seconds += time.perf_counter() - clock
        course.examples += len(rows)
        course.trained_tokens += sum(map(len, rows))  # type: ignore[arg-type]
        seen = None
        if is_due(plan, len(train), step):
            with average.in_place():
                seen = validate(trainee, valid)
        point = _note(course, plan, found, seen)
        course.seconds = time.monotonic() - started
        try:
            watch.metrics(point, plan.end_step)
            watch.progress("train", step, plan.end_step)
        except JobPaused:
            _save(checkpoints, trainee, optimizer, average, course)
            raise JobPaused(step) from None
        if seen:
            folder = _save(checkpoints, trainee, optimizer, average, course)
            if step % course.stopping.steps_per_epoch == 0:
                watch.checkpoint(step, folder, point.as_dict())
    if course.stopping.best_step == 0:
        raise _diverged(plan, f"no validation loss was a number until step {course.step}")
    course.stopped = course.stopped or (
        f"all {plan.end_step} steps taken; "
        f"the lowest calibrated validation loss is that of step {course.stopping.best_step}"
        if valid
        else f"all {plan.end_step} steps taken; there are no validation examples, so the last step is kept"
    )
    course.seconds = time.monotonic() - started
    return course


def batch_rows(plan: TrainPlan, n: int, step: int) -> list[int]:
    """The rows of a step. Depends on (seed, step) alone, so a resumed job sees the same order."""
    steps_per_epoch = math.ceil(n / plan.batch_size)
    epoch, within = divmod(step - 1, steps_per_epoch)
    order = list(range(n))
    random.Random(f"{plan.seed}/{epoch}").shuffle(order)
    return order[within * plan.batch_size : (within + 1) * plan.batch_size]


def batch(plan: TrainPlan, train: Sequence[Row], copies: Sequence[Sequence[Row]], step: int) -> list[Row]:
    """What a step learns from: its rows, and for about half of them a copy in the row's place. Depends on
    (seed, step) alone."""
    chosen = batch_rows(plan, len(train), step)
    if not copies:
        return [train[row] for row in chosen]
    epoch = (step - 1) // math.ceil(len(train) / plan.batch_size)
    # Drawn, not counted: in a file whose labels alternate, one label would be all copies and the other none.
    turns = random.Random(f"{plan.seed}/turns").sample(range(len(train)), len(train))
    return [in_turn(train[row], copies[row], epoch + turns[row]) for row in chosen]


def in_turn(row: Row, copies: Sequence[Row], turn: int) -> Row:
    """The row as it is and one of its copies alternate, and the copies take turns: each is seen equally often."""
    return copies[turn // 2 % len(copies)] if copies and turn % 2 else row


def learning_rate(plan: TrainPlan, step: int, peak: float) -> float:
    """Linear warm-up to `peak`, then linear to 0 just after the last step."""
    if step <= plan.warmup_steps:
        return peak * step / plan.warmup_steps
    left = plan.total_steps + 1 - step
    return peak * left / (plan.total_steps + 1 - plan.warmup_steps)


def is_due(plan: TrainPlan, n: int, step: int) -> bool:
    """True when valid is looked at after this step: several times an epoch, at its end, where a checkpoint is to be
    kept, and at the very end."""
    within = step % math.ceil(n / plan.batch_size)
    return within % plan.eval_every == 0 or step == plan.end_step or step in plan.kept_steps


def optimizer_of(plan: TrainPlan, trainee: Trainee[Any]) -> torch.optim.Optimizer:
    """AdamW on the trained parameters. Its moments exist from now on: made after the first step, they would lie among
    what that step has freed, and a later one that is larger could not use the holes between them."""
    parameters = list(trainee.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=plan.weight_decay, fused=True)
    for one in parameters:
        one.grad = torch.zeros_like(one)
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].zero_()
    optimizer.zero_grad(set_to_none=True)
    for group in optimizer.param_groups:
        group["lr"] = plan.learning_rate
    return optimizer


def gradients(trainee: Trainee[Row], rows: Sequence[Row], step: int) -> Step:
    """Gradients of one batch. The loss is the mean over the weighted predictions of the whole batch, however
    it is cut into micro-batches; what is reported counts what is to be learned only, without smoothing."""
    trainee.start(step, rows)
    weight = sum(trainee.weight(row) for row in rows)
    nats = right = count = 0.0
    for number, chosen in enumerate(trainee.micro_batches(rows, training=True)):
        found = trainee.learn([rows[i] for i in chosen], number, weight)
        learned = found.weights == 1
        nats += float(found.nll[learned].sum())
        right += float(found.right[learned].sum())
        count += float(learned.sum())
    norms = torch._foreach_norm([p.grad for p in trainee.parameters.values() if p.grad is not None])
    return Step(nats / count, right / count, float(torch.stack(norms).norm()))


def update(plan: TrainPlan, trainee: Trainee[Row], optimizer: torch.optim.Optimizer, rate: float, norm: float) -> None:
    """Apply the gradients, whose norm is `norm`, clipped as torch's clip_grad_norm_ does it, and clear them."""
    if norm > plan.max_grad_norm:
        gradients = [p.grad for p in trainee.parameters.values() if p.grad is not None]
        torch._foreach_mul_(gradients, plan.max_grad_norm / (norm + 1e-6))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def validate(trainee: Trainee[Row], valid: Sequence[Row]) -> Validation:
    """Losses of every example; with nothing to look at, nothing.

    Calibrated losses are those after temperature scaling (Guo et al. 2017): how sure a model is of its answers
    does not change which one is the likeliest, so it must not decide when training stops.
    """
    trainee.stop()
    losses, right = [0.0] * len(valid), [False] * len(valid)
    tempered = torch.zeros(len(TEMPERATURES), len(valid))
    hits = count = 0
    for rows in trainee.micro_batches(valid, training=False) if valid else []:
        found = trainee.losses([valid[row] for row in rows])
        sums = torch.zeros(len(rows), device=found.nll.device).index_add_(0, found.owners, found.nll)
        wrong = torch.bincount(found.owners[~found.right], minlength=len(rows))
        counts = torch.bincount(found.owners, minlength=len(rows))
        scaled = torch.zeros(len(TEMPERATURES), len(rows), device=found.nll.device)
        tempered[:, rows] = (scaled.index_add_(1, found.owners, found.tempered) / counts).cpu()
        for row, mean, misses in zip(rows, (sums / counts).tolist(), wrong.tolist(), strict=True):
            losses[row], right[row] = mean, misses == 0
        hits += int(found.right.sum())
        count += len(found.right)
    means = tempered.mean(dim=1).tolist() if valid else []
    lowest = min(range(len(means)), key=lambda row: means[row], default=0)
    # Where the loss is not a number, no temperature makes it one.
    calibrated = tempered[lowest].tolist() if all(map(math.isfinite, losses)) else losses
    return Validation(losses, right, hits / count if count else 0.0, calibrated, TEMPERATURES[lowest])


def _note(course: Course, plan: TrainPlan, found: Step, seen: Validation | None) -> CurvePoint:
    """Take in a step and what valid said after it; decides whether to stop."""
    point = CurvePoint(
        step=course.step,
        train_loss=found.loss,
        train_accuracy=found.accuracy,
        valid_loss=sum(seen.losses) / len(seen.losses) if seen and seen.losses else None,
        valid_calibrated_loss=sum(seen.calibrated) / len(seen.calibrated) if seen and seen.losses else None,
        valid_accuracy=seen.accuracy if seen and seen.losses else None,
    )
    course.curve.append(point)
    if seen:
        course.answered[course.step] = seen.right
        if course.step in plan.kept_steps:
            course.kept[course.step] = seen.calibrated
        score = sum(seen.right) / len(seen.right) if seen.right else None
        course.stopping.update(course.step, seen.calibrated, score)
        if plan.early_stopping:
            course.stopped = course.stopping.reason
    return point


def _save(
    root: Path, trainee: Trainee[Row], optimizer: torch.optim.Optimizer, average: Average, course: Course
) -> Path:
    folder = checkpoint.save(root, course.step, trainee, optimizer, average, course.state())
    _prune(root, course)
    return folder


def _prune(root: Path, course: Course) -> None:
    # The one before stays until this one has proven readable: at the next save. A restart may need the first.
    newest = checkpoint.steps(root)[-2:]
    checkpoint.prune(root, {0, *course.stopping.keep(), *course.kept, *newest})


def _resume(
    root: Path,
    trainee: Trainee[Row],
    optimizer: torch.optim.Optimizer,
    average: Average,
    course: Course,
    watch: Watch,
) -> None:
    found = checkpoint.latest(root)
    if found is None:
        checkpoint.save(root, 0, trainee, optimizer, average, course.state())
        return
    folder, state = found
    checkpoint.restore(folder, trainee, optimizer, average)
    course.restore(state)
    _prune(root, course)  # a process that was killed in between leaves more, and a restart must not see it
    if course.step:
        watch.message(f"Training continues from the checkpoint of step {course.step}", level="warn")
    if course.step and course.step % course.stopping.steps_per_epoch == 0:
        # It was saved, but whoever was stopped just then may not have said so.
        watch.checkpoint(course.step, folder, course.curve[-1].as_dict(), again=True)


def _to_go_back_to(course: Course, root: Path) -> Iterator[int]:
    """Steps that training can go on from; which ones can be read is found out when somebody wants to know."""
    yield from course.stopping.can_go_back_to(state["step"] for _, state in checkpoint.sound(root))


def _start_again(
    alarm: Alarm,
    root: Path,
    trainee: Trainee[Row],
    optimizer: torch.optim.Optimizer,
    average: Average,
    course: Course,
) -> None:
    """Go back to an earlier checkpoint with a smaller learning rate, as if what came after had never been."""
    if alarm.restart_from is None:
        raise InvalidTrainingFile(alarm.sentence, param="hyperparameters.learning_rate")
    try:
        folder, state = checkpoint.read(root, alarm.restart_from)
    except CheckpointDamaged as error:  # the beginning's: of the others only those that can be read were offered
        raise CheckpointDamaged(f"{alarm.sentence}, but {error}. Start a new job.") from error
    state["guard"] = course.guard.state()
    checkpoint.rewind(root, alarm.restart_from, state)
    checkpoint.restore(folder, trainee, optimizer, average)
    optimizer.zero_grad(set_to_none=True)
    course.restore(state)
    _prune(root, course)


def _diverged(plan: TrainPlan, what: str) -> InvalidTrainingFile:
    return InvalidTrainingFile(
        f"training diverged: {what}. Try a smaller learning_rate than {plan.learning_rate:g}.",
        param="hyperparameters.learning_rate",
    )
