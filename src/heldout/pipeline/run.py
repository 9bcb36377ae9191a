"""ONE JOB, START TO VERDICT. Reads like the first page of the README; every stage is a function of data."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from heldout.engine import catalogue
from heldout.engine.base import Engine, ModelRef
from heldout.pipeline import crossfit, fold_records, ladder, report
from heldout.pipeline.advise.learning_curve import MoreData
from heldout.pipeline.advise.rungs import measure_cheap
from heldout.pipeline.augment.copies import Augmented, robust_copies
from heldout.pipeline.augment.paraphrase import paraphrased_copies
from heldout.pipeline.checks import Parts
from heldout.pipeline.closed_book import with_the_base_models_word
from heldout.pipeline.consequences import measure_all
from heldout.pipeline.consequences.base import Budget, Consequence, Subject
from heldout.pipeline.crossfit import CrossFit, Fold, FoldWatch
from heldout.pipeline.encoder_rung import TUNED_ENCODER, tuned_encoder_rung
from heldout.pipeline.evaluate.answers import Metric, choose_metric
from heldout.pipeline.evaluate.clusters import find_clusters
from heldout.pipeline.evaluate.forgetting import Forgetting, measure_forgetting
from heldout.pipeline.evaluate.graders.read import grader_metric, read_grader
from heldout.pipeline.evaluate.scores import Scores, score_model
from heldout.pipeline.fold_length import TrainedFold, choose_length, final_plan, fold_plan, trained_fold
from heldout.pipeline.folds import Folds, is_small, split_into_folds
from heldout.pipeline.intake import check_files, frozen_encoder, model_tools, refuse_errors, tell_findings
from heldout.pipeline.ladder import CLASSICAL, FROZEN, Rung, with_clusters
from heldout.pipeline.mistakes import instructive_mistakes
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.plan import TrainPlan, make_plan
from heldout.pipeline.replay import Replay, replay_examples
from heldout.pipeline.reproduce import Reproduction, reproduction_of
from heldout.pipeline.request import Request, Tools
from heldout.pipeline.served_rungs import ServedRung, serve_frozen_encoder, serve_shots, serve_word_counts
from heldout.pipeline.split import SMALL, split_dataset
from heldout.pipeline.training import Adapter, ModelFacts
from heldout.pipeline.types import Example, Finding, Split
from heldout.pipeline.verdict import decide
from heldout.pipeline.watch import Silent, Watch
from heldout.settings import DEFAULT_MODEL

#: Largest difference of an answer's log-probability (nats per token of the answer, relative to its size)
#: between the trainer and the serving path; two ways of adding up the same fp32 products differ by 1e-4.
SERVING_TOLERANCE = {"float32": 0.01, "bfloat16": 0.15}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A tuned model, proven to be served as it was trained, and the scores to judge it by."""

    split: Split  # of the model that is served
    left_out: tuple[Finding, ...]
    rungs: tuple[Rung, ...]
    adapter: Adapter
    tuned: Rung
    answered: tuple[Example, ...]  # whom the scores are about, in order
    clusters: tuple[int, ...]  # answered[i] is one piece of evidence with all others of clusters[i]
    metric: Metric
    crossfit: CrossFit | None = None  # where the scores come from, when there is no holdout


def run_job(request: Request, tools: Tools) -> Outcome:
    """Check, make a model and measure it, judge, report."""
    started = time.monotonic()
    facts = tools.trainer.facts(request.base_model)
    parts, findings = look_at_files(request, facts, tools)
    refuse_errors(request, findings)
    if facts.kind == catalogue.CHAT:  # an encoder says labels, no facts
        findings = with_the_base_models_word(findings, tools.engine, request.base_model, parts.train, tools.watch)
    tell_findings(findings, tools.watch)
    reproduction = reproduction_of(request)

    more = more_data(parts, request, facts, tools)
    few = parts.holdout is None and is_small(parts.train)
    made = (make_by_crossfit if few else make_by_holdout)(request, parts, facts, tools)

    forgetting = forgetting_of(made, request, facts, tools)
    consequences = consequences_of(made, forgetting, request, facts, tools)
    verdict = decide(
        made.rungs,
        made.tuned,
        made.crossfit,
        forgetting=forgetting,
        consequences=consequences,
        caveats=made.split.caveats,
        clusters=made.clusters,
        look=tools.look(made.answered),
    )
    outcome = Outcome(
        verdict=verdict,
        rungs=made.rungs,
        tuned=made.tuned,
        adapter=made.adapter,
        plan=made.adapter.plan,
        split=made.split,
        findings=(*findings, *made.left_out),
        base_model=request.base_model,
        kind=facts.kind,
        asked=request.hyperparameters,
        reproduction=with_precision(reproduction, made.adapter, facts),
        seconds=time.monotonic() - started,
        crossfit=made.crossfit,
        consequences=consequences,
        mistakes=instructive_mistakes(made.answered, made.tuned, ladder.best_baseline(made.rungs)),
        served_rungs=serve_rungs(made, request, facts, tools),
        more_data=more,
    )
    report.write(outcome, request.directory)
    shutil.rmtree(activations(request), ignore_errors=True)  # large, and of use to this job alone
    first = ". ".join((verdict.outcome, *verdict.caveats, verdict.reasons[0]))
    tools.watch.message(f"Verdict: {first}", data={"outcome": verdict.outcome})
    return outcome


def with_precision(reproduction: Reproduction, adapter: Adapter, facts: ModelFacts) -> Reproduction:
    """Told the precision that was probed here: another machine's probe may choose another. A classifier has one."""
    if facts.kind == catalogue.ENCODER:
        return reproduction
    environment = reproduction.environment | {"HELDOUT_PRECISION": adapter.precision}
    return replace(reproduction, environment=dict(sorted(environment.items())))


def look_at_files(request: Request, facts: ModelFacts, tools: Tools) -> tuple[Parts, tuple[Finding, ...]]:
    """The job's files, with all that the checks see of them by asking its models."""
    limit = request.hyperparameters.max_length
    models = model_tools(request.base_model, facts, tools.trainer, tools.engine, max_length=limit)
    return check_files(request, models, tools.watch)


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
    rungs = climb(split, metric, request, facts, tools, max_tokens=max_tokens)
    rungs = with_clusters(with_tuned_encoder(rungs, split, metric, request, facts, tools), clusters)
    tell_rungs(rungs, "the holdout", tools.watch)

    adapter = train(plan, split, request, tools, directory=request.directory)
    prove_serving(adapter, request.base_model, tools)
    tuned = Rung(
        name="tuned",
        kind="tuned",
        description=f"the base model with the adapter of step {adapter.best_step}, the prompt as it is",
        scores=score_tuned(adapter.directory, split, metric, request.base_model, max_tokens, tools),
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
    )


def make_by_crossfit(request: Request, parts: Parts, facts: ModelFacts, tools: Tools) -> Made:
    """Every fold goes through the stages of `make_by_holdout`, and the answers of all folds are put together.
    Then the model that is served is trained on all rows and proven."""
    folds, left_out = split_into_folds(parts.train, parts.valid, seed=request.seed, keep_leaks=request.keep_leaks)
    metric = metric_of(request, parts)
    tell_findings(left_out, tools.watch)
    tell_folds(folds, metric, tools.watch)

    # In the end all rows are trained on: what is wrong with one of them is told before anything is spent.
    whole = make_plan(request.hyperparameters, folds.splits[0], facts, seed=request.seed)
    tools.trainer.fit(whole, folds.whole, base_model=request.base_model, directory=request.directory)
    planned = [make_plan(request.hyperparameters, split, facts, seed=request.seed) for split in folds.splits]
    plans = [
        within_memory(fold_plan(plan, folds.whole), split, request, tools)
        for plan, split in zip(planned, folds.splits, strict=True)
    ]
    tools.watch.planned(plans[0])  # the others differ by a row or two
    answered = tuple(row for split in folds.splits for row in split.holdout)
    clusters = find_clusters(answered)
    if request.hyperparameters.tuned_encoder:
        tools.watch.message(f"The rung {TUNED_ENCODER} is left out: cross-fitting would train five", level="warn")
    rungs = with_clusters(climb_folds(folds, metric, request, facts, tools), clusters)
    tell_rungs(rungs, "the rows, out of fold", tools.watch)

    trained = train_folds(folds, plans, request, tools)
    fitted = ask_folds(folds, trained, metric, request, tools)
    tuned = with_clusters([crossfit.pool_tuned(fitted)], clusters)[0]
    tell_rungs([tuned], "the rows, out of fold", tools.watch)

    length = choose_length(trained)
    plan = final_plan(request.hyperparameters, folds.whole, facts, plans[0], trained, length, seed=request.seed)
    plan = within_memory(plan, folds.whole, request, tools)
    tools.watch.message(f"The model to serve is trained on all {len(folds.whole.train)} rows")
    tools.watch.planned(plan)
    adapter = train(plan, folds.whole, request, tools, directory=request.directory)
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
        crossfit=found,
    )


def metric_of(request: Request, parts: Parts) -> Metric:
    """How answers are scored: as was asked for, or as fits the training answers."""
    metric = choose_metric([example.target for example in parts.train.examples], request.hyperparameters.metric)
    return metric if request.grader is None else grader_metric(read_grader(request.grader), metric)


def more_data(parts: Parts, request: Request, facts: ModelFacts, tools: Tools) -> MoreData | None:
    """What twice as many examples would gain, by the best cheap rung; None where answers are no labels, or few."""
    if choose_metric([example.target for example in parts.train.examples]).form != "label":
        return None
    encoder = frozen_encoder(request.base_model, facts)
    more = measure_cheap(
        parts.train,
        (lambda texts: tools.engine.embed(encoder, texts)) if encoder else None,
        Silent(),
        seed=request.seed,
    ).more
    if more:
        tools.watch.message(more.sentence, data=more.as_dict())
    return more


def serve_rungs(made: Made, request: Request, facts: ModelFacts, tools: Tools) -> tuple[ServedRung, ...]:
    """The cheaper rungs that can be asked as models, fitted on what the tuned model was trained on."""
    served: list[ServedRung | None] = []
    for rung in made.rungs:
        directory = request.directory / "rungs" / rung.name
        if rung.name == CLASSICAL:
            served.append(serve_word_counts(made.split.train, request.base_model, directory=directory))
        elif rung.name == FROZEN and (encoder := frozen_encoder(request.base_model, facts)):
            encoder_facts = tools.trainer.facts(encoder)
            served.append(
                serve_frozen_encoder(made.split.train, tools.engine, encoder, encoder_facts, directory=directory)
            )
        elif rung.name == TUNED_ENCODER and (encoder := catalogue.bundled_encoder()):
            served.append(ServedRung(rung=rung.name, base_model=encoder, directory=directory / "adapter"))
        elif rung.shots:
            served.append(serve_shots(rung, request.base_model, directory=directory))
    return tuple(one for one in served if one)


def with_tuned_encoder(
    rungs: tuple[Rung, ...], split: Split, metric: Metric, request: Request, facts: ModelFacts, tools: Tools
) -> tuple[Rung, ...]:
    """The ladder with the rung that has to be asked for: dearer than what is only fitted, cheaper than a prompt."""
    if not request.hyperparameters.tuned_encoder:
        return rungs
    if facts.kind == catalogue.ENCODER or metric.form != "label":
        why = "the job trains an encoder itself" if facts.kind == catalogue.ENCODER else "the answers are no labels"
        tools.watch.message(f"The rung {TUNED_ENCODER} is left out: {why}", level="warn")
        return rungs
    trained = tuned_encoder_rung(split, metric, tools, directory=request.directory / "rungs" / TUNED_ENCODER)
    prompts = [rung for rung in rungs if rung.kind == "prompt"]
    return (*rungs[: len(rungs) - len(prompts)], *trained, *prompts)


def climb(
    split: Split, metric: Metric, request: Request, facts: ModelFacts, tools: Tools, *, max_tokens: int
) -> tuple[Rung, ...]:
    """The cheaper rungs that this base model leaves room for: an encoder cannot be prompted."""
    return ladder.climb(
        split,
        metric,
        tools.engine,
        None if facts.kind == catalogue.ENCODER else request.base_model,
        encoder=frozen_encoder(request.base_model, facts),
        max_tokens=max_tokens,
        watch=tools.watch,
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


def train_folds(folds: Folds, plans: Sequence[TrainPlan], request: Request, tools: Tools) -> tuple[TrainedFold, ...]:
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
            adapter = train(plan, split, request, in_fold, directory=directory)
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
        crossfit.discard_models(directory)
        in_fold.watch.message(
            f"the best step was {fold.best_step} ({fold.best_epoch:.2g} epochs); {fold.scores.mean:.1%} "
            f"{metric.name} on {len(split.holdout)} rows it never saw",
            data=fold.as_dict(),
        )
        answered.append(fold)
    return tuple(answered)


def activations(request: Request) -> Path:
    """What frozen layers say of this job's examples, shared by its trainings."""
    return request.directory / "activations"


def within_memory(plan: TrainPlan, split: Split, request: Request, tools: Tools) -> TrainPlan:
    """The plan made to fit into memory. Raises InvalidValue when it cannot."""
    replay, augmented = replay_for(plan, split, request, tools), copies_for(plan, split, request, tools)
    whole = mixed(split, replay, augmented)
    return tools.trainer.fit(plan, whole, base_model=request.base_model, directory=request.directory)


def replay_for(plan: TrainPlan, split: Split, request: Request, tools: Tools) -> Replay:
    """The general examples to train on beside train; answered at the first call, read from disk after it."""
    return replay_examples(
        plan,
        len(split.train),
        tools.engine,
        request.base_model,
        directory=request.directory,
        watch=tools.watch,
    )


def copies_for(plan: TrainPlan, split: Split, request: Request, tools: Tools) -> Augmented:
    """The copies that take turns with the rows of train. What a model wrote for them is read from disk after the
    first call."""
    if plan.augmentation == "none":
        return Augmented()
    if plan.augmentation == "robust":
        return robust_copies(split, seed=plan.seed)
    is_encoder = tools.trainer.facts(request.base_model).kind == catalogue.ENCODER
    return paraphrased_copies(
        split,
        tools.engine,
        DEFAULT_MODEL if is_encoder else request.base_model,
        request.base_model if is_encoder else catalogue.bundled_encoder(),
        seed=plan.seed,
        directory=request.directory,
        watch=tools.watch,
    )


def mixed(split: Split, replay: Replay, augmented: Augmented) -> Split:
    """The split as the trainer gets it, and nobody else: shots, rungs and counts are about the user's rows."""
    copies = (*augmented.copies, *(() for _ in replay.examples)) if augmented.copies else ()
    return replace(split, train=(*split.train, *replay.examples), copies=copies)


def train(plan: TrainPlan, split: Split, request: Request, tools: Tools, *, directory: Path) -> Adapter:
    """Train in `directory`: the job's own, or a fold's below it."""
    replay, augmented = replay_for(plan, split, request, tools), copies_for(plan, split, request, tools)
    if augmented.sentence:
        tools.watch.message(augmented.sentence, data=augmented.data)
    if replay.examples:
        tools.watch.message(replay.sentence, data={"examples": len(replay.examples), "different": replay.different})
    tools.engine.close()  # training needs the memory
    return tools.trainer.train(
        plan,
        mixed(split, replay, augmented),
        base_model=request.base_model,
        directory=directory,
        watch=tools.watch,
        cache=activations(request),
    )


def answer_room(engine: Engine, base_model: str, split: Split) -> int:
    """The most tokens an evaluated answer may have: a quarter more than the longest that was trained on,
    and a little. Longer ones are cut and counted as cut: they cannot be right."""
    targets = {example.target for part in (split.train, split.valid) for example in part}
    return math.ceil(1.25 * max(engine.count_tokens(base_model, sorted(targets)))) + 4


def prove_serving(adapter: Adapter, base_model: str, tools: Tools) -> None:
    """Train = serve: the adapter on disk, loaded through the serving path, gives the trainer's
    log-probabilities. Raises RuntimeError when it does not: that model must not be judged or served."""
    model = ModelRef(base_model=base_model, adapter=str(adapter.directory))
    served = tools.engine.log_probs(model, [proof.messages for proof in adapter.proofs])
    worst = 0.0
    for proof, log_prob in zip(adapter.proofs, served, strict=True):
        worst = max(worst, abs(proof.log_prob - log_prob) / (1 + abs(proof.log_prob)))
    if not worst <= SERVING_TOLERANCE[adapter.precision]:
        raise RuntimeError(
            f"the served model differs from the trained one: log-probabilities of {len(served)} answers are up "
            f"to {worst:.2g} apart (relative). This is a defect; the model was not registered."
        )
    tools.watch.message(
        f"The adapter on disk, loaded as it will be served, gives the trainer's log-probabilities on "
        f"{len(served)} answers (largest relative difference {worst:.1e})",
        data={"largest_difference": worst},
    )


def score_tuned(adapter: Path, split: Split, metric: Metric, base_model: str, max_tokens: int, tools: Tools) -> Scores:
    """The tuned model on the holdout: the one look."""
    return score_model(
        tools.engine,
        ModelRef(base_model=base_model, adapter=str(adapter)),
        split.holdout,
        metric,
        max_tokens=max_tokens,
        progress=lambda done, total: tools.watch.progress("tuned model", done, total),
    )


def forgetting_of(made: Made, request: Request, facts: ModelFacts, tools: Tools) -> Forgetting | None:
    """What became of general skills in the served model; an encoder has none."""
    if facts.kind == catalogue.ENCODER:
        return None
    return measure_forgetting(
        tools.engine,
        request.base_model,
        made.adapter.directory,
        replay_ratio=made.adapter.plan.replay_ratio,
        directory=request.directory,
        watch=tools.watch,
    )


def consequences_of(
    made: Made, forgetting: Forgetting | None, request: Request, facts: ModelFacts, tools: Tools
) -> tuple[Consequence, ...]:
    """What training made worse in the served model, in the time that the job has for it."""
    seconds = made.adapter.seconds if request.eval_budget is None else request.eval_budget
    subject = Subject(
        engine=tools.engine,
        model=ModelRef(base_model=request.base_model, adapter=str(made.adapter.directory)),
        is_encoder=facts.kind == catalogue.ENCODER,
        split=made.split,
        answered=made.answered,
        metric=made.metric,
        max_tokens=answer_room(tools.engine, request.base_model, made.split),
        tuned=made.tuned,
        baseline=ladder.best_baseline(made.rungs),
        rungs=made.rungs,
        crossfit=made.crossfit is not None,
        forgetting=forgetting,
        budget=Budget(seconds),
        watch=tools.watch,
    )
    return measure_all(subject)


def tell_split(split: Split, metric: Metric, watch: Watch) -> None:
    """What the rows are for."""
    watch.message(
        f"{len(split.train)} examples to train on, {len(split.valid)} to stop by, {len(split.holdout)} held out "
        f"for the verdict; answers are scored by {metric.name}"
    )


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


def tell_rungs(rungs: Sequence[Rung], where: str, watch: Watch) -> None:
    """How well each answers."""
    for rung in rungs:
        low, high = rung.scores.interval
        watch.message(
            f"{rung.name}: {rung.scores.mean:.1%} {rung.scores.metric} on {where} "
            f"(95 % interval {low:.1%} to {high:.1%})"
            + (f", macro-F1 {rung.scores.macro_f1:.1%}" if rung.scores.macro_f1 is not None else ""),
            data=rung.as_dict(),
        )
