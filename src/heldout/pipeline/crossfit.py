"""Cross-fitting: what a file too small for a holdout can say, every row answered by a model that never saw it.

Five folds. Each is a job of its own on a split of its own; their answers are put together and judged like
those of one holdout. Then a sixth model learns from all rows, for as long as the folds needed, and is served.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heldout.pipeline.evaluate.scores import Scores
from heldout.pipeline.evaluate.statistics import mean_interval
from heldout.pipeline.fold_length import TrainedFold
from heldout.pipeline.ladder import Rung
from heldout.pipeline.watch import Watch, Within


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One finished fold: how its model was trained, and what it answered to the rows it never saw."""

    number: int  # from 1
    train: int  # examples of each part
    valid: int
    best_step: int
    best_epoch: float  # best_step in passes over train
    last_step: int
    learning_rate: float  # the peak rate at the end: what a search chose, or what was left after a new start
    valid_loss: float | None  # nats, at best_step
    stopped: str
    seconds: float  # the training phase
    scores: Scores  # of its holdout

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the report."""
        low, high = self.scores.interval
        return {
            "fold": self.number,
            "train": self.train,
            "valid": self.valid,
            "holdout": len(self.scores.per_example),
            "best_step": self.best_step,
            "best_epoch": self.best_epoch,
            "last_step": self.last_step,
            "learning_rate": self.learning_rate,
            "valid_loss": self.valid_loss,
            "stopped": self.stopped,
            "seconds": self.seconds,
            "score": self.scores.mean,
            "interval": [low, high],
        }


@dataclass(frozen=True, kw_only=True)
class CrossFit:
    """Where the verdict's answers come from when there was no holdout."""

    folds: tuple[Fold, ...]
    groups: int  # distinct prompts answered

    @property
    def sentence(self) -> str:
        """What a reader must know of every score beside it."""
        return (
            f"scores come from cross-fitting: out-of-fold answers of {len(self.folds)} models, each to the rows it "
            "never saw; the served model was trained on all rows and was itself not measured"
        )

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the report."""
        return {"groups": self.groups, "folds": [fold.as_dict() for fold in self.folds]}


class FoldWatch(Within):
    """Passes on what a fold tells, under the fold's name."""

    def __init__(self, watch: Watch, number: int, count: int) -> None:
        super().__init__(watch, f"fold {number} of {count}")


def make_fold(trained: TrainedFold, chosen: int, scores: Scores) -> Fold:
    """What a fold found, answered by the chosen one of its models."""
    step = trained.models[chosen].step
    return Fold(
        number=trained.number,
        train=trained.train,
        valid=trained.valid,
        best_step=step,
        best_epoch=step / trained.steps_per_epoch,
        last_step=trained.last_step,
        learning_rate=trained.learning_rate,
        valid_loss=trained.valid_losses[chosen],
        stopped=trained.stopped,
        seconds=trained.seconds,
        scores=scores,
    )


def discard_models(directory: Path, *, but: Collection[str] = ()) -> None:
    """Delete a fold's checkpoints and adapters, except in these folders; what the fold found stays."""
    for folder in [one for one in directory.iterdir() if one.is_dir() and one.name not in but]:
        shutil.rmtree(folder)


def pool_rungs(ladders: Sequence[Sequence[Rung]], watch: Watch) -> tuple[Rung, ...]:
    """The rungs of all folds as one ladder over all rows, in the folds' order.

    A few-shot prompt is chosen anew in every fold, so that the pooled rung is called few-shot; the one to be served is
    that of the fold in which it scored highest. A rung that one fold does not have (its prompts do not fit, say) is
    left out: it did not answer all rows.
    """
    pooled = []
    for name in dict.fromkeys(_pooled_name(rung) for ladder in ladders for rung in ladder):
        parts = [rung for ladder in ladders for rung in ladder if _pooled_name(rung) == name]
        if len(parts) < len(ladders):
            watch.message(
                f"{name} is left out of the ladder: {len(ladders) - len(parts)} of {len(ladders)} folds have no "
                "such rung",
                level="warn",
            )
            continue
        pooled.append(
            Rung(
                name=name,
                kind=parts[0].kind,
                description=_pooled_description(name, parts),
                scores=pool([rung.scores for rung in parts]),
                shots=_best(parts).shots,
                fold_shots=tuple(rung.shots for rung in parts),
            )
        )
    return tuple(pooled)


def pool_tuned(folds: Sequence[Fold]) -> Rung:
    """The tuned models of all folds as one rung over all rows, in the folds' order."""
    return Rung(
        name="tuned",
        kind="tuned",
        description=(
            f"the base model with the adapters of {len(folds)} folds, each asked about the rows it never saw; "
            "the served adapter was trained on all rows"
        ),
        scores=pool([fold.scores for fold in folds]),
    )


def pool(parts: Sequence[Scores]) -> Scores:
    """Scores on several lists of examples as scores on the lists put together."""
    per_example = tuple(score for part in parts for score in part.per_example)
    first = parts[0]
    return Scores(
        metric=first.metric,
        binary=first.binary,
        mean=sum(per_example) / len(per_example),
        interval=mean_interval(per_example, binary=first.binary),
        per_example=per_example,
        answers=tuple(answer for part in parts for answer in part.answers),
        prompt_tokens=sum(part.prompt_tokens * len(part.per_example) for part in parts) / len(per_example),
        cut=sum(part.cut for part in parts),
        labels=tuple(label for part in parts for label in part.labels),
        milliseconds=sum(part.milliseconds * len(part.per_example) for part in parts) / len(per_example),
    )


def _pooled_name(rung: Rung) -> str:
    return "few-shot" if rung.name.startswith("few-shot-") else rung.name


def _best(parts: Sequence[Rung]) -> Rung:
    return max(parts, key=lambda rung: rung.scores.mean)


def _pooled_description(name: str, parts: Sequence[Rung]) -> str:
    if len({rung.description for rung in parts}) == 1:
        return parts[0].description
    if name == "constant":
        return "always the commonest training answer of the fold"
    chosen = ", ".join(rung.name.removeprefix("few-shot-") for rung in parts)
    lines = ", ".join(str(shot.line) for shot in _best(parts).shots)
    return (
        "the base model with solved examples, chosen anew in every fold from its training rows, by its validation "
        f"rows ({chosen} examples); to be asked as a model: those of lines {lines}, the best in their fold"
    )
