"""A subject made by hand, and an engine whose answers are a function of the conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from heldout.engine.base import Message, ModelRef, Progress, Reply, Sampling
from heldout.errors import ContextLengthExceeded
from heldout.pipeline.consequences.base import Budget, Subject
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.evaluate.scores import score_answers
from heldout.pipeline.ladder import Rung
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Silent

MODEL = ModelRef(base_model="base", adapter="adapter")
BASE = ModelRef(base_model="base")
#: What a model says to a conversation.
Says = Callable[[Sequence[Message]], str]


def last(messages: Sequence[Message]) -> str:
    """What the user wrote last."""
    return str(messages[-1]["content"])


class Speaking:
    """As much of an Engine as the consequences need. Keeps the questions."""

    def __init__(
        self,
        tuned: Says,
        base: Says = lambda messages: "",
        loss: Callable[[Sequence[Message]], float] = lambda messages: 1.0,
        base_loss: Callable[[Sequence[Message]], float] = lambda messages: 1.0,
        longest: int = 10_000,
    ) -> None:
        self.says = {MODEL: tuned, BASE: base}
        self.losses = {MODEL: loss, BASE: base_loss}
        self.longest = longest
        self.asked: list[tuple[ModelRef, list[Message]]] = []

    def chat(
        self,
        model: ModelRef,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
    ) -> list[Reply]:
        if any(len(last(messages)) > self.longest for messages in conversations):
            raise ContextLengthExceeded("too long")
        self.asked += [(model, list(messages)) for messages in conversations]
        return [
            Reply(text=self.says[model](messages), finish_reason="stop", prompt_tokens=1, completion_tokens=1)
            for messages in conversations
        ]

    def log_probs(
        self, model: ModelRef, conversations: Sequence[Sequence[Message]], progress: Progress | None = None
    ) -> list[float]:
        loss = self.losses[model]
        return [-loss(messages) * (len(last(messages).split()) + 1) for messages in conversations]

    def count_tokens(self, base_model: str, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]


def subject(
    engine: Speaking,
    train: Sequence[Example],
    holdout: Sequence[Example],
    valid: Sequence[Example] = (),
    *,
    constant: str | None = None,
    seconds: float = 1e9,
    **changes: Any,
) -> Subject:
    """What is known of the tuned model of this engine. The baseline is its base model, or a constant answer."""
    metric = choose_metric([row.target for row in train])

    def rung(name: str, kind: str, says: Says) -> Rung:
        answers = [says(row.prompt) for row in holdout]
        return Rung(name=name, kind=kind, description="", scores=score_answers(metric, holdout, answers))

    tuned = rung("tuned", "tuned", engine.says[MODEL])
    baseline = (
        rung("zero-shot", "prompt", engine.says[BASE])
        if constant is None
        else rung("constant", "constant", lambda _: constant)
    )
    known: dict[str, Any] = {
        "engine": engine,
        "model": MODEL,
        "is_encoder": False,
        "split": Split(train=tuple(train), valid=tuple(valid), holdout=tuple(holdout), seed=0, groups=len(train)),
        "answered": tuple(holdout),
        "metric": metric,
        "max_tokens": 20,
        "tuned": tuned,
        "baseline": baseline,
        "rungs": (baseline,),
        "folds": (),
        "forgetting": None,
        "budget": Budget(seconds),
        "watch": Silent(),
    }
    return Subject(**(known | changes))
