"""Every "auto" becomes a number once, with its reason, and only the number travels on."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from heldout.pipeline.hyperparameters import Hyperparameters

if TYPE_CHECKING:
    from heldout.pipeline.training import ModelFacts
    from heldout.pipeline.types import Split

T = TypeVar("T", int, float, bool)


class Choice(NamedTuple):
    """A number and why it is that number."""

    value: Any
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """Resolved hyperparameters: nothing is "auto", nothing is None."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    learning_rate: float
    lr_search: str  # "off", or "light": three rates, of which learning_rate is the middle one
    warmup_ratio: float  # share of total_steps that was asked for; warmup_steps is what is taken
    warmup_steps: int
    total_steps: int
    eval_every: int  # steps between validations
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...]  # PEFT's meaning: ("all-linear",), or the ends of module names
    freeze_layers: int  # lower decoder layers that get no adapter
    weight_decay: float
    max_grad_norm: float
    label_smoothing: float
    neftune_noise_alpha: float  # 0: no noise
    prompt_loss_weight: float  # weight of a prompt's token in the loss; an answer's is 1
    replay_ratio: float  # general examples added to train, as a share of it
    max_length: int  # tokens; a longer example is an error, never cut
    early_stopping: bool
    patience: int  # validations without improvement before training stops
    # A validation counts as an improvement when its mean loss per example is lower by more than
    # min_delta nats, and by more than min_delta_errors standard errors of the paired difference.
    min_delta: float
    min_delta_errors: float
    seed: int
    reasons: dict[str, str]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """{name: {"value", "reason"}}, as it goes into the report and on the wire."""
        return {
            field.name: {"value": getattr(self, field.name), "reason": self.reasons.get(field.name, "")}
            for field in fields(self)
            if field.name != "reasons"
        }


def make_plan(asked: Hyperparameters, split: Split, facts: ModelFacts, *, seed: int) -> TrainPlan:
    """Resolve what was asked for. The defaults and their evidence are in docs/design/recipe.md."""
    n, n_valid = len(split.train), len(split.valid)
    batch = _asked(asked.batch_size, lambda: _batch_size(n))
    if batch.value > n:
        batch = Choice(n, f"{batch.value} was asked for, but there are only {n} examples")
    epochs = _asked(asked.n_epochs, lambda: _epochs(n))
    steps_per_epoch = math.ceil(n / batch.value)
    total = steps_per_epoch * epochs.value
    multiplier = _asked(asked.learning_rate_multiplier, lambda: Choice(1.0, "auto: the base rate as it is"))
    base_rate = _learning_rate(facts.hidden_size, batch.value)
    rate = _asked(
        asked.learning_rate,
        lambda: Choice(base_rate.value * multiplier.value, f"{base_rate.reason}, times the multiplier"),
    )
    rank = _asked(asked.lora_r, lambda: Choice(16, "auto: capacity is not the limit at this size"))
    warmup_ratio = 0.06 if asked.warmup_ratio is None else asked.warmup_ratio
    choices = {
        "n_epochs": epochs,
        "batch_size": batch,
        "learning_rate_multiplier": multiplier,
        "learning_rate": rate,
        "lr_search": Choice("off", "auto"),
        "warmup_ratio": Choice(warmup_ratio, "auto"),
        "warmup_steps": Choice(
            min(total, max(5, round(warmup_ratio * total))) if warmup_ratio else 0,
            f"{warmup_ratio:.0%} of the steps, at least 5; then linear to 0" if warmup_ratio else "no warm-up",
        ),
        "total_steps": Choice(total, f"{steps_per_epoch} steps an epoch, {epochs.value} epochs"),
        "eval_every": _eval_every(steps_per_epoch, n, n_valid),
        "lora_r": rank,
        "lora_alpha": _asked(
            asked.lora_alpha, lambda: Choice(2.0 * rank.value, "auto: twice lora_r, so the rate carries over")
        ),
        "lora_dropout": _asked(asked.lora_dropout, lambda: _dropout(n)),
        "target_modules": Choice(("all-linear",), "auto"),
        "freeze_layers": Choice(0, "auto"),
        "weight_decay": _asked(asked.weight_decay, lambda: Choice(0.0, "auto: sweeps choose 0 for LoRA")),
        "max_grad_norm": _asked(asked.max_grad_norm, lambda: Choice(1.0, "auto")),
        "label_smoothing": Choice(0.0, "auto"),
        "neftune_noise_alpha": Choice(0.0, "auto"),
        "prompt_loss_weight": Choice(0.0, "auto"),
        "replay_ratio": Choice(0.0, "auto"),
        "max_length": _asked(
            asked.max_length,
            lambda: Choice(min(facts.context, 4096), "auto: the model's context, at most 4096"),
        ),
        "early_stopping": _asked(asked.early_stopping, lambda: Choice(True, "auto")),
        "patience": _asked(
            asked.patience, lambda: Choice(4, "auto: validations without improvement, and at least one epoch")
        ),
        "min_delta": Choice(0.0, "auto"),
        "min_delta_errors": Choice(0.5, "auto"),
        "seed": Choice(seed, "set in the request or drawn with the job"),
    }
    return TrainPlan(
        **{name: choice.value for name, choice in choices.items()},
        reasons={name: choice.reason for name, choice in choices.items()},
    )


def _asked(requested: Any, otherwise: Any) -> Choice:
    return otherwise() if requested is None else Choice(requested, "set in the request")


def _epochs(n: int) -> Choice:
    epochs = max(3, min(12, math.ceil(720 / n)))
    return Choice(epochs, f"auto: {n} examples; about 720 in all, between 3 and 12 epochs, early stopping decides")


def _batch_size(n: int) -> Choice:
    size = 8 if n < 2_000 else 16 if n < 10_000 else 32
    return Choice(size, f"auto: {n} examples; LoRA likes small batches")


def _learning_rate(hidden_size: int, batch_size: int) -> Choice:
    # 2e-3 is measured at width 576 and batch 8 (docs/experiments.md); falling with the width it meets the
    # 2e-4 to 3e-4 that is customary for models of 7B.
    rate = 2e-3 * 576 / hidden_size * math.sqrt(batch_size / 8)
    return Choice(max(1e-4, min(2e-3, rate)), f"2e-3 at width 576 and batch 8; width {hidden_size}, batch {batch_size}")


def _dropout(n: int) -> Choice:
    if n < 1_000:
        return Choice(0.05, f"auto: {n} examples are fewer than 1000")
    return Choice(0.0, f"auto: {n} examples are enough without")


def _eval_every(steps_per_epoch: int, n: int, n_valid: int) -> Choice:
    # A validation example costs about 40 % of a training example (no backward, larger packs).
    per_epoch = max(2, min(4, round(0.5 * n / max(1, n_valid))))
    every = max(1, math.ceil(steps_per_epoch / per_epoch))
    return Choice(every, f"{per_epoch} validations an epoch: {n} training, {n_valid} validation examples")
