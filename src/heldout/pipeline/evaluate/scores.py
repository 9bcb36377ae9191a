"""Scores of one model on one list of examples, example by example, so that two models compare in pairs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from heldout.engine.base import Engine, Message, ModelRef, Progress, Reply, Sampling
from heldout.engine.rungs import behind
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.evaluate.metrics.exact import are_imbalanced, macro_f1
from heldout.pipeline.evaluate.statistics import mean_interval
from heldout.pipeline.types import Example, Split

#: Answers that tell what is likely.
LIKELY = 1_000


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How well a model answers; `answers[i]` and `per_example[i]` belong to example i."""

    metric: str
    binary: bool
    mean: float
    interval: tuple[float, float]  # 95 %
    per_example: tuple[float, ...]
    answers: tuple[str, ...]
    prompt_tokens: float = 0.0  # per answer, on average
    cut: int = 0  # answers that ran into the token limit
    labels: tuple[str, ...] = ()  # the right answers, where they are labels
    #: Per answer, in the batches of the evaluation; 0 where nothing was computed. The same answers are the same
    #: scores however long they took.
    milliseconds: float = field(default=0.0, compare=False)

    @property
    def macro_f1(self) -> float | None:
        """Told beside the score where labels are so imbalanced that the common ones carry it; else None."""
        return macro_f1(self.answers, self.labels) if self.labels and are_imbalanced(self.labels) else None

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the report, without the single answers."""
        return {
            "metric": self.metric,
            "score": self.mean,
            "interval": list(self.interval),
            "n": len(self.per_example),
            "prompt_tokens": round(self.prompt_tokens, 1),
            "cut_answers": self.cut,
            **({"macro_f1": self.macro_f1} if self.macro_f1 is not None else {}),
            "ms_per_answer": round(self.milliseconds, 3),
        }


def score_answers(
    metric: Metric,
    examples: Sequence[Example],
    answers: Sequence[str],
    replies: Sequence[Reply] = (),
    *,
    seconds: float = 0.0,
) -> Scores:
    """Score answers that were given to `examples`, in order, in so many seconds."""
    per_example = metric.score_all(examples, answers)
    return Scores(
        metric=metric.name,
        binary=metric.binary,
        mean=sum(per_example) / len(per_example),
        interval=mean_interval(per_example, binary=metric.binary),
        per_example=per_example,
        answers=tuple(answers),
        prompt_tokens=sum(reply.prompt_tokens for reply in replies) / len(replies) if replies else 0.0,
        cut=sum(reply.finish_reason == "length" for reply in replies),
        labels=tuple(example.target for example in examples) if metric.form == "label" else (),
        milliseconds=1000 * seconds / len(per_example),
    )


def score_model(
    engine: Engine,
    model: ModelRef,
    examples: Sequence[Example],
    metric: Metric,
    *,
    max_tokens: int,
    shots: Sequence[Example] = (),
    learned: Sequence[Example] = (),
    progress: Progress | None = None,
) -> Scores:
    """Let a model answer every example greedily, after `shots` if there are any, and score it. Where it was shown
    answers, those of `learned` are what it is likely to say."""
    prompts = [with_shots(example.prompt, shots) for example in examples]
    started = time.perf_counter()

    def clocked(done: int, total: int) -> None:
        nonlocal started
        if done == 0:  # the model is loaded: that is no part of an answer's time
            started = time.perf_counter()
        if progress:
            progress(done, total)

    sampling = Sampling(max_tokens=max_tokens, expected=likely_answers(learned, metric))
    replies = engine.chat(model, prompts, sampling, clocked)
    seconds = time.perf_counter() - started
    return score_answers(metric, examples, [reply.text for reply in replies], replies, seconds=seconds)


def answer_room(engine: Engine, base_model: str, split: Split) -> int:
    """The most tokens an evaluated answer may have: a quarter more than the longest that was trained on,
    and a little. Longer ones are cut and counted as cut: they cannot be right."""
    targets = {example.target for part in (split.train, split.valid) for example in part}
    return math.ceil(1.25 * max(engine.count_tokens(base_model, sorted(targets)))) + 4


def likely_answers(learned: Sequence[Example], metric: Metric) -> tuple[str, ...]:
    """What a model says that was shown these rows, of many rows evenly spread ones; of free text nothing is known."""
    every = max(1, math.ceil(len(learned) / LIKELY))
    return () if metric.form == "text" else tuple(row.target for row in learned[::every])


def with_shots(prompt: Sequence[Message], shots: Sequence[Example]) -> list[Message]:
    """The prompt with solved examples before its first user message, after its own system message."""
    return behind(turns_of(shots), prompt)


def turns_of(shots: Sequence[Example]) -> list[Message]:
    """What the solved examples say, without their system messages."""
    return [
        {"role": message["role"], "content": message["content"]}
        for shot in shots
        for message in shot.messages
        if message["role"] != "system"
    ]
