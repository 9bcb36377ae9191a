"""On a GPU: the operations of a pack, forward and backward, started as one. A CUDA graph for each size of pack.

A step of a small model is thousands of short operations, and a GPU waits for the processor that starts them one by one
(docs/experiments.md, "On a GPU"). A graph is recorded once and started whole; what it fixes are sizes and addresses.
So packs are filled up to one of a few sizes, with tokens that nobody looks at and predictions that weigh nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from heldout.train.layout import Layout
from heldout.train.packing import Pack

#: Sizes are multiples of this, and of a quarter of the power of two below them: a quarter is filled up at most.
LEAST = 64
#: Graphs that are kept: each is some thousand operations in the GPU's memory.
MOST = 32


class Filled(NamedTuple):
    """A pack, filled up. L tokens, R rows that predict, U predictions."""

    x: torch.Tensor  # [L, h] what enters the first trained layer
    positions: torch.Tensor  # [1, L]
    until: torch.Tensor  # [L] see Layout.until
    rows: torch.Tensor  # [R] different positions
    sources: torch.Tensor  # [U] which of the R rows predicts
    targets: torch.Tensor  # [U]
    weights: torch.Tensor  # [U] of each prediction in the loss; 0: filled up

    @property
    def layout(self) -> Layout:
        """Who looks at whom. It has no groups and no segments: what they would say is not fixed by sizes."""
        return Layout(position_ids=self.positions, segments=(), until=self.until)


#: Forward and backward of a filled pack, gradients added to the parameters': nll and right of its predictions, [U].
Run = Callable[[Filled], tuple[torch.Tensor, torch.Tensor]]


class _Recorded(NamedTuple):
    graph: Any
    inputs: Filled
    outputs: tuple[torch.Tensor, torch.Tensor]


class Graphs:
    """Runs packs, and from the second of a size on by a recorded graph."""

    def __init__(self, run: Run, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._run, self._parameters = run, list(parameters)
        # Where they are is recorded with a graph.
        self._gradients = [torch.zeros_like(one) for one in self._parameters]
        self._sizes: set[tuple[int, ...]] = set()
        self._recorded: dict[tuple[int, ...], _Recorded] = {}
        self._address = 0
        self._memory: Any = None  # all graphs share it: they never run at the same time

    def start(self, address: int) -> None:
        """Gradients are 0: a step begins. What was recorded with dropout's masks at another address is forgotten."""
        if address != self._address:
            self._address = address
            self._recorded.clear()
            self._memory = None  # it went with the last graph
        torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def learn(self, filled: Filled) -> tuple[torch.Tensor, torch.Tensor]:
        """Nll and right of the predictions, [U] each; the gradients of the weighted sum of losses are added."""
        size = (len(filled.x), len(filled.rows), len(filled.targets))
        is_full = size not in self._recorded and len(self._recorded) == MOST
        if filled.x.device.type != "cuda" or size not in self._sizes or is_full:
            # What comes once is not worth recording; and recording wants that everything ran before.
            self._sizes.add(size)
            return self._run(filled)
        if size not in self._recorded:
            self._recorded[size] = self._record(filled)
        recorded = self._recorded[size]
        for place, tensor in zip(recorded.inputs, filled, strict=True):
            place.copy_(tensor)
        recorded.graph.replay()
        nll, right = recorded.outputs
        return nll.clone(), right.clone()

    def _record(self, filled: Filled) -> _Recorded:
        inputs = Filled(*(tensor.clone() for tensor in filled))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            outputs = self._run(inputs)
        self._memory = graph.pool()
        return _Recorded(graph, inputs, outputs)


def fill(one: Pack, x: torch.Tensor, weight: float) -> Filled:
    """The pack with what enters its first trained layer, [L, h], filled up on the device of `x`.

    Args:
        weight: what the sum of losses is divided by.
    """
    n = _size(max(len(one.rows), len(one.targets)))
    length = max(_size(len(x)), n)
    device = x.device
    # Rows differ, also those that are filled up: their gradients are written to their places.
    free = torch.ones(length, dtype=torch.bool)
    free[one.rows] = False
    rows = torch.cat([one.rows, free.nonzero()[: n - len(one.rows), 0]])
    weights = torch.bincount(one.entries, weights=one.weights.double(), minlength=n) / weight
    nobody = torch.arange(len(x), length)
    entering = x.new_zeros(length, x.shape[1])
    entering[: len(x)] = x
    return Filled(
        x=entering,
        positions=_filled(one.layout.position_ids[0], length)[None].to(device),
        until=torch.cat([one.layout.until, nobody + 1]).to(device),
        rows=rows.to(device),
        sources=_filled(one.sources, n).to(device),
        targets=_filled(one.targets, n).to(device),
        weights=weights.float().to(device),
    )


def _size(n: int) -> int:
    step = max(LEAST, 1 << max(0, n.bit_length() - 3))
    return -(-n // step) * step


def _filled(x: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([x, x.new_zeros(length - len(x))])
