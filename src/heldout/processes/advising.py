"""`heldout advise` and `heldout.advise`: what a job would be, from its own parts, before it is started."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heldout.engine import catalogue
from heldout.pipeline.advise.advice import Advice, Job, Unmeasured, count_findings, why_no_curve
from heldout.pipeline.advise.costs import Prices, add_costs, count_tokens
from heldout.pipeline.advise.duration import add_up, training_of
from heldout.pipeline.advise.measure import Measured, measure
from heldout.pipeline.advise.recommend import Prompted, Proof, recommend, what_it_proves
from heldout.pipeline.advise.rungs import Cheap, Embed, measure_cheap
from heldout.pipeline.advise.task import Task, infer_task, kind_of_rows
from heldout.pipeline.checks import ModelTools, Parts
from heldout.pipeline.checks.groups import group_by_prompt
from heldout.pipeline.checks.length import find_too_long
from heldout.pipeline.evaluate.answers import Metric, choose_metric
from heldout.pipeline.evaluate.scores import answer_room
from heldout.pipeline.fold_length import fold_plan
from heldout.pipeline.folds import is_small, split_into_folds
from heldout.pipeline.giveaways import find_giveaways
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.intake import check_files, frozen_encoder, model_tools, refuse_errors
from heldout.pipeline.plan import TrainPlan, make_plan
from heldout.pipeline.request import Request, Tools
from heldout.pipeline.split import part_sizes, split_dataset
from heldout.pipeline.training import ModelFacts
from heldout.pipeline.types import Split
from heldout.pipeline.watch import Silent, Watch
from heldout.processes.foreground import source
from heldout.settings import DEFAULT_MODEL, Settings, read_settings

#: Seconds of training steps: a few of the slow ones, many of the fast ones.
STEPPING = 12.0

QUICK = "--quick loads no model"
REFUSED = "a job would refuse this file; heldout check names every problem"


def advise(
    train: str | Path,
    validation: str | Path | None = None,
    holdout: str | Path | None = None,
    *,
    model: str = DEFAULT_MODEL,
    quick: bool = False,
    seed: int = 0,
    watch: Watch | None = None,
    settings: Settings | None = None,
    **hyperparameters: Any,
) -> Advice:
    """Say what a file is good for and what a job with it would take, without training a model.

    Args:
        train, validation, holdout, model, hyperparameters: as for `heldout.tune`.
        quick: load no model: seconds instead of a minute or two, and no duration, tokens and costs.
        seed: decides the split; another one changes the numbers by chance only.

    Raises UserError when no row can be read, or for an unknown model; its message says what to do.
    """
    began = time.perf_counter()
    settings, watch = settings or read_settings(), watch or Silent()
    asked = Hyperparameters.parse(hyperparameters)
    request = Request(
        base_model=model,
        training=source(train),
        validation=source(validation) if validation else None,
        holdout=source(holdout) if holdout else None,
        seed=seed,
        hyperparameters=asked,
        directory=Path(),
    )
    with request.training.open() as content:
        special = kind_of_rows(content)
    parts, findings = check_files(request, ModelTools(kind=catalogue.known_kind(model, settings.model_aliases)))
    if special is None and not len(parts.train):
        refuse_errors(request, findings)
    # Their rows are no plain conversations; what was read of them says little.
    task = Task(kind=special, why="so its rows say") if special else infer_task(parts.train)
    errors, warnings = count_findings(findings)
    proof = _proof(parts)
    cheap = Cheap()
    prompted: tuple[Prompted, ...] = ()
    job: Job | Unmeasured = Unmeasured(why=REFUSED if errors else QUICK)
    if quick or errors:
        if task.kind == "labels":
            cheap = _cheap(parts, None, watch, seed)
    else:
        # torch and transformers come in here.
        from heldout.processes.tools import local_tools

        tools = local_tools(settings, model, watch)
        facts = tools.trainer.facts(model)
        parts = replace(parts, model=model_tools(model, facts, tools.trainer, tools.engine))
        refuse_errors(request, tuple(find_too_long(parts)))
        checked = time.perf_counter() - began
        if task.kind == "labels":
            encoder = frozen_encoder(model, facts)
            embed = (lambda texts: tools.engine.embed(encoder, texts)) if encoder else None
            cheap = _cheap(parts, embed, watch, seed)
        with tempfile.TemporaryDirectory(prefix="heldout-advise-") as name:
            rehearsal = _rehearse(parts, replace(request, directory=Path(name)), facts, tools, cheap)
        job = _job(rehearsal, model, _prices(settings), checked, settings.eval_budget)
        prompted = _prompted(rehearsal.measured)
        tools.engine.close()
    prompts = len(group_by_prompt(parts.train.examples))
    return Advice(
        file=request.training.name,
        examples=len(parts.train),
        prompts=prompts,
        task=task,
        recommendation=recommend(task, len(parts.train), proof, cheap.rungs, prompted),
        cheap=cheap.rungs,
        prompted=prompted,
        proof=proof,
        more_data=cheap.more or why_no_curve(task, prompts),
        job=job,
        errors=errors,
        warnings=warnings,
    )


def _cheap(parts: Parts, embed: Embed | None, watch: Watch, seed: int) -> Cheap:
    giveaways = find_giveaways(parts.rows, with_valid=parts.valid is not None)
    return measure_cheap(parts.train, embed, watch, giveaways=giveaways, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """A job's splits and plans, the last one's is served, and what their parts take here."""

    splits: Sequence[Split]
    plans: Sequence[TrainPlan]
    metric: Metric
    measured: Measured


def _rehearse(parts: Parts, request: Request, facts: ModelFacts, tools: Tools, cheap: Cheap) -> Rehearsal:
    """Split and plan as a job does, and measure the parts of the first of its trainings."""

    def plan(split: Split, asked: Hyperparameters, whole: Split | None = None) -> TrainPlan:
        made = make_plan(asked, split, facts, seed=request.seed)
        made = fold_plan(made, whole) if whole else made
        return tools.trainer.fit(made, split, base_model=request.base_model, directory=request.directory)

    asked = request.hyperparameters
    if parts.holdout is None and is_small(parts.train):
        folds, _ = split_into_folds(parts.train, parts.valid, seed=request.seed)
        splits = [*folds.splits, folds.whole]
        plans = [plan(split, asked, folds.whole) for split in folds.splits]
        # Of the model to serve at most: the folds may find that a share of its steps is enough.
        plans.append(plan(folds.whole, replace(asked, n_epochs=plans[0].n_epochs, lr_search="off"), folds.whole))
    else:
        split, _ = split_dataset(parts.train, parts.valid, parts.holdout, seed=request.seed)
        splits, plans = [split], [plan(split, asked)]
    metric = choose_metric([example.target for example in parts.train.examples], asked.metric)
    measured = measure(
        plans[0],
        splits[0],
        metric,
        facts,
        tools.engine,
        tools.trainer,
        base_model=request.base_model,
        max_tokens=answer_room(tools.engine, request.base_model, splits[0]),
        cheap=cheap,
        directory=request.directory,
        seconds=STEPPING,
        watch=tools.watch,
    )
    return Rehearsal(splits=splits, plans=plans, metric=metric, measured=measured)


def _job(rehearsal: Rehearsal, model: str, prices: Prices, checked: float, eval_budget: float | None) -> Job:
    measured, plans = rehearsal.measured, rehearsal.plans
    trainings = [training_of(*one, rehearsal.metric) for one in zip(plans, rehearsal.splits, strict=True)]
    duration = add_up(trainings, measured, checked=checked, eval_budget=eval_budget)
    tokens = count_tokens(measured, plans[0].n_epochs)
    return Job(
        base_model=model,
        duration=duration,
        memory_bytes=max(plan.predicted_memory_bytes for plan in plans),
        tokens=tokens,
        costs=add_costs(tokens, duration, measured, prices),
        steps_measured=measured.timings.steps,
    )


def _prompted(measured: Measured) -> tuple[Prompted, ...]:
    answered = [*([measured.plain] if measured.plain else []), *measured.behind_shots]
    return tuple(
        Prompted(
            name=f"{one.shots}-shot" if one.shots else "zero-shot",
            score=one.scores.mean,
            interval=one.scores.interval,
            rows=one.rows,
            metric=one.scores.metric,
        )
        for one in answered
        if one.scores
    )


def _proof(parts: Parts) -> Proof:
    """The rows that a job would answer once."""
    if parts.holdout is not None:
        return what_it_proves(len(parts.holdout), crossfit=False)
    prompts = len(group_by_prompt(parts.train.examples))
    if is_small(parts.train):
        return what_it_proves(prompts, crossfit=True)
    return what_it_proves(part_sizes(prompts, holdout=True, valid=parts.valid is None)[0], crossfit=False)


def _prices(settings: Settings) -> Prices:
    return Prices(
        input=settings.price_input,
        output=settings.price_output,
        training=settings.price_training,
        hour=settings.price_hour,
    )
