"""What a request may ask of training, and in which ranges: the one place, for the wire and the command line.

Nothing here chooses a value. "auto", null and absence all mean None, and the plan turns None into a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from heldout.errors import InvalidValue
from heldout.pipeline.evaluate.answers import SCORERS


class Values(NamedTuple):
    """A set of values. `read` takes one from JSON and gives it in its type, or None when it is not in the set."""

    words: str  # what may be given, to finish "Expected …"
    metavar: str  # the same in short, for the command line; empty: a switch
    read: Callable[[Any], Any]


class Knob(NamedTuple):
    """One hyperparameter: its values, and what the command line's help says of it."""

    group: str
    values: Values
    help: str


def _is_number(value: Any) -> bool:
    # bool is an int to Python, and json.loads lets NaN, Infinity and 400-digit integers through.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 < value < 1e9


def _whole(words: str, holds: Callable[[int], bool]) -> Values:
    def read(value: Any) -> int | None:
        return int(value) if _is_number(value) and value == int(value) and holds(int(value)) else None

    return Values(f"a whole number {words}", "N", read)


def _number(words: str, holds: Callable[[float], bool]) -> Values:
    def read(value: Any) -> float | None:
        return float(value) if _is_number(value) and holds(value) else None

    return Values(f"a number {words}", "X", read)


def _one_of(*names: str) -> Values:
    *first, last = (f'"{name}"' for name in names)
    words = f"{', '.join(first)} or {last}"
    return Values(words, "|".join(names), lambda value: value if value in names else None)


def _read_layers(value: Any) -> int | float | str | None:
    if value in tuple(FREEZE_PROFILES):
        return str(value)
    if not _is_number(value) or value < 0:
        return None
    # JSON's 1 is a layer. 1.0 is a share, of which the plan says how many layers it would be.
    if isinstance(value, float) and value <= 1:
        return value
    return int(value) if value == int(value) else None


def _read_modules(value: Any) -> tuple[str, ...] | None:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not 1 <= len(names) <= 64 or (len(names) > 1 and "all-linear" in names):
        return None
    sound = all(isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in names)
    return tuple(names) if sound else None


#: Names for a share of the layers that stays as it is: the lower half, the lower three quarters.
FREEZE_PROFILES = {"full": 0.0, "fast": 0.5, "turbo": 0.75}

_ABOVE_0 = _number("above 0", lambda x: x > 0)
_AT_LEAST_0 = _number("of at least 0", lambda x: x >= 0)
_FROM_0_TO_1 = _number("from 0 to 1", lambda x: 0 <= x <= 1)
_FROM_0_TO_BELOW_1 = _number("from 0 to below 1", lambda x: 0 <= x < 1)
_SWITCH = Values("true or false", "", lambda value: value if isinstance(value, bool) else None)
_LAYERS = Values(
    'a whole number of layers, a share of them above 0 and below 1, "full", "fast" or "turbo"',
    "N|SHARE|PROFILE",
    _read_layers,
)
_MODULES = Values(
    '"all-linear", or 1 to 64 names of modules out of letters, digits, "_", "-" and "."', "NAME,…", _read_modules
)

#: How copies of training rows are made.
AUGMENTATIONS = ("none", "robust", "paraphrase")

LENGTH, ADAPTER, REGULARISATION, STOPPING = "Length and learning rate", "Adapter", "Regularisation", "Early stopping"
JUDGING = "Judging"


def _knob(group: str, values: Values, help: str) -> Any:
    return field(default=None, metadata={"knob": Knob(group, values, help)})


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What was asked for, in range; None is left to the plan.

    The first three are OpenAI's, the others ours, with PEFT's and TRL's names where they have one. Those of early
    stopping travel as one key: `early_stopping: true`, or `{"enabled": true, "patience": 3, "min_delta": 0.01}`.
    """

    n_epochs: int | None = _knob(
        LENGTH, _whole("from 1 to 50", lambda x: 1 <= x <= 50), "Most passes over the training examples."
    )
    batch_size: int | None = _knob(
        LENGTH, _whole("from 1 to 256", lambda x: 1 <= x <= 256), "Examples between two updates."
    )
    learning_rate_multiplier: float | None = _knob(LENGTH, _ABOVE_0, "Times the automatic learning rate.")
    learning_rate: float | None = _knob(LENGTH, _ABOVE_0, "Absolute; instead of the multiplier.")
    lr_search: str | None = _knob(
        LENGTH, _one_of("off", "light"), "Try three rates and go on with the best; the given one is the middle."
    )
    warmup_ratio: float | None = _knob(LENGTH, _FROM_0_TO_1, "Share of the steps in which the rate rises from 0.")
    max_grad_norm: float | None = _knob(LENGTH, _ABOVE_0, "Longer gradients are scaled down to this length.")
    max_length: int | None = _knob(
        LENGTH, _whole("of at least 16", lambda x: x >= 16), "Tokens; a longer example is an error, never cut."
    )
    lora_r: int | None = _knob(ADAPTER, _whole("from 1 to 256", lambda x: 1 <= x <= 256), "Rank.")
    lora_alpha: float | None = _knob(ADAPTER, _ABOVE_0, "The adapter's output is scaled by alpha / rank.")
    target_modules: tuple[str, ...] | None = _knob(ADAPTER, _MODULES, "Layers that get an adapter.")
    freeze_layers: int | float | str | None = _knob(
        ADAPTER, _LAYERS, "Lower layers that get none, for speed: fast is half, turbo three quarters of them."
    )
    lora_dropout: float | None = _knob(REGULARISATION, _FROM_0_TO_BELOW_1, "Dropout at the adapter's input.")
    weight_decay: float | None = _knob(REGULARISATION, _AT_LEAST_0, "AdamW's, on the adapter's weights.")
    label_smoothing: float | None = _knob(
        REGULARISATION, _FROM_0_TO_BELOW_1, "Share of the target spread over the whole vocabulary."
    )
    neftune_noise_alpha: float | None = _knob(
        REGULARISATION, _AT_LEAST_0, "Size of the noise on input embeddings while training."
    )
    prompt_loss_weight: float | None = _knob(
        REGULARISATION, _FROM_0_TO_1, "Weight of a prompt's token in the loss; an answer's is 1."
    )
    ema_decay: float | None = _knob(
        REGULARISATION,
        _FROM_0_TO_BELOW_1,
        "What a step leaves of the averaged weights, which are validated and kept; 0: no average.",
    )
    replay_ratio: float | None = _knob(
        REGULARISATION, _FROM_0_TO_1, "General examples added against forgetting, as a share of the training examples."
    )
    augmentation: str | None = _knob(
        REGULARISATION,
        _one_of(*AUGMENTATIONS),
        "Every other epoch a changed copy of the row: with typing slips and the like, or reworded by a chat model.",
    )
    early_stopping: bool | None = _knob(STOPPING, _SWITCH, "Stop when validation stops improving.")
    patience: int | None = _knob(
        STOPPING, _whole("of at least 1", lambda x: x >= 1), "Validations without improvement before that."
    )
    min_delta: float | None = _knob(
        STOPPING, _AT_LEAST_0, "Nats per example a validation must be better by to be an improvement."
    )
    metric: str | None = _knob(JUDGING, _one_of(*SCORERS), "How answers are compared with those in the data.")
    tuned_encoder: bool | None = _knob(
        JUDGING, _SWITCH, "Fine-tune an encoder on the same rows too, as a rung of the ladder; for labels."
    )

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Hyperparameters:
        """Check `raw`. Raises InvalidValue naming the key, its value and what it may be."""
        asked = {}
        for key, name, value in _entries(raw):
            if _is_open(value):
                continue
            asked[name] = KNOBS[name].values.read(value)
            if asked[name] is None:
                raise _wrong(key, value, f'{KNOBS[name].values.words}, or "auto"')
        if "learning_rate" in asked and "learning_rate_multiplier" in asked:
            raise InvalidValue(
                "learning_rate and learning_rate_multiplier were both given; give one of them.",
                param="hyperparameters.learning_rate",
            )
        return cls(**asked)

    def as_dict(self) -> dict[str, Any]:
        """Only what was set, as JSON and in the form `parse` takes."""
        asked = {name: getattr(self, name) for name in KNOBS if getattr(self, name) is not None}
        if self.target_modules is not None:
            asked["target_modules"] = list(self.target_modules)
        return fold(asked)


KNOBS: dict[str, Knob] = {one.name: one.metadata["knob"] for one in fields(Hyperparameters)}

#: Keys of the object `early_stopping` on the wire, and the hyperparameters they are.
_EARLY_STOPPING = {"enabled": "early_stopping", "patience": "patience", "min_delta": "min_delta"}

#: The keys `Hyperparameters.parse` knows.
SUPPORTED = tuple(name for name in KNOBS if name not in ("patience", "min_delta"))


def fold(flat: dict[str, Any]) -> dict[str, Any]:
    """`flat` in the form `Hyperparameters.parse` takes: early stopping's three as one key."""
    stopping = {key: flat[name] for key, name in _EARLY_STOPPING.items() if name in flat}
    rest = {name: value for name, value in flat.items() if name not in _EARLY_STOPPING.values()}
    if not stopping:
        return rest
    return rest | {"early_stopping": stopping["enabled"] if stopping.keys() == {"enabled"} else stopping}


def _entries(raw: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(key for error messages, hyperparameter, value) for all of `raw`, with `early_stopping` taken apart."""
    for key, value in raw.items():
        if key not in SUPPORTED:
            raise InvalidValue(
                f"Unknown hyperparameter {key!r}. Supported: {', '.join(SUPPORTED)}.",
                code="unknown_parameter",
                param=f"hyperparameters.{key}",
            )
        if key != "early_stopping" or _is_open(value) or isinstance(value, bool):
            yield key, key, value
        elif isinstance(value, dict) and value.keys() <= _EARLY_STOPPING.keys():
            given = {part: one for part, one in value.items() if not _is_open(one)}
            for part, one in {"enabled": True, **given}.items():
                yield f"{key}.{part}", _EARLY_STOPPING[part], one
        else:
            raise _wrong(key, value, 'true, false or {"enabled": …, "patience": …, "min_delta": …}')


def _is_open(value: Any) -> bool:
    return value is None or value == "auto"


def _wrong(key: str, value: Any, words: str) -> InvalidValue:
    return InvalidValue(
        f"Invalid value for hyperparameter {key}: {value!r}. Expected {words}.", param=f"hyperparameters.{key}"
    )
