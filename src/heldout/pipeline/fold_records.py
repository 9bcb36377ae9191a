"""What the folds of cross-fitting leave on disk, so that a job which is taken up again repeats no finished part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from heldout.errors import InvalidValue
from heldout.kept import read_record, write_record
from heldout.pipeline.crossfit import Fold
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.evaluate.scores import Scores, score_answers
from heldout.pipeline.fold_length import TrainedFold
from heldout.pipeline.ladder import Rung
from heldout.pipeline.training import KeptModel
from heldout.pipeline.types import Example, Split

LADDER, TRAINED, FOLD = "ladder.json", "trained.json", "fold.json"
#: Changes when the records on disk do; a job of another version is not taken up.
VERSION = 5


def read_ladder(directory: Path, split: Split, metric: Metric) -> tuple[Rung, ...] | None:
    """The rungs that were scored on the fold's holdout before, or None. Raises InvalidValue when the record
    is about other rows."""
    record = _read(directory / LADDER, split)
    if record is None:
        return None
    train = {row.line: row for row in split.train}
    return tuple(
        Rung(
            name=one["name"],
            kind=one["kind"],
            description=one["description"],
            scores=_restored(one["answers"], metric, split.holdout),
            shots=tuple(train[line] for line in one["shots"]),
        )
        for one in record["rungs"]
    )


def write_ladder(directory: Path, split: Split, rungs: Sequence[Rung]) -> None:
    """Keep what the rungs answered."""
    stored = [
        {
            "name": rung.name,
            "kind": rung.kind,
            "description": rung.description,
            "shots": [shot.line for shot in rung.shots],
            "answers": _stored(rung.scores),
        }
        for rung in rungs
    ]
    _write(directory / LADDER, split, {"rungs": stored})


def read_trained(directory: Path, split: Split) -> TrainedFold | None:
    """A fold that was trained before, or None. Raises InvalidValue when the record is about other rows."""
    record = _read(directory / TRAINED, split)
    if record is None:
        return None
    models = tuple(
        KeptModel(step=one["step"], directory=directory / one["directory"], losses=tuple(one["losses"]))
        for one in record["models"]
    )
    facts = record["trained"]
    lists = {name: tuple(facts[name]) for name in ("valid_losses", "valid_lines")}
    return TrainedFold(**(facts | lists), models=models)


def write_trained(directory: Path, split: Split, trained: TrainedFold) -> None:
    """Keep what a fold's training found, and where its models lie."""
    facts = {one.name: getattr(trained, one.name) for one in fields(trained) if one.name != "models"}
    models = [
        {"step": one.step, "directory": str(one.directory.relative_to(directory)), "losses": one.losses}
        for one in trained.models
    ]
    _write(directory / TRAINED, split, {"trained": facts, "models": models})


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
