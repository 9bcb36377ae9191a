"""A tuned model from a file too small for a holdout: five folds that answer for it, and the training on all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from heldout.pipeline import crossfit, fold_records
from heldout.pipeline.checks import Parts
from heldout.pipeline.crossfit import CrossFit, Fold, FoldWatch
from heldout.pipeline.encoder_rung import TUNED_ENCODER
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.evaluate.clusters import find_clusters
from heldout.pipeline.evaluate.scores import answer_room
from heldout.pipeline.fold_length import TrainedFold, choose_length, final_plan, fold_plan, trained_fold
from heldout.pipeline.folds import Folds, split_into_folds
from heldout.pipeline.intake import tell_findings
from heldout.pipeline.ladder import Rung, with_clusters
from heldout.pipeline.plan import TrainPlan, make_plan
from heldout.pipeline.request import Request, Tools
from heldout.pipeline.split import SMALL
from heldout.pipeline.stages import (
    FoldModel,
    Made,
    Stopwatch,
    climb,
    metric_of,
    prove_serving,
    score_tuned,
    tell_rungs,
    tell_what_it_can_show,
    train,
    within_memory,
)
from heldout.pipeline.training import ModelFacts
from heldout.pipeline.watch import Watch


def make_by_crossfit(request: Request, parts: Parts, facts: ModelFacts, tools: Tools) -> Made:
    """Every fold goes through the stages of `make_by_holdout`, and the answers of all folds are put together.
    Then the model that is served is trained on all rows and proven."""
    folds, left_out = split_into_folds(parts.train, parts.valid, seed=request.seed, keep_leaks=request.keep_leaks)
    metric = metric_of(request, parts)
    tell_findings(left_out, tools.watch)
    tell_folds(folds, metric, tools.watch)

    # In the end all rows are trained on: what is wrong with one of them is told before anything is spent.
    planned = [make_plan(request.hyperparameters, split, facts, seed=request.seed) for split in folds.splits]
    tools.trainer.fit(planned[0], folds.whole, base_model=request.base_model, directory=request.directory)
    plans = [
        within_memory(fold_plan(plan, folds.whole), split, request, tools)
        for plan, split in zip(planned, folds.splits, strict=True)
    ]
    tools.watch.planned(plans[0])  # the others differ by a row or two
    answered = tuple(row for split in folds.splits for row in split.holdout)
    clusters = find_clusters(answered)
    tell_what_it_can_show(clusters, tools.watch, crossfit=True)
    if request.hyperparameters.tuned_encoder:
        tools.watch.message(f"The rung {TUNED_ENCODER} is left out: cross-fitting would train five", level="warn")
    answering = Stopwatch()
    with answering:
        rungs = with_clusters(climb_folds(folds, metric, request, facts, tools), clusters)
    tell_rungs(rungs, "the rows, out of fold", tools.watch)

    trained = train_folds(folds, plans, metric, request, tools)
    with answering:
        fitted = ask_folds(folds, trained, metric, request, tools)
    tuned = with_clusters([crossfit.pool_tuned(fitted)], clusters)[0]
    tell_rungs([tuned], "the rows, out of fold", tools.watch)

    length = choose_length(trained)
    if not folds.whole.valid:
        tools.watch.message(f"How long to train: {length.sentence}", data=length.as_dict())
    plan = final_plan(request.hyperparameters, folds.whole, facts, plans[0], trained, length, seed=request.seed)
    plan = within_memory(plan, folds.whole, request, tools)
    tools.watch.message(f"The model to serve is trained on all {len(folds.whole.train)} rows")
    tools.watch.planned(plan)
    adapter = train(plan, folds.whole, metric, request, tools, directory=request.directory)
    prove_serving(adapter, request.base_model, tools)
    found = CrossFit(folds=fitted, groups=folds.groups)
    tools.watch.message(f"Mind that {found.sentence}")
    return Made(
        split=folds.whole,
        left_out=left_out,
        rungs=rungs,
        adapter=adapter,
        tuned=tuned,
        answered=answered,
        clusters=clusters,
        metric=metric,
        answering=answering.seconds,
        crossfit=found,
        fold_models=tuple(
            FoldModel(
                directory=one.model_of(fold.best_step).directory,
                # Where there was one model, valid has chosen nothing.
                split=split if len(one.models) > 1 or folds.whole.valid else replace(split, valid=()),
                max_tokens=answer_room(tools.engine, request.base_model, split),
            )
            for one, fold, split in zip(trained, fitted, folds.splits, strict=True)
        ),
    )


def climb_folds(folds: Folds, metric: Metric, request: Request, facts: ModelFacts, tools: Tools) -> tuple[Rung, ...]:
    """The cheaper rungs on the rows that the tuned models will answer. What is chosen or fitted is so in each
    fold by that fold's train and valid alone."""
    ladders = []
    for number, split in enumerate(folds.splits, start=1):
        directory = request.directory / f"fold-{number}"
        rungs = fold_records.read_ladder(directory, split, metric)
        if rungs is None:
            max_tokens = answer_room(tools.engine, request.base_model, split)
            in_fold = replace(tools, watch=FoldWatch(tools.watch, number, len(folds.splits)))
            rungs = climb(split, metric, request, facts, in_fold, max_tokens=max_tokens)
            fold_records.write_ladder(directory, split, rungs)
        ladders.append(rungs)
    return crossfit.pool_rungs(ladders, tools.watch)


def train_folds(
    folds: Folds, plans: Sequence[TrainPlan], metric: Metric, request: Request, tools: Tools
) -> tuple[TrainedFold, ...]:
    """Train in every fold, and keep the models that may answer. What a training found is on disk before anything of
    it is deleted, so a job that is taken up repeats no finished one."""
    found = []
    for number, (split, plan) in enumerate(zip(folds.splits, plans, strict=True), start=1):
        directory = request.directory / f"fold-{number}"
        in_fold = replace(tools, watch=FoldWatch(tools.watch, number, len(folds.splits)))
        trained = fold_records.read_trained(directory, split)
        if trained is None:
            in_fold.watch.message(
                f"{len(split.train)} rows to train on, {len(split.valid)} to stop by, {len(split.holdout)} to answer"
            )
            adapter = train(plan, split, metric, request, in_fold, directory=directory)
            trained = trained_fold(number, split, plan, folds.whole, adapter)
            fold_records.write_trained(directory, split, trained)
            in_fold.watch.kept()
        crossfit.discard_models(directory, but=trained.folders(directory))
        found.append(trained)
    return tuple(found)


def ask_folds(
    folds: Folds, trained: Sequence[TrainedFold], metric: Metric, request: Request, tools: Tools
) -> tuple[Fold, ...]:
    """Let the models of the folds answer the rows that they never saw. Which of a fold's models does is chosen
    without the rows that it answers."""
    answered = []
    for split, one in zip(folds.splits, trained, strict=True):
        directory = request.directory / f"fold-{one.number}"
        in_fold = replace(tools, watch=FoldWatch(tools.watch, one.number, len(folds.splits)))
        fold = fold_records.read_fold(directory, split, metric)
        if fold is None:
            chosen = choose_length(trained, but={row.line for row in split.holdout}).chosen
            adapter = one.models[chosen].directory
            max_tokens = answer_room(tools.engine, request.base_model, split)
            scores = score_tuned(adapter, split, metric, request.base_model, max_tokens, in_fold)
            fold = crossfit.make_fold(one, chosen, scores)
            fold_records.write_fold(directory, split, fold)
            in_fold.watch.kept()
        in_fold.watch.message(
            f"the best step was {fold.best_step} ({fold.best_epoch:.2g} epochs); {fold.scores.mean:.1%} "
            f"{metric.name} on {len(split.holdout)} rows it never saw",
            data=fold.as_dict(),
        )
        answered.append(fold)
    return tuple(answered)


def discard_folds(made: Made, request: Request) -> None:
    """Delete the folds' models: nothing will be asked of them any more."""
    for number in range(1, 1 + len(made.fold_models)):
        crossfit.discard_models(request.directory / f"fold-{number}")


def tell_folds(folds: Folds, metric: Metric, watch: Watch) -> None:
    """What the rows are for, what that costs, and how to avoid it."""
    n, whole = len(folds.splits), folds.whole
    watch.message(
        f"Cross-fitting: {whole.groups} distinct prompts are too few for a holdout of their own (fewer than "
        f"{SMALL}) and no holdout file was given. {n + 1} trainings instead of 1: {n} models, each scored on the "
        f"rows it never saw, and the one that is served, on all {len(whole.train)} rows. "
        "Give a holdout file (x_holdout_file, --holdout) to train once.",
        data={"folds": n, "trainings": n + 1, "groups": whole.groups},
    )
    scored = sum(len(split.holdout) for split in folds.splits)
    first = folds.splits[0]
    watch.message(
        f"{scored} examples to answer, each by the model that never saw it; in each of {n} folds about "
        f"{len(first.train)} to train on and {len(first.valid)} to stop by; answers are scored by {metric.name}"
    )
