"""A verdict on a model that no job of ours has trained, and what its training may have made worse."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from heldout.pipeline.consequences import forgetting as forgetting_light
from heldout.pipeline.consequences import hallucination, measure_all
from heldout.pipeline.consequences.base import Budget, Consequence, Measure, Subject, not_measured
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.evaluate.forgetting import Forgetting, measure_forgetting
from heldout.pipeline.evaluation import Answerer, Evaluation
from heldout.pipeline.ladder import best_baseline
from heldout.pipeline.types import Example, Split
from heldout.pipeline.verdict import Verdict, decide
from heldout.pipeline.watch import Watch

#: Probes have at least so many seconds, and else as many as the answers took.
AT_LEAST = 60.0

NO_BASE = "what the model was before its training is not known"


def decide_on(
    done: Evaluation,
    answerer: Answerer,
    split: Split,
    metric: Metric,
    watch: Watch,
    *,
    clusters: Sequence[int],
    is_trained: bool,
    seconds: float | None,
    look: Callable[[Sequence[Example]], int],
) -> tuple[Verdict, tuple[Consequence, ...]]:
    """Compare the model with the cheaper rungs, as a job does with its own; the verdict, and the consequences of its
    training where they can be measured.

    Args:
        done: its answers, and the rungs.
        split: the rows it was trained on, and those that it answered.
        is_trained: it was trained, and answers in this process: the consequences of training can be measured.
        seconds: that probes may take; None: as many as the answers took.
        look: as in `Tools`.
    """
    lost: Forgetting | None = None
    found: tuple[Consequence, ...] = ()
    if is_trained:
        seconds = max(AT_LEAST, done.seconds) if seconds is None else seconds
        known = {} if answerer.model.adapter else _without_base()
        if seconds > 0:
            lost = _forgetting(answerer, watch)
        else:
            why = Budget(seconds).sentence
            known = {forgetting_light.measure: not_measured(forgetting_light.NAME, why)} | known
        subject = Subject(
            engine=answerer.engine,
            model=answerer.model,
            is_encoder=not answerer.is_prompted,
            # Who trained it may have stopped by any of the rows: all of them are training rows here.
            split=replace(split, train=(*split.train, *split.valid), valid=()),
            answered=done.examples,
            metric=metric,
            max_tokens=done.max_tokens,
            tuned=done.rung,
            baseline=best_baseline(done.rungs),
            rungs=done.rungs,
            folds=(),
            forgetting=lost,
            budget=Budget(seconds),  # from now on: general skills have their own time, as in a job
            watch=watch,
        )
        found = measure_all(subject, known)
    verdict = decide(
        done.rungs,
        done.rung,
        forgetting=lost,
        consequences=found,
        caveats=split.caveats,
        clusters=clusters,
        look=look(done.examples),
    )
    return verdict, found


def _forgetting(answerer: Answerer, watch: Watch) -> Forgetting | None:
    if not (answerer.model.adapter and answerer.is_prompted):
        return None
    with tempfile.TemporaryDirectory(prefix="heldout-evaluate-") as directory:
        return measure_forgetting(
            answerer.engine,
            answerer.model.base_model,
            Path(answerer.model.adapter),
            replay_ratio=0.0,
            directory=Path(directory),
            watch=watch,
        )


def _without_base() -> dict[Measure, Consequence]:
    """What is a comparison with the model before training."""
    return {
        forgetting_light.measure: not_measured(forgetting_light.NAME, NO_BASE),
        hallucination.measure: not_measured(hallucination.NAME, NO_BASE),
    }
