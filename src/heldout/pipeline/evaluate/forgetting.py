"""Forgetting: how likely the tuned model still finds what the base model answered to general prompts.

The prompts are never trained on, not even by replay. The base model's own greedy answers are fixed, and both
models say how probable they are: no judge is needed, and nothing is drawn at random.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heldout.engine.base import Engine, Message, ModelRef
from heldout.pipeline.general_answers import MAX_TOKENS, base_answers, is_whole
from heldout.pipeline.general_prompts import HELD_BACK
from heldout.pipeline.watch import Watch

#: General skills have dropped when the answers are surely less likely by more than this, in nats per token.
MARGIN = 0.5
SURE = 0.99
#: With fewer answers there is nothing to say.
FEWEST = 8


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """The tuned model against its base model on general prompts, in pairs. Every prompt weighs the same."""

    change: float  # of the mean log-probability, nats per token; negative when the tuned model forgot
    error: float  # standard error of `change`
    interval: tuple[float, float]  # 95 %, of `change`
    p_dropped: float  # probability that the true change is below -MARGIN
    n: int  # prompts; the others of `asked` were answered at too great length
    asked: int
    replay_ratio: float  # that the tuned model was trained with

    @property
    def dropped(self) -> bool:
        """True when general skills have surely dropped by more than the margin."""
        return self.p_dropped >= SURE

    @property
    def sentence(self) -> str:
        """What was measured, in words."""
        low, high = self.interval
        return (
            f"on {self.n} general prompts that were not trained on, the log-probability of the base model's own "
            f"answers changed by {self.change:+.2f} nats per token (95 % interval {low:+.2f} to {high:+.2f})"
        )

    @property
    def advice(self) -> str:
        """What to do about skills that dropped."""
        if not self.replay_ratio:
            return "if the model has to answer more than prompts like yours, train again with replay_ratio 0.25"
        more = "a larger replay_ratio, " if self.replay_ratio < 1 else ""
        return (
            f"replay_ratio {self.replay_ratio:g} was not enough; if the model has to answer more than prompts like "
            f"yours, try {more}a smaller learning_rate or fewer epochs"
        )

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the report and on the wire."""
        return {
            "change": self.change,
            "error": self.error,
            "interval": list(self.interval),
            "p_dropped": self.p_dropped,
            "dropped": self.dropped,
            "margin": MARGIN,
            "n": self.n,
            "asked": self.asked,
            "replay_ratio": self.replay_ratio,
        }


def measure_forgetting(
    engine: Engine, base_model: str, adapter: Path, *, replay_ratio: float, directory: Path, watch: Watch
) -> Forgetting | None:
    """Let both models read the base model's answers. None, and a message why, when it ends too few of them.

    Args:
        directory: where the base model's answers are kept.
    """
    watch.message("Measuring what became of general skills")
    replies = base_answers(HELD_BACK, engine, base_model, directory=directory, watch=watch)
    # A cut answer would be read as ended where nobody ends it.
    answers = {prompt: reply.text for prompt, reply in zip(HELD_BACK, replies, strict=True) if is_whole(reply)}
    if len(answers) < FEWEST:
        watch.message(
            f"Forgetting was not measured: {base_model} ended {len(answers)} of its {len(HELD_BACK)} answers to "
            f"general prompts within {MAX_TOKENS} tokens; {FEWEST} are needed",
            level="warn",
        )
        return None
    conversations: list[list[Message]] = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in answers.items()
    ]
    tokens = [count + 1 for count in engine.count_tokens(base_model, list(answers.values()))]  # 1: the end of the turn
    before = engine.log_probs(ModelRef(base_model=base_model), conversations)
    after = engine.log_probs(ModelRef(base_model=base_model, adapter=str(adapter)), conversations)
    changes = [(b - a) / count for a, b, count in zip(before, after, tokens, strict=True)]
    found = judge_changes(changes, asked=len(HELD_BACK), replay_ratio=replay_ratio)
    watch.message(f"General skills: {found.sentence}", level="warn" if found.dropped else "info", data=found.as_dict())
    return found


def judge_changes(changes: Sequence[float], *, asked: int, replay_ratio: float) -> Forgetting:
    """Mean, error and interval of the changes of at least two prompts (nats per token), by Student's t."""
    from scipy.stats import t

    n = len(changes)
    mean, error = statistics.fmean(changes), statistics.stdev(changes) / math.sqrt(n)
    half = float(t.ppf(0.975, n - 1)) * error
    below = (-MARGIN - mean) / error if error else math.copysign(math.inf, -MARGIN - mean)
    return Forgetting(
        change=mean,
        error=error,
        interval=(mean - half, mean + half),
        p_dropped=float(t.cdf(below, n - 1)),
        n=n,
        asked=asked,
        replay_ratio=replay_ratio,
    )
