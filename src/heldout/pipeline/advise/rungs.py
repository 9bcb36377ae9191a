"""The cheap rungs on the file itself, each row answered by a model that never saw it; what more rows would gain."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from heldout.engine.labels import text_of, user_text, varies_in_system
from heldout.errors import ContextLengthExceeded
from heldout.pipeline.advise.learning_curve import FEWEST_ROWS, MOST_ROWS, Fit, MoreData, draw_curve, predict
from heldout.pipeline.checks.groups import fold, group_by_prompt
from heldout.pipeline.evaluate.statistics import wilson
from heldout.pipeline.giveaways import Giveaways
from heldout.pipeline.ladder import classical_model, frozen_model, one_thread
from heldout.pipeline.types import Dataset, Example
from heldout.pipeline.watch import Watch

#: A vector of length 1 for each text.
Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]

#: With fewer rows a fold's quarter has nothing to learn from.
FEWEST_FITTED = 20

TFIDF, FROZEN = "TF-IDF + logistic regression", "a frozen encoder + logistic regression"


@dataclass(frozen=True, kw_only=True)
class CheapRung:
    """A rung that needs no training of a model, scored out of fold."""

    name: str
    score: float  # share of right answers
    interval: tuple[float, float]  # 95 %
    rows: int  # that were answered

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the JSON document."""
        return {"name": self.name, "score": self.score, "interval": list(self.interval), "rows": self.rows}


class Cheap(NamedTuple):
    """What the cheap rungs said of a file with labels."""

    rungs: tuple[CheapRung, ...] = ()  # cheapest first; none for answers that are no labels
    more: MoreData | None = None  # by the best of them; None with too few rows for a curve
    embed_seconds: float = 0.0  # for each text; 0 without an encoder
    fit_seconds: float = 0.0  # of all models that drew the curves

    @property
    def seconds(self) -> float:
        """What all of this took."""
        return self.fit_seconds + self.embed_seconds * (self.rungs[0].rows if self.rungs else 0)


def measure_cheap(
    dataset: Dataset, embed: Embed | None, watch: Watch, *, giveaways: Giveaways = Giveaways(), seed: int = 0
) -> Cheap:
    """Score the cheap rungs of a file with labels.

    Args:
        embed: the encoder of the frozen rung; None leaves that rung out.
        giveaways: what rows are asked without, though they are learned with it.
    """
    groups = group_by_prompt(dataset.examples)
    rows = [group[0] for group in groups.values()]  # a repeated prompt would be answered from memory
    n = len(rows)
    if n > MOST_ROWS:
        rows = random.Random(f"{seed}/cheap").sample(rows, MOST_ROWS)
    asked = giveaways.asked(rows)
    labels = [fold(row.target) for row in rows]
    commonest = max(labels.count(label) for label in set(labels))
    rungs = [_rung("always the commonest answer", commonest, len(rows))]
    if len(rows) < FEWEST_FITTED:
        return Cheap(tuple(rungs))
    fits: list[tuple[str, Fit]] = [(TFIDF, tfidf_fit(rows, labels, asked))]
    embed_seconds = 0.0
    if embed is not None:
        began = time.perf_counter()
        frozen = frozen_fit(rows, labels, embed, watch, asked)
        texts = len(rows) + sum(one != other for one, other in zip(rows, asked, strict=True))
        embed_seconds = (time.perf_counter() - began) / texts
        if frozen:
            fits.append((FROZEN, frozen))
    curves = []
    began = time.perf_counter()
    for name, fit in fits:
        watch.message(f"Scoring {name} out of fold")
        with one_thread():
            curve = draw_curve(labels, fit, seed=seed)
        right = sum(answer == label for answer, label in zip(curve.answers, labels, strict=True))
        rungs.append(_rung(name, right, len(rows)))
        curves.append((right, name, curve))
    fit_seconds = time.perf_counter() - began
    _, name, best = max(curves, key=lambda one: one[0])
    more = predict(best, n, rung=name, seed=seed) if len(rows) >= FEWEST_ROWS else None
    return Cheap(tuple(rungs), more, embed_seconds, fit_seconds)


def _rung(name: str, right: int, rows: int) -> CheapRung:
    return CheapRung(name=name, score=right / rows, interval=wilson(right, rows), rows=rows)


def tfidf_fit(rows: Sequence[Example], labels: Sequence[str], asked_rows: Sequence[Example] | None = None) -> Fit:
    """The classical rung of the ladder. `asked_rows[i]` is row i as it is asked; None: as it is learned."""
    texts = [user_text(row.prompt) for row in rows]
    questions = texts if asked_rows is None else [user_text(row.prompt) for row in asked_rows]

    def fit(taught: Sequence[int], asked: Sequence[int]) -> Sequence[str]:
        known = [labels[row] for row in taught]
        if len(set(known)) < 2:
            return [known[0]] * len(asked)
        model = classical_model().fit([texts[row] for row in taught], known)
        return [str(answer) for answer in model.predict([questions[row] for row in asked])]

    return fit


def frozen_fit(
    rows: Sequence[Example],
    labels: Sequence[str],
    embed: Embed,
    watch: Watch,
    asked_rows: Sequence[Example] | None = None,
) -> Fit | None:
    """The frozen rung of the ladder. None, and a message, when a text is longer than the encoder reads.
    `asked_rows` as in `tfidf_fit`."""
    import numpy as np

    with_system = varies_in_system([row.prompt for row in rows])
    texts = [text_of(row.prompt, with_system=with_system) for row in rows]
    questions = texts if asked_rows is None else [text_of(row.prompt, with_system=with_system) for row in asked_rows]
    watch.message(f"Reading {len(rows)} texts with the encoder")
    try:
        vectors = np.asarray(embed(texts))
        changed = [i for i, (text, question) in enumerate(zip(texts, questions, strict=True)) if text != question]
        asked_vectors = vectors.copy() if changed else vectors
        if changed:
            asked_vectors[changed] = embed([questions[i] for i in changed])
    except ContextLengthExceeded as error:
        watch.message(f"The frozen encoder is left out: {error}", level="warn")
        return None

    def fit(taught: Sequence[int], asked: Sequence[int]) -> Sequence[str]:
        known = [labels[row] for row in taught]
        if len(set(known)) < 2:
            return [known[0]] * len(asked)
        return [str(answer) for answer in frozen_model().fit(vectors[taught], known).predict(asked_vectors[asked])]

    return fit
