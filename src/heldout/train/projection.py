"""A linear layer with its adapter as one product, or several of one input; forward and backward.

With inner values i = A (m * x) a layer with an adapter is W x + s B i: one product of [W | s B] with x and i side by
side. Its backward product with [W | s B] gives the gradients of both at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear

from heldout.engine.frozen import FrozenLinear
from heldout.train.products import Dense, Held, Weights


class Adapter(NamedTuple):
    """One projection's adapter, and where it lies in the joint product."""

    a: torch.nn.Parameter  # [r, in]
    b: torch.nn.Parameter  # [out, r]
    scaling: float
    outputs: slice  # its rows of the joint weight
    ranks: slice  # its columns of the joint inner values


class Scratch:
    """Memory for what a layer needs for a moment only. On a processor it is the same for all layers: made anew for each
    one, it would lie among what is kept for the backward pass, and leave holes there."""

    def __init__(self, *, shared: bool) -> None:
        self._memory: dict[str, torch.Tensor] | None = {} if shared else None

    def take(self, use: str, like: torch.Tensor, count: int) -> torch.Tensor:
        """[count], of the type of `like` and where it is; what was taken for this use before is overwritten."""
        if self._memory is None:
            return like.new_empty(count)
        memory = self._memory.pop(use, None)
        if memory is None or memory.numel() < count or memory.dtype != like.dtype:
            del memory  # or both would be in memory
            memory = like.new_empty(count)
        self._memory[use] = memory
        return memory[:count]

    def like(self, use: str, x: torch.Tensor) -> torch.Tensor:
        """Of the shape and memory order of a matrix."""
        memory = self.take(use, x, x.numel())
        return memory.view(x.shape) if x.stride(-1) == 1 else memory.view(x.shape[::-1]).t()


@dataclass(frozen=True)
class Projection:
    """Linear layers that take the same input, as one product. Where several layers are stacked, B is block-diagonal."""

    weights: Weights  # W frozen, and the place for s B beside it
    bias: torch.Tensor | None
    inputs: int
    adapters: tuple[Adapter, ...]
    stacked: torch.Tensor  # all A, [R, in], in the precision of the products, as the last forward pass had them

    @staticmethod
    def of(*layers: torch.nn.Module) -> Projection:
        """Layers of PEFT, or plain ones. Their base weights become the joint one's."""
        bases: list[Any] = [layer.base_layer if isinstance(layer, Linear) else layer for layer in layers]
        inputs = bases[0].in_features
        outputs = rank = 0
        found = []
        for layer, base in zip(layers, bases, strict=True):
            if isinstance(layer, Linear):
                (name,) = layer.active_adapters
                a, b = _matrices(layer, name)
                rows = slice(outputs, outputs + base.out_features)
                found.append(Adapter(a, b, layer.scaling[name], rows, slice(rank, rank + len(a))))
                rank += len(a)
            outputs += base.out_features
        weights = _taken_over(bases, outputs, inputs, rank)
        bias = None if bases[0].bias is None else torch.cat([base.bias.data for base in bases])
        return Projection(weights, bias, inputs, tuple(found), weights.beside.new_empty(rank, inputs))

    @property
    def rank(self) -> int:
        """R, the sum of the adapters' ranks."""
        return self.weights.beside.shape[1]

    def input_of(self, joint: torch.Tensor) -> torch.Tensor:
        """The input in a room for it and its inner values."""
        return joint[:, : self.inputs]

    def inner_of(self, joint: torch.Tensor) -> torch.Tensor:
        """The inner values beside the input, [n, R]."""
        return joint[:, self.inputs :]

    def room(
        self, like: torch.Tensor, length: int, *, wide: bool = False, scratch: Scratch | None = None
    ) -> torch.Tensor:
        """Room for the input and its inner values side by side, [n, in + R]; column-major if `wide`. In `scratch` where
        it is needed for a moment only."""
        width = self.inputs + self.rank
        count = length * width
        room = scratch.take("joint", like, count) if scratch else like.new_empty(count)
        return room.view(width, length).t() if wide else room.view(length, width)

    def forward(
        self, joint: torch.Tensor, masked: torch.Tensor, *, onto: torch.Tensor | None = None, wide: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """W x + bias + adapters (+ onto) of the input in `joint`, whose inner values are written beside it; and the
        inner values, [n, R].

        Args:
            masked: what the adapters take, [n, in].
            wide: give the result column-major: by torch the same numbers a fifth faster where the output is wider
                than the input (the product splits along the longer side).
        """
        inner = self.inner_of(joint)
        if self.adapters:
            for one in self.adapters:
                self.stacked[one.ranks] = one.a.data
                self.weights.beside[one.outputs, one.ranks] = one.b.data * one.scaling
            torch.mm(masked, self.stacked.t(), out=inner)
        y = self.weights.product(joint, onto, wide=wide)
        return (y if self.bias is None else y.add_(self.bias)), inner.clone()

    def backward(
        self, grad: torch.Tensor, mask: torch.Tensor | None, *, needs_x: bool = True, wide: bool = False
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The gradient of the input, [n, in] (None unless `needs_x`), and that of the inner values, [n, R]; both
        column-major if `wide`. `mask`: what the adapters' input was multiplied by."""
        if not needs_x:
            return None, grad @ self.weights.beside
        both = self.weights.product_back(grad, wide=wide)
        d_x, through = both[:, : self.inputs], both[:, self.inputs :]
        if mask is not None:  # in the memory order of what it is added to
            more = (self.stacked.t() @ through.t()).t() if wide else through @ self.stacked
            d_x.addcmul_(more, mask)
        elif self.adapters:
            d_x.addmm_(through, self.stacked)
        return d_x, through

    def gradients(
        self, masked: torch.Tensor, grad: torch.Tensor, inner: torch.Tensor, through: torch.Tensor
    ) -> list[torch.Tensor]:
        """Those of every adapter's A and B, in their order.

        Args:
            masked: what the adapters took, [n, in].
            grad: of the joint product's result, [n, out].
            inner: A masked, [n, R].
            through: the gradient of `inner`, [n, R].
        """
        if not self.adapters:
            return []
        found, of_a = [], through.t() @ masked
        for one in self.adapters:
            # Twice as fast as the product of the transposed.
            of_b = (inner[:, one.ranks].t() @ grad[:, one.outputs]).t()
            found.append(of_a[one.ranks].to(one.a.dtype))
            found.append((of_b * one.scaling).to(one.b.dtype))
        return found


def _matrices(layer: Any, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _taken_over(bases: Sequence[Any], outputs: int, inputs: int, rank: int) -> Weights:
    if all(isinstance(base, FrozenLinear) for base in bases):
        held = Held.of([base.frozen for base in bases], rank)
        for base in bases:
            del base.frozen  # it is part of the joint one
        return held
    weight = bases[0].weight.data.new_zeros(outputs, inputs + rank)
    first = 0
    for base in bases:
        part = weight[first : first + base.out_features, :inputs]
        part.copy_(base.weight.data)
        base.weight.data = part
        first += base.out_features
    return Dense(weight, inputs)
