"""Cross-fitting: what a file too small for a holdout can say, every row answered by a model that never saw it.

Five folds. Each is a job of its own on a split of its own; their answers are put together and judged like
those of one holdout. Then a sixth model learns from all rows, for as long as the folds needed, and is served.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from heldout.errors import InvalidValue
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.evaluate.scores import Scores, score_answers
from heldout.pipeline.evaluate.statistics import mean_interval
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.kept import read_record, write_record
from heldout.pipeline.ladder import Rung
from heldout.pipeline.plan import TrainPlan, make_plan, steps_per_epoch
from heldout.pipeline.training import Adapter, ModelFacts
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Watch, Within

LADDER, FOLD = "ladder.json", "fold.json"
#: Changes when the records on disk do; a job of another version is not taken up.
VERSION = 2


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


def make_fold(number: int, split: Split, plan: TrainPlan, adapter: Adapter, scores: Scores) -> Fold:
    """What a fold found."""
    return Fold(
        number=number,
        train=len(split.train),
        valid=len(split.valid),
        best_step=adapter.best_step,
        best_epoch=adapter.best_step / _steps_per_epoch(plan, split),
        last_step=adapter.last_step,
        learning_rate=adapter.learning_rate,
        valid_loss=next((point.valid_loss for point in adapter.curve if point.step == adapter.best_step), None),
        stopped=adapter.stopped,
        seconds=adapter.seconds,
        scores=scores,
    )


def discard_models(directory: Path) -> None:
    """Delete a finished fold's checkpoints and adapter; what it found stays."""
    for folder in [one for one in directory.iterdir() if one.is_dir()]:
        shutil.rmtree(folder)


def pool_rungs(ladders: Sequence[Sequence[Rung]], watch: Watch) -> tuple[Rung, ...]:
    """The rungs of all folds as one ladder over all rows, in the folds' order.

    A few-shot prompt is chosen anew in every fold, so that the pooled rung is called few-shot. A rung that
    one fold does not have (its prompts do not fit, say) is left out: it did not answer all rows.
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


def final_plan(
    asked: Hyperparameters, whole: Split, facts: ModelFacts, folds: Sequence[Fold], *, seed: int
) -> TrainPlan:
    """The plan of the model that is served, trained on all rows.

    With a validation file of the user's it is trained as the folds were, stopped by that file. Without one
    nothing is left to stop by: it takes as many epochs as the folds' best checkpoints did, in the median, at
    the median of the rates that the folds ended with.
    """
    if whole.valid:
        return make_plan(asked, whole, facts, seed=seed)
    epochs = statistics.median(fold.best_epoch for fold in folds)
    n_epochs = max(1, math.ceil(epochs))
    plan = make_plan(replace(asked, n_epochs=n_epochs, lr_search="off"), whole, facts, seed=seed)
    rate = statistics.median(fold.learning_rate for fold in folds)
    steps = max(1, round(epochs * _steps_per_epoch(plan, whole)))
    best = ", ".join(f"{fold.best_epoch:.2g}" for fold in folds)
    why = f"the median of the folds' best ({best}) is {epochs:.2g} epochs"
    nothing = "nothing is left to choose by: all rows are trained on"
    return replace(
        plan,
        total_steps=steps,
        warmup_steps=min(plan.warmup_steps, steps),
        learning_rate=rate,
        early_stopping=False,
        reasons={
            **plan.reasons,
            "n_epochs": f"{why}, begun ones counted",
            "total_steps": f"{why}, of {_steps_per_epoch(plan, whole)} steps each",
            "early_stopping": f"{nothing}; the folds found out when to stop",
            "lr_search": nothing,
            "learning_rate": (
                plan.reasons["learning_rate"]
                if rate == plan.learning_rate
                else f"the median of the rates that the folds ended with; {plan.learning_rate:g} was planned"
            ),
        },
    )


def read_ladder(directory: Path, split: Split, metric: Metric) -> tuple[Rung, ...] | None:
    """The rungs that were scored on the fold's holdout before, or None. Raises InvalidValue when the record
    is about other rows."""
    record = _read(directory / LADDER, split)
    if record is None:
        return None
    return tuple(
        Rung(
            name=one["name"],
            kind=one["kind"],
            description=one["description"],
            scores=_restored(one["answers"], metric, split.holdout),
        )
        for one in record["rungs"]
    )


def write_ladder(directory: Path, split: Split, rungs: Sequence[Rung]) -> None:
    """Keep what the rungs answered."""
    stored = [
        {"name": rung.name, "kind": rung.kind, "description": rung.description, "answers": _stored(rung.scores)}
        for rung in rungs
    ]
    _write(directory / LADDER, split, {"rungs": stored})


def read_fold(directory: Path, split: Split, metric: Metric) -> Fold | None:
    """A fold that was finished before, or None. Raises InvalidValue when the record is about other rows."""
    record = _read(directory / FOLD, split)
    if record is None:
        return None
    return Fold(**record["fold"], scores=_restored(record["answers"], metric, split.holdout))


def write_fold(directory: Path, split: Split, fold: Fold) -> None:
    """Keep what a fold found."""
    facts = {one.name: getattr(fold, one.name) for one in fields(fold) if one.name != "scores"}
    _write(directory / FOLD, split, {"fold": facts, "answers": _stored(fold.scores)})


def _steps_per_epoch(plan: TrainPlan, split: Split) -> int:
    return steps_per_epoch(len(split.train), plan.batch_size, plan.replay_ratio)


def _pooled_name(rung: Rung) -> str:
    return "few-shot" if rung.name.startswith("few-shot-") else rung.name


def _pooled_description(name: str, parts: Sequence[Rung]) -> str:
    if len({rung.description for rung in parts}) == 1:
        return parts[0].description
    if name == "constant":
        return "always the commonest training answer of the fold"
    chosen = ", ".join(rung.name.removeprefix("few-shot-") for rung in parts)
    return (
        "the base model with solved examples, chosen anew in every fold from its training rows, by its validation "
        f"rows ({chosen} examples)"
    )


def _stored(scores: Scores) -> dict[str, Any]:
    # Answers, not scores: they are scored again as they are read.
    return {
        "texts": scores.answers,
        "prompt_tokens": scores.prompt_tokens,
        "cut": scores.cut,
        "milliseconds": scores.milliseconds,
    }


def _restored(stored: dict[str, Any], metric: Metric, examples: Sequence[Example]) -> Scores:
    scores = score_answers(metric, examples, stored["texts"])
    return replace(
        scores,
        prompt_tokens=stored["prompt_tokens"],
        cut=stored["cut"],
        milliseconds=stored["milliseconds"],
    )


def _write(path: Path, split: Split, content: dict[str, Any]) -> None:
    """Write a record that says which rows it is about."""
    write_record(path, {"version": VERSION, "lines": _lines(split), **content})


def _read(path: Path, split: Split) -> dict[str, Any] | None:
    """The record, or None when there is none. Raises InvalidValue when it is about other rows."""
    record = read_record(path)
    if record is None:
        return None
    if (record["version"], record["lines"]) != (VERSION, _lines(split)):
        raise InvalidValue(
            f"{path} was written by a job with other data, another seed or another version of Heldout; delete "
            f"the folder {path.parent} to have this fold done again"
        )
    return record


def _lines(split: Split) -> list[int]:
    return [row.line for row in split.holdout]
