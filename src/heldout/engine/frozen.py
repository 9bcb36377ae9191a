"""A model whose layers multiply with kernels (heldout/kernels/frozen.py)."""

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
        self.register_parameter("bias", None if bias is None else _copied(bias, frozen.precision))

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
    nothing = torch.full((1, 1), math.nan, dtype=frozen.precision)
    return torch.nn.Parameter(nothing.expand(frozen.outputs, frozen.inputs), requires_grad=False)


def _copied(parameter: torch.Tensor, precision: torch.dtype) -> torch.nn.Parameter:
    """In memory of its own: while one tensor is a view of a model's file, all of the file stays in memory."""
    return torch.nn.Parameter(parameter.detach().to(precision, copy=True), requires_grad=False)


def taking(kernels: Kernels | None, config: Mapping[str, Any], precision: torch.dtype) -> Kernels | None:
    """The kernels if a model of this config can multiply with them in this precision."""
    if not kernels or config["model_type"] not in KINDS or not kernels.multiplies(precision):
        return None
    # Products of pairs: every layer takes one of these or the heads' numbers.
    odd = any(config[name] % 2 for name in ("hidden_size", "intermediate_size"))
    return None if odd and precision == torch.bfloat16 else kernels


def freeze(model: Any, kernels: Kernels, precision: torch.dtype) -> None:
    """Let all products of `model`, which is of one of KINDS, be computed with kernels in this precision; in float32
    with its weights as they are. All else becomes of this precision."""
    _freeze_ends(model, kernels, precision)
    # Layer by layer, and nothing holds what was replaced: memory is that of one copy.
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is torch.nn.Linear:
                setattr(module, name, _frozen(child, kernels, precision))
    for module in model.modules():
        if not isinstance(module, FrozenLinear | FrozenEmbedding):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, _copied(parameter, precision))


def _freeze_ends(model: Any, kernels: Kernels, precision: torch.dtype) -> None:
    """The embedding and the head, which may share their weights."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        model.set_input_embeddings(FrozenEmbedding(Frozen.of(kernels, embedding.weight.data, precision)))
        model.set_output_embeddings(_frozen(head, kernels, precision))
        return
    both = FrozenEmbedding(Frozen.of(kernels, head.weight.data, precision))
    model.set_input_embeddings(both)
    model.set_output_embeddings(FrozenLinear(both.frozen, head.bias, both.weight))


def _frozen(layer: torch.nn.Linear, kernels: Kernels, precision: torch.dtype) -> FrozenLinear:
    return FrozenLinear(Frozen.of(kernels, layer.weight.data, precision), layer.bias)
