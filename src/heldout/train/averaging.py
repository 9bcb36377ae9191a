"""The exponential moving average of the trained weights: what is validated, saved and handed over.

With a learning rate high enough to learn fast the weights of single steps jump about, most of all where labels are
wrong; their average is steadier and better. See docs/design/stopping.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch


class Average:
    """The average of `parameters` over the steps so far, the newest counting most; with decay 0 the parameters
    themselves."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.weights = {name: one.detach().clone() for name, one in parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after this step. Early steps count less than `decay` would have it, or the
        weights that training began with would be remembered for long."""
        if self.weights:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.weights.values()), list(self.parameters.values()), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold their average meanwhile."""
        now = {name: self.parameters[name].detach().clone() for name in self.weights}
        self.put(self.weights)
        try:
            yield
        finally:
            self.put(now)

    def restart(self, now: Mapping[str, torch.Tensor]) -> None:
        """Go on where the parameters hold the average as it was saved, and `now` the weights of that step."""
        for name, weight in self.weights.items():
            weight.copy_(self.parameters[name].detach())
        self.put(now)

    @torch.no_grad()
    def put(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Give these parameters these values."""
        for name, weight in weights.items():
            self.parameters[name].copy_(weight)
