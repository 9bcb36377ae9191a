"""What a request may ask of training, and in which ranges: the one place, for the wire and the command line.

Nothing here chooses a value. "auto", null and absence all mean None, and the plan turns None into a number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from heldout.errors import InvalidValue


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What was asked for, in range; None is left to the plan.

    The first three are OpenAI's, the others ours, named as in PEFT. `early_stopping` and `patience`
    travel as one key: `early_stopping: true`, or `{"enabled": true, "patience": 3}`.
    """

    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    learning_rate: float | None = None  # absolute; instead of the multiplier
    lora_r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    weight_decay: float | None = None
    warmup_ratio: float | None = None
    max_grad_norm: float | None = None
    max_length: int | None = None  # tokens of one example
    early_stopping: bool | None = None
    patience: int | None = None  # evaluations without improvement before training stops

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Hyperparameters:
        """Check `raw`. Raises InvalidValue naming the key, its value and what it may be."""
        asked = {name: value for name, value in raw.items() if value is not None and value != "auto"}
        stopping = _early_stopping(asked.pop("early_stopping", None))
        for name in raw:
            _check_known(name)
        if "learning_rate" in asked and "learning_rate_multiplier" in asked:
            raise InvalidValue(
                "learning_rate and learning_rate_multiplier were both given; give one of them.",
                param="hyperparameters.learning_rate",
            )
        numbers: dict[str, Any] = {name: _number(name, value) for name, value in asked.items()}
        return cls(**numbers, **stopping)

    def as_dict(self) -> dict[str, Any]:
        """Only what was set, in the form `parse` takes."""
        asked = {one.name: getattr(self, one.name) for one in fields(self)}
        patience = asked.pop("patience")
        if patience is not None:
            asked["early_stopping"] = {"enabled": self.early_stopping is not False, "patience": patience}
        return {name: value for name, value in asked.items() if value is not None}


@dataclass(frozen=True)
class _Range:
    words: str
    holds: Callable[[float], bool]
    whole: bool = False


_RANGES = {
    "n_epochs": _Range("a whole number from 1 to 50", lambda value: 1 <= value <= 50, whole=True),
    "batch_size": _Range("a whole number from 1 to 256", lambda value: 1 <= value <= 256, whole=True),
    "learning_rate_multiplier": _Range("a number above 0", lambda value: value > 0),
    "learning_rate": _Range("a number above 0", lambda value: value > 0),
    "lora_r": _Range("a whole number from 1 to 256", lambda value: 1 <= value <= 256, whole=True),
    "lora_alpha": _Range("a number above 0", lambda value: value > 0),
    "lora_dropout": _Range("a number from 0 to below 1", lambda value: 0 <= value < 1),
    "weight_decay": _Range("a number of at least 0", lambda value: value >= 0),
    "warmup_ratio": _Range("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "max_grad_norm": _Range("a number above 0", lambda value: value > 0),
    "max_length": _Range("a whole number of at least 16", lambda value: value >= 16, whole=True),
}
_PATIENCE = _Range("a whole number of at least 1", lambda value: value >= 1, whole=True)

#: The keys `Hyperparameters.parse` knows.
SUPPORTED = (*_RANGES, "early_stopping")


def _check_known(name: str) -> None:
    if name not in SUPPORTED:
        raise InvalidValue(
            f"Unknown hyperparameter {name!r}. Supported: {', '.join(SUPPORTED)}.",
            code="unknown_parameter",
            param=f"hyperparameters.{name}",
        )


def _number(name: str, value: Any, allowed: _Range | None = None) -> float:
    allowed = allowed or _RANGES[name]
    # bool is an int to Python, and json.loads lets NaN, Infinity and 400-digit integers through.
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 < value < 1e9
    if not number or not allowed.holds(value) or (allowed.whole and value != int(value)):
        raise _wrong(name, value, f'{allowed.words}, or "auto"')
    return int(value) if allowed.whole else float(value)


def _early_stopping(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, bool):
        return {"early_stopping": value}
    if not isinstance(value, dict) or not set(value) <= {"enabled", "patience"}:
        raise _wrong("early_stopping", value, 'true, false or {"enabled": …, "patience": …}')
    enabled = value.get("enabled", True)
    if not isinstance(enabled, bool):
        raise _wrong("early_stopping.enabled", enabled, "true or false")
    patience = value.get("patience")
    if patience is None:
        return {"early_stopping": enabled}
    return {"early_stopping": enabled, "patience": _number("early_stopping.patience", patience, _PATIENCE)}


def _wrong(name: str, value: Any, words: str) -> InvalidValue:
    return InvalidValue(
        f"Invalid value for hyperparameter {name}: {value!r}. Expected {words}.",
        param=f"hyperparameters.{name}",
    )
