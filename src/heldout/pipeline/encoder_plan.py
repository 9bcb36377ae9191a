"""The recipe of a classifier on an encoder: what plan.py is for chat models. Evidence:
docs/design/encoder-classifiers.md."""

from __future__ import annotations

import math
from typing import Any

from heldout.errors import InvalidValue
from heldout.pipeline.hyperparameters import FREEZE_PROFILES, Hyperparameters
from heldout.pipeline.plan import Choice, asked_or, augmentation, batch_within, ema_decay, eval_every, steps, stopping
from heldout.pipeline.training import ModelFacts
from heldout.pipeline.types import Split

#: Hyperparameters that change nothing here, and the value that stands for that.
MEANINGLESS: dict[str, Any] = {
    "lora_r": 0,
    "lora_alpha": 0.0,
    "target_modules": (),
    "neftune_noise_alpha": 0.0,
    "prompt_loss_weight": 0.0,
    "replay_ratio": 0.0,
}
#: Measured at width 384 (docs/experiments.md); 2e-5 at 768 and 1e-5 at 1024 are customary.
RATE, WIDTH = 1e-4, 384


def encoder_choices(asked: Hyperparameters, split: Split, facts: ModelFacts) -> dict[str, Choice]:
    """Every value of the plan but the seed.

    Raises InvalidValue when something was asked for that a classifier has no use for, or more than the
    encoder has.
    """
    _refuse_meaningless(asked)
    n = len(split.train)
    batch = batch_within(asked_or(asked.batch_size, lambda: Choice(16, "auto: customary for encoders")), n)
    epochs = asked_or(asked.n_epochs, lambda: _epochs(n))
    steps_per_epoch = math.ceil(n / batch.value)
    total = steps_per_epoch * epochs.value
    warmup = asked_or(asked.warmup_ratio, lambda: Choice(0.1, "auto: customary for encoders"))
    nothing = "an encoder classifier has none: the encoder itself is trained, on labels alone"
    return {
        "n_epochs": epochs,
        "batch_size": batch,
        **steps(total, f"{steps_per_epoch} steps an epoch, {epochs.value} epochs"),
        "eval_every": eval_every(steps_per_epoch, n, len(split.valid)),
        "max_length": _max_length(asked, facts.context),
        "micro_tokens": Choice(4096, "padded tokens: a GPU's time goes into starting operations")
        if facts.gpu
        else Choice(256, "padded tokens: few, so that short texts are not padded to long ones"),
        "checkpointing": Choice(False, "not needed: encoders are small"),
        "predicted_memory_bytes": Choice(0, "not predicted"),
        **_rate(asked, facts),
        "warmup_ratio": warmup,
        "warmup_steps": Choice(
            min(total, max(5, round(warmup.value * total))) if warmup.value else 0,
            f"{warmup.value:.0%} of the steps, at least 5; then linear to 0" if warmup.value else "no warm-up",
        ),
        "max_grad_norm": asked_or(asked.max_grad_norm, lambda: Choice(1.0, "auto")),
        "ema_decay": ema_decay(asked, steps_per_epoch, total),
        "freeze_layers": _freeze_layers(asked.freeze_layers, facts.layers),
        "lora_dropout": asked_or(
            asked.lora_dropout, lambda: Choice(0.1, "auto: dropout of the trained layers, as encoders are trained")
        ),
        "weight_decay": asked_or(asked.weight_decay, lambda: Choice(0.01, "auto: customary for encoders")),
        "label_smoothing": asked_or(
            asked.label_smoothing, lambda: Choice(0.0, "auto: off; worth trying when labels are wrong")
        ),
        "augmentation": augmentation(asked, split),
        **{name: Choice(value, nothing) for name, value in MEANINGLESS.items()},
        **stopping(asked),
    }


def _refuse_meaningless(asked: Hyperparameters) -> None:
    for name, off in MEANINGLESS.items():
        if getattr(asked, name) not in (None, off):
            raise InvalidValue(
                f"{name} means nothing to an encoder classifier, which has no LoRA adapter and generates no text. "
                "Leave it out, or train a chat model.",
                param=f"hyperparameters.{name}",
            )


def _epochs(n: int) -> Choice:
    epochs = max(3, min(10, math.ceil(2400 / n)))
    return Choice(epochs, f"auto: {n} examples; about 2400 in all, between 3 and 10 epochs, early stopping decides")


def _max_length(asked: Hyperparameters, context: int) -> Choice:
    if asked.max_length is not None and asked.max_length > context:
        raise InvalidValue(
            f"max_length {asked.max_length} is more than this encoder reads ({context} tokens).",
            param="hyperparameters.max_length",
        )
    return asked_or(asked.max_length, lambda: Choice(context, "auto: all that the encoder reads"))


def _rate(asked: Hyperparameters, facts: ModelFacts) -> dict[str, Choice]:
    multiplier = asked_or(asked.learning_rate_multiplier, lambda: Choice(1.0, "auto: the base rate as it is"))
    base = max(1e-5, min(RATE, RATE * (WIDTH / facts.hidden_size) ** 2))
    reason = f"{RATE:g} at width {WIDTH}, falling with its square; width {facts.hidden_size}; times the multiplier"
    return {
        "learning_rate_multiplier": multiplier,
        "learning_rate": asked_or(asked.learning_rate, lambda: Choice(base * multiplier.value, reason)),
        "lr_search": asked_or(
            asked.lr_search, lambda: Choice("off", "auto: trying rates costs most of a second run and fits validation")
        ),
    }


def _freeze_layers(asked: float | str | None, layers: int) -> Choice:
    """How many lower layers stay as they are. All of them: the head alone is trained."""
    share = FREEZE_PROFILES["fast"] if asked is None else FREEZE_PROFILES[asked] if isinstance(asked, str) else asked
    frozen = math.ceil(share * layers - 0.5) if isinstance(share, float) else share
    if frozen > layers:
        raise InvalidValue(
            f"freeze_layers {asked!r} is more than the {layers} layers of this encoder.",
            param="hyperparameters.freeze_layers",
        )
    if asked is None:
        return Choice(frozen, f"auto: as `fast`: the lower {frozen} of {layers} stay; measured as good, in less time")
    alone = "; the head alone is trained" if frozen == layers else ""
    return Choice(frozen, f"set in the request: {asked}, of {layers} layers{alone}")
