"""The Trainer that the pipeline asks for: prepare, prove, train, hand over the best adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from heldout.engine import catalogue, device, stored, weights
from heldout.engine.template import ChatTemplate, Tokens
from heldout.errors import CheckpointDamaged, InvalidTrainingFile
from heldout.kernels import Kernels, compiling
from heldout.pipeline import encoder_memory, memory
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.selection import Candidate, Kind, Selection, select
from heldout.pipeline.training import Adapter, KeptModel, ModelFacts, Proof, Timings
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Silent, Watch
from heldout.train import body, checkpoint, classifier, loop, search, sft, timing
from heldout.train.loop import Course
from heldout.train.memory import PeakMemory, give_back_memory, keep_freed_memory
from heldout.train.method import Trainee

Row = TypeVar("Row")

#: Conversations whose log-probabilities the serving path must reproduce.
PROOFS = 8


class TorchTrainer:
    """Trains adapters of chat models, and classifiers on encoders, in this process."""

    def __init__(
        self,
        *,
        cache: Path,
        aliases: dict[str, str],
        precision: str = "auto",
        allow_paths: bool = False,
        memory_limit: int = 0,
        use_kernels: bool = True,
    ) -> None:
        """`memory_limit`: bytes this process may fill where it computes; 0: what there is. `use_kernels`: where they
        can be compiled (heldout/kernels)."""
        self._memory_limit = memory_limit
        self._use_kernels = use_kernels
        self._settled: tuple[Kernels | None, str] | None = None  # kernels of this job, and why none
        self._told = False
        self.cache = cache
        self.aliases = aliases
        self.allow_paths = allow_paths
        self._precision = precision
        self._templates: dict[Path, Any] = {}  # tokenizers in use: loading one takes a second

    def facts(self, base_model: str) -> ModelFacts:
        """See Trainer.facts."""
        folder = self._folder(base_model)
        if catalogue.kind_of(folder) == catalogue.ENCODER:
            return classifier.facts(folder, stored.parameters(folder))
        config = sft.config_of(folder)
        return ModelFacts(
            hidden_size=config["hidden_size"],
            layers=config["num_hidden_layers"],
            context=weights.context_of(config),
            parameters=stored.parameters(folder),
            gpu=device.is_gpu(),
        )

    def count_tokens(self, examples: Sequence[Example], *, base_model: str) -> list[int]:
        """See Trainer.count_tokens. No weights are loaded for it."""
        folder = self._folder(base_model)
        if catalogue.kind_of(folder) == catalogue.ENCODER:
            if folder not in self._templates:
                self._templates[folder] = classifier.load_tokenizer(folder)
            return classifier.count_tokens(self._templates[folder], examples)
        if folder not in self._templates:
            self._templates[folder] = ChatTemplate(weights.load_tokenizer(folder))
        return sft.count_tokens(self._templates[folder], examples)

    def fit(self, plan: TrainPlan, split: Split, *, base_model: str, directory: Path | None = None) -> TrainPlan:
        """See Trainer.fit."""
        folder = self._folder(base_model)
        limit = self._memory_limit or device.memory_bytes()
        if catalogue.kind_of(folder) == catalogue.ENCODER:
            encoder, longest = classifier.shapes(plan, folder, stored.parameters(folder), split)
            return encoder_memory.fit(plan, encoder, limit, longest=longest, valid_tokens=device.portions().padded)
        precision = (
            weights.keep_precision(directory, self._precision)
            if directory
            else weights.choose_precision(self._precision)
        )
        config = sft.config_of(folder)
        body.refuse(config, cut=plan.freeze_layers)
        template = ChatTemplate(weights.load_tokenizer(folder))
        rows, others = _tokenize(template, split, plan.max_length)
        copies, _ = that_fit(split.copies, lambda some: sft.tokenize(template, some, plan.max_length, "copies"))
        kernels = self._kernels(directory)
        shapes = sft.shapes(config, folder, precision, gpu=device.is_gpu(), kernels=kernels)
        turns = max(1, 2 * max(map(len, copies), default=0))  # epochs until every copy was seen
        steps = range(1, turns * math.ceil(len(rows) / plan.batch_size) + 1)
        batches = [loop.batch(plan, rows, copies, step) for step in steps]
        plan = memory.fit(plan, shapes, sft.sizes(plan, shapes, batches, others), limit)
        body.refuse(config, cut=plan.freeze_layers, checkpoint=plan.checkpointing)
        return plan

    def train(
        self,
        plan: TrainPlan,
        split: Split,
        *,
        base_model: str,
        directory: Path,
        watch: Watch,
        cache: Path | None = None,
    ) -> Adapter:
        """See Trainer.train."""
        if catalogue.kind_of(self._folder(base_model)) == catalogue.CHAT:  # a classifier is float32 in any case
            weights.keep_precision(directory, self._precision)
        adapter = self._train(plan, split, base_model, directory, watch, cache)
        give_back_memory()
        return adapter

    def _train(
        self, plan: TrainPlan, split: Split, base_model: str, directory: Path, watch: Watch, cache: Path | None
    ) -> Adapter:
        with PeakMemory() as peak, device.repeatable():
            trainee = self.build(plan, split, base_model, cache, directory, watch)
            keep_freed_memory()
            train = trainee.rows(split.train, "the training data")
            valid = trainee.rows(split.valid, "the validation data")
            copies, left_out = that_fit(split.copies, lambda some: trainee.rows(some, "the copies"))
            if left_out:
                watch.message(f"{left_out} copies of training rows are left out: too long for {plan.max_length} tokens")
            trained = _announce(trainee, watch)
            trainee.prepare([*train, *(copy for some in copies for copy in some), *valid], watch)
            if plan.lr_search == "light":
                plan = search.learning_rate(
                    plan, trainee, train, valid, copies=copies, directory=directory, watch=watch
                )
            course = loop.run(
                plan, trainee, train, valid, copies=copies, checkpoints=directory / "checkpoints", watch=watch
            )
            watch.message(f"Training ended: {course.stopped}")
            selection, chosen = choose(trainee, valid, course, checkpoints=directory / "checkpoints", watch=watch)
        watch.message(selection.reason, data=selection.as_dict())
        # Restored from disk: what is proven below is what was saved.
        trainee.load(chosen)
        proofs = [
            Proof(messages=example.messages, log_prob=trainee.log_prob(example))
            for example in (split.valid or split.train)[:PROOFS]
        ]
        return Adapter(
            plan=plan,
            directory=checkpoint.publish(chosen, directory / "adapter"),
            checkpoint=checkpoint.read(directory / "checkpoints", selection.chosen.step)[0],
            best_step=selection.chosen.step,
            last_step=course.step,
            curve=tuple(course.curve),
            trained_tokens=course.trained_tokens,
            trained_parameters=trained,
            examples_per_second=course.examples / course.step_seconds,
            seconds=course.seconds,
            peak_memory_bytes=peak.bytes,
            precision=trainee.precision,
            kernels=trainee.kernels,
            learning_rate=course.guard.learning_rate,
            stopped=course.stopped,
            selection=selection,
            proofs=tuple(proofs),
            kept=_kept(plan, course, directory),
        )

    def time_steps(self, plan: TrainPlan, split: Split, *, base_model: str, directory: Path, seconds: float) -> Timings:
        """See Trainer.time_steps."""
        if catalogue.kind_of(self._folder(base_model)) == catalogue.CHAT:
            weights.keep_precision(directory, self._precision)
        began = time.perf_counter()
        trainee = self.build(plan, split, base_model, directory / "activations", directory)
        keep_freed_memory()
        train = trainee.rows(split.train, "the training data")
        valid = trainee.rows(split.valid, "the validation data")
        build = time.perf_counter() - began
        with device.repeatable():
            return timing.time_parts(plan, trainee, train, valid, directory=directory, seconds=seconds, build=build)

    def build(
        self,
        plan: TrainPlan,
        split: Split,
        base_model: str,
        cache: Path | None,
        directory: Path | None = None,
        watch: Watch | None = None,
    ) -> Trainee[Any]:
        """The base model, ready to be trained by this plan. `directory`: the job's, which keeps what it began with."""
        folder = self._folder(base_model)
        if catalogue.kind_of(folder) == catalogue.ENCODER:
            return classifier.build_model(plan, folder, split)
        return sft.build_model(
            plan, folder, weights.choose_precision(self._precision), cache, self._kernels(directory, watch)
        )

    def _kernels(self, directory: Path | None, watch: Watch | None = None) -> Kernels | None:
        if device.is_gpu():
            return None
        if self._settled is None:
            if directory is None:
                return compiling.choose(self.cache, use=self._use_kernels)[0]
            # The first directory is the job's: what it began with holds for its folds as well.
            self._settled = compiling.keep(directory, self.cache, use=self._use_kernels)
        kernels, why_not = self._settled
        if watch and why_not and not self._told:
            self._told = True  # once, not for every fold
            watch.message(
                f"Kernels for this processor are not used ({why_not}), torch's own operations train: a step takes a "
                "tenth to a third longer, and weights may take twice the memory"
            )
        return kernels

    def _folder(self, base_model: str) -> Path:
        source = catalogue.resolve(base_model, self.aliases, allow_paths=self.allow_paths)
        return weights.prepare(source, self.cache)


def choose(
    trainee: Trainee[Row], valid: Sequence[Row], course: Course, *, checkpoints: Path, watch: Watch = Silent()
) -> tuple[Selection, Path]:
    """The checkpoint to hand over, and where it lies: the lowest validation loss, the most answers right,
    the last, or the average of three neighbours, by pipeline/selection.py.

    A damaged one is left out, and the watch is told. Raises CheckpointDamaged when none is left.
    """
    stopping = course.stopping
    wanted = {course.step, *((stopping.best_step, stopping.top_step, *stopping.neighbours()) if valid else ())}
    sound, damaged = _sound(checkpoints, course, wanted, watch)
    if not sound:
        raise CheckpointDamaged(
            f"no checkpoint of this training can be handed over: {'; '.join(damaged)}. Start a new job."
        )
    if not valid:
        last = Candidate(kind="last", step=max(sound), valid_loss=math.nan, scores=())
        named = "the last" if last.step == course.step else "the last that can be read"
        reason = f"step {last.step} ({named}) is taken: there are no validation examples to choose by"
        return Selection(chosen=last, reason=reason, candidates=(last,)), sound[last.step]
    seen_losses = ((point.step, point.valid_calibrated_loss) for point in course.curve)
    losses = {step: loss for step, loss in seen_losses if loss is not None}

    def candidate(kind: Kind, step: int, loss: float, right: Sequence[bool]) -> Candidate:
        return Candidate(kind=kind, step=step, valid_loss=loss, scores=tuple(map(float, right)))

    finite = [step for step in sound if math.isfinite(losses[step])]
    if not finite:
        raise CheckpointDamaged(f"no checkpoint whose validation loss is a number can be read: {'; '.join(damaged)}.")
    best = stopping.best_step if stopping.best_step in sound else min(finite, key=lambda step: losses[step])
    steps: dict[Kind, int] = {"best_loss": best, "best_metric": stopping.top_step, "last": course.step}
    steps = {kind: step for kind, step in steps.items() if step in sound}
    candidates = [candidate(kind, step, losses[step], course.answered[step]) for kind, step in steps.items()]
    folders: dict[Kind, Path] = {kind: sound[step] for kind, step in steps.items()}
    neighbours = stopping.neighbours()
    if len(neighbours) == 3 and sound.keys() >= set(neighbours):
        folders["average"] = checkpoint.average([sound[step] for step in neighbours], checkpoints / "average")
        trainee.load(folders["average"])
        seen = loop.validate(trainee, valid)
        mean = sum(seen.calibrated) / len(seen.calibrated)
        candidates.append(candidate("average", stopping.best_step, mean, seen.right))
    selection = select(candidates, metric="share of answers that are right")
    if damaged:
        selection = replace(selection, reason=f"of the checkpoints that can be read, {selection.reason}")
    return selection, folders[selection.chosen.kind]


def _kept(plan: TrainPlan, course: Course, directory: Path) -> tuple[KeptModel, ...]:
    """The checkpoints that the plan wants beside the best, published. Raises CheckpointDamaged for a damaged one."""
    return tuple(
        KeptModel(
            step=step,
            directory=checkpoint.publish(
                checkpoint.read(directory / "checkpoints", step)[0], directory / "kept" / f"step-{step:06d}"
            ),
            losses=tuple(course.kept[step]),
        )
        for step in dict.fromkeys(plan.kept_steps)
    )


def _sound(checkpoints: Path, course: Course, wanted: set[int], watch: Watch) -> tuple[dict[int, Path], list[str]]:
    """Where the checkpoints of these steps lie, and what is wrong with those that cannot be read. With one of
    them gone, every other one that has been validated may take its place."""
    sound: dict[int, Path] = {}
    damaged: list[str] = []

    def look(steps: set[int]) -> None:
        for step in sorted(steps - sound.keys()):
            try:
                sound[step] = checkpoint.read(checkpoints, step)[0]
            except CheckpointDamaged as error:
                damaged.append(str(error))
                watch.message(f"Left out when choosing what to hand over: {error}", level="warn")

    look(wanted)
    if damaged:
        look((set(checkpoint.steps(checkpoints)) & course.answered.keys()) - wanted)
    return sound, damaged


def _tokenize(template: ChatTemplate, split: Split, max_length: int) -> tuple[list[Tokens], list[Tokens]]:
    """Train and valid as tokens. Raises InvalidTrainingFile naming the lines of both that cannot be trained on."""
    found, problems = [], []
    for examples, part in ((split.train, "the training data"), (split.valid, "the validation data")):
        try:
            found.append(sft.tokenize(template, examples, max_length, part))
        except InvalidTrainingFile as error:
            problems.append(str(error))
    if problems:
        raise InvalidTrainingFile("\n".join(problems))
    return found[0], found[1]


def that_fit(
    copies: Sequence[Sequence[Example]], rows: Callable[[Sequence[Example]], list[Row]]
) -> tuple[list[list[Row]], int]:
    """Copies of training rows as the model takes them, and how many it cannot take. A row that cannot be trained on
    fails the job; a copy that we made longer than the model reads is only left out."""
    left_out = 0

    def one(example: Example) -> list[Row]:
        nonlocal left_out
        try:
            return rows([example])
        except InvalidTrainingFile:
            left_out += 1
            return []

    return [[row for example in some for row in one(example)] for some in copies], left_out


def _announce(trainee: Trainee[Row], watch: Watch) -> int:
    """Say what is trained; the number of trained parameters."""
    trained, total = sum(p.numel() for p in trainee.parameters.values()), trainee.size
    watch.message(
        f"Training {trained:,} of {total:,} parameters ({trained / total:.2%}): {trainee.description}, "
        f"{trainee.precision} products, fp32 adapter, {torch.get_num_threads()} threads",
        data={"trained_parameters": trained, "parameters": total, "share": trained / total},
    )
    return trained
