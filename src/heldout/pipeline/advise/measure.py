"""What a job's parts take on this machine, measured with the job's own plan, engine and trainer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from heldout.engine.base import Engine, ModelRef, Sampling
from heldout.engine.catalogue import ENCODER
from heldout.errors import ContextLengthExceeded
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.evaluate.scores import Scores, score_model
from heldout.pipeline.general_answers import MAX_TOKENS
from heldout.pipeline.general_prompts import HELD_BACK
from heldout.pipeline.ladder import candidate_shots, choosers_of
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.training import ModelFacts, Timings, Trainer
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Watch

#: Rows that are answered in one batch by the local engine: fewer would be slower for each.
ANSWERED = 48
#: Conversations whose log-probability is read, and general prompts that are answered.
READ, ASKED = 4, 8


@dataclass(frozen=True, kw_only=True)
class Answering:
    """The base model with the prompt as it is, or behind shots."""

    shots: int
    rows: int  # answered to measure this
    seconds: float
    prompt_tokens: float  # of a call, on average
    scores: Scores

    @property
    def a_row(self) -> float:
        """Seconds for each answer."""
        return self.seconds / self.rows


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds, each measured on the real thing."""

    load: float  # the base model into the engine, while a job goes on
    plain: Answering | None  # None: an encoder cannot be prompted
    with_shots: tuple[Answering, ...]  # one for each number of shots that fits
    tuned: float  # for each answer of a tuned model
    reading: float  # the log-probability of one conversation
    general: float  # all general prompts, answered
    embedding: float  # for each text, by the frozen encoder; 0 without that rung
    system_tokens: float  # of a system prompt, on average
    target_tokens: float  # of an answer, on average
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
    embedding: float,
    directory: Path,
    seconds: float,
    watch: Watch,
) -> Measured:
    """Answer a few rows, take a few steps, and answer with what they made. The holdout is not asked.

    Args:
        embedding: seconds for each text, measured elsewhere.
        directory: an empty one; what is left there is of no use.
        seconds: about so long are steps taken.
    """
    model = ModelRef(base_model=base_model)
    rows = [*split.valid, *split.train][:ANSWERED]
    prompted = facts.kind != ENCODER
    plain: Answering | None = None
    with_shots: tuple[Answering, ...] = ()
    reading = general = 0.0
    if prompted:
        watch.message(f"Answering {len(rows)} rows with the prompt as it is, and behind solved examples")
        plain = _answer(engine, model, rows, metric, (), max_tokens)
        with_shots = tuple(_answer_behind_shots(engine, model, split, metric, max_tokens))
        reading = _clock(lambda: engine.log_probs(model, [one.messages for one in rows[:READ]])) / len(rows[:READ])
        general = _clock(lambda: _ask_general(engine, model)) * len(HELD_BACK) / ASKED
    engine.close()
    watch.message(f"Taking steps of training for about {seconds:.0f} seconds")
    timings = trainer.time_steps(plan, split, base_model=base_model, directory=directory, seconds=seconds)
    began = time.perf_counter()
    targets = engine.count_tokens(base_model, [row.target for row in rows])  # loads the model again, as a job does
    load = time.perf_counter() - began
    tuned = ModelRef(base_model=base_model, adapter=str(timings.adapter))
    prompts = [row.prompt for row in rows]
    engine.log_probs(tuned, [rows[0].messages])  # the adapter is loaded
    watch.message(f"Answering {len(rows)} rows with what those {timings.steps} steps made")
    # A tuned model ends its answers where the training answers end; this one does not know that yet.
    limit = Sampling(max_tokens=_long(targets) + 1)
    answering = _clock(lambda: engine.chat(tuned, prompts, limit)) / len(rows)
    system = sorted({str(row.prompt[0]["content"]) for row in rows if row.prompt[0]["role"] == "system"})
    system_tokens = dict(zip(system, engine.count_tokens(base_model, system), strict=True)) if system else {}
    return Measured(
        load=load,
        plain=plain,
        with_shots=with_shots,
        tuned=answering,
        reading=reading,
        general=general,
        embedding=embedding,
        system_tokens=statistics.fmean(system_tokens.get(str(row.prompt[0]["content"]), 0) for row in rows),
        target_tokens=statistics.fmean(targets),
        timings=timings,
    )


def _answer(
    engine: Engine,
    model: ModelRef,
    rows: Sequence[Example],
    metric: Metric,
    shots: Sequence[Example],
    max_tokens: int,
) -> Answering:
    began = time.perf_counter()
    scores = score_model(engine, model, rows, metric, max_tokens=max_tokens, shots=shots)
    return Answering(
        shots=len(shots),
        rows=len(rows),
        seconds=time.perf_counter() - began,
        prompt_tokens=scores.prompt_tokens,
        scores=scores,
    )


def _answer_behind_shots(
    engine: Engine, model: ModelRef, split: Split, metric: Metric, max_tokens: int
) -> list[Answering]:
    """As a job chooses shots; the first draw of each number, which is as slow as the second."""
    found: dict[int, Answering] = {}
    for shots in candidate_shots(split, metric):
        if len(shots) in found:
            continue
        try:
            found[len(shots)] = _answer(engine, model, choosers_of(split), metric, shots, max_tokens)
        except ContextLengthExceeded:
            continue  # a job leaves it out, and says so
    return list(found.values())


def _ask_general(engine: Engine, model: ModelRef) -> None:
    prompts = [[{"role": "user", "content": prompt}] for prompt in HELD_BACK[:ASKED]]
    engine.chat(model, prompts, Sampling(max_tokens=MAX_TOKENS))


def _long(tokens: Sequence[int]) -> int:
    """A length that nine of ten answers do not exceed: a batch takes as long as its long answers."""
    return sorted(tokens)[(9 * len(tokens)) // 10 if len(tokens) > 1 else 0]


def _clock(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
