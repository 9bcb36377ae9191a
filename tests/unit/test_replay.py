"""Replay: the base model's own answers to general prompts are trained on, whole ones only, and always the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from heldout.engine.base import Message, ModelRef, Progress, Reply, Sampling
from heldout.errors import InvalidValue
from heldout.pipeline.general_answers import FILE, MAX_TOKENS, base_answers
from heldout.pipeline.general_prompts import HELD_BACK, KINDS, REPLAYED
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.plan import TrainPlan, make_plan
from heldout.pipeline.replay import Replay, replay_examples
from heldout.pipeline.training import ModelFacts
from heldout.pipeline.watch import Silent
from tests.unit.conftest import labelled, split_of

FACTS = ModelFacts(hidden_size=64, layers=2, context=512, parameters=1)


@dataclass
class Talker:
    """As much of an Engine as replay needs: its answers are `tokens` tokens long."""

    finish: Callable[[str], str] = lambda prompt: "stop"
    text: Callable[[str], str] = lambda prompt: f"answer to {prompt}"
    tokens: int = 10
    asked: list[str] = field(default_factory=list)
    models: set[ModelRef] = field(default_factory=set)
    sampled: set[Sampling] = field(default_factory=set)

    def chat(
        self,
        model: ModelRef,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
    ) -> list[Reply]:
        prompts = [str(messages[-1]["content"]) for messages in conversations]
        self.asked += prompts
        self.models.add(model)
        self.sampled.add(sampling)
        return [
            Reply(
                text=self.text(prompt),
                finish_reason=self.finish(prompt),
                prompt_tokens=20,
                completion_tokens=self.tokens,
            )
            for prompt in prompts
        ]


def plan_of(ratio: float | None, n: int = 80, seed: int = 0, **asked: Any) -> TrainPlan:
    split = split_of(labelled("train", n), labelled("valid", 20))
    return make_plan(Hyperparameters(replay_ratio=ratio, **asked), split, FACTS, seed=seed)


def replay(engine: Talker, directory: Path, ratio: float | None, n: int = 80, **asked: Any) -> Replay:
    plan = plan_of(ratio, n, **asked)
    return replay_examples(plan, n, engine, "base", directory=directory, watch=Silent())  # type: ignore[arg-type]


def prompts_of(found: Replay) -> list[str]:
    return [str(example.prompt[0]["content"]) for example in found.examples]


def test_what_measures_forgetting_is_never_trained_on() -> None:
    assert (len(REPLAYED), len(HELD_BACK)) == (96, 24)
    assert len({*REPLAYED, *HELD_BACK}) == 120
    assert {prompts[-1] for prompts in KINDS.values()} == set(HELD_BACK)


def test_the_base_model_answers_greedily_and_is_learned_from_as_it_answered(tmp_path: Path) -> None:
    engine = Talker()
    found = replay(engine, tmp_path, 0.25)
    assert len(found.examples) == 20
    assert set(prompts_of(found)) <= set(REPLAYED)
    assert len(set(prompts_of(found))) == 20
    for example in found.examples:
        assert example.target == f"answer to {example.prompt[0]['content']}"
        assert (example.weights, example.line) == ((0, 1), 0)
    assert engine.models == {ModelRef(base_model="base")}
    assert engine.sampled == {Sampling(max_tokens=MAX_TOKENS, temperature=0.0)}


@pytest.mark.parametrize("ratio", [None, 0.0])
def test_without_a_ratio_nobody_is_asked_and_nothing_is_written(tmp_path: Path, ratio: float | None) -> None:
    engine = Talker()
    assert replay(engine, tmp_path, ratio).examples == ()
    assert engine.asked == []
    assert list(tmp_path.iterdir()) == []


def test_the_seed_draws_the_prompts(tmp_path: Path) -> None:
    def drawn(folder: str, seed: int) -> list[str]:
        (tmp_path / folder).mkdir()
        return prompts_of(replay(Talker(), tmp_path / folder, 0.25, seed=seed))

    assert drawn("a", 1) == drawn("b", 1)
    assert drawn("c", 2) != drawn("d", 1)


def test_an_answer_that_was_cut_or_is_empty_is_not_learned_and_another_prompt_takes_its_place(tmp_path: Path) -> None:
    engine = Talker(
        finish=lambda prompt: "length" if prompt.startswith("W") else "stop",
        text=lambda prompt: " " if prompt.startswith("G") else "yes",
    )
    found = replay(engine, tmp_path, 0.5)
    assert len(found.examples) == len(set(prompts_of(found))) == 40
    assert not any(prompt.startswith(("W", "G")) for prompt in prompts_of(found))
    left_out = [prompt for prompt in engine.asked if prompt.startswith(("W", "G"))]
    assert left_out
    assert f"{len(left_out)} of {len(engine.asked)} answers were left out" in found.sentence


def test_an_example_that_would_not_fit_into_max_length_is_left_out(tmp_path: Path) -> None:
    exact = 20 + 10 + 1  # the end of the turn
    assert len(replay(Talker(), tmp_path, 0.25, max_length=exact).examples) == 20
    with pytest.raises(InvalidValue, match=f"a max_length of {exact - 1}"):
        replay(Talker(), tmp_path, 0.25, max_length=exact - 1)


def test_a_base_model_that_ends_no_answer_cannot_be_replayed(tmp_path: Path) -> None:
    engine = Talker(finish=lambda prompt: "length")
    with pytest.raises(InvalidValue, match="base ended none of its answers to 96 general prompts") as caught:
        replay(engine, tmp_path, 0.1)
    assert caught.value.param == "hyperparameters.replay_ratio"
    assert "Leave replay_ratio out" in str(caught.value)


def test_more_examples_than_prompts_are_repetitions_and_said_to_be(tmp_path: Path) -> None:
    found = replay(Talker(), tmp_path, 0.5, n=400)
    times = Counter(prompts_of(found))
    assert (len(found.examples), len(times)) == (200, 96)
    assert set(times.values()) == {2, 3}
    assert "only 96 of them are different, each is there up to 3 times" in found.sentence
    assert "different" not in replay(Talker(), tmp_path, 0.5, n=80).sentence


def test_a_job_that_is_taken_up_again_trains_on_the_same_answers(tmp_path: Path) -> None:
    first, second = Talker(), Talker(text=lambda prompt: "something else")
    found = replay(first, tmp_path, 0.25)
    again = replay(second, tmp_path, 0.25)
    assert again == found
    assert second.asked == []
    more = replay(second, tmp_path, 0.5)
    assert more.examples[:20] == found.examples, "a fold and the whole share what was answered"
    assert len(second.asked) == 20


def test_half_a_record_is_no_record(tmp_path: Path) -> None:
    (tmp_path / FILE).with_suffix(".writing").write_text('{"version": 1, "answ')
    assert len(replay(Talker(), tmp_path, 0.25).examples) == 20
    assert [one.name for one in tmp_path.iterdir()] == [FILE]


def test_answers_of_another_base_model_are_refused(tmp_path: Path) -> None:
    replay(Talker(), tmp_path, 0.25)
    with pytest.raises(InvalidValue, match="another base model"):
        base_answers(REPLAYED[:1], Talker(), "other", directory=tmp_path, watch=Silent())  # type: ignore[arg-type]


@pytest.mark.parametrize(("ratio", "n", "rows"), [(0.25, 80, 20), (0.1, 240, 24), (1.0, 50, 50), (0.001, 80, 1)])
def test_steps_count_the_general_examples_too(tmp_path: Path, ratio: float, n: int, rows: int) -> None:
    plan = plan_of(ratio, n, n_epochs=2, batch_size=8)
    assert len(replay(Talker(), tmp_path, ratio, n).examples) == rows
    assert plan.total_steps == 2 * math.ceil((n + rows) / 8)
    assert f"steps an epoch of {n} examples and {rows} general ones" in plan.reasons["total_steps"]


def test_the_number_of_epochs_is_chosen_for_the_examples_of_the_user() -> None:
    assert plan_of(1.0).n_epochs == plan_of(None).n_epochs
    assert plan_of(1.0).lora_dropout == plan_of(None).lora_dropout
