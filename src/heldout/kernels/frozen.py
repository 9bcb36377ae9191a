"""Frozen weights that stay in memory as their file has them, and are widened on their way to the processor's cache.

Most models are published in bfloat16. Widened to float32 once, as a processor without bfloat16 units needs them, their
weights take twice the memory, and a product of few tokens waits for it twice as long. The products here give the same
numbers: widening loses nothing, and the sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from heldout.kernels import Kernels


@dataclass(frozen=True)
class Frozen:
    """Weights [out, in], bfloat16 or float32, in panels of P outputs: [out / P, in, P], the last one filled up with 0.

    In bfloat16 the outputs i and P / 2 + i of a panel lie side by side (product.cpp says why).
    """

    kernels: Kernels
    panels: torch.Tensor
    outputs: int

    @staticmethod
    def of(kernels: Kernels, weight: torch.Tensor) -> Frozen:
        """These weights, copied."""
        outputs, inputs = weight.shape
        size = kernels.panel
        whole = weight
        if outputs % size:
            whole = torch.cat([weight, weight.new_zeros(size - outputs % size, inputs)])
        halves = 2 if weight.dtype == torch.bfloat16 else 1
        panels = whole.view(-1, halves, size // halves, inputs).permute(0, 3, 2, 1)
        return Frozen(kernels, panels.reshape(-1, inputs, size).contiguous(), outputs)

    @staticmethod
    def joined(parts: Sequence[Frozen]) -> Frozen:
        """Weights of the same inputs below each other, copied; of one, itself."""
        first = parts[0]
        if len(parts) == 1:
            return first
        return Frozen.of(first.kernels, torch.cat([one.weight for one in parts]))

    @property
    def inputs(self) -> int:
        """Numbers of an input."""
        return self.panels.shape[1]

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], copied."""
        count, inputs, size = self.panels.shape
        halves = self._halves
        panels = self.panels.view(count, inputs, size // halves, halves)
        return panels.permute(0, 3, 2, 1).reshape(-1, inputs)[: self.outputs]

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """The weights of some outputs, [..., in], as float32: an embedding's. Raises IndexError where there is none."""
        if numbers.numel() and not (int(numbers.min()) >= 0 and int(numbers.max()) < self.outputs):
            raise IndexError(f"a row outside of the {self.outputs} that there are")
        panel, place = numbers // self.kernels.panel, numbers % self.kernels.panel
        if self._halves == 2:
            half = self.kernels.panel // 2
            place = place % half * 2 + place // half
        return self.panels[panel, :, place].float()

    def product(
        self, x: torch.Tensor, beside: torch.Tensor | None = None, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [W | beside]' (+ onto), [n, out]; all float32. A row of it depends on that row of `x` alone, to the bit.

        Args:
            x: [n, in + R]; beside: [out, R]; onto: [n, out].
        """
        return self.kernels.product(self.panels, self.outputs, x, beside, onto)

    def product_back(self, grad: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
        """grad [W | beside], [n, in + R], of grad [n, out]; all float32."""
        return self.kernels.product_back(self.panels, self.outputs, grad, beside)

    @property
    def _halves(self) -> int:
        return 2 if self.panels.dtype == torch.bfloat16 else 1
