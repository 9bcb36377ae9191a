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
        self.weights = copy(parameters) if decay else {}

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
        now = copy(self.parameters) if self.weights else {}
        put(self.parameters, self.weights)
        try:
            yield
        finally:
            put(self.parameters, now)

    def restart(self, now: Mapping[str, torch.Tensor]) -> None:
        """Go on where the parameters hold the average as it was saved, and `now` the weights of that step."""
        for name, weight in self.weights.items():
            weight.copy_(self.parameters[name].detach())
        put(self.parameters, now)


def copy(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Their values now, which later steps do not change."""
    return {name: one.detach().clone() for name, one in parameters.items()}


@torch.no_grad()
def put(parameters: Mapping[str, torch.nn.Parameter], weights: Mapping[str, torch.Tensor]) -> None:
    """Give those parameters that are named these values, in place."""
    for name, weight in weights.items():
        parameters[name].copy_(weight)
