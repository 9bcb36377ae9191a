"""By cross-fitting every question is asked of the fold's model that never saw the row, or of one that learned it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from heldout.engine.base import Message, ModelRef, Progress, Reply, Sampling
from heldout.pipeline.consequences import bias, calibration, fragility, generalisation, measure_all, memorisation
from heldout.pipeline.consequences.base import Consequence, Subject, TunedModel
from heldout.pipeline.consequences.records import read_consequences, write_consequences
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.evaluate.scores import score_answers
from heldout.pipeline.ladder import Rung
from heldout.pipeline.types import Example, Split
from tests.unit.conftest import example
from tests.unit.consequences import BASE, MODEL, Speaking, last, subject

COUNT = 3
MODELS = [ModelRef(base_model="base", adapter=f"fold-{number}") for number in range(COUNT)]
LABELS = ("card", "loan", "visa")
NAMES = ("John", "Mary", "Peter", "Susan")


def row(i: int) -> Example:
    label = LABELS[i // 4 % 3]
    return example(f"The note {i} of {NAMES[i % 4]} asks about my {label} today", label, i + 1)


ROWS = [row(i) for i in range(120)]
#: Fold k answers the rows k, k + 3, ..., and stops by the fold after it.
HELD = [ROWS[number::COUNT] for number in range(COUNT)]
SHOTS = [(HELD[(number + 2) % COUNT][0],) for number in range(COUNT)]


class Noting(Speaking):
    """Fold k's model says "fold k" where `honest` is off, so that it shows who answered; likelihoods tell it too."""

    def __init__(self, *, honest: bool = True) -> None:
        super().__init__(label_in)
        self.honest = honest
        self.read: list[tuple[ModelRef, str]] = []
        self.room: dict[ModelRef, int | None] = {}  # tokens of an answer, at most

    def chat(
        self,
        model: ModelRef,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
    ) -> list[Reply]:
        self.asked += [(model, list(messages)) for messages in conversations]
        self.room[model] = sampling.max_tokens
        if progress:
            progress(len(conversations), len(conversations))
        texts = [label_in(messages) if self.honest else str(model.adapter) for messages in conversations]
        return [Reply(text=text, finish_reason="stop", prompt_tokens=1, completion_tokens=1) for text in texts]

    def log_probs(
        self, model: ModelRef, conversations: Sequence[Sequence[Message]], progress: Progress | None = None
    ) -> list[float]:
        self.read += [(model, str(messages[-2]["content"])) for messages in conversations]
        return [-1.0 if label_in(messages[:-1]) == last(messages) else -3.0 for messages in conversations]


def label_in(messages: Sequence[Message]) -> str:
    letters = last(messages).lower()
    return next((label for label in LABELS if label in letters), LABELS[0])


def by_folds(engine: Noting, **changes: Any) -> Subject:
    """What is known of a cross-fitted job: every fold answered its rows, and its baseline had shots of its own."""
    answered = [one for held in HELD for one in held]
    metric = choose_metric([one.target for one in ROWS])
    scores = score_answers(metric, answered, [one.target for one in answered])
    baseline = Rung(name="few-shot", kind="prompt", description="", scores=scores, shots=SHOTS[0])
    folds = []
    for number, model in enumerate(MODELS):
        valid, train = HELD[(number + 1) % COUNT], HELD[(number + 2) % COUNT]
        split = Split(train=tuple(train), valid=tuple(valid), holdout=tuple(HELD[number]), seed=0, groups=COUNT)
        places = range(number * len(train), (number + 1) * len(train))
        folds.append(TunedModel(model=model, split=split, places=places, shots=SHOTS[number], max_tokens=20 + number))
    return subject(engine, ROWS, answered, baseline=baseline, folds=tuple(folds), **changes)


def fold_of(text: str) -> int:
    """The fold that held out the row behind a text, which the perturbations leave its number."""
    number = next(word for word in text.replace(",", " ").split() if word.isdecimal())
    return int(number) % COUNT


def parts_asked(asked: Sequence[tuple[ModelRef, str]]) -> set[tuple[int, int]]:
    """(fold of the model, fold that held out the row) of every question to a fold's model."""
    return {(MODELS.index(model), fold_of(text)) for model, text in asked if model in MODELS}


OWN = {(number, number) for number in range(COUNT)}
LEARNED = {(number, (number + 2) % COUNT) for number in range(COUNT)}
CHOSEN_BY = {(number, (number + 1) % COUNT) for number in range(COUNT)}


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (fragility.measure, OWN),
        (bias.measure, OWN),
        (generalisation.measure, LEARNED | CHOSEN_BY),
    ],
)
def test_rows_are_asked_again_of_the_model_that_never_saw_them_or_of_one_that_learned_them(
    measure: Any, expected: set[tuple[int, int]]
) -> None:
    engine = Noting()
    found: Consequence = measure(by_folds(engine))
    assert found.status != "not_measured", found.sentence
    assert MODEL not in {model for model, _ in engine.asked}, "the served model has seen every row"
    assert parts_asked([(model, last(messages)) for model, messages in engine.asked]) == expected


@pytest.mark.parametrize(("measure", "expected"), [(memorisation.measure, OWN | LEARNED), (calibration.measure, OWN)])
def test_likelihoods_are_read_by_the_same_models(measure: Any, expected: set[tuple[int, int]]) -> None:
    engine = Noting()
    found: Consequence = measure(by_folds(engine))
    assert found.status != "not_measured", found.sentence
    assert MODEL not in {model for model, _ in engine.read}
    assert parts_asked(engine.read) == expected


def test_answers_come_back_in_the_order_of_the_questions() -> None:
    known = by_folds(engine := Noting(honest=False))
    places = [0, 119, 40, 1, 80, 39]
    replies = known.ask_each([(one, asked.prompt) for one, asked in known.unseen(places)], "all")
    assert [reply.text for reply in replies] == ["fold-0", "fold-2", "fold-1", "fold-0", "fold-2", "fold-0"]
    assert [fold_of(last(messages)) for _, messages in engine.asked] == [0, 0, 0, 1, 2, 2]
    assert [engine.room[model] for model in MODELS] == [20, 21, 22], "answers are cut where those before were"


def test_the_baseline_is_asked_with_the_shots_of_the_fold_that_held_the_row_out() -> None:
    known = by_folds(engine := Noting())
    known.ask_each([(one, asked.prompt) for one, asked in known.unseen(range(0, 120, 10))], "all", baseline=True)
    assert {model for model, _ in engine.asked} == {BASE}
    for _, messages in engine.asked:
        shown = next(str(message["content"]) for message in messages if message["role"] == "user")
        assert fold_of(shown) == (fold_of(last(messages)) + 2) % COUNT


def test_a_learned_row_is_asked_of_one_of_the_models_that_learned_it_and_only_once() -> None:
    known = by_folds(Noting())
    everything = known.learned(500, "all")
    assert sorted(one.line for _, one in everything) == list(range(1, 121))
    assert all(one in owner.split.train for owner, one in everything)
    assert known.learned(20, "some") == known.learned(20, "some")
    assert not {one.line for _, one in known.learned(500, "all", but={1, 2, 3})} & {1, 2, 3}


def test_sentences_say_that_the_models_of_the_folds_were_measured_and_not_the_served_one() -> None:
    found = {one.name: one for one in measure_all(by_folds(Noting()))}
    for name in ("format", "fragility", "bias", "calibration"):
        assert found[name].sentence.endswith("the models of the folds, each with rows that it never saw"), name
    for name in ("generalisation", "memorisation"):  # half of their rows were learned
        assert found[name].sentence.endswith("measured on the models of the folds"), name
    assert "models of the folds" not in found["hallucination"].sentence


def test_what_was_measured_is_read_again_unless_it_is_about_another_model_or_other_rows(tmp_path: Path) -> None:
    found = measure_all(by_folds(Noting()))
    assert read_consequences(tmp_path, ROWS, 7) is None
    write_consequences(tmp_path, ROWS, 7, found)
    assert read_consequences(tmp_path, ROWS, 7) == found
    assert read_consequences(tmp_path, ROWS[1:], 7) is None
    assert read_consequences(tmp_path, ROWS, 8) is None


def test_no_temperature_is_fitted_on_models_that_are_not_served() -> None:
    assert calibration.measure(by_folds(Noting())).numbers["temperature"] is None
