"""What the training loop asks of a kind of model: the same few functions for each (sft.py, classifier.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch

from heldout.pipeline.types import Example
from heldout.pipeline.watch import Watch

Row = TypeVar("Row")

#: What logits are divided by to find the temperature at which validation loss is lowest: from 0.35 to 5.7.
TEMPERATURES = tuple(2 ** (k / 2) for k in range(-3, 6))


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a micro-batch says about itself, per prediction; T predictions. A prediction is a supervised
    token of a chat model or the class of a classifier's example."""

    loss: torch.Tensor  # [T] what training lowers, with gradient
    nll: torch.Tensor  # [T] negative log-likelihood in nats, without smoothing and gradient
    right: torch.Tensor  # [T] bool, the argmax is the target
    owners: torch.Tensor  # [T] index of the example within the micro-batch
    weights: torch.Tensor  # [T] 1 for what is to be learned; less for prompt tokens
    tempered: torch.Tensor  # [K, T] nll at each of TEMPERATURES; [0, T] in training


class Learned(NamedTuple):
    """What a micro-batch said while its gradients were computed: see Losses."""

    nll: torch.Tensor  # [T]
    right: torch.Tensor  # [T]
    weights: torch.Tensor  # [T]


def add_gradients(found: Losses, weight: float) -> Learned:
    """Add those of the weighted losses over `weight` to the parameters'."""
    ((found.loss * found.weights).sum() / weight).backward()
    return Learned(found.nll, found.right, found.weights)


class Trainee(Protocol[Row]):
    """A model that is being trained; a Row is one example as the model takes it."""

    parameters: dict[str, torch.nn.Parameter]  # what is trained, by name

    @property
    def precision(self) -> str:
        """Of the products: "float32" or "bfloat16"."""
        ...

    @property
    def kernels(self) -> bool:
        """Whether operations compiled for the processor take part (heldout/kernels)."""
        ...

    @property
    def description(self) -> str:
        """What is trained, for the story: "LoRA r=16 on all linear layers"."""
        ...

    @property
    def size(self) -> int:
        """Parameters of the whole model, trained or not."""
        ...

    def rows(self, examples: Sequence[Example], part: str) -> list[Row]:
        """Examples as the model takes them. Raises InvalidTrainingFile naming every line of `part` that it
        cannot be trained on."""
        ...

    def prepare(self, rows: Sequence[Row], watch: Watch) -> None:
        """Compute once what every epoch would compute again."""
        ...

    def log_prob(self, example: Example) -> float:
        """Log-probability (nats) of the example's last answer, with the weights as they are."""
        ...

    def micro_batches(self, rows: Sequence[Row], *, training: bool) -> list[list[int]]:
        """Indices of the rows that are computed together."""
        ...

    def weight(self, row: Row) -> float:
        """Sum of the weights of a row's predictions in training."""
        ...

    def start(self, step: int, rows: Sequence[Row]) -> None:
        """Training mode for this step, whose rows these are. What is random depends on (seed, step) alone."""
        ...

    def stop(self) -> None:
        """Evaluation mode: nothing random, no regularisation."""
        ...

    def losses(self, rows: Sequence[Row], number: int = 0) -> Losses:
        """Run one micro-batch; `number` is its place in the step."""
        ...

    def learn(self, rows: Sequence[Row], number: int, weight: float) -> Learned:
        """Run one micro-batch, and add the gradients of its weighted losses over `weight` to the parameters'."""
        ...

    def save(self, folder: Path) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json` into an existing folder."""
        ...

    def load(self, folder: Path) -> None:
        """Put back what `save` wrote."""
        ...
