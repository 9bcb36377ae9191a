"""The cheaper rungs: what the user would have without training, scored on the same holdout.

Anything that is chosen (the shots, their number and order) is chosen on valid; the holdout is only looked
at with the choice made.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from heldout.engine.base import Engine, ModelRef
from heldout.engine.labels import text_of, user_text, varies_in_system
from heldout.errors import ContextLengthExceeded
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.evaluate.scores import Scores, score_answers, score_model
from heldout.pipeline.evaluate.statistics import mean_interval
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Watch

#: Valid examples that choose among few-shot prompts. More would cost more than training does.
CHOOSERS = 24
SHOT_COUNTS = (4, 8)
ORDERS = 2
#: Inverse strength of the penalty on vectors of length 1; 10 to 100 were alike (docs/experiments.md).
FROZEN_C = 100.0
#: The names of the rungs that need no language model: they can be served (served_rungs.py).
FROZEN, CLASSICAL = "frozen-encoder", "tfidf-logistic"


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One way to get answers, cheapest first in the ladder.

    kind: constant (needs no model) · classical (a linear model on counts of words or on the vectors of an encoder,
    which may be fine-tuned) · prompt (the base model as it is) · tuned.
    """

    name: str
    kind: str
    description: str
    scores: Scores
    shots: tuple[Example, ...] = ()  # that the prompt shows; by cross-fitting those of the best of the folds' prompts
    fold_shots: tuple[tuple[Example, ...], ...] = ()  # by cross-fitting, those of each fold's prompt

    @property
    def costs(self) -> tuple[str, str]:
        """Milliseconds and prompt tokens of an answer, as they are shown; empty where there are none."""
        milliseconds, tokens = self.scores.milliseconds, self.scores.prompt_tokens
        return (three_digits(milliseconds) if milliseconds else "", f"{tokens:.0f}" if tokens else "")

    @property
    def explained(self) -> str:
        """What it is, and its macro-F1 where labels are imbalanced."""
        macro = self.scores.macro_f1
        return self.description if macro is None else f"{self.description}; macro-F1 {macro:.1%}"

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the report."""
        return {
            "name": self.name,
            "kind": self.kind,
            "description": self.description,
            **self.scores.as_dict(),
        }


def three_digits(number: float) -> str:
    """To three digits, or all of those before the point; never with an exponent."""
    if number >= 999.5:
        return f"{number:,.0f}"
    return f"{number:.3g}" if number >= 0.001 else "under 0.001"


def best_baseline(rungs: Sequence[Rung]) -> Rung:
    """What the user would have without training: the best prompt, or the constant answer if that is better."""
    return max((rung for rung in rungs if rung.kind in ("prompt", "constant")), key=lambda rung: rung.scores.mean)


def climb(
    split: Split,
    metric: Metric,
    engine: Engine,
    base_model: str | None,
    *,
    encoder: str | None = None,
    max_tokens: int,
    watch: Watch,
) -> tuple[Rung, ...]:
    """Score every rung below a tuned model on the holdout.

    Args:
        base_model: the chat model to be prompted; None when there is none.
        encoder: the encoder of the frozen rung; None leaves that rung out.
    """
    rungs = [constant_rung(split, metric)]
    if metric.form == "label":
        watch.message("Scoring TF-IDF + logistic regression")
        rungs.append(classical_rung(split, metric))
        if encoder:
            rungs += frozen_rung(split, metric, engine, encoder, watch)
    if base_model:
        rungs += prompt_rungs(split, metric, engine, base_model, max_tokens=max_tokens, watch=watch)
    return tuple(rungs)


def with_clusters(rungs: Sequence[Rung], clusters: Sequence[int]) -> tuple[Rung, ...]:
    """The rungs with intervals that know which examples belong together."""

    def interval(scores: Scores) -> tuple[float, float]:
        return mean_interval(scores.per_example, binary=scores.binary, clusters=clusters)

    return tuple(replace(rung, scores=replace(rung.scores, interval=interval(rung.scores))) for rung in rungs)


def prompt_rungs(
    split: Split, metric: Metric, engine: Engine, base_model: str, *, max_tokens: int, watch: Watch
) -> list[Rung]:
    """The base model with the prompt as it is, and behind the best shots."""
    zero_shot = Rung(
        name="zero-shot",
        kind="prompt",
        description="the base model with the prompt as it is",
        scores=score_model(
            engine,
            ModelRef(base_model=base_model),
            split.holdout,
            metric,
            max_tokens=max_tokens,
            progress=lambda done, total: watch.progress("zero-shot prompt", done, total),
        ),
    )
    return [zero_shot, *few_shot_rungs(split, metric, engine, base_model, max_tokens=max_tokens, watch=watch)]


def few_shot_rungs(
    split: Split, metric: Metric, engine: Engine, base_model: str, *, max_tokens: int, watch: Watch
) -> list[Rung]:
    """The base model behind the best shots; nothing when there are no shots, or none that fit."""

    def ask_if_it_fits(examples: Sequence[Example], shots: Sequence[Example], stage: str) -> Scores | None:
        try:
            return score_model(
                engine,
                ModelRef(base_model=base_model),
                examples,
                metric,
                max_tokens=max_tokens,
                shots=shots,
                learned=split.train,
                progress=lambda done, total: watch.progress(stage, done, total),
            )
        except ContextLengthExceeded as error:
            watch.message(f"A prompt with {len(shots)} shots is left out: {error}", level="warn")
            return None

    choosers = _spread(split.valid, CHOOSERS, split.seed)
    best: tuple[float, tuple[Example, ...]] = (-1.0, ())
    for shots in candidate_shots(split, metric):
        tried = ask_if_it_fits(choosers, shots, f"choosing {len(shots)} shots")
        if tried and tried.mean > best[0]:
            best = (tried.mean, shots)
    score, shots = best
    scores = ask_if_it_fits(split.holdout, shots, f"{len(shots)}-shot prompt") if shots else None
    if not scores:
        return []
    lines = ", ".join(str(shot.line) for shot in shots)
    return [
        Rung(
            name=f"few-shot-{len(shots)}",
            kind="prompt",
            description=(
                f"the base model with {len(shots)} solved examples (training lines {lines}), the best of "
                f"{len(SHOT_COUNTS) * ORDERS} prompts on {len(choosers)} validation examples ({score:.2f} there)"
            ),
            scores=scores,
            shots=shots,
        )
    ]


def constant_rung(split: Split, metric: Metric) -> Rung:
    """Always the commonest answer of train: what knowing nothing of the input is worth."""
    counts: dict[str, int] = defaultdict(int)
    for example in split.train:
        counts[example.target] += 1
    commonest = max(counts, key=lambda answer: counts[answer])
    shown = commonest if len(commonest) <= 60 else commonest[:57] + "…"
    return Rung(
        name="constant",
        kind="constant",
        description=f"always the commonest training answer, {shown!r}",
        scores=score_answers(metric, split.holdout, [commonest] * len(split.holdout)),
    )


def classical_rung(split: Split, metric: Metric) -> Rung:
    """TF-IDF of words and word pairs with logistic regression, trained on train alone."""
    model = classical_model()
    with one_thread():
        model.fit([user_text(example.prompt) for example in split.train], [example.target for example in split.train])
        started = time.perf_counter()
        answers = [str(answer) for answer in model.predict([user_text(example.prompt) for example in split.holdout])]
        seconds = time.perf_counter() - started
    return Rung(
        name=CLASSICAL,
        kind="classical",
        description="TF-IDF of words and word pairs + logistic regression: milliseconds, no language model",
        scores=score_answers(metric, split.holdout, answers, seconds=seconds),
    )


def classical_model() -> Any:
    """What the classical rung fits."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"),
        LogisticRegression(C=10.0, max_iter=1000),
    )


def one_thread() -> Any:
    """Fits of this size gain nothing from threads; on a busy machine threads that wait for each other made them 15 to
    80 times slower."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


def frozen_model() -> Any:
    """What the frozen rung fits to vectors of length 1."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=FROZEN_C, max_iter=1000)


def frozen_rung(split: Split, metric: Metric, engine: Engine, encoder: str, watch: Watch) -> list[Rung]:
    """An encoder as it is with logistic regression on its vectors, trained on train alone. Nothing, when a text
    is longer than the encoder reads."""
    with_system = varies_in_system([example.prompt for example in split.train])

    def vectors(examples: Sequence[Example]) -> list[list[float]]:
        texts = [text_of(example.prompt, with_system=with_system) for example in examples]
        return engine.embed(encoder, texts)

    watch.message(f"Scoring the frozen encoder {encoder} + logistic regression")
    try:
        seen = vectors(split.train)
        started = time.perf_counter()
        asked = vectors(split.holdout)
    except ContextLengthExceeded as error:
        watch.message(f"The frozen encoder is left out: {error}", level="warn")
        return []
    targets = [example.target for example in split.train]
    if len(set(targets)) < 2:
        return []
    with one_thread():
        seconds = time.perf_counter() - started
        model = frozen_model().fit(seen, targets)
        answers = [str(answer) for answer in model.predict(asked)]
    return [
        Rung(
            name=FROZEN,
            kind="classical",
            description=f"{encoder} as it is + logistic regression on its vectors: seconds, nothing of it is trained",
            scores=score_answers(metric, split.holdout, answers, seconds=seconds),
        )
    ]


def candidate_shots(split: Split, metric: Metric) -> list[tuple[Example, ...]]:
    """The few-shot prompts to choose from: two numbers of shots, two draws each. Labels take turns, so
    that a prompt shows as many different ones as it can."""
    candidates = []
    for count in SHOT_COUNTS:
        for order in range(ORDERS):
            rng = random.Random(f"{split.seed}/{count}/{order}")
            groups: dict[str, list[Example]] = defaultdict(list)
            for example in split.train:
                groups[example.target if metric.form == "label" else ""].append(example)
            queues = [rng.sample(group, len(group)) for _, group in sorted(groups.items())]
            rng.shuffle(queues)
            turns = [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]
            if len(turns) >= count:
                candidates.append(tuple(turns[:count]))
    return candidates


def _spread(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    if len(examples) <= count:
        return list(examples)
    return random.Random(f"{seed}/choosers").sample(list(examples), count)
