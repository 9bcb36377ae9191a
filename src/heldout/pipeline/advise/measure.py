"""What a job's parts take on this machine, measured with the job's own plan, engine and trainer."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from heldout.engine.base import Engine, Message, ModelRef, Reply, Sampling
from heldout.engine.catalogue import ENCODER
from heldout.errors import ContextLengthExceeded
from heldout.pipeline.advise.rungs import Cheap
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.evaluate.scores import Scores, score_answers, with_shots
from heldout.pipeline.general_answers import MAX_TOKENS
from heldout.pipeline.general_prompts import HELD_BACK
from heldout.pipeline.ladder import candidate_shots
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.training import ModelFacts, Timings, Trainer
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Watch

#: Rows that are answered as they are, and behind shots.
ANSWERED, BEHIND_SHOTS = 24, 12
#: Work of answering, in tokens computed: a step that adds a token to every row of a batch first reads all weights,
#: which takes as long as computing about so many tokens; so many rows are a batch (engine/sharing.py).
READING_WEIGHTS, BATCH = 12, 48
#: Conversations whose log-probability is read, and general prompts that are answered.
READ, ASKED = 4, 8


@dataclass(frozen=True, kw_only=True)
class Answering:
    """The base model with the prompt as it is, or behind shots."""

    shots: int
    rows: int  # answered to measure this
    seconds: float
    prompt_tokens: float  # of a call, on average
    shared_tokens: float  # of them the same for all rows and computed once: system prompt and shots
    answer_tokens: float  # on average
    longest: int  # answer, in tokens
    scores: Scores | None = None

    def seconds_for(self, rows: int) -> float:
        """What so many rows would take, asked at once: what they share is computed once, and larger batches read the
        weights less often."""
        return self.seconds * self._work(rows) / self._work(self.rows)

    def _work(self, rows: int) -> float:
        if not rows:
            return 0.0
        own = self.prompt_tokens - self.shared_tokens + self.answer_tokens
        return self.shared_tokens + own * rows + READING_WEIGHTS * self.longest * math.ceil(rows / BATCH)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds, each measured on the real thing."""

    load: float  # the base model into the engine, while a job goes on
    plain: Answering | None  # None: an encoder cannot be prompted
    behind_shots: tuple[Answering, ...]  # one for each number of shots that fits
    tuned: Answering
    reading: float  # the log-probability of one conversation
    general: Answering | None  # prompts that ask for general skills; None as above
    cheap: Cheap  # measured before
    system_tokens: float  # of a system prompt, on average
    target_tokens: float  # of an answer, on average
    labels: int  # 0: the answers are none
    timings: Timings


def measure(
    plan: TrainPlan,
    split: Split,
    metric: Metric,
    facts: ModelFacts,
    engine: Engine,
    trainer: Trainer,
    *,
    base_model: str,
    max_tokens: int,
    cheap: Cheap,
    directory: Path,
    seconds: float,
    watch: Watch,
) -> Measured:
    """Answer a few rows, take a few steps, and answer with what they made. The holdout is not asked.

    Args:
        cheap: the cheap rungs with their times.
        directory: an empty one; what is left there is of no use.
        seconds: about so long are steps taken.
    """
    model = ModelRef(base_model=base_model)
    rows = [*split.valid, *split.train][:ANSWERED]
    prompted = facts.kind != ENCODER
    plain: Answering | None = None
    behind_shots: tuple[Answering, ...] = ()
    reading, general = 0.0, None
    system_tokens = _system_tokens(engine, base_model, rows)
    if prompted:
        watch.message(f"Answering {len(rows)} rows with the prompt as it is, and {BEHIND_SHOTS} behind solved examples")
        plain = _answer(engine, model, rows, max_tokens, metric=metric, shared=system_tokens)
        behind_shots = tuple(_answer_behind_shots(engine, model, split, metric, max_tokens, rows, plain))
        reading = _clock(lambda: engine.log_probs(model, [one.messages for one in rows[:READ]])) / len(rows[:READ])
        general = _ask(engine, model, [[{"role": "user", "content": one}] for one in HELD_BACK[:ASKED]], MAX_TOKENS)
    engine.close()
    watch.message(f"Taking steps of training for about {seconds:.0f} seconds")
    timings = trainer.time_steps(plan, split, base_model=base_model, directory=directory, seconds=seconds)
    began = time.perf_counter()
    targets = engine.count_tokens(base_model, [row.target for row in rows])  # loads the model again, as a job does
    load = time.perf_counter() - began
    tuned = ModelRef(base_model=base_model, adapter=str(timings.adapter))
    engine.log_probs(tuned, [rows[0].messages])  # the adapter is loaded
    watch.message(f"Answering {len(rows)} rows with what those {timings.steps} steps made")
    # A tuned model ends its answers where the training answers end; this one does not know that yet.
    answering = _answer(engine, tuned, rows, _long(targets) + 1, shared=system_tokens)
    return Measured(
        load=load,
        plain=plain,
        behind_shots=behind_shots,
        tuned=answering,
        reading=reading,
        general=general,
        cheap=cheap,
        system_tokens=system_tokens,
        target_tokens=statistics.fmean(targets),
        labels=len({row.target for row in split.train}) if metric.form == "label" else 0,
        timings=timings,
    )


def _answer(
    engine: Engine,
    model: ModelRef,
    rows: Sequence[Example],
    max_tokens: int,
    *,
    metric: Metric | None = None,
    shots: Sequence[Example] = (),
    shared: float = 0.0,
) -> Answering:
    replies: list[Reply] = []
    prompts = [with_shots(row.prompt, shots) for row in rows]
    one = _ask(engine, model, prompts, max_tokens, replies)
    scores = score_answers(metric, rows, [reply.text for reply in replies], replies) if metric else None
    return replace(one, shots=len(shots), shared_tokens=shared, scores=scores)


def _ask(
    engine: Engine,
    model: ModelRef,
    prompts: Sequence[Sequence[Message]],
    max_tokens: int,
    replies: list[Reply] | None = None,
) -> Answering:
    """Answer prompts that share nothing; the answers are added to `replies`."""
    began = time.perf_counter()
    given = engine.chat(model, prompts, Sampling(max_tokens=max_tokens))
    seconds = time.perf_counter() - began
    if replies is not None:
        replies += given
    return Answering(
        shots=0,
        rows=len(prompts),
        seconds=seconds,
        prompt_tokens=statistics.fmean(reply.prompt_tokens for reply in given),
        shared_tokens=0.0,
        answer_tokens=statistics.fmean(reply.completion_tokens for reply in given),
        longest=max(reply.completion_tokens for reply in given),
    )


def _answer_behind_shots(
    engine: Engine,
    model: ModelRef,
    split: Split,
    metric: Metric,
    max_tokens: int,
    rows: Sequence[Example],
    plain: Answering,
) -> list[Answering]:
    """As a job chooses shots; the first draw of each number, which is as slow as the second."""
    found: dict[int, Answering] = {}
    for shots in candidate_shots(split, metric):
        asked = [row for row in rows if row not in shots][:BEHIND_SHOTS]
        if len(shots) in found or not asked:
            continue
        try:
            one = _answer(engine, model, asked, max_tokens, metric=metric, shots=shots)
        except ContextLengthExceeded:
            continue  # a job leaves it out, and says so
        shared = plain.shared_tokens + one.prompt_tokens - plain.prompt_tokens
        found[len(shots)] = replace(one, shared_tokens=max(0.0, shared))
    return list(found.values())


def _system_tokens(engine: Engine, base_model: str, rows: Sequence[Example]) -> float:
    """Tokens of a row's system prompt, on average."""
    prompts = [str(row.prompt[0]["content"]) if row.prompt[0]["role"] == "system" else "" for row in rows]
    texts = sorted({text for text in prompts if text})
    counts = dict(zip(texts, engine.count_tokens(base_model, texts), strict=True)) if texts else {}
    return statistics.fmean(counts.get(text, 0) for text in prompts)


def _long(tokens: Sequence[int]) -> int:
    """A length that nine of ten answers do not exceed: a batch takes as long as its long answers."""
    return sorted(tokens)[(9 * len(tokens)) // 10 if len(tokens) > 1 else 0]


def _clock(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
