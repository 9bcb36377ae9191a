"""Tokens, and what they cost: with a hosted service, and on this machine. Prices are the operator's; none is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from heldout.pipeline.advise.duration import Duration
from heldout.pipeline.advise.measure import Measured

MILLION, HOUR, CALLS = 1e6, 3600.0, 1_000


@dataclass(frozen=True, kw_only=True)
class Prices:
    """In the operator's currency; None where it was not given (HELDOUT_PRICE_…)."""

    input: float | None = None  # per million prompt tokens of a hosted model
    output: float | None = None  # per million answer tokens of a hosted model
    training: float | None = None  # per million tokens that a hosted service trains on
    hour: float | None = None  # of this machine


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """In the base model's tokens, rounded means for a call."""

    per_epoch: int  # of the training examples, once
    supervised: int  # of them learned from
    epochs: int  # at most
    shots: int  # solved examples of the longest prompt; 0: none fits
    with_shots: int  # prompt tokens of a call behind so many solved examples; 0: none fits
    plain: int  # prompt tokens of a call as the file has it
    without_system: int  # the same with the system prompt cut
    answer: int  # tokens of an answer

    @property
    def saved(self) -> int:
        """Prompt tokens that a call saves when a tuned model needs neither shots nor system prompt."""
        return max(self.with_shots, self.plain) - self.without_system

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the JSON document."""
        return {
            "per_epoch": self.per_epoch,
            "supervised": self.supervised,
            "epochs": self.epochs,
            "prompt": {
                "shots": self.shots,
                "with_shots": self.with_shots,
                "plain": self.plain,
                "without_system": self.without_system,
                "saved": self.saved,
            },
            "answer": self.answer,
        }


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Both sides, where their prices were given. Calls are counted by the thousand."""

    hosted_training: float | None
    hosted_calls: float | None  # prompted with shots, or as the file has it where none fit
    hosted_calls_short: float | None  # without shots and system prompt
    here_training: float | None  # a typical job
    here_calls: float | None  # of a tuned model, the prompt as the file has it

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the JSON document."""
        return {
            "hosted": {
                "training": self.hosted_training,
                "per_1000_calls": self.hosted_calls,
                "per_1000_calls_short_prompt": self.hosted_calls_short,
            },
            "here": {"training": self.here_training, "per_1000_calls": self.here_calls},
        }


def count_tokens(measured: Measured, epochs: int) -> Tokens:
    """What the file costs in tokens. An encoder is not prompted: its prompts are 0."""
    longest = max(measured.behind_shots, key=lambda one: one.shots, default=None)
    plain = measured.plain.prompt_tokens if measured.plain else 0.0
    return Tokens(
        per_epoch=measured.timings.tokens,
        supervised=measured.timings.supervised,
        epochs=epochs,
        shots=longest.shots if longest else 0,
        with_shots=round(longest.prompt_tokens) if longest else 0,
        plain=round(plain),
        without_system=round(max(0.0, plain - measured.system_tokens)),
        answer=round(measured.target_tokens),
    )


def add_costs(tokens: Tokens, duration: Duration, measured: Measured, prices: Prices) -> Costs | None:
    """What training and a thousand calls cost; None without any price."""
    if prices == Prices():
        return None
    prompt = max(tokens.with_shots, tokens.plain)
    return Costs(
        hosted_training=_times(prices.training, tokens.per_epoch * tokens.epochs / MILLION),
        hosted_calls=_calls(prices, prompt, tokens.answer),
        hosted_calls_short=_calls(prices, tokens.without_system, tokens.answer),
        here_training=_times(prices.hour, duration.typical / HOUR),
        here_calls=_times(prices.hour, measured.tuned.seconds_for(CALLS) / HOUR),
    )


def _calls(prices: Prices, prompt: int, answer: int) -> float | None:
    if prices.input is None or prices.output is None:
        return None
    return CALLS / MILLION * (prices.input * prompt + prices.output * answer)


def _times(price: float | None, amount: float) -> float | None:
    return None if price is None else price * amount
