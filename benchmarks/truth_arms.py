"""The arms of `truth.py`: what a user of each trainer ends up with, scored on the truth set.

Every answer here is right when all of its tokens are the argmax given those before them: greedy decoding would give it.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import MODEL, plan_of, trainer
from benchmarks.truth_traps import Rows, dataset_of, to_jsonl

from heldout.engine.base import Message, ModelRef, Progress, Reply, Sampling
from heldout.engine.local import LocalEngine
from heldout.errors import InvalidTrainingFile
from heldout.pipeline import ladder
from heldout.pipeline.checks import rows as checked_rows
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.giveaways import find_giveaways
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.intake import frozen_encoder
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.request import Request, Source, Tools
from heldout.pipeline.run import run_job
from heldout.pipeline.split import split_dataset
from heldout.pipeline.training import CurvePoint
from heldout.pipeline.types import Dataset, Example, Split
from heldout.pipeline.watch import Silent
from heldout.settings import Settings
from heldout.train import loop
from heldout.train.averaging import Average
from heldout.train.memory import keep_freed_memory

#: TRL 1.16's SFTConfig as it comes, with PEFT's LoraConfig as it comes: the loss is over the whole conversation.
TRL_DEFAULT = {
    "n_epochs": 3,
    "batch_size": 8,
    "learning_rate": 2e-5,
    "warmup_ratio": 0.0,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "lora_r": 8,
    "lora_alpha": 8.0,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj"],
    "prompt_loss_weight": 1.0,
    "ema_decay": 0.0,
    "early_stopping": False,
}
#: What TRL's pages advise for LoRA: ten times the rate, all linear layers, the loss on completions only. Rank and alpha
#: are ours, so that the rate is what differs; their examples have alpha / r of 0.5, a weaker adapter at this rate.
TRL_ADVISED = TRL_DEFAULT | {
    "learning_rate": 2e-4,
    "lora_r": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.05,
    "target_modules": ["all-linear"],
    "prompt_loss_weight": 0.0,
}
#: Ours, with a number of epochs instead of early stopping: what hosted services do.
THREE_EPOCHS = {"n_epochs": 3, "early_stopping": False}
#: Tokens of an answer, where nothing is generated.
ROOM = 256
#: Looks at the truth set in one training for the ceiling, at most.
LOOKS = 3


class Forced:
    """The local engine, which need not generate what the base model says to rows whose answers are known: it only
    looks whether greedy decoding would give one. The tuned model's answers are generated as they are served.

    General prompts, which are nobody's rows, are left unanswered: forgetting is not measured, and it changes no
    verdict.
    """

    def __init__(self, train: Sequence[Example], others: Sequence[Example], asked: dict[str, Any]) -> None:
        self._local = LocalEngine(cache=Settings().cache, aliases={}, allow_paths=True)
        self._asked = asked
        self._answers: dict[str, set[str]] = {}
        for one in (*train, *as_held_out(train), *others):
            self._answers.setdefault(_key(one.prompt), set()).add(one.target)
        self._trainee: Any = None

    def chat(
        self,
        model: ModelRef,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
    ) -> list[Reply]:
        """See Engine.chat."""
        if model.adapter:
            return self._local.chat(model, conversations, sampling, progress)
        tried = [
            (number, answer)
            for number, messages in enumerate(conversations)
            for answer in sorted(self._answers.get(_key(messages), ()))
        ]
        replies = [Reply(text="", finish_reason="length", prompt_tokens=0, completion_tokens=0)] * len(conversations)
        if tried:
            examples = [_ending(conversations[number], answer) for number, answer in tried]
            rows, right = self._look(model, examples)
            for (number, answer), row, is_right in zip(tried, rows, right, strict=True):
                if is_right or not replies[number].prompt_tokens:
                    prompt = row.supervised.index(True)
                    replies[number] = Reply(
                        text=answer if is_right else "",
                        finish_reason="stop",
                        prompt_tokens=prompt,
                        completion_tokens=len(row) - prompt,
                    )
        return replies

    def right(self, model: ModelRef, examples: Sequence[Example]) -> list[bool]:
        """Whether each example's answer is what the model says."""
        return self._look(model, examples)[1]

    def _look(self, model: ModelRef, examples: Sequence[Example]) -> tuple[list[Any], list[bool]]:
        if self._trainee is None:
            plan = plan_of(Split(train=tuple(examples), valid=(), holdout=(), seed=0, groups=1), 0, **self._asked)
            self._trainee = trainer().build(plan, Split(train=(), valid=(), holdout=(), seed=0, groups=0), MODEL, None)
        if model.adapter:
            self._trainee.load(Path(model.adapter))
        else:
            with torch.no_grad():
                for parameter in self._trainee.parameters.values():
                    parameter.zero_()  # an adapter that adds nothing
        rows = self._trainee.rows(examples, "the rows")
        return rows, loop.validate(self._trainee, rows).right

    def close(self) -> None:
        """See Engine.close."""
        self._trainee = None
        self._local.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._local, name)


def as_held_out(rows: Sequence[Example]) -> tuple[Example, ...]:
    """The rows as a job asks those that it holds out of them: without a code that tells their answers."""
    read = checked_rows.Rows.read([Dataset(name="rows", examples=tuple(rows))])
    return find_giveaways(read, with_valid=False).asked(rows)


def _key(messages: Sequence[Message]) -> str:
    """What a conversation asks, whatever solved examples stand before it."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    return json.dumps([system, messages[-1]["content"]])


def _ending(messages: Sequence[Message], answer: str) -> Example:
    whole = (*messages, {"role": "assistant", "content": answer})
    return Example(messages=whole, weights=(0,) * len(messages) + (1,), line=1)


def run_ours(rows: Rows, seed: int, asked: dict[str, Any], engine: Forced, directory: Path) -> Outcome:
    """The product's own job on the user's rows, verdict included; without probes, which cost time."""

    def source(name: str, some: Sequence[dict[str, Any]]) -> Source:
        content = to_jsonl(some)
        return Source(name=name, open=lambda: io.BytesIO(content))

    request = Request(
        base_model=MODEL,
        training=source("train.jsonl", rows.train),
        validation=source("valid.jsonl", rows.valid) if rows.valid else None,
        seed=seed,
        hyperparameters=Hyperparameters.parse(asked | {"metric": "exact_match"}),
        directory=directory,
        eval_budget=0.0,
    )
    tools: Any = Tools(engine=engine, trainer=trainer(), watch=Silent())  # type: ignore[arg-type]
    return run_job(request, tools)


def examples(rows: Sequence[dict[str, Any]]) -> tuple[Example, ...]:
    """Rows as they are read from a file, whose answers are learned or asked for."""
    return tuple(dataset_of(rows, "rows").examples)


def rungs_on_truth(rows: Rows, truth: Sequence[Example], seed: int, engine: Forced) -> dict[str, list[float]]:
    """The cheaper rungs, chosen and fitted on the user's rows as in a job, and scored on the truth set."""
    valid = dataset_of(rows.valid, "valid.jsonl") if rows.valid else None
    held = dataset_of(rows.truth, "truth.jsonl")
    split, _ = split_dataset(dataset_of(rows.train, "train.jsonl"), valid, held, seed=seed)
    metric = choose_metric([example.target for example in split.train], "exact_match")
    encoder = frozen_encoder(MODEL, trainer().facts(MODEL))
    if len(split.holdout) != len(truth):
        raise ValueError(f"{len(truth) - len(split.holdout)} truth rows are not disjoint from the user's")
    rungs = ladder.climb(split, metric, engine, MODEL, encoder=encoder, max_tokens=ROOM, watch=Silent())  # type: ignore[arg-type]
    return {plain_name(rung.name): list(rung.scores.per_example) for rung in rungs}


def plain_name(rung: str) -> str:
    """A rung's name without the number of shots, which every fold and split chooses for itself."""
    return "few-shot" if rung.startswith("few-shot") else rung


@dataclass
class Trained:
    """A training of the user's rows to its end: what the truth set says after some of its steps."""

    right: dict[int, list[bool]] = field(default_factory=dict)  # step -> truth rows that are right
    losses: list[float] = field(default_factory=list)  # of each step
    seconds: float = 0.0  # looks at the truth set not counted
    stopped: str = ""

    @property
    def last(self) -> list[bool]:
        """What its last step comes to; nothing right where it broke down."""
        return self.right[max(self.right)]


class Looking(Silent):
    """Scores the truth set after some steps, with the averaged weights that would be kept."""

    def __init__(self, trainee: Any, truth: Sequence[Any], decay: float, steps: set[int], found: Trained) -> None:
        self.trainee, self.truth, self.steps, self.found = trainee, truth, steps, found
        self.average = Average(trainee.parameters, decay)
        self.spent = 0.0

    def metrics(self, point: CurvePoint, total_steps: int) -> None:
        self.average.update(point.step)
        self.found.losses.append(point.train_loss)
        if point.step in self.steps:
            started = time.perf_counter()
            with self.average.in_place():
                self.found.right[point.step] = loop.validate(self.trainee, self.truth).right
            self.spent += time.perf_counter() - started


def plan_for(rows: Sequence[Example], seed: int, asked: dict[str, Any]) -> TrainPlan:
    """The plan for all rows, without validation. Where there is no warm-up, the first step has the whole rate, as
    TRL's schedule has it."""
    split = Split(train=tuple(rows), valid=(), holdout=(), seed=seed, groups=len(rows))
    plan = plan_of(split, seed, **asked)
    if plan.warmup_steps:
        return plan
    return replace(plan, learning_rate=plan.learning_rate * (plan.total_steps + 1) / plan.total_steps)


def same_plan(plan: TrainPlan) -> str:
    """Equal for plans that train alike: two arms with one plan are one training."""
    return json.dumps({name: one for name, one in asdict(plan).items() if name != "reasons"})


def train(
    plan: TrainPlan, rows: Sequence[Example], truth: Sequence[Example], looks: int, directory: Path, cache: Path
) -> Trained:
    """Take all steps, and look at the truth set so many times, evenly, the last time after the last step."""
    split = Split(train=tuple(rows), valid=(), holdout=tuple(truth), seed=plan.seed, groups=len(rows))
    trainee: Any = trainer().build(plan, split, MODEL, cache)
    keep_freed_memory()
    learned, judged = trainee.rows(split.train, "train"), trainee.rows(split.holdout, "truth")
    trainee.prepare([*learned, *judged], Silent())
    found = Trained()
    steps = {math.ceil(plan.total_steps * look / looks) for look in range(1, looks + 1)}
    watch = Looking(trainee, judged, plan.ema_decay, steps, found)
    started = time.perf_counter()
    try:
        course = loop.run(plan, trainee, learned, [], checkpoints=directory, watch=watch)
        found.stopped = course.stopped
    except InvalidTrainingFile as error:  # it diverged at every rate that the guard tries
        found.stopped = str(error)
    found.seconds = time.perf_counter() - started - watch.spent
    found.right.setdefault(plan.total_steps, [False] * len(judged))
    return found
