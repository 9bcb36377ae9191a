"""Which checkpoint to hand over where the losses do not tell the score: the candidates answer rows of validation."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from heldout.engine.base import ModelRef
from heldout.kept import read_record, write_record
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.evaluate.scores import answer_room, score_model
from heldout.pipeline.giveaways import as_asked
from heldout.pipeline.request import Tools
from heldout.pipeline.selection import select
from heldout.pipeline.training import Adapter
from heldout.pipeline.types import Example, Split

#: All candidates together answer at most so many rows for each one that was trained on, in all epochs;
SHARE = 0.5
#: but each of them so many at least, where there are so many, and at most.
LEAST, MOST = 50, 200
#: In the job's directory, or the fold's: what the candidates answered is not asked again.
RECORD = "candidates.json"


def choose_by_answers(adapter: Adapter, split: Split, metric: Metric, base_model: str, tools: Tools) -> Adapter:
    """The adapter with the candidate in its place that `metric` prefers on rows of validation, by the rule that the
    trainer chose by (selection.select). Nothing is asked where no score could change the choice, or where training
    knows the scores."""
    known = adapter.selection
    checkpoints = list(dict.fromkeys(one.directory for one in adapter.contenders))  # one may be several candidates
    if metric.is_told_by_tokens or len(checkpoints) < 2:
        return adapter
    started = time.monotonic()
    scores = _scores(checkpoints, adapter, as_asked(split), metric, base_model, tools)
    found = {one.kind: scores[one.directory] for one in adapter.contenders}
    # A candidate that no score could have chosen has none.
    scored = tuple(replace(one, scores=found.get(one.kind, ())) for one in known.candidates)
    asked = [one for one in scored if one.kind in found]
    selection = replace(select(asked, metric=metric.name, complete=known.complete), candidates=scored)
    handed = tools.trainer.hand_over(adapter, selection)
    return replace(handed, seconds=adapter.seconds + time.monotonic() - started)


def count_to_ask(valid: int, candidates: int, trained: int) -> int:
    """How many of so many validation rows each candidate answers, after training that took `trained` rows, in all
    epochs: an answer costs about as much as a row of training."""
    return min(valid, MOST, max(LEAST, int(SHARE * trained / candidates)))


def rows_to_ask(split: Split, count: int) -> tuple[Example, ...]:
    """So many rows of validation, in order; the same ones for the same seed."""
    chosen = random.Random(f"{split.seed}/candidates").sample(range(len(split.valid)), count)
    return tuple(split.valid[row] for row in sorted(chosen))


def _scores(
    asked: Sequence[Path], adapter: Adapter, split: Split, metric: Metric, base_model: str, tools: Tools
) -> dict[Path, tuple[float, ...]]:
    """What each checkpoint scores on the same rows; from the record of a job that is taken up."""
    rows = rows_to_ask(split, count_to_ask(len(split.valid), len(asked), adapter.last_step * adapter.plan.batch_size))
    about: dict[str, Any] = {
        "metric": metric.name,
        "lines": [row.line for row in rows],
        "checkpoints": [folder.name for folder in asked],
    }
    path = adapter.directory.parent / RECORD
    record = read_record(path)
    if record is not None and {name: record.get(name) for name in about} == about:
        return dict(zip(asked, map(tuple, record["scores"]), strict=True))
    tools.watch.message(
        f"{len(asked)} checkpoints answer {len(rows)} of {len(split.valid)} validation rows: their losses do not tell "
        f"their {metric.name}, and one is to be handed over"
    )
    max_tokens = answer_room(tools.engine, base_model, split)
    scores = []
    for number, folder in enumerate(asked):

        def progress(done: int, total: int, before: int = number) -> None:
            tools.watch.progress("choosing a checkpoint", before * total + done, len(asked) * total)

        model = ModelRef(base_model=base_model, adapter=str(folder))
        found = score_model(
            tools.engine, model, rows, metric, max_tokens=max_tokens, learned=split.train, progress=progress
        )
        scores.append(found.per_example)
    write_record(path, {**about, "scores": scores})
    tools.watch.kept()
    return dict(zip(asked, scores, strict=True))
