"""Which checkpoint to hand over where the losses do not tell the score: the candidates answer rows of validation."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from functools import partial

from heldout.engine.base import ModelRef
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.evaluate.scores import answer_room, score_model
from heldout.pipeline.request import Tools
from heldout.pipeline.selection import in_question, select
from heldout.pipeline.training import Adapter
from heldout.pipeline.types import Example, Split

#: Rows that a candidate answers, where there are so many.
MOST, LEAST = 200, 50
#: All candidates together answer at most so many rows for each one that was trained on, in all epochs.
SHARE = 0.5


def choose_by_answers(adapter: Adapter, split: Split, metric: Metric, base_model: str, tools: Tools) -> Adapter:
    """The adapter with the candidate in its place that `metric` prefers on rows of validation, by the rule that the
    trainer chose by (selection.select). Nothing is asked where no score could change the choice, or where training
    knows the scores."""
    known = adapter.selection
    candidates = in_question(known.candidates)
    folders = {one.candidate.kind: one.directory for one in adapter.contenders}
    asked = list(dict.fromkeys(folders[one.kind] for one in candidates))  # one checkpoint may be several candidates
    if metric.is_told_by_tokens or len(asked) < 2:
        return adapter
    started = time.monotonic()
    rows = rows_to_ask(split, count_to_ask(len(split.valid), len(asked), adapter.last_step * adapter.plan.batch_size))
    tools.watch.message(
        f"{len(asked)} checkpoints answer {len(rows)} of {len(split.valid)} validation rows: their losses do not tell "
        f"their {metric.name}, and one is to be handed over"
    )
    max_tokens = answer_room(tools.engine, base_model, split)
    scores = {
        folder: score_model(
            tools.engine,
            ModelRef(base_model=base_model, adapter=str(folder)),
            rows,
            metric,
            max_tokens=max_tokens,
            learned=split.train,
            progress=partial(tools.watch.progress, f"checkpoint {number} of {len(asked)}"),
        ).per_example
        for number, folder in enumerate(asked, start=1)
    }
    scored = {one.kind: replace(one, scores=scores[folders[one.kind]]) for one in candidates}
    selection = select(tuple(scored.values()), metric=metric.name, complete=known.complete)
    every = tuple(scored.get(one.kind, replace(one, scores=())) for one in known.candidates)
    handed = tools.trainer.hand_over(adapter, replace(selection, candidates=every))
    return replace(handed, seconds=adapter.seconds + time.monotonic() - started)


def count_to_ask(valid: int, candidates: int, trained: int) -> int:
    """How many of so many validation rows each candidate answers, after training that took `trained` rows, in all
    epochs: an answer costs about as much as a row of training."""
    return min(valid, MOST, max(LEAST, int(SHARE * trained / candidates)))


def rows_to_ask(split: Split, count: int) -> tuple[Example, ...]:
    """So many rows of validation, in order; the same ones for the same seed."""
    chosen = random.Random(f"{split.seed}/candidates").sample(range(len(split.valid)), count)
    return tuple(split.valid[row] for row in sorted(chosen))
