"""Products with frozen weights, in either direction: by torch, or with kernels (kernels/frozen.py).

Beside the weights W, [out, in], may lie columns that change, [out, R]: an adapter's s B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from heldout.kernels import Kernels
from heldout.kernels.frozen import Frozen


class Weights(Protocol):
    """[W | beside]."""

    @property
    def kernels(self) -> Kernels | None:
        """Those that multiply; None where torch does."""

    @property
    def beside(self) -> torch.Tensor:
        """[out, R], to be written to."""

    def product(self, x: torch.Tensor, onto: torch.Tensor | None = None, *, wide: bool = False) -> torch.Tensor:
        """x [W | beside]' (+ onto), [n, out], of x [n, in + R]; column-major if `wide` and torch computes."""

    def product_back(self, grad: torch.Tensor, *, wide: bool = False) -> torch.Tensor:
        """grad [W | beside], [n, in + R], of grad [n, out]; column-major if `wide` and torch computes."""


@dataclass(frozen=True)
class Dense:
    """Weights that torch multiplies with, in the precision of the products."""

    weight: torch.Tensor  # [out, in + R]
    inputs: int
    kernels: None = None

    @staticmethod
    def of(layer: torch.nn.Linear) -> Dense:
        """A layer's, with nothing beside them."""
        return Dense(layer.weight.data, layer.in_features)

    @property
    def beside(self) -> torch.Tensor:
        """See Weights.beside."""
        return self.weight[:, self.inputs :]

    def product(self, x: torch.Tensor, onto: torch.Tensor | None = None, *, wide: bool = False) -> torch.Tensor:
        """See Weights.product."""
        if wide:
            y = torch.mm(self.weight, x.t()).t()
            return y if onto is None else y.add_(onto)
        return torch.mm(x, self.weight.t()) if onto is None else torch.addmm(onto, x, self.weight.t())

    def product_back(self, grad: torch.Tensor, *, wide: bool = False) -> torch.Tensor:
        """See Weights.product_back."""
        return torch.mm(self.weight.t(), grad.t()).t() if wide else torch.mm(grad, self.weight)


@dataclass(frozen=True)
class Held:
    """Weights that kernels multiply with. Results are row-major."""

    frozen: Frozen
    beside: torch.Tensor

    @property
    def kernels(self) -> Kernels:
        """See Weights.kernels."""
        return self.frozen.kernels

    @staticmethod
    def of(parts: Sequence[Frozen], ranks: int = 0) -> Held:
        """Weights of the same inputs below each other, and a place for so many columns."""
        joined = Frozen.joined(parts)
        return Held(joined, torch.zeros(joined.outputs, ranks, dtype=joined.precision))

    def product(self, x: torch.Tensor, onto: torch.Tensor | None = None, *, wide: bool = False) -> torch.Tensor:
        """See Weights.product."""
        return self.frozen.product(x, self.beside, onto)

    def product_back(self, grad: torch.Tensor, *, wide: bool = False) -> torch.Tensor:
        """See Weights.product_back."""
        return self.frozen.product_back(grad, self.beside)
