"""When to stop, and which checkpoint is best: by evidence from validation, in numbers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class EarlyStopping:
    """Watches per-example validation losses.

    A checkpoint is the new best when its mean loss is the lowest so far; it counts as *progress* only
    when it beats the last progress by half the standard error of the paired difference, so noise does
    not buy patience (docs/design/recipe.md). Training stops after `patience` validations
    without progress and at least one epoch since.
    """

    patience: int
    steps_per_epoch: int
    best_step: int = 0
    best_loss: float = math.inf
    progress_step: int = 0
    progress_losses: list[float] = field(default_factory=list)
    waited: int = 0

    def update(self, step: int, losses: list[float]) -> bool:
        """Take in one validation (nats per example, in a fixed order). True if it is the best so far."""
        mean = sum(losses) / len(losses)
        if not self.progress_losses or _clearly_below(losses, self.progress_losses):
            self.progress_step, self.progress_losses, self.waited = step, list(losses), 0
        else:
            self.waited += 1
        if mean < self.best_loss:
            self.best_step, self.best_loss = step, mean
            return True
        return False

    def ran_out(self, step: int) -> bool:
        """True when waiting any longer is unlikely to help."""
        return self.waited >= self.patience and step - self.progress_step >= self.steps_per_epoch

    def state(self) -> dict[str, Any]:
        """What a resumed job needs to decide the same."""
        return {
            "best_step": self.best_step,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "progress_step": self.progress_step,
            "progress_losses": self.progress_losses,
            "waited": self.waited,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.best_step = state["best_step"]
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        self.progress_step, self.waited = state["progress_step"], state["waited"]
        self.progress_losses = list(state["progress_losses"])


def _clearly_below(new: list[float], old: list[float]) -> bool:
    differences = [b - a for a, b in zip(new, old, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    if n < 2:
        return mean > 0
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return mean > 0.5 * math.sqrt(variance / n)
