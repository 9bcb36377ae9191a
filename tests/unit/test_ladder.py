"""The cheaper rungs: chosen on valid, shown examples of train, and one look at the holdout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from heldout.engine.base import Message, ModelRef, Piece, Progress, Reply, Sampling
from heldout.errors import ContextLengthExceeded
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.evaluate.scores import with_shots
from heldout.pipeline.ladder import CHOOSERS, Rung, candidate_shots, classical_rung, climb, constant_rung, frozen_rung
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Silent
from tests.unit.conftest import example, labelled, split_of

LABELS = ("red", "green", "blue", "black")


@dataclass
class Recorder:
    """An Engine that notes what it is asked. It knows every right answer, and gives it only behind
    `good_at` shots (or behind none, when that is 0)."""

    split: Split
    good_at: int = 8
    calls: list[list[list[Message]]] = field(default_factory=list)
    sampled: list[Sampling] = field(default_factory=list)
    longest: int = 0  # characters of a text it can embed; 0: no limit

    def chat(
        self,
        model: ModelRef,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
    ) -> list[Reply]:
        self.calls.append([list(one) for one in conversations])
        self.sampled.append(sampling)
        return [self._reply(one) for one in conversations]

    def _reply(self, conversation: Sequence[Message]) -> Reply:
        rows = (*self.split.train, *self.split.valid, *self.split.holdout)
        known = {row.prompt[-1]["content"]: row.target for row in rows}
        shots = len(shown(conversation))
        text = known[conversation[-1]["content"]] if shots == self.good_at else "no idea"
        return Reply(text=text, finish_reason="stop", prompt_tokens=len(conversation), completion_tokens=1)

    def stream(self, model: ModelRef, conversation: Sequence[Message], sampling: Sampling = Sampling()) -> Any:
        reply = self._reply(conversation)
        pieces: Iterator[Piece] = iter([Piece(text=reply.text), Piece(finish_reason="stop")])
        return pieces

    def log_probs(
        self, model: ModelRef, conversations: Sequence[Sequence[Message]], progress: Progress | None = None
    ) -> list[float]:
        return [0.0] * len(conversations)

    def count_tokens(self, base_model: str, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def embed(self, encoder: str, texts: Sequence[str]) -> list[list[float]]:
        if self.longest and max(map(len, texts)) > self.longest:
            raise ContextLengthExceeded("too long for this encoder")
        return [[float(label in text) for label in LABELS] for text in texts]

    def close(self) -> None: ...


def shown(conversation: Sequence[Message]) -> list[tuple[str, str]]:
    """The solved examples in a prompt."""
    turns = [message for message in conversation if message["role"] != "system"][:-1]
    return [(turns[i]["content"], turns[i + 1]["content"]) for i in range(0, len(turns), 2)]


@pytest.fixture
def split() -> Split:
    return split_of(labelled("train", 40, LABELS), labelled("valid", 60, LABELS), labelled("holdout", 32, LABELS))


def climbed(split: Split, **options: Any) -> tuple[dict[str, Rung], Recorder]:
    engine = Recorder(split, **options)
    metric = choose_metric([row.target for row in split.train])
    rungs = climb(split, metric, engine, "base", max_tokens=5, watch=Silent())
    return {one.name: one for one in rungs}, engine


def test_the_rungs_come_in_order_of_their_cost(split: Split) -> None:
    rungs, _ = climbed(split)
    assert [(one.name, one.kind) for one in rungs.values()] == [
        ("constant", "constant"),
        ("tfidf-logistic", "classical"),
        ("zero-shot", "prompt"),
        ("few-shot-8", "prompt"),
    ]
    assert all(len(one.scores.per_example) == 32 for one in rungs.values())


def test_shots_come_from_train_only(split: Split) -> None:
    _, engine = climbed(split)
    solved = {pair for call in engine.calls for conversation in call for pair in shown(conversation)}
    assert solved
    assert solved <= {(row.prompt[-1]["content"], row.target) for row in split.train}
    metric = choose_metric([row.target for row in split.train])
    assert all(shot in split.train for shots in candidate_shots(split, metric) for shot in shots)


def test_the_holdout_is_asked_without_shots_and_with_the_chosen_ones_only(split: Split) -> None:
    rungs, engine = climbed(split)
    held = [call for call in engine.calls if any("holdout" in one[-1]["content"] for one in call)]
    others = [call for call in engine.calls if call not in held]
    assert [len(call) for call in held] == [32, 32]
    assert [{len(shown(one)) for one in call} for call in held] == [{0}, {8}]
    (chosen,) = {tuple(shown(one)) for one in held[1]}
    lines = ", ".join(prompt.removeprefix("train ") for prompt, _ in chosen)
    one_based = ", ".join(str(int(line) + 1) for line in lines.split(", "))
    assert f"training lines {one_based}" in rungs["few-shot-8"].description
    assert all("valid" in one[-1]["content"] for call in others for one in call)
    assert engine.calls.index(held[1]) == len(engine.calls) - 1, "chosen before the holdout is looked at"


@pytest.mark.parametrize("good_at", [4, 8])
def test_the_shots_that_answer_valid_best_are_chosen(split: Split, good_at: int) -> None:
    rungs, _ = climbed(split, good_at=good_at)
    assert rungs[f"few-shot-{good_at}"].scores.mean == 1.0
    assert rungs["zero-shot"].scores.mean == 0.0
    assert "(1.00 there)" in rungs[f"few-shot-{good_at}"].description


def test_when_no_shots_help_the_fewest_are_kept_and_the_base_answers_alone(split: Split) -> None:
    rungs, _ = climbed(split, good_at=0)
    assert rungs["zero-shot"].scores.mean == 1.0
    assert rungs["few-shot-4"].scores.mean == 0.0


def test_a_prompt_is_chosen_on_a_bounded_number_of_examples(split: Split) -> None:
    _, engine = climbed(split)
    choosing = [call for call in engine.calls if "valid" in call[0][-1]["content"]]
    assert [len(call) for call in choosing] == [CHOOSERS] * 4
    assert len({tuple(one[-1]["content"] for one in call) for call in choosing}) == 1, "the same for every prompt"


def test_answers_are_greedy_and_bounded(split: Split) -> None:
    _, engine = climbed(split)
    assert {(one.temperature, one.max_tokens) for one in engine.sampled} == {(0.0, 5)}


def test_the_same_seed_climbs_the_same_ladder(split: Split) -> None:
    first, again = climbed(split), climbed(split)
    assert first[0] == again[0]
    assert first[1].calls == again[1].calls
    metric = choose_metric([row.target for row in split.train])
    other = split_of(split.train, split.valid, split.holdout, seed=1)
    assert candidate_shots(split, metric) != candidate_shots(other, metric)


def test_shots_show_as_many_labels_as_they_can() -> None:
    rows = (*labelled("train", 90, ("red",)), *labelled("rare", 6, ("green", "blue", "black")))
    split = split_of(rows)
    candidates = candidate_shots(split, choose_metric([row.target for row in rows]))
    assert [len(shots) for shots in candidates] == [4, 4, 8, 8]
    lines = [tuple(rows.index(shot) for shot in shots) for shots in candidates]
    assert len(set(lines)) == 4, "four different prompts"
    for shots, numbers in zip(candidates, lines, strict=True):
        assert {shot.target for shot in shots} == set(LABELS)
        assert len(set(numbers)) == len(shots), "no example twice"


def test_too_few_examples_for_shots_leave_that_rung_out() -> None:
    split = split_of([example(f"train {i}", f"text number {i}") for i in range(3)], *[labelled("valid", 3)] * 2)
    rungs, engine = climbed(split)
    assert list(rungs) == ["constant", "zero-shot"]
    assert len(engine.calls) == 1


def test_the_constant_rung_is_the_commonest_answer_of_train() -> None:
    train = labelled("train", 10, ("red", "red", "green"))
    split = split_of(train, (), labelled("holdout", 40, ("green", "green", "green", "red")))
    one = constant_rung(split, choose_metric([row.target for row in train]))
    assert set(one.scores.answers) == {"red"}
    assert one.scores.mean == 0.25
    assert "'red'" in one.description


def test_the_classical_rung_learns_from_train_alone() -> None:
    def rows(part: str, n: int, labels: Sequence[str]) -> tuple[Example, ...]:
        return tuple(example(f"{part} {i} is {LABELS[i % 4]}", labels[i % 4], i + 1) for i in range(n))

    metric = choose_metric(LABELS * 10)
    train, holdout = rows("train", 40, LABELS), rows("holdout", 32, LABELS)
    assert classical_rung(split_of(train, (), holdout), metric).scores.mean == 1.0
    # The holdout's answers are turned round: nothing but the score may change.
    lying = split_of(train, (), rows("holdout", 32, LABELS[::-1]))
    assert classical_rung(lying, metric).scores.answers == tuple(row.target for row in holdout)
    assert classical_rung(lying, metric).scores.mean == 0.0


def coloured(part: str, n: int, answers: Sequence[str] = LABELS) -> tuple[Example, ...]:
    """Rows whose label stands in the text; the answers may be others."""
    return tuple(example(f"{part} {i} is {LABELS[i % 4]}", answers[i % 4], i + 1) for i in range(n))


def test_the_frozen_rung_learns_from_train_alone() -> None:
    metric = choose_metric(LABELS * 10)
    train = coloured("train", 40)
    lying = split_of(train, (), coloured("holdout", 32, LABELS[::-1]))
    (one,) = frozen_rung(lying, metric, Recorder(lying), "minilm", Silent())
    assert one.scores.answers == tuple(LABELS[i % 4] for i in range(32))
    assert (one.name, one.kind) == ("frozen-encoder", "classical")
    assert one.scores.mean == 0.0


def test_a_text_longer_than_the_encoder_reads_leaves_the_frozen_rung_out() -> None:
    split = split_of(coloured("train", 40), (), coloured("a very long holdout", 32))
    said: list[str] = []

    class Listening(Silent):
        def message(self, text: str, **more: Any) -> None:
            said.append(text)

    engine = Recorder(split, longest=20)
    assert frozen_rung(split, choose_metric(LABELS * 10), engine, "minilm", Listening()) == []
    assert said[-1] == "The frozen encoder is left out: too long for this encoder"


def test_an_encoder_is_not_prompted() -> None:
    split = split_of(coloured("train", 40), coloured("valid", 20), coloured("holdout", 32))
    engine = Recorder(split)
    metric = choose_metric([row.target for row in split.train])
    rungs = climb(split, metric, engine, None, encoder="minilm", max_tokens=5, watch=Silent())
    assert [one.name for one in rungs] == ["constant", "tfidf-logistic", "frozen-encoder"]
    assert engine.calls == []


def test_text_answers_have_no_classical_rung() -> None:
    train = [example(f"train {i}", f"text number {i}") for i in range(20)]
    rungs, _ = climbed(split_of(train, labelled("valid", 5), labelled("holdout", 30)))
    assert [one.kind for one in rungs.values()] == ["constant", "prompt", "prompt"]


def test_shots_stand_between_the_system_message_and_the_question() -> None:
    shot, asked = example("shot", "yes"), example("question", "no")

    def contents(prompt: Sequence[Message]) -> list[str]:
        return [message["content"] for message in with_shots(prompt, [shot])]

    assert contents(asked.prompt) == ["Answer.", "shot", "yes", "question"]
    assert contents(asked.prompt[1:]) == ["shot", "yes", "question"]
