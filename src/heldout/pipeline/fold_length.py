"""How long to train where no row is left to stop by: the folds train to the end, keep models on the way, and all of
their validation rows together choose one of them.

The ten validation rows of one fold cannot tell when to stop: measured in docs/experiments.md, "Cross-fitting: how long
to train".
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heldout.errors import InvalidTrainingFile
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.plan import TrainPlan, make_plan, steps_per_epoch
from heldout.pipeline.training import Adapter, KeptModel, ModelFacts
from heldout.pipeline.types import Split

#: Of a fold's steps: after each of these shares a model is kept.
SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class TrainedFold:
    """A fold whose model is trained and has not answered yet."""

    number: int  # from 1
    train: int  # examples of each part
    valid: int
    steps_per_epoch: int
    last_step: int
    learning_rate: float  # the peak rate at the end: what a search chose, or what was left after a new start
    stopped: str
    seconds: float  # the training phase
    models: tuple[KeptModel, ...]  # to choose from: one of each share, or the only one
    valid_losses: tuple[float | None, ...]  # nats, not calibrated, of each model
    valid_lines: tuple[int, ...]  # of the training file; none where validation is a file of its own

    def model_of(self, step: int) -> KeptModel:
        """The model of this step, which is one of them."""
        return next(model for model in self.models if model.step == step)

    def folders(self, directory: Path) -> set[str]:
        """The folders in the fold's directory that have the models."""
        return {model.directory.relative_to(directory).parts[0] for model in self.models}


@dataclass(frozen=True, kw_only=True)
class Length:
    """Which of the folds' models, counted from 0, and what the validation rows of all folds say of each."""

    chosen: int
    losses: tuple[float, ...]  # calibrated, nats, the mean over the rows; empty where there was one model
    rows: int

    @property
    def share(self) -> float:
        """Of the steps that were planned."""
        return SHARES[self.chosen] if self.losses else 1.0

    def as_dict(self) -> dict[str, Any]:
        """As the event has it."""
        return {"share": self.share, "losses": list(self.losses), "rows": self.rows}

    @property
    def sentence(self) -> str:
        """Why, in words."""
        if not self.losses:
            return "all planned steps, as early stopping is off"
        each = ", ".join(f"{loss:.3g}" for loss in self.losses)
        return (
            f"{self.share:.0%} of the planned steps: there the calibrated loss of the {self.rows} validation rows of "
            f"all folds is lowest ({each} nats after {', '.join(f'{share:.0%}' for share in SHARES)})"
        )


def fold_plan(plan: TrainPlan, whole: Split) -> TrainPlan:
    """The plan of a fold's training: it goes to the end and keeps a model after each share.

    With a validation file of the user's every training is stopped by that file, and nothing changes here.
    """
    if whole.valid:
        return plan
    shares = SHARES if plan.early_stopping else SHARES[-1:]
    together = "the validation rows of all folds together choose when to end: those of one are too few"
    return replace(
        plan,
        kept_shares=shares,
        early_stopping=False,
        reasons={
            **plan.reasons,
            "kept_shares": f"after {', '.join(f'{share:.0%}' for share in shares)} of the steps",
            "early_stopping": together if plan.early_stopping else plan.reasons["early_stopping"],
            "patience": f"not used: {together}",
        },
    )


def trained_fold(number: int, split: Split, plan: TrainPlan, whole: Split, adapter: Adapter) -> TrainedFold:
    """What the training of a fold left. Of no kept models its adapter is the only one."""
    kept = {model.step: model for model in adapter.kept}
    only = KeptModel(step=adapter.best_step, directory=adapter.directory, losses=())
    models = tuple(kept[step] for step in plan.kept_steps) or (only,)
    losses = {point.step: point.valid_loss for point in adapter.curve}
    return TrainedFold(
        number=number,
        train=len(split.train),
        valid=len(split.valid),
        steps_per_epoch=steps_per_epoch(len(split.train), plan.batch_size, plan.replay_ratio),
        last_step=adapter.last_step,
        learning_rate=adapter.learning_rate,
        stopped=adapter.stopped,
        seconds=adapter.seconds,
        models=models,
        valid_losses=tuple(losses.get(model.step) for model in models),
        valid_lines=() if whole.valid else tuple(row.line for row in split.valid),
    )


def choose_length(folds: Sequence[TrainedFold], *, but: Collection[int] = ()) -> Length:
    """The models with the lowest calibrated loss, over the validation rows of all folds.

    Args:
        but: lines that have no say: those that a fold is going to answer.

    Raises InvalidTrainingFile when no loss is a number.
    """
    counts = {len(fold.models) for fold in folds}
    if counts == {1}:
        return Length(chosen=0, losses=(), rows=0)
    means = []
    for which in range(counts.pop()):
        losses = [
            loss
            for fold in folds
            for line, loss in zip(fold.valid_lines, fold.models[which].losses, strict=True)
            if line not in but
        ]
        mean = math.fsum(losses) / len(losses)
        means.append(mean if math.isfinite(mean) else math.inf)
    best = min(range(len(means)), key=lambda which: means[which])
    if means[best] == math.inf:
        raise InvalidTrainingFile(
            "training diverged: no validation loss is a number. Try a smaller learning_rate.",
            param="hyperparameters.learning_rate",
        )
    return Length(chosen=best, losses=tuple(means), rows=len(losses))


def final_plan(
    asked: Hyperparameters,
    whole: Split,
    facts: ModelFacts,
    planned: TrainPlan,
    folds: Sequence[TrainedFold],
    length: Length,
    *,
    seed: int,
) -> TrainPlan:
    """The plan of the model that is served, trained on all rows as the folds were.

    With a validation file of the user's it is stopped by that file. Without one it has the schedule of `planned`, a
    fold's plan, in epochs, and ends after the share of it that all folds have chosen, at the median of the rates that
    they ended with.
    """
    if whole.valid:
        return make_plan(asked, whole, facts, seed=seed)
    plan = make_plan(replace(asked, n_epochs=planned.n_epochs, lr_search="off"), whole, facts, seed=seed)
    rate = statistics.median(fold.learning_rate for fold in folds)
    nothing = "nothing is left to choose by: all rows are trained on"
    return replace(
        plan,
        end_share=length.share,
        learning_rate=rate,
        early_stopping=False,
        reasons={
            **plan.reasons,
            "n_epochs": f"as in the folds: {planned.reasons['n_epochs']}",
            "end_share": length.sentence,
            "early_stopping": f"{nothing}; the folds found out when to end",
            "lr_search": nothing,
            "learning_rate": (
                plan.reasons["learning_rate"]
                if rate == plan.learning_rate
                else f"the median of the rates that the folds ended with; {plan.learning_rate:g} was planned"
            ),
        },
    )
