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
from heldout.errors import InvalidTrainingFile
from heldout.kernels import Kernels, compiling
from heldout.pipeline import encoder_memory, memory
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.selection import Selection
from heldout.pipeline.training import Adapter, KeptModel, ModelFacts, Timings
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Watch
from heldout.train import body, checkpoint, classifier, loop, search, sft, timing
from heldout.train.candidates import choose, prove
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
        config = sft.config_of(folder)
        body.refuse(config, cut=plan.freeze_layers)
        shapes, sizes = self.sizes(plan, split, base_model=base_model, directory=directory)
        plan = memory.fit(plan, shapes, sizes, limit)
        body.refuse(config, cut=plan.freeze_layers, checkpoint=plan.checkpointing)
        return plan

    def sizes(
        self, plan: TrainPlan, split: Split, *, base_model: str, directory: Path | None = None
    ) -> tuple[memory.Shapes, memory.Sizes]:
        """What the memory of a chat model's training depends on."""
        folder = self._folder(base_model)
        precision = (
            weights.keep_precision(directory, self._precision)
            if directory
            else weights.choose_precision(self._precision)
        )
        template = ChatTemplate(weights.load_tokenizer(folder))
        rows, others = _tokenize(template, split, plan.max_length)
        copies, _ = that_fit(split.copies, lambda some: sft.tokenize(template, some, plan.max_length, "copies"))
        kernels = self._kernels(directory)
        shapes = sft.shapes(sft.config_of(folder), folder, precision, gpu=device.is_gpu(), kernels=kernels)
        turns = max(1, 2 * max(map(len, copies), default=0))  # epochs until every copy was seen
        steps = range(1, turns * math.ceil(len(rows) / plan.batch_size) + 1)
        batches = [loop.batch(plan, rows, copies, step) for step in steps]
        return shapes, sft.sizes(plan, shapes, batches, others)

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
            selection, folders = choose(trainee, valid, course, checkpoints=directory / "checkpoints", watch=watch)
        # Of a fold's models one of the kept ones is asked, and none is served.
        proven = () if plan.kept_steps else (split.valid or split.train)[:PROOFS]
        contenders = prove(trainee, selection, folders, proven)
        chosen = next(one for one in contenders if one.kind == selection.chosen.kind)
        return Adapter(
            plan=plan,
            directory=checkpoint.publish(chosen.directory, directory / "adapter"),
            checkpoint=chosen.checkpoint,
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
            proofs=chosen.proofs,
            contenders=contenders,
            kept=_kept(plan, course, directory),
        )

    def hand_over(self, adapter: Adapter, selection: Selection) -> Adapter:
        """See Trainer.hand_over."""
        chosen = next(one for one in adapter.contenders if one.kind == selection.chosen.kind)
        return replace(
            adapter,
            directory=checkpoint.publish(chosen.directory, adapter.directory),
            checkpoint=chosen.checkpoint,
            best_step=selection.chosen.step,
            selection=selection,
            proofs=chosen.proofs,
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
                "quarter longer, or up to twice as long, and weights may take twice the memory"
            )
        return kernels

    def _folder(self, base_model: str) -> Path:
        source = catalogue.resolve(base_model, self.aliases, allow_paths=self.allow_paths)
        return weights.prepare(source, self.cache)


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
