"""Replay: general examples, answered by the base model itself, are mixed into training against forgetting."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

from heldout.engine.base import Engine, Reply
from heldout.errors import InvalidValue
from heldout.pipeline.general_answers import MAX_TOKENS, base_answers, is_whole
from heldout.pipeline.general_prompts import REPLAYED
from heldout.pipeline.plan import TrainPlan, replay_rows
from heldout.pipeline.types import Example
from heldout.pipeline.watch import Watch


@dataclass(frozen=True, kw_only=True)
class Replay:
    """General examples to train on beside n of the user's. They come from no line of a file: line 0."""

    examples: tuple[Example, ...]
    different: int  # the others are repetitions
    asked: int  # prompts the base model answered for this
    n: int

    @property
    def sentence(self) -> str:
        """What is mixed in, and what could not be."""
        told = (
            f"Replay: {len(self.examples)} general examples, answered by the base model itself, are mixed into "
            f"{self.n} training examples"
        )
        if self.asked > self.different:
            told += (
                f"; {self.asked - self.different} of {self.asked} answers were left out: cut at {MAX_TOKENS} tokens, "
                "empty or too long for max_length"
            )
        if len(self.examples) > self.different:
            times = math.ceil(len(self.examples) / self.different)
            told += f"; only {self.different} of them are different, each is there up to {times} times"
        return told


def replay_examples(
    plan: TrainPlan, n: int, engine: Engine, base_model: str, *, directory: Path, watch: Watch
) -> Replay:
    """The general examples that `plan` adds to n training examples.

    The seed draws the prompts, and a prompt is used twice only when all have been used once. For one whose answer
    was cut, is empty or would not fit into max_length, another is drawn.

    Args:
        directory: where the base model's answers are kept.

    Raises InvalidValue when there is no answer to learn from.
    """
    wanted = replay_rows(plan.replay_ratio, n)
    drawn = random.Random(f"{plan.seed}/replay").sample(REPLAYED, len(REPLAYED))
    found: list[Example] = []
    asked = 0
    while len(found) < wanted and asked < len(drawn):
        prompts = drawn[asked : asked + wanted - len(found)]
        replies = base_answers(prompts, engine, base_model, directory=directory, watch=watch)
        found += [
            _example(prompt, reply)
            for prompt, reply in zip(prompts, replies, strict=True)
            if is_whole(reply) and _fits(reply, plan.max_length)
        ]
        asked += len(prompts)
    if wanted and not found:
        raise InvalidValue(
            f"replay_ratio is {plan.replay_ratio:g}, but {base_model} ended none of its answers to {asked} general "
            f"prompts within {MAX_TOKENS} tokens and a max_length of {plan.max_length}, so there is nothing to "
            "replay. Leave replay_ratio out, or train a model that was tuned to follow instructions.",
            param="hyperparameters.replay_ratio",
        )
    return Replay(examples=tuple(found[i % len(found)] for i in range(wanted)), different=len(found), asked=asked, n=n)


def _fits(reply: Reply, max_length: int) -> bool:
    return reply.prompt_tokens + reply.completion_tokens + 1 <= max_length  # 1: the end of the turn


def _example(prompt: str, reply: Reply) -> Example:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": reply.text})
    return Example(messages=messages, weights=(0, 1), line=0)
