"""Every "auto" becomes a value once, with its reason, and only the value travels on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from heldout.engine.catalogue import ENCODER
from heldout.errors import InvalidValue
from heldout.pipeline.augment.forms import why_blocked
from heldout.pipeline.hyperparameters import FREEZE_PROFILES, Hyperparameters

if TYPE_CHECKING:
    from heldout.pipeline.training import ModelFacts
    from heldout.pipeline.types import Split


#: Packed tokens of a micro-batch where memory is no concern: more are not faster, on a processor and on a GPU.
MICRO_TOKENS = (2048, 4096)
#: Tokens of an example of a chat model, at most, unless told otherwise.
MAX_LENGTH = 4096


class Choice(NamedTuple):
    """A value and why it is that one."""

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
    total_steps: int  # of the schedule: here the learning rate reaches 0
    end_share: float  # of total_steps: training ends here at the latest; 1, unless folds have found that less is better
    kept_shares: tuple[float, ...]  # of total_steps: where models are kept beside the best, for folds to compare
    eval_every: int  # steps between validations
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...]  # PEFT's meaning: ("all-linear",), or the ends of module names
    freeze_layers: int  # lower decoder layers that get no adapter
    weight_decay: float
    max_grad_norm: float
    ema_decay: float  # of the averaged weights, for each step; 0: no average
    label_smoothing: float
    neftune_noise_alpha: float  # 0: no noise
    prompt_loss_weight: float  # weight of a prompt's token in the loss; an answer's is 1
    replay_ratio: float  # general examples added to train, as a share of it
    augmentation: str  # "none", or how the copies are made that take turns with the rows: "robust", "paraphrase"
    max_length: int  # tokens; a longer example is an error, never cut
    micro_tokens: int  # packed tokens that are computed at once; a step of more is cut into several
    checkpointing: bool  # layers keep their input only and are computed again in the backward pass
    predicted_memory_bytes: int  # of the job's process at its highest; 0 until the trainer has said
    early_stopping: bool
    patience: int  # validations without improvement before training stops
    # A validation counts as an improvement when its mean loss per example is lower by more than
    # min_delta nats, and by more than min_delta_errors standard errors of the paired difference.
    min_delta: float
    min_delta_errors: float
    seed: int
    reasons: dict[str, str]

    @property
    def end_step(self) -> int:
        """The last step, if nothing ends training before."""
        return self._step_at(self.end_share)

    @property
    def kept_steps(self) -> tuple[int, ...]:
        """The steps of kept_shares; with few steps some are the same."""
        return tuple(map(self._step_at, self.kept_shares))

    def _step_at(self, share: float) -> int:
        return max(1, math.ceil(share * self.total_steps))

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """{name: {"value", "reason"}}, as it goes into the report and on the wire."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "reasons"}
        values |= {"target_modules": list(self.target_modules), "kept_shares": list(self.kept_shares)}
        return {name: {"value": value, "reason": self.reasons.get(name, "")} for name, value in values.items()}


def make_plan(asked: Hyperparameters, split: Split, facts: ModelFacts, *, seed: int) -> TrainPlan:
    """Resolve what was asked for. The defaults and their evidence are in docs/design/recipe.md.

    Raises InvalidValue when the model has too few layers for what was asked, or when two wishes exclude
    each other.
    """
    if facts.kind == ENCODER:
        from heldout.pipeline.encoder_plan import encoder_choices  # it builds on this file

        choices = encoder_choices(asked, split, facts)
    else:
        choices = _chat_choices(asked, split, facts)
    if choices["freeze_layers"].value and choices["neftune_noise_alpha"].value:
        raise InvalidValue(
            "neftune_noise_alpha and freeze_layers exclude each other: the noise enters below the frozen layers, whose "
            "output is computed once. Leave one of them at 0.",
            param="hyperparameters.neftune_noise_alpha",
        )
    choices["seed"] = Choice(seed, "set in the request or drawn with the job")
    return TrainPlan(
        **{name: choice.value for name, choice in choices.items()},
        reasons={name: choice.reason for name, choice in choices.items()},
    )


def _chat_choices(asked: Hyperparameters, split: Split, facts: ModelFacts) -> dict[str, Choice]:
    n, n_valid = len(split.train), len(split.valid)
    batch = batch_within(asked_or(asked.batch_size, lambda: _batch_size(n)), n)
    epochs = _epochs(asked, n)
    regularisation = _regularisation(asked, n)
    replay_ratio = regularisation["replay_ratio"].value
    an_epoch = steps_per_epoch(n, batch.value, replay_ratio)
    total = an_epoch * epochs.value
    mixed = f" of {n} examples and {replay_rows(replay_ratio, n)} general ones" if replay_ratio else ""
    return {
        "n_epochs": epochs,
        "batch_size": batch,
        **steps(total, f"{an_epoch} steps an epoch{mixed}, {epochs.value} epochs"),
        "eval_every": eval_every(an_epoch, n, n_valid),
        "max_length": _max_length(asked, facts.context),
        "micro_tokens": Choice(MICRO_TOKENS[facts.gpu], "fits in memory"),
        "checkpointing": Choice(False, "not needed: a third more work for less memory"),
        "predicted_memory_bytes": Choice(0, "not predicted"),
        **_rate(asked, facts.hidden_size, batch.value, total),
        "ema_decay": ema_decay(asked, an_epoch, total),
        **_adapter(asked, facts.layers),
        **regularisation,
        "augmentation": augmentation(asked, split),
        **stopping(asked),
    }


def _max_length(asked: Hyperparameters, context: int) -> Choice:
    if asked.max_length is not None and asked.max_length > context:
        raise InvalidValue(
            f"max_length {asked.max_length} is more than this model reads ({context} tokens).",
            param="hyperparameters.max_length",
        )
    return asked_or(
        asked.max_length,
        lambda: Choice(min(context, MAX_LENGTH), f"auto: the model's context, at most {MAX_LENGTH}"),
    )


def _rate(asked: Hyperparameters, hidden_size: int, batch_size: int, total_steps: int) -> dict[str, Choice]:
    multiplier = asked_or(asked.learning_rate_multiplier, lambda: Choice(1.0, "auto: the base rate as it is"))
    base = _base_rate(hidden_size, batch_size)
    rate = asked_or(
        asked.learning_rate, lambda: Choice(base.value * multiplier.value, f"{base.reason}, times the multiplier")
    )
    if asked.lr_search == "light":
        rate = Choice(rate.value, f"{rate.reason}; the middle one of three that are tried")
    warmup = asked_or(asked.warmup_ratio, lambda: Choice(0.06, "auto: a short one"))
    return {
        "learning_rate_multiplier": multiplier,
        "learning_rate": rate,
        "lr_search": asked_or(
            asked.lr_search, lambda: Choice("off", "auto: trying rates costs most of a second run and fits validation")
        ),
        "warmup_ratio": warmup,
        "warmup_steps": Choice(
            min(total_steps, max(5, round(warmup.value * total_steps))) if warmup.value else 0,
            f"{warmup.value:.0%} of the steps, at least 5; then linear to 0" if warmup.value else "no warm-up",
        ),
        "max_grad_norm": asked_or(asked.max_grad_norm, lambda: Choice(1.0, "auto")),
    }


def _adapter(asked: Hyperparameters, layers: int) -> dict[str, Choice]:
    rank = asked_or(asked.lora_r, lambda: Choice(16, "auto: capacity is not the limit at this size"))
    return {
        "lora_r": rank,
        "lora_alpha": asked_or(
            asked.lora_alpha, lambda: Choice(2.0 * rank.value, "auto: twice lora_r, so the rate carries over")
        ),
        "target_modules": asked_or(
            asked.target_modules,
            lambda: Choice(("all-linear",), "auto: attention alone is worse, even with as many parameters"),
        ),
        "freeze_layers": _freeze_layers(asked.freeze_layers, layers),
    }


def _regularisation(asked: Hyperparameters, n: int) -> dict[str, Choice]:
    return {
        "lora_dropout": asked_or(asked.lora_dropout, lambda: _dropout(n)),
        "weight_decay": asked_or(asked.weight_decay, lambda: Choice(0.0, "auto: sweeps choose 0 for LoRA")),
        "label_smoothing": asked_or(
            asked.label_smoothing, lambda: Choice(0.0, "auto: off; nothing shows that it helps a language model")
        ),
        "neftune_noise_alpha": asked_or(
            asked.neftune_noise_alpha,
            lambda: Choice(0.0, "auto: off; where it was measured it changed the style, not the facts"),
        ),
        "prompt_loss_weight": asked_or(
            asked.prompt_loss_weight,
            lambda: Choice(0.0, "auto: answers only; learning prompts helped with long prompts and short answers"),
        ),
        "replay_ratio": asked_or(
            asked.replay_ratio, lambda: Choice(0.0, "auto: off until general examples are shown to help")
        ),
    }


def augmentation(asked: Hyperparameters, split: Split) -> Choice:
    """How copies of rows are made: the same for every kind of model. Evidence: docs/design/augmentation.md.

    Raises InvalidValue when copies were asked for, and the answers of these rows could be wrong for them.
    """
    wanted = asked.augmentation
    if wanted is None:
        return Choice("none", "auto: off; at equal steps copies gained nothing that is more than chance")
    reason = None if wanted == "none" else why_blocked(split.train, labels_only=wanted == "paraphrase")
    if reason:
        raise InvalidValue(
            f"augmentation {wanted!r} would teach wrong answers here: {reason}. Leave it out, or set it to none.",
            param="hyperparameters.augmentation",
        )
    return Choice(wanted, "set in the request")


def replay_rows(ratio: float, n: int) -> int:
    """How many general examples are added to n training examples: at least one, if any were asked for."""
    return max(1, round(ratio * n)) if ratio else 0


def steps_per_epoch(n: int, batch_size: int, replay_ratio: float) -> int:
    """Steps of one pass over n training examples and the general ones that are added to them."""
    return math.ceil((n + replay_rows(replay_ratio, n)) / batch_size)


def steps(total: int, why: str) -> dict[str, Choice]:
    """How many steps there are, and that nobody looks for another end: the same for every kind of model."""
    return {
        "total_steps": Choice(total, why),
        "end_share": Choice(1.0, "all steps of the schedule"),
        "kept_shares": Choice((), "none: only folds are compared"),
    }


def stopping(asked: Hyperparameters) -> dict[str, Choice]:
    """When training stops: the same for every kind of model."""
    given = asked.min_delta is not None
    return {
        "early_stopping": asked_or(asked.early_stopping, lambda: Choice(True, "auto: validation ends training")),
        "patience": asked_or(
            asked.patience, lambda: Choice(4, "auto: validations without improvement, and at least one epoch")
        ),
        "min_delta": asked_or(asked.min_delta, lambda: Choice(0.0, "auto: min_delta_errors decides")),
        "min_delta_errors": Choice(0.0, "min_delta was set in the request and decides alone")
        if given
        else Choice(0.5, "auto: half the standard error of the paired difference, so that noise is no improvement"),
    }


def asked_or(requested: Any, otherwise: Callable[[], Choice]) -> Choice:
    """What was asked for, or else the plan's own choice."""
    return otherwise() if requested is None else Choice(requested, "set in the request")


def batch_within(batch: Choice, n: int) -> Choice:
    """A batch has at most all examples."""
    if batch.value <= n:
        return batch
    return Choice(n, f"{batch.value} was asked for, but there are only {n} examples")


def _epochs(asked: Hyperparameters, n: int) -> Choice:
    if asked.n_epochs is None:
        epochs = max(3, min(12, math.ceil(720 / n)))
        return Choice(epochs, f"auto: {n} examples; about 720 in all, between 3 and 12 epochs, early stopping decides")
    if asked.early_stopping is False:
        return Choice(asked.n_epochs, "set in the request; all of them, as early stopping is off")
    return Choice(asked.n_epochs, "set in the request, as the most; early stopping may end sooner")


def _freeze_layers(asked: float | str | None, layers: int) -> Choice:
    """How many lower layers get no adapter; at least one layer gets one."""
    if asked is None:
        return Choice(0, "auto: full; freezing lower layers buys speed, not quality, so it is yours to choose")
    share = FREEZE_PROFILES[asked] if isinstance(asked, str) else asked
    # Half a layer is not frozen: so "turbo" leaves something to train in a model of two layers.
    frozen = math.ceil(share * layers - 0.5) if isinstance(share, float) else share
    if frozen >= layers:
        raise InvalidValue(
            f"freeze_layers {asked!r} leaves no layer to train: the model has {layers}. Freeze at most {layers - 1}, "
            "or give a share below 1.",
            param="hyperparameters.freeze_layers",
        )
    return Choice(frozen, f"set in the request: {asked}, of {layers} layers")


def _batch_size(n: int) -> Choice:
    size = 8 if n < 2_000 else 16 if n < 10_000 else 32
    return Choice(size, f"auto: {n} examples; LoRA likes small batches")


def _base_rate(hidden_size: int, batch_size: int) -> Choice:
    # 2e-3 is measured at width 576 and batch 8 (docs/experiments.md); falling with the width it meets the
    # 2e-4 to 3e-4 that is customary for models of 7B.
    rate = 2e-3 * 576 / hidden_size * math.sqrt(batch_size / 8)
    return Choice(max(1e-4, min(2e-3, rate)), f"2e-3 at width 576 and batch 8; width {hidden_size}, batch {batch_size}")


def _dropout(n: int) -> Choice:
    if n < 1_000:
        return Choice(0.05, f"auto: {n} examples are fewer than 1000")
    return Choice(0.0, f"auto: {n} examples are enough without")


def ema_decay(asked: Hyperparameters, steps_per_epoch: int, total_steps: int) -> Choice:
    """How much of the averaged weights a step leaves: they remember about 1 / (1 - decay) steps."""

    def auto() -> Choice:
        steps = min(steps_per_epoch / 2, total_steps / 20)
        reason = f"auto: averages about {steps:.0f} steps, half an epoch and at most a twentieth of all"
        return Choice(round(1 - 1 / steps, 4), reason) if steps > 1 else Choice(0.0, "auto: too few steps to average")

    return asked_or(asked.ema_decay, auto)


def eval_every(steps_per_epoch: int, n: int, n_valid: int) -> Choice:
    """Steps between validations: two to four an epoch, as many as cost little beside training."""
    # A validation example costs about 40 % of a training example (no backward, larger packs).
    per_epoch = max(2, min(4, round(0.5 * n / max(1, n_valid))))
    every = max(1, math.ceil(steps_per_epoch / per_epoch))
    return Choice(every, f"{per_epoch} validations an epoch: {n} training, {n_valid} validation examples")
