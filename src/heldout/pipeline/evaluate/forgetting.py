"""Forgetting: how likely the tuned model still finds what the base model answered to general prompts, and how many of
the short questions that the base model answers right it still does.

None of them is ever trained on, not even by replay. The base model's own greedy answers are fixed, and both models say
how probable they are: no judge is needed, and nothing is drawn at random.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heldout.engine.base import Engine, Message, ModelRef, Sampling
from heldout.pipeline.evaluate.statistics import wilson
from heldout.pipeline.general_answers import FACT_TOKENS, FACTS_FILE, MAX_TOKENS, base_answers, is_whole
from heldout.pipeline.general_facts import FACTS, right_ones
from heldout.pipeline.general_prompts import HELD_BACK
from heldout.pipeline.watch import Watch

#: General skills have dropped when the answers are surely less likely by more than this, in nats per token.
MARGIN = 0.5
SURE = 0.99
#: And when of the short questions that the base model answers right less than this share surely is (97.5 %): a model
#: that rewrites what it is asked may find the base model's long answers as likely as ever.
HALF = 0.5
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
    known: int = 0  # short questions that the base model answers right
    kept: int = 0  # those of them that the tuned model does

    @property
    def dropped(self) -> bool:
        """True when general skills have surely dropped: probabilities by more than the margin, or answers by half."""
        return self.p_dropped >= SURE or self.lost_facts

    @property
    def lost_facts(self) -> bool:
        """True when of the questions that the base model answers right the tuned one surely answers less than half."""
        return self.known >= FEWEST and wilson(self.kept, self.known)[1] < HALF

    @property
    def sentence(self) -> str:
        """What was measured, in words."""
        low, high = self.interval
        return (
            f"on {self.n} general prompts that were not trained on, the log-probability of the base model's own "
            f"answers changed by {self.change:+.2f} nats per token (95 % interval {low:+.2f} to {high:+.2f})"
            f"{self._facts}"
        )

    @property
    def _facts(self) -> str:
        if self.known < FEWEST:
            return f"; of {len(FACTS)} short questions the base model answers {self.known} right, too few to lose"
        low, high = wilson(self.kept, self.known)
        return (
            f"; of {self.known} short questions that the base model answers right, the tuned model answers "
            f"{self.kept / self.known:.0%} (95 % interval {low:.0%} to {high:.0%})"
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
            "questions": len(FACTS),
            "known": self.known,
            "kept": self.kept,
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
    tuned = ModelRef(base_model=base_model, adapter=str(adapter))
    before, after = (engine.log_probs(model, conversations) for model in (ModelRef(base_model=base_model), tuned))
    changes = [(b - a) / count for a, b, count in zip(before, after, tokens, strict=True)]
    known, kept = count_facts(engine, tuned, directory=directory, watch=watch)
    found = judge_changes(changes, asked=len(HELD_BACK), replay_ratio=replay_ratio)
    found = replace(found, known=known, kept=kept)
    watch.message(f"General skills: {found.sentence}", level="warn" if found.dropped else "info", data=found.as_dict())
    return found


def count_facts(engine: Engine, tuned: ModelRef, *, directory: Path, watch: Watch) -> tuple[int, int]:
    """How many short questions the base model answers right, and how many of these the tuned model does."""
    questions = list(FACTS)
    replies = base_answers(
        questions,
        engine,
        tuned.base_model,
        directory=directory,
        watch=watch,
        file=FACTS_FILE,
        max_tokens=FACT_TOKENS,
    )
    known = right_ones(questions, [reply.text for reply in replies])
    if not known:
        return 0, 0
    again = engine.chat(
        tuned,
        [[{"role": "user", "content": question}] for question in known],
        Sampling(max_tokens=FACT_TOKENS),
        lambda done, total: watch.progress("general questions", done, total),
    )
    return len(known), len(right_ones(known, [reply.text for reply in again]))


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
