"""A tuned model judged by rows that were held out: one training."""

from __future__ import annotations

from heldout.pipeline.checks import Parts
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.evaluate.clusters import find_clusters
from heldout.pipeline.evaluate.scores import answer_room
from heldout.pipeline.intake import tell_findings
from heldout.pipeline.ladder import Rung, with_clusters
from heldout.pipeline.plan import make_plan
from heldout.pipeline.request import Request, Tools
from heldout.pipeline.split import split_dataset
from heldout.pipeline.stages import (
    Made,
    Stopwatch,
    climb,
    metric_of,
    prove_serving,
    score_tuned,
    tell_rungs,
    tell_what_it_can_show,
    train,
    with_tuned_encoder,
    within_memory,
)
from heldout.pipeline.training import ModelFacts
from heldout.pipeline.types import Split
from heldout.pipeline.watch import Watch


def make_by_holdout(request: Request, parts: Parts, facts: ModelFacts, tools: Tools) -> Made:
    """Split, score the cheaper rungs, plan, train, prove, evaluate."""
    split, left_out = split_dataset(
        parts.train, parts.valid, parts.holdout, seed=request.seed, keep_leaks=request.keep_leaks
    )
    metric = metric_of(request, parts)
    tell_findings(left_out, tools.watch)
    tell_split(split, metric, tools.watch)

    max_tokens = answer_room(tools.engine, request.base_model, split)
    plan = within_memory(make_plan(request.hyperparameters, split, facts, seed=request.seed), split, request, tools)
    tools.watch.planned(plan)
    clusters = find_clusters(split.holdout)
    tell_what_it_can_show(clusters, tools.watch, crossfit=False)
    answering = Stopwatch()
    with answering:
        rungs = climb(split, metric, request, facts, tools, max_tokens=max_tokens)
    rungs = with_clusters(with_tuned_encoder(rungs, split, metric, request, facts, tools), clusters)
    tell_rungs(rungs, "the holdout", tools.watch)

    adapter = train(plan, split, metric, request, tools, directory=request.directory)
    with answering:
        prove_serving(adapter, request.base_model, tools)
        scores = score_tuned(adapter.directory, split, metric, request.base_model, max_tokens, tools)
    tuned = Rung(
        name="tuned",
        kind="tuned",
        description=f"the base model with the adapter of step {adapter.best_step}, the prompt as it is",
        scores=scores,
    )
    return Made(
        split=split,
        left_out=left_out,
        rungs=rungs,
        adapter=adapter,
        tuned=with_clusters([tuned], clusters)[0],
        answered=split.holdout,
        clusters=clusters,
        metric=metric,
        answering=answering.seconds,
    )


def tell_split(split: Split, metric: Metric, watch: Watch) -> None:
    """What the rows are for."""
    watch.message(
        f"{len(split.train)} examples to train on, {len(split.valid)} to stop by, {len(split.holdout)} held out "
        f"for the verdict; answers are scored by {metric.name}"
    )
