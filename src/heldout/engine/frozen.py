"""A model whose weights stay as their file has them: layers that multiply with kernels (heldout/kernels/frozen.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from heldout.kernels import Kernels
from heldout.kernels.frozen import Frozen

#: Kinds of models that are known to use their layers' weights for products (and looking up tokens) only.
KINDS = ("llama", "mistral", "qwen2", "qwen3")


class FrozenLinear(torch.nn.Linear):
    """A linear layer without gradients. Its `weight` is of its shape and type and holds no numbers."""

    def __init__(self, frozen: Frozen, bias: torch.Tensor | None, weight: Any = None) -> None:
        """`weight`: that of a layer with the same weights."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = frozen.inputs, frozen.outputs
        self.frozen = frozen
        self.weight: torch.nn.Parameter = _placeholder(frozen) if weight is None else weight
        self.register_parameter(
            "bias", None if bias is None else torch.nn.Parameter(bias.data.float(), requires_grad=False)
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Raises RuntimeError where a gradient would be lost."""
        if torch.is_grad_enabled() and input.requires_grad:
            raise RuntimeError("a frozen linear layer hands no gradient on to its input")
        flat = input.reshape(-1, self.in_features)
        onto = None if self.bias is None else self.bias.expand(len(flat), -1)
        return self.frozen.product(flat, onto=onto).view(*input.shape[:-1], self.out_features)


class FrozenEmbedding(torch.nn.Embedding):
    """An embedding without gradients. Its `weight` is of its shape and type and holds no numbers."""

    def __init__(self, frozen: Frozen) -> None:
        torch.nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = frozen.outputs, frozen.inputs
        self.frozen = frozen
        self.weight = _placeholder(frozen)

    def extra_repr(self) -> str:
        """See torch."""
        return f"{self.num_embeddings}, {self.embedding_dim}"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., in]."""
        return self.frozen.rows(input)


def _placeholder(frozen: Frozen) -> torch.nn.Parameter:
    """What says a weight's shape and type; whoever computed with it would get no number."""
    return torch.nn.Parameter(torch.full((1, 1), math.nan).expand(frozen.outputs, frozen.inputs), requires_grad=False)


def taking(kernels: Kernels | None, config: Mapping[str, Any], precision: torch.dtype) -> Kernels | None:
    """The kernels if a model of this config can multiply with them in this precision."""
    return kernels if config["model_type"] in KINDS and precision == torch.float32 else None


def freeze(model: Any, kernels: Kernels) -> None:
    """Let all products of `model`, which is of one of KINDS, be computed with its weights as they are; the rest of it
    becomes float32."""
    _freeze_ends(model, kernels)
    # Layer by layer, and nothing holds what was replaced: memory is that of one copy.
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is torch.nn.Linear:
                setattr(module, name, _frozen(child, kernels))
    model.float()


def _freeze_ends(model: Any, kernels: Kernels) -> None:
    """The embedding and the head, which may share their weights."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        model.set_input_embeddings(FrozenEmbedding(Frozen.of(kernels, embedding.weight.data)))
        model.set_output_embeddings(_frozen(head, kernels))
        return
    both = FrozenEmbedding(Frozen.of(kernels, head.weight.data))
    model.set_input_embeddings(both)
    model.set_output_embeddings(FrozenLinear(both.frozen, head.bias, both.weight))


def _frozen(layer: torch.nn.Linear, kernels: Kernels) -> FrozenLinear:
    return FrozenLinear(Frozen.of(kernels, layer.weight.data), layer.bias)
