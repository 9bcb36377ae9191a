"""Does the bias consequence see bias that was planted, and only that? `python benchmarks/bias.py [--rung frozen]`

Each training file of ticket-urgency (the same messages, first names spread more and more unevenly over the labels)
teaches a cheap model, which answers test_pairs: every message once with a woman's and once with a man's name, so that
the right gap is 0. Printed are BiasAmp by declared groups, and what swapping names finds where none are declared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import SHARED, examples_of, rows_of

from heldout.engine.base import Message, ModelRef, Progress, Reply, Sampling
from heldout.engine.labels import user_text
from heldout.engine.local import LocalEngine
from heldout.pipeline import ladder
from heldout.pipeline.consequences import bias
from heldout.pipeline.consequences.base import Budget, Subject
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.evaluate.scores import score_answers
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Silent
from heldout.settings import DEFAULT_ENCODER, Settings

FOLDER = SHARED / "bias" / "ticket-urgency"
FILES = ("balanced", "skew75", "skew95", "biased_labels")


class Answering:
    """As much of an Engine as swaps need: the answers of a fitted cheap model."""

    def __init__(self, predict: Callable[[list[str]], Sequence[str]]) -> None:
        self._predict = predict

    def chat(
        self,
        model: ModelRef,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
    ) -> list[Reply]:
        texts = [str(messages[-1]["content"]) for messages in conversations]
        return [
            Reply(text=str(text), finish_reason="stop", prompt_tokens=0, completion_tokens=0)
            for text in self._predict(texts)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rung", default="tfidf", choices=["tfidf", "frozen"])
    asked = parser.parse_args()
    print(
        "| train | score | BiasAmp | interval | light | other answers | same group | beyond | interval | light | gap |"
    )
    print("|---|--:|--:|--:|---|--:|--:|--:|--:|---|--:|")
    for name in FILES:
        subject = taught(name, asked.rung)
        groups = bias.measure(subject)
        swaps = bias.measure(without_groups(subject))
        a, b = groups.numbers, swaps.numbers
        print(
            f"| {name} | {subject.tuned.scores.mean:.1%} | {a['bias_amp']:.3f} | {a['interval'][0]:.3f} to "
            f"{a['interval'][1]:.3f} | {groups.status} | {b['flip_rate']:.1%} | {b['within_flip_rate']:.1%} | "
            f"{b['excess']:.1%} | {b['interval'][0]:.1%} to {b['interval'][1]:.1%} | {swaps.status} | "
            f"{abs(b['shift']['male'] - b['shift']['female']):.1%} |",
            flush=True,
        )


def taught(name: str, rung: str) -> Subject:
    """A cheap model that this training file taught."""
    test = FOLDER / "test_pairs.jsonl"
    declared = [row["group"] for row in rows_of(FOLDER / f"train_{name}.groups.jsonl")]
    train = grouped(FOLDER / f"train_{name}.jsonl", declared)
    holdout = grouped(test, [row["group"] for row in rows_of(test)])
    return subject_of(train, holdout, fit(rung, train))


def grouped(path: Path, groups: Sequence[str]) -> tuple[Example, ...]:
    """The rows of a file, each with its group."""
    return tuple(replace(row, group=group) for row, group in zip(examples_of(path), groups, strict=True))


def without_groups(subject: Subject) -> Subject:
    """The same rows of somebody who declared nothing."""
    split = replace(subject.split, train=tuple(replace(row, group=None) for row in subject.split.train))
    return replace(subject, split=split, answered=tuple(replace(row, group=None) for row in subject.answered))


def fit(rung: str, train: Sequence[Example]) -> Callable[[list[str]], Sequence[str]]:
    """A cheap rung of the ladder, taught by these rows."""
    texts, labels = [user_text(row.prompt) for row in train], [row.target for row in train]
    if rung == "tfidf":
        model = ladder.classical_model().fit(texts, labels)
        return lambda new: model.predict(new)
    engine = LocalEngine(cache=Settings().cache, aliases={}, precision="float32", allow_paths=True)
    head = ladder.frozen_model().fit(engine.embed(DEFAULT_ENCODER, texts), labels)
    return lambda new: head.predict(engine.embed(DEFAULT_ENCODER, new))


def subject_of(
    train: tuple[Example, ...], holdout: tuple[Example, ...], predict: Callable[[list[str]], Sequence[str]]
) -> Subject:
    """What a job would know of this model. Its baseline is a constant answer: without a link to any group."""
    split = Split(train=train, valid=(), holdout=holdout, seed=0, groups=len(train))
    metric = choose_metric([row.target for row in train])
    baseline = ladder.constant_rung(split, metric)
    answers = [str(one) for one in predict([user_text(row.prompt) for row in holdout])]
    engine: Any = Answering(predict)
    return Subject(
        engine=engine,
        model=ModelRef(base_model="cheap"),
        is_encoder=True,
        split=split,
        answered=holdout,
        metric=metric,
        max_tokens=20,
        tuned=ladder.Rung(name="tuned", kind="tuned", description="", scores=score_answers(metric, holdout, answers)),
        baseline=baseline,
        rungs=(baseline,),
        folds=(),
        forgetting=None,
        budget=Budget(600.0),
        watch=Silent(),
    )


if __name__ == "__main__":
    main()
