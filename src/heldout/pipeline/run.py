"""ONE JOB, START TO VERDICT. Reads like the first page of the README; every stage is a function of data."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace

from heldout.engine import catalogue
from heldout.engine.base import ModelRef
from heldout.pipeline import ladder, report
from heldout.pipeline.advise.learning_curve import MoreData
from heldout.pipeline.advise.rungs import measure_cheap
from heldout.pipeline.by_crossfit import discard_folds, make_by_crossfit
from heldout.pipeline.by_holdout import make_by_holdout
from heldout.pipeline.checks import Parts
from heldout.pipeline.checks.wrong_labels import noise_caveats
from heldout.pipeline.closed_book import with_the_base_models_word
from heldout.pipeline.consequences import measure_all, without_models
from heldout.pipeline.consequences.base import Budget, Consequence, Subject, TunedModel, seconds_for_probes
from heldout.pipeline.consequences.records import read_consequences, write_consequences
from heldout.pipeline.encoder_rung import TUNED_ENCODER
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.evaluate.forgetting import Forgetting, measure_forgetting
from heldout.pipeline.evaluate.scores import answer_room
from heldout.pipeline.folds import is_small
from heldout.pipeline.giveaways import as_asked, find_giveaways
from heldout.pipeline.intake import check_files, frozen_encoder, model_tools, refuse_errors, tell_findings
from heldout.pipeline.ladder import CLASSICAL, FROZEN
from heldout.pipeline.mistakes import instructive_mistakes
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.reproduce import Reproduction, reproduction_of
from heldout.pipeline.request import Request, Tools
from heldout.pipeline.served_rungs import ServedRung, serve_frozen_encoder, serve_shots, serve_word_counts
from heldout.pipeline.stages import Made, Stopwatch, activations
from heldout.pipeline.training import Adapter, ModelFacts
from heldout.pipeline.types import Example, Finding
from heldout.pipeline.verdict import decide
from heldout.pipeline.watch import Silent


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

    answering = Stopwatch(made.answering)
    with answering:
        forgetting = forgetting_of(made, request, facts, tools)
    consequences = consequences_of(made, forgetting, answering, request, facts, tools)
    verdict = decide(
        made.rungs,
        made.tuned,
        made.crossfit,
        forgetting=forgetting,
        consequences=consequences,
        caveats=(*made.split.caveats, *noise_caveats(findings, holdout_given=parts.holdout is not None)),
        clusters=made.clusters,
        look=tools.look(as_given(made.answered, parts)),
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
        reproduction=as_computed(reproduction, made.adapter, facts),
        seconds=time.monotonic() - started,
        crossfit=made.crossfit,
        consequences=consequences,
        mistakes=instructive_mistakes(made.answered, made.tuned, ladder.best_baseline(made.rungs)),
        served_rungs=serve_rungs(made, request, facts, tools),
        more_data=more,
    )
    report.write(outcome, request.directory)
    shutil.rmtree(activations(request), ignore_errors=True)  # large, and of use to this job alone
    discard_folds(made, request)
    first = ". ".join((verdict.outcome, *verdict.caveats, verdict.reasons[0]))
    tools.watch.message(f"Verdict: {first}", data={"outcome": verdict.outcome})
    return outcome


def as_computed(reproduction: Reproduction, adapter: Adapter, facts: ModelFacts) -> Reproduction:
    """Told the precision that was probed here, and whether there were no kernels: another machine may choose another
    precision, and have kernels. A classifier has one precision and never kernels."""
    if facts.kind == catalogue.ENCODER:
        return reproduction
    environment = reproduction.environment | {"HELDOUT_PRECISION": adapter.precision}
    if not adapter.kernels:
        environment["HELDOUT_KERNELS"] = "off"
    return replace(reproduction, environment=dict(sorted(environment.items())))


def look_at_files(request: Request, facts: ModelFacts, tools: Tools) -> tuple[Parts, tuple[Finding, ...]]:
    """The job's files, with all that the checks see of them by asking its models."""
    limit = request.hyperparameters.max_length
    models = model_tools(request.base_model, facts, tools.trainer, tools.engine, max_length=limit)
    return check_files(request, models, tools.watch)


def as_given(answered: Sequence[Example], parts: Parts) -> tuple[Example, ...]:
    """The rows of the verdict as they stand in their file: a look at them is one however they were asked."""
    lines = {example.line for example in answered}
    return tuple(row for row in (parts.holdout or parts.train).examples if row.line in lines)


def more_data(parts: Parts, request: Request, facts: ModelFacts, tools: Tools) -> MoreData | None:
    """What twice as many examples would gain, by the best cheap rung; None where answers are no labels, or few."""
    if choose_metric([example.target for example in parts.train.examples]).form != "label":
        return None
    encoder = frozen_encoder(request.base_model, facts)
    more = measure_cheap(
        parts.train,
        (lambda texts: tools.engine.embed(encoder, texts)) if encoder else None,
        Silent(),
        giveaways=find_giveaways(parts.rows, with_valid=parts.valid is not None, keep=request.keep_leaks),
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


def tuned_by_folds(made: Made, base_model: str) -> tuple[TunedModel, ...]:
    """By cross-fitting: who answered which of the rows; none otherwise."""
    shots = ladder.best_baseline(made.rungs).fold_shots
    found: list[TunedModel] = []
    for number, one in enumerate(made.fold_models):
        start = found[-1].places.stop if found else 0
        found.append(
            TunedModel(
                model=ModelRef(base_model=base_model, adapter=str(one.directory)),
                split=as_asked(one.split),
                places=range(start, start + len(one.split.holdout)),
                shots=shots[number],
                max_tokens=one.max_tokens,
            )
        )
    return tuple(found)


def consequences_of(
    made: Made, forgetting: Forgetting | None, evaluating: Stopwatch, request: Request, facts: ModelFacts, tools: Tools
) -> tuple[Consequence, ...]:
    """What training made worse, in the time that the job has for it after answering for the verdict."""
    if known := read_consequences(request.directory, made.answered, made.adapter.best_step):
        return known
    seconds = request.eval_budget
    if seconds is None:
        seconds = seconds_for_probes(made.training_seconds, evaluating.seconds)
    subject = Subject(
        engine=tools.engine,
        model=ModelRef(base_model=request.base_model, adapter=str(made.adapter.directory)),
        is_encoder=facts.kind == catalogue.ENCODER,
        split=as_asked(made.split),
        answered=made.answered,
        metric=made.metric,
        max_tokens=answer_room(tools.engine, request.base_model, made.split),
        tuned=made.tuned,
        baseline=ladder.best_baseline(made.rungs),
        rungs=made.rungs,
        folds=tuned_by_folds(made, request.base_model),
        forgetting=forgetting,
        budget=Budget(seconds),
        watch=tools.watch,
    )
    # Only where a job is taken up again that had ended, by another version.
    gone = not all(one.directory.is_dir() for one in made.fold_models)
    with evaluating:
        found = measure_all(subject, without_models("the models of the folds are gone") if gone else {})
    write_consequences(request.directory, made.answered, made.adapter.best_step, found)
    tools.watch.message(
        f"Evaluation took {evaluating.seconds:.0f} s in all, training {made.training_seconds:.0f} s",
        data={"evaluating": evaluating.seconds, "training": made.training_seconds},
    )
    return found
