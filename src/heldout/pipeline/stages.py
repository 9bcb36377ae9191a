"""The stages of making a tuned model, for one training or six: what is cheaper, memory, training, proof, answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from heldout.engine import catalogue
from heldout.engine.base import ModelRef
from heldout.pipeline import ladder
from heldout.pipeline.advise.recommend import what_it_proves
from heldout.pipeline.augment.copies import Augmented, robust_copies
from heldout.pipeline.augment.paraphrase import paraphrased_copies
from heldout.pipeline.candidate_answers import choose_by_answers
from heldout.pipeline.checks import Parts
from heldout.pipeline.crossfit import CrossFit
from heldout.pipeline.encoder_rung import TUNED_ENCODER, tuned_encoder_rung
from heldout.pipeline.evaluate.answers import Metric, choose_metric
from heldout.pipeline.evaluate.graders.read import grader_metric, read_grader
from heldout.pipeline.evaluate.scores import Scores, score_model
from heldout.pipeline.intake import frozen_encoder
from heldout.pipeline.ladder import Rung
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.replay import Replay, replay_examples
from heldout.pipeline.request import Request, Tools
from heldout.pipeline.training import Adapter, ModelFacts
from heldout.pipeline.types import Example, Finding, Split
from heldout.pipeline.watch import Watch
from heldout.settings import DEFAULT_MODEL

#: Largest difference of an answer's log-probability (nats per token of the answer, relative to its size)
#: between the trainer and the serving path; two ways of adding up the same fp32 products differ by 1e-4. In
#: bfloat16 0.13 was measured with the right adapter, and 3.7 or more for every answer without it.
SERVING_TOLERANCE = {"float32": 0.01, "bfloat16": 0.5}


@dataclass(frozen=True, kw_only=True)
class FoldModel:
    """The tuned model that answered a fold's rows."""

    directory: Path  # of its adapter
    split: Split  # of the fold
    max_tokens: int  # of its answers


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
    answering: float  # seconds that the scores took in this process, the tuned models' included
    crossfit: CrossFit | None = None  # where the scores come from, when there is no holdout
    fold_models: tuple[FoldModel, ...] = ()  # of cross-fitting, in the order of `answered`

    @property
    def training_seconds(self) -> float:
        """Of all its trainings."""
        return self.adapter.seconds + sum(fold.seconds for fold in (self.crossfit.folds if self.crossfit else ()))


class Stopwatch:
    """Adds up how long some blocks took: `with watch: …`; `watch.seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.monotonic() - self._began


def metric_of(request: Request, parts: Parts) -> Metric:
    """How answers are scored: as was asked for, or as fits the training answers."""
    metric = choose_metric([example.target for example in parts.train.examples], request.hyperparameters.metric)
    return metric if request.grader is None else grader_metric(read_grader(request.grader), metric)


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


def train(plan: TrainPlan, split: Split, metric: Metric, request: Request, tools: Tools, *, directory: Path) -> Adapter:
    """Train in `directory`, the job's own or a fold's below it, and choose the checkpoint to hand over."""
    replay, augmented = replay_for(plan, split, request, tools), copies_for(plan, split, request, tools)
    if augmented.sentence:
        tools.watch.message(augmented.sentence, data=augmented.data)
    if replay.examples:
        tools.watch.message(replay.sentence, data={"examples": len(replay.examples), "different": replay.different})
    tools.engine.close()  # training needs the memory
    adapter = tools.trainer.train(
        plan,
        mixed(split, replay, augmented),
        base_model=request.base_model,
        directory=directory,
        watch=tools.watch,
        cache=activations(request),
    )
    if plan.kept_steps:  # a fold's: which one of its models is asked all folds decide together
        return adapter
    adapter = choose_by_answers(adapter, split, metric, request.base_model, tools)
    tools.watch.message(adapter.selection.reason, data=adapter.selection.as_dict())
    return adapter


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
        learned=split.train,
        progress=lambda done, total: tools.watch.progress("tuned model", done, total),
    )


def tell_what_it_can_show(clusters: Sequence[int], watch: Watch, *, crossfit: bool) -> None:
    """Before anything is trained: which differences so many rows are enough to find."""
    proof = what_it_proves(len(set(clusters)), crossfit=crossfit)
    watch.message(f"The verdict can find, in 80 of 100 cases, {proof.sentence}", data=proof.as_dict())


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
