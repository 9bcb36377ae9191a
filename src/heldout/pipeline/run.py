"""ONE JOB, START TO VERDICT. Reads like the first page of the README; every stage is a function of data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from heldout.engine.base import Engine, ModelRef
from heldout.errors import InvalidHoldoutFile, InvalidTrainingFile, InvalidValidationFile, UserError
from heldout.pipeline import ladder, report
from heldout.pipeline.checks import Parts, check
from heldout.pipeline.dataset import read_dataset
from heldout.pipeline.evaluate.answers import Metric, choose_metric
from heldout.pipeline.evaluate.scores import score_model
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.ladder import Rung
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.plan import make_plan
from heldout.pipeline.split import split_dataset
from heldout.pipeline.training import Adapter, Trainer
from heldout.pipeline.types import Dataset, Finding, Split
from heldout.pipeline.verdict import decide
from heldout.pipeline.watch import Watch

#: Largest difference of an answer's log-probability (nats per token of the answer, relative to its size)
#: between the trainer and the serving path; two ways of adding up the same fp32 products differ by 1e-4.
SERVING_TOLERANCE = {"float32": 0.01, "bfloat16": 0.15}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file of the job: how reports call it, and how to read it."""

    name: str
    open: Callable[[], BinaryIO]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for."""

    base_model: str
    training: Source
    validation: Source | None = None
    holdout: Source | None = None
    seed: int = 0
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    directory: Path  # checkpoints, adapter and report are written here; a job resumes from it


@dataclass(frozen=True, kw_only=True)
class Tools:
    """Who does the work that is not ours."""

    engine: Engine
    trainer: Trainer
    watch: Watch


def run_job(request: Request, tools: Tools) -> Outcome:
    """Check, split, score the cheaper rungs, plan, train, prove, evaluate, judge, report."""
    started = time.monotonic()
    parts, findings = check_files(request)
    refuse_errors(request, findings)
    split, left_out = split_dataset(parts.train, parts.valid, parts.holdout, seed=request.seed)
    metric = choose_metric([example.target for example in split.train])
    tell_split(split, metric, (*findings, *left_out), tools.watch)

    max_tokens = answer_room(tools.engine, request.base_model, split)
    plan = make_plan(request.hyperparameters, split, tools.trainer.facts(request.base_model), seed=request.seed)
    tools.watch.planned(plan)
    rungs = ladder.climb(split, metric, tools.engine, request.base_model, max_tokens=max_tokens, watch=tools.watch)
    tell_ladder(rungs, tools.watch)

    tools.engine.close()  # training needs the memory
    adapter = tools.trainer.train(
        plan, split, base_model=request.base_model, directory=request.directory, watch=tools.watch
    )
    tools.watch.message(f"Training ended: {adapter.stopped}")
    prove_serving(adapter, request.base_model, tools)

    tuned = score_tuned(adapter, split, metric, request.base_model, max_tokens, tools)
    verdict = decide(rungs, tuned)
    outcome = Outcome(
        verdict=verdict,
        rungs=rungs,
        tuned=tuned,
        adapter=adapter,
        plan=plan,
        split=split,
        findings=(*findings, *left_out),
        base_model=request.base_model,
        seconds=time.monotonic() - started,
    )
    report.write(outcome, request.directory)
    tools.watch.message(f"Verdict: {verdict.outcome}. {verdict.reasons[0]}", data={"outcome": verdict.outcome})
    return outcome


def check_files(request: Request) -> tuple[Parts, tuple[Finding, ...]]:
    """Read every file and look at all of them together; every problem is in the findings."""
    train, findings = _read(request.training)
    valid, valid_findings = _read(request.validation) if request.validation else (None, ())
    holdout, holdout_findings = _read(request.holdout) if request.holdout else (None, ())
    assert train is not None
    parts = Parts(train=train, valid=valid, holdout=holdout)
    return parts, (*findings, *valid_findings, *holdout_findings, *check(parts))


def refuse_errors(request: Request, findings: Sequence[Finding]) -> None:
    """Raise the error of the first file concerned, with every problem of every file in its message."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return
    first = errors[0]
    kind: type[UserError] = InvalidTrainingFile
    if request.validation and first.file == request.validation.name:
        kind = InvalidValidationFile
    if request.holdout and first.file == request.holdout.name:
        kind = InvalidHoldoutFile
    # OpenAI's sentence and code stay as they are: scripts look for them.
    code = first.code if first.code == "invalid_n_examples" else None
    raise kind("\n".join(_sentence(finding) for finding in errors), code=code)


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


def score_tuned(adapter: Adapter, split: Split, metric: Metric, base_model: str, max_tokens: int, tools: Tools) -> Rung:
    """The tuned model on the holdout: the one look."""
    scores = score_model(
        tools.engine,
        ModelRef(base_model=base_model, adapter=str(adapter.directory)),
        split.holdout,
        metric,
        max_tokens=max_tokens,
        progress=lambda done, total: tools.watch.progress("tuned model", done, total),
    )
    return Rung(
        name="tuned",
        kind="tuned",
        description=f"the base model with the adapter of step {adapter.best_step}, the prompt as it is",
        scores=scores,
    )


def tell_split(split: Split, metric: Metric, findings: Sequence[Finding], watch: Watch) -> None:
    """The first lines of a job's story."""
    for finding in findings:
        level = "warn" if finding.severity == "warning" else "info"
        watch.message(f"{finding.file}: {finding.message}", level=level, data=finding.as_dict())
    watch.message(
        f"{len(split.train)} examples to train on, {len(split.valid)} to stop by, {len(split.holdout)} held out "
        f"for the verdict; answers are scored by {metric.name}"
    )


def tell_ladder(rungs: Sequence[Rung], watch: Watch) -> None:
    """What the user would have without training."""
    for rung in rungs:
        low, high = rung.scores.interval
        watch.message(
            f"{rung.name}: {rung.scores.mean:.1%} {rung.scores.metric} on the holdout "
            f"(95 % interval {low:.1%} to {high:.1%})",
            data=rung.as_dict(),
        )


def _read(source: Source) -> tuple[Dataset, tuple[Finding, ...]]:
    with source.open() as content:
        return read_dataset(content, name=source.name)


def _sentence(finding: Finding) -> str:
    alone = finding.code == "invalid_n_examples"
    return finding.message if alone else f"{finding.file}: {finding.message}"
