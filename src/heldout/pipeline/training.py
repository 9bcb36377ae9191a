"""What the pipeline asks of a trainer, and what it gets back. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from heldout.engine.base import Message
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.selection import Kind, Selection
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Watch

#: What training's scores of a checkpoint are: the share of validation answers whose every token is the likeliest.
RIGHT = "share of answers that are right"


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the plan must know of a base model."""

    hidden_size: int
    layers: int  # decoder layers
    context: int  # tokens
    parameters: int
    kind: str = "chat"  # or "encoder": a classifier on an encoder
    gpu: bool = False  # where it is trained


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One step of training. Losses are mean negative log-likelihoods in nats: `train_loss` per supervised
    token of the batch, `valid_loss` per example (each example weighs the same) over all of valid, and the same at
    the temperature at which it is lowest."""

    step: int
    train_loss: float
    train_accuracy: float  # share of supervised tokens that are the argmax
    valid_loss: float | None = None
    valid_calibrated_loss: float | None = None  # what stopping and selection go by
    valid_accuracy: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the report; what was not measured at this step is None."""
        return {
            "step": self.step,
            "train_loss": self.train_loss,
            "train_accuracy": self.train_accuracy,
            "valid_loss": self.valid_loss,
            "valid_calibrated_loss": self.valid_calibrated_loss,
            "valid_accuracy": self.valid_accuracy,
        }


@dataclass(frozen=True, kw_only=True)
class Proof:
    """A fixed conversation and the log-probability (nats) that the trainer gave its answer."""

    messages: tuple[Message, ...]
    log_prob: float


@dataclass(frozen=True, kw_only=True)
class KeptModel:
    """An adapter from before the end of training, with what validation said of it."""

    step: int
    directory: Path  # in the standard PEFT layout
    losses: tuple[float, ...]  # calibrated, nats, of each validation example


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A checkpoint that could be handed over, where it lies while the job's folder is not cleared."""

    kind: Kind  # of its candidate
    directory: Path  # of its adapter, in the standard PEFT layout
    checkpoint: Path  # of its step itself; the adapter may be an average of it and its neighbours
    proofs: tuple[Proof, ...]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A trained adapter in the standard PEFT layout: the best checkpoint, not the last."""

    plan: TrainPlan  # as it was run: with the learning rate that a search chose, and why
    directory: Path
    checkpoint: Path  # of `best_step` itself; the adapter may be an average of it and its neighbours
    best_step: int
    last_step: int
    curve: tuple[CurvePoint, ...]
    trained_tokens: int  # tokens of all examples in all steps taken, as a hosted service would bill them
    trained_parameters: int
    examples_per_second: float  # training steps only, validation and saving not counted
    seconds: float  # the whole training phase
    peak_memory_bytes: int  # of this process during training
    precision: str  # of the products: "float32" or "bfloat16"
    kernels: bool  # whether operations compiled for the processor took part (heldout/kernels)
    learning_rate: float  # the peak rate at the end; below the plan's if training had to start again
    stopped: str  # why training ended, in words
    selection: Selection  # which checkpoint was taken, and why
    proofs: tuple[Proof, ...]
    contenders: tuple[Contender, ...]  # the selection's candidates that a score could have chosen
    kept: tuple[KeptModel, ...] = ()  # of the plan's kept_steps, in their order


@dataclass(frozen=True, kw_only=True)
class Timings:
    """How long the parts of a training take here, each measured on the real thing. Times are in seconds."""

    build: float  # until the model and the rows are there
    prepare: float  # for each example: what frozen layers say of it, once
    step: float
    validation: float  # for each example
    save: float  # a checkpoint
    steps: int  # that were taken to measure this
    tokens: int  # of all training examples, once
    supervised: int  # of them learned from; with a prompt_loss_weight prompts count at that weight
    adapter: Path  # what these few steps made: as slow to serve as a finished one


class Trainer(Protocol):
    """Turns a plan and a split into an adapter."""

    def facts(self, base_model: str) -> ModelFacts:
        """What the base model is like. Raises ModelNotFound."""
        ...

    def count_tokens(self, examples: Sequence[Example], *, base_model: str) -> list[int]:
        """How many tokens each example is as it is trained on: of a chat model, in its template up to the last
        answer that is learned (0 where the template refuses the conversation); of an encoder, its prompt."""
        ...

    def fit(self, plan: TrainPlan, split: Split, *, base_model: str, directory: Path | None = None) -> TrainPlan:
        """The plan with its memory predicted, and micro-batches and checkpointing chosen so that it fits.

        The precision of products is settled here: `directory`, the job's, keeps it for every process that
        takes the job up.

        Raises InvalidValue when it cannot, and InvalidTrainingFile as `train` does.
        """
        ...

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
        """Train in `directory`, continuing from the last checkpoint that lies there. The checkpoint that is handed
        over is the one that the losses speak for: of scores, training knows RIGHT alone.

        Without rows in `split.valid` all steps of the plan are taken and the last one is kept. What frozen
        layers say of an example may be kept in `cache`, a folder that several trainings share.

        Raises InvalidTrainingFile naming the lines when labels would not cover exactly the answers.
        """
        ...

    def hand_over(self, adapter: Adapter, selection: Selection) -> Adapter:
        """The adapter with the contender of the selection's chosen kind in its place, on disk as well."""
        ...

    def time_steps(self, plan: TrainPlan, split: Split, *, base_model: str, directory: Path, seconds: float) -> Timings:
        """Take real steps of this plan for about so many seconds, in an empty `directory`, and look at part of valid.

        Raises InvalidTrainingFile as `train` does.
        """
        ...
