"""From the measured parts to the whole job: every stage of a job, counted and multiplied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from heldout.pipeline.advise.learning_curve import FOLDS, PARTITIONS
from heldout.pipeline.advise.measure import READ, READING_WEIGHTS, Measured
from heldout.pipeline.candidate_answers import count_to_ask
from heldout.pipeline.consequences import calibration, fragility, generalisation, memorisation
from heldout.pipeline.consequences.base import seconds_for_probes
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.general_answers import FACT_TOKENS, MAX_TOKENS
from heldout.pipeline.general_facts import FACTS
from heldout.pipeline.general_prompts import HELD_BACK
from heldout.pipeline.ladder import CHOOSERS, ORDERS
from heldout.pipeline.plan import TrainPlan, steps_per_epoch
from heldout.pipeline.types import Split

#: Typical, where early stopping is on: the best step is half way, and patience runs out from there.
TYPICAL_BEST = 0.5
#: A search of the learning rate goes so often through a quarter of an epoch, at least 10 steps (train/search.py).
TRIALS = 5
#: Drawing a learning curve costs as much as fitting so many models of a fold.
CURVE = FOLDS * len(PARTITIONS)
#: Checkpoints that may be handed over (pipeline/selection.py): the lowest loss, the highest score, the last, and an
#: average; two of them are often the same.
CANDIDATES, TYPICAL_CANDIDATES = 4, 3
#: Conversations by which a saved model is proven to be served as it was trained (train/trainer.py).
PROOFS = 8
#: Ways in which a holdout row is asked again (consequences/fragility.py).
PERTURBATIONS = 8


#: The stages that are a job's training, as its report counts them.
TRAINING = ("training and validation", "answers that choose a checkpoint")


class Stage(NamedTuple):
    """One kind of work of a job, in seconds."""

    name: str
    at_most: float
    typical: float


@dataclass(frozen=True, kw_only=True)
class Duration:
    """How long a job would take on this machine, as busy as it is now; from the check to the verdict."""

    stages: tuple[Stage, ...]
    trainings: int
    steps: int  # at most, of all trainings
    typical_steps: int

    @property
    def at_most(self) -> float:
        """Seconds when nothing stops early."""
        return math.fsum(stage.at_most for stage in self.stages)

    @property
    def typical(self) -> float:
        """Seconds when every training is stopped half way, and its patience later."""
        return math.fsum(stage.typical for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the JSON document."""
        return {
            "at_most": self.at_most,
            "typical": self.typical,
            "trainings": self.trainings,
            "steps": self.steps,
            "typical_steps": self.typical_steps,
            "stages": [stage._asdict() for stage in self.stages],
        }


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training of the job, and the rows that are answered before and after it."""

    train: int
    valid: int
    holdout: int  # 0: nothing is answered
    steps: int
    typical_steps: int
    search_steps: int  # to find a learning rate, before
    eval_every: int
    steps_per_epoch: int
    batch_size: int
    by_answers: bool  # whether candidates answer rows of valid (pipeline/candidate_answers.py)
    candidates: int = CANDIDATES  # that are proven to be served as they were trained, and once more by the engine

    @property
    def shorter(self) -> Training:
        """The same, as it typically goes."""
        return replace(self, steps=self.typical_steps, candidates=min(self.candidates, TYPICAL_CANDIDATES))

    @property
    def candidate_answers(self) -> int:
        """Rows of valid that all candidates together answer."""
        trained = self.steps * self.batch_size
        return self.candidates * count_to_ask(self.valid, self.candidates, trained) if self.by_answers else 0

    @property
    def validations(self) -> int:
        """How often valid is looked at in all steps (train/loop.py, is_due)."""
        within = [step % self.steps_per_epoch for step in range(1, self.steps + 1)]
        due = sum(step % self.eval_every == 0 for step in within)
        return due + (bool(within) and within[-1] % self.eval_every != 0)


def training_of(plan: TrainPlan, split: Split, metric: Metric) -> Training:
    """The training that this plan makes of this split, whose answers are scored by `metric`."""
    n = len(split.train)
    best = math.ceil(TYPICAL_BEST * plan.total_steps)
    an_epoch = steps_per_epoch(n, plan.batch_size, plan.replay_ratio)
    until = best + plan.patience * plan.eval_every if split.valid else best
    return Training(
        train=n,
        valid=len(split.valid),
        holdout=len(split.holdout),
        steps=plan.total_steps,
        typical_steps=min(plan.total_steps, until) if plan.early_stopping else plan.total_steps,
        search_steps=TRIALS * max(10, round(0.25 * an_epoch)) if plan.lr_search == "light" else 0,
        eval_every=plan.eval_every,
        steps_per_epoch=an_epoch,
        batch_size=plan.batch_size,
        candidates=CANDIDATES if split.valid else 1,
        by_answers=bool(split.valid) and not plan.kept_steps and not metric.is_told_by_tokens,
    )


def add_up(
    trainings: Sequence[Training], measured: Measured, *, checked: float = 0.0, eval_budget: float | None = None
) -> Duration:
    """The job that consists of these trainings: the last one is the model that is served.

    Args:
        checked: seconds that reading and checking the files took, and loading the code of models.
        eval_budget: seconds for probes of the tuned model; None: what other answers leave of its training's time.
    """
    pairs = {
        "checks": (checked,) * 2,
        "loading the model": (_loading(trainings, measured),) * 2,
        "cheap rungs and prompts": (measured.cheap.seconds + sum(_ladder(one, measured) for one in trainings),) * 2,
        "training and validation": (
            sum(_training(one, measured) for one in trainings),
            sum(_training(one.shorter, measured) for one in trainings),
        ),
        "answers that choose a checkpoint": (
            sum(measured.tuned.seconds_for(one.candidate_answers) for one in trainings),
            sum(measured.tuned.seconds_for(one.shorter.candidate_answers) for one in trainings),
        ),
        "answers of tuned models": (sum(measured.tuned.seconds_for(one.holdout) for one in trainings),) * 2,
        "general skills": (_general(measured),) * 2,
    }
    answering = sum(pairs[name][0] for name in ("cheap rungs and prompts", "answers of tuned models", "general skills"))
    # By cross-fitting the models of all folds are asked, each about its own rows.
    whole = replace(trainings[0], holdout=sum(one.holdout for one in trainings))
    most, typical = (
        _probes(whole, measured, seconds_for_probes(trained, answering) if eval_budget is None else eval_budget)
        for trained in map(sum, zip(*(pairs[name] for name in TRAINING), strict=True))
    )
    pairs["probes of tuned models"] = (most, typical)
    return Duration(
        stages=tuple(Stage(name, most, typical) for name, (most, typical) in pairs.items()),
        trainings=len(trainings),
        steps=sum(one.steps for one in trainings),
        typical_steps=sum(one.typical_steps for one in trainings),
    )


def _loading(trainings: Sequence[Training], measured: Measured) -> float:
    """The engine gives the model back before each training."""
    return measured.load * (1 + len(trainings))


def _ladder(one: Training, measured: Measured) -> float:
    """The rungs of one holdout. Which prompt is the best is not known: the mean of them is."""
    if not one.holdout:
        return 0.0
    cheap = measured.cheap
    seconds = cheap.embed_seconds * (one.train + one.holdout) + cheap.fit_seconds / CURVE
    if measured.plain:
        seconds += measured.plain.seconds_for(one.holdout)
    shots = measured.behind_shots
    if shots:
        choosing = sum(prompt.seconds_for(min(CHOOSERS, one.valid)) for prompt in shots)
        seconds += ORDERS * choosing + _mean([prompt.seconds_for(one.holdout) for prompt in shots])
    return seconds


def _general(measured: Measured) -> float:
    """The base model answers, and both models read the answers; both answer short questions."""
    if measured.general is None:
        return 0.0
    # A short question's answer has a quarter of the room.
    answers = measured.general.seconds_for(len(HELD_BACK) + 2 * len(FACTS) * FACT_TOKENS // MAX_TOKENS)
    return answers + 2 * len(HELD_BACK) * measured.reading


def _probes(one: Training, measured: Measured, budget: float) -> float:
    """Answers and readings for the consequences, until their time is used up. Fragility has half of it, and asks the
    baseline as well."""
    perturbed = min(fragility.ITEMS, one.holdout)
    both = measured.tuned.seconds_for(perturbed) + _mean(
        [shot.seconds_for(perturbed) for shot in measured.behind_shots]
    )
    again = 2 * measured.tuned.seconds_for(min(generalisation.ITEMS, one.holdout))
    read = 2 * min(memorisation.READ, one.holdout) * measured.reading
    return min(budget, min(budget / 2, PERTURBATIONS * both) + again + read + _label_probabilities(one, measured))


def _label_probabilities(one: Training, measured: Measured) -> float:
    """Calibration: a chat model reads every label behind a prompt that it reads once; an encoder says them all."""
    if not measured.labels:
        return 0.0
    if measured.plain is None:
        return measured.tuned.seconds_for(one.holdout) + measured.tuned.seconds_for(one.valid)
    prompts = min(one.holdout, calibration.READINGS // measured.labels)
    own = measured.tuned.prompt_tokens - measured.tuned.shared_tokens
    together = own + measured.labels * measured.target_tokens  # the prompt and its labels, with others in one pass
    alone = own + measured.target_tokens + READING_WEIGHTS / READ  # as it was measured: so many in one pass
    return prompts * measured.reading * together / alone


def _mean(seconds: Sequence[float]) -> float:
    return math.fsum(seconds) / len(seconds) if seconds else 0.0


def _training(one: Training, measured: Measured) -> float:
    timings = measured.timings
    validation = one.valid * timings.validation
    looks = one.validations + (1 if one.valid else 0)  # the average of checkpoints is looked at too
    return (
        timings.build
        + timings.prepare * (one.train + one.valid)
        + timings.step * (one.steps + one.search_steps)
        + validation * looks
        + timings.save * (one.validations + 1)
        + (one.candidates + 1) * PROOFS * measured.reading  # once more as it is served
    )
