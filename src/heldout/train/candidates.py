"""The checkpoints of a finished training that may be handed over, and which one of them validation prefers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from heldout.errors import CheckpointDamaged
from heldout.pipeline.selection import Candidate, Kind, Selection, in_question, select
from heldout.pipeline.training import RIGHT, Contender, Proof
from heldout.pipeline.types import Example
from heldout.pipeline.watch import Silent, Watch
from heldout.train import checkpoint, loop
from heldout.train.loop import Course
from heldout.train.method import Trainee

Row = TypeVar("Row")


def choose(
    trainee: Trainee[Row], valid: Sequence[Row], course: Course, *, checkpoints: Path, watch: Watch = Silent()
) -> tuple[Selection, dict[Kind, Path]]:
    """Which checkpoint to hand over as far as losses tell, and where each candidate lies: the lowest validation loss,
    the most answers right, the last, and the average of three neighbours, by pipeline/selection.py.

    A damaged one is left out, and the watch is told. Raises CheckpointDamaged when none is left.
    """
    stopping = course.stopping
    top = [] if stopping.top_score is None else [stopping.top_step]  # none while no answer was right
    wanted = {course.step, *((stopping.best_step, *top, *stopping.neighbours()) if valid else ())}
    sound, damaged = _sound(checkpoints, course, wanted, watch)
    if not sound:
        raise CheckpointDamaged(
            f"no checkpoint of this training can be handed over: {'; '.join(damaged)}. Start a new job."
        )
    if not valid:
        last = Candidate(kind="last", step=max(sound), valid_loss=math.nan, scores=())
        named = "the last" if last.step == course.step else "the last that can be read"
        reason = f"step {last.step} ({named}) is taken: there are no validation examples to choose by"
        alone = Selection(chosen=last, reason=reason, candidates=(last,), complete=not damaged)
        return alone, {"last": sound[last.step]}
    seen_losses = ((point.step, point.valid_calibrated_loss) for point in course.curve)
    losses = {step: loss for step, loss in seen_losses if loss is not None}

    def candidate(kind: Kind, step: int, loss: float, right: Sequence[bool]) -> Candidate:
        return Candidate(kind=kind, step=step, valid_loss=loss, scores=tuple(map(float, right)))

    finite = [step for step in sound if math.isfinite(losses[step])]
    if not finite:
        raise CheckpointDamaged(f"no checkpoint whose validation loss is a number can be read: {'; '.join(damaged)}.")
    best = stopping.best_step if stopping.best_step in sound else min(finite, key=lambda step: losses[step])
    steps: list[tuple[Kind, int]] = [
        ("best_loss", best),
        *(("best_metric", step) for step in top if step in sound),
        *(("last", step) for step in [course.step] if step in sound),
    ]
    candidates = [candidate(kind, step, losses[step], course.answered[step]) for kind, step in steps]
    folders = {kind: sound[step] for kind, step in steps}
    neighbours = stopping.neighbours()
    if len(neighbours) == 3 and sound.keys() >= set(neighbours):
        folders["average"] = checkpoint.average([sound[step] for step in neighbours], checkpoints / "average")
        trainee.load(folders["average"])
        seen = loop.validate(trainee, valid)
        mean = sum(seen.calibrated) / len(seen.calibrated)
        candidates.append(candidate("average", stopping.best_step, mean, seen.right))
    return select(candidates, metric=RIGHT, complete=not damaged), folders


def prove(
    trainee: Trainee[Any], selection: Selection, folders: Mapping[Kind, Path], examples: Sequence[Example]
) -> tuple[Contender, ...]:
    """The candidates that may be handed over, with the log-probabilities that each gives to the answers of these
    examples. Every one is restored from disk: what is proven is what was saved."""
    contending = dict.fromkeys(folders[one.kind] for one in in_question(selection.candidates))
    proofs: dict[Path, tuple[Proof, ...]] = {}
    for folder in contending:
        trainee.load(folder)
        proofs[folder] = tuple(
            Proof(messages=example.messages, log_prob=trainee.log_prob(example)) for example in examples
        )
    by_step = {one.step: folders[one.kind] for one in selection.candidates if one.kind != "average"}
    return tuple(
        Contender(
            kind=one.kind,
            directory=folders[one.kind],
            checkpoint=by_step[one.step],  # the middle one of an average is the lowest loss
            proofs=proofs[folders[one.kind]],
        )
        for one in selection.candidates
        if folders[one.kind] in contending  # one checkpoint may be several candidates
    )


def _sound(checkpoints: Path, course: Course, wanted: set[int], watch: Watch) -> tuple[dict[int, Path], list[str]]:
    """Where the checkpoints of these steps lie, and what is wrong with those that cannot be read. With one of
    them gone, every other one that has been validated may take its place."""
    sound: dict[int, Path] = {}
    damaged: list[str] = []

    def look(steps: set[int]) -> None:
        for step in sorted(steps - sound.keys()):
            try:
                sound[step] = checkpoint.read(checkpoints, step)[0]
            except CheckpointDamaged as error:
                damaged.append(str(error))
                watch.message(f"Left out when choosing what to hand over: {error}", level="warn")

    look(wanted)
    if damaged:
        look((set(checkpoint.steps(checkpoints)) & course.answered.keys()) - wanted)
    return sound, damaged
