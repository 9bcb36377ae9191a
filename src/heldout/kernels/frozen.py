"""Frozen weights for products of our own, in float32 or in bfloat16.

Most models are published in bfloat16. Widened to float32 once, as a processor without bfloat16 units needs them, their
weights take twice the memory, and a product of few tokens waits for it twice as long. In float32 the products here keep
weights as their file has them, widen them on their way to the processor's cache, and give the same numbers: widening
loses nothing, and the sums are float32. Where a processor multiplies pairs of bfloat16 numbers, products are of these
pairs, with weights and activations in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from heldout.kernels import Kernels


@dataclass(frozen=True)
class Frozen:
    """Weights [out, in], bfloat16 or float32, in panels of P outputs: [out / P, in, P], the last one filled up with 0.

    In bfloat16 for products in float32 the outputs i and P / 2 + i of a panel lie side by side (product.cpp says why).
    """

    kernels: Kernels
    panels: torch.Tensor
    outputs: int
    precision: torch.dtype  # of the products, and of all that is given and found

    @staticmethod
    def of(kernels: Kernels, weight: torch.Tensor, precision: torch.dtype = torch.float32) -> Frozen:
        """These weights, copied; for products in bfloat16 rounded to it."""
        outputs, inputs = weight.shape
        if precision == torch.bfloat16:
            weight = weight.to(precision)
        size = kernels.panel
        whole = weight
        if outputs % size:
            whole = torch.cat([weight, weight.new_zeros(size - outputs % size, inputs)])
        halves = _halves(weight.dtype, precision)
        panels = whole.view(-1, halves, size // halves, inputs).permute(0, 3, 2, 1)
        return Frozen(kernels, panels.reshape(-1, inputs, size).contiguous(), outputs, precision)

    @staticmethod
    def joined(parts: Sequence[Frozen]) -> Frozen:
        """Weights of the same inputs below each other, copied; of one, itself."""
        first = parts[0]
        if len(parts) == 1:
            return first
        return Frozen.of(first.kernels, torch.cat([one.weight for one in parts]), first.precision)

    @property
    def inputs(self) -> int:
        """Numbers of an input."""
        return self.panels.shape[1]

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], copied."""
        count, inputs, size = self.panels.shape
        halves = _halves(self.panels.dtype, self.precision)
        panels = self.panels.view(count, inputs, size // halves, halves)
        return panels.permute(0, 3, 2, 1).reshape(-1, inputs)[: self.outputs]

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """The weights of some outputs, [..., in]: an embedding's. Raises IndexError where there is none."""
        if numbers.numel() and not (int(numbers.min()) >= 0 and int(numbers.max()) < self.outputs):
            raise IndexError(f"a row outside of the {self.outputs} that there are")
        panel, place = numbers // self.kernels.panel, numbers % self.kernels.panel
        if _halves(self.panels.dtype, self.precision) == 2:
            half = self.kernels.panel // 2
            place = place % half * 2 + place // half
        return self.panels[panel, :, place].to(self.precision)

    def product(
        self, x: torch.Tensor, beside: torch.Tensor | None = None, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [W | beside]' (+ onto), [n, out]. A row of it depends on that row of `x` alone, to the bit.

        Args:
            x: [n, in + R]; beside: [out, R]; onto: [n, out].
        """
        self._expect(x)
        return self.kernels.product(self.panels, self.outputs, x, beside, onto)

    def product_back(self, grad: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
        """grad [W | beside], [n, in + R], of grad [n, out]."""
        self._expect(grad)
        return self.kernels.product_back(self.panels, self.outputs, grad, beside)

    def _expect(self, x: torch.Tensor) -> None:
        # Panels for the one precision are read as other numbers by products of the other.
        if x.dtype != self.precision:
            raise ValueError(f"{x.dtype} where {self.precision} is expected")


def _halves(held: torch.dtype, precision: torch.dtype) -> int:
    """Parts of a panel whose numbers lie side by side."""
    return 2 if held == torch.bfloat16 and precision == torch.float32 else 1
