"""What a job would take and cost, from what was measured of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heldout.engine.base import Message, ModelRef, Progress, Reply, Sampling
from heldout.pipeline.advise.costs import Costs, Prices, add_costs, count_tokens
from heldout.pipeline.advise.duration import Training, add_up, training_of
from heldout.pipeline.advise.measure import READING_WEIGHTS, Answering, Measured, measure
from heldout.pipeline.advise.rungs import Cheap
from heldout.pipeline.consequences.base import SECONDS
from heldout.pipeline.evaluate.answers import Metric, choose_metric
from heldout.pipeline.evaluate.scores import Scores
from heldout.pipeline.general_facts import FACTS as QUESTIONS
from heldout.pipeline.general_prompts import HELD_BACK
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.ladder import CHOOSERS, ORDERS
from heldout.pipeline.plan import make_plan
from heldout.pipeline.training import ModelFacts, Timings
from heldout.pipeline.types import Split
from heldout.pipeline.watch import Silent
from heldout.settings import Settings
from tests.unit.conftest import labelled, split_of

ROUGE = choose_metric(["an answer", "and another one"], "rouge_l")
FACTS = ModelFacts(hidden_size=576, layers=30, context=2048, parameters=135_000_000)


def answering(shots: int, rows: int, seconds: float, prompt: float, shared: float, answer: float = 5.0) -> Answering:
    scores = Scores(metric="m", binary=True, mean=0.5, interval=(0.4, 0.6), per_example=(), answers=())
    return Answering(
        shots=shots,
        rows=rows,
        seconds=seconds,
        prompt_tokens=prompt,
        shared_tokens=shared,
        answer_tokens=answer,
        longest=round(answer),
        scores=scores,
    )


def measured(**changes: Any) -> Measured:
    timings = Timings(
        build=3.0,
        prepare=0.0,
        step=2.0,
        validation=0.1,
        save=0.5,
        steps=5,
        tokens=10_000,
        supervised=800,
        adapter=Path("adapter"),
    )
    values: dict[str, Any] = {
        "load": 4.0,
        "plain": answering(0, 24, 24.0, 100.0, 80.0),
        "behind_shots": (answering(4, 12, 12.0, 300.0, 280.0), answering(8, 12, 24.0, 500.0, 480.0)),
        "tuned": answering(0, 24, 12.0, 100.0, 80.0),
        "reading": 0.25,
        "general": answering(0, 8, 20.0, 20.0, 0.0, answer=40.0),
        "cheap": Cheap(),
        "system_tokens": 80.0,
        "target_tokens": 4.0,
        "labels": 0,
        "timings": timings,
    }
    return Measured(**(values | changes))


def training(**changes: Any) -> Training:
    values: dict[str, Any] = {
        "train": 80,
        "valid": 20,
        "holdout": 40,
        "steps": 30,
        "typical_steps": 20,
        "search_steps": 0,
        "eval_every": 5,
        "steps_per_epoch": 10,
        "batch_size": 8,
        "by_answers": False,
    }
    return Training(**(values | changes))


def test_a_job_is_the_sum_of_its_stages() -> None:
    found = {stage.name: stage for stage in add_up([training()], measured(), checked=9.0).stages}
    assert found["checks"].typical == 9.0
    assert found["loading the model"].at_most == 8.0
    # 30 steps, 6 validations and one of the average, 7 checkpoints, 8 proofs of 4 candidates and as it is served.
    assert found["training and validation"].at_most == pytest.approx(3 + 60 + 7 * 2.0 + 7 * 0.5 + 40 * 0.25)
    assert found["training and validation"].typical == pytest.approx(3 + 40 + 5 * 2.0 + 5 * 0.5 + 32 * 0.25)
    assert found["answers that choose a checkpoint"].at_most == 0.0
    assert found["answers of tuned models"].at_most == measured().tuned.seconds_for(40)
    general = measured().general
    assert general is not None
    answers = general.seconds_for(len(HELD_BACK) + 2 * len(QUESTIONS) // 4)
    assert found["general skills"].at_most == answers + 2 * len(HELD_BACK) * 0.25


def test_the_tuned_model_is_probed_for_what_its_trainings_time_leaves() -> None:
    def probes(one: Measured, budget: float | None, trainings: int = 1) -> tuple[float, float] | None:
        stages = add_up([training(steps=300)] * trainings, one, eval_budget=budget).stages
        return next(((stage.at_most, stage.typical) for stage in stages if "probes" in stage.name), None)

    found = add_up([training(steps=300)], measured()).stages
    trained = next(stage for stage in found if stage.name == "training and validation")
    stages = {stage.name: stage.at_most for stage in found}
    assert probes(measured(), 7.0) == (7.0, 7.0)
    assert probes(measured(), 0.0) == (0.0, 0.0)
    six = probes(measured(), 1e9, trainings=6), probes(measured(), 1e9)
    assert six[0] is not None
    assert six[1] is not None
    assert six[0][0] > six[1][0], "by cross-fitting the models of all folds are asked about their own rows"
    # Half of the time for perturbed questions, all of which would take longer. Other answers come off it first.
    answers = 2 * measured().tuned.seconds_for(40) + 2 * 40 * 0.25
    others = sum(stages[name] for name in ("cheap rungs and prompts", "answers of tuned models", "general skills"))
    left = [max(SECONDS, t / 4, 0.95 * t - others) for t in (trained.at_most, trained.typical)]
    assert left[0] > trained.at_most / 4
    assert left[1] == SECONDS, "that in any case"
    assert probes(measured(), None) == pytest.approx(tuple(min(t, t / 2 + answers) for t in left))


def test_probes_that_need_less_than_their_time_end_before_it() -> None:
    def probes(one: Measured) -> float:
        return next(
            stage.typical for stage in add_up([training()], one, eval_budget=1000.0).stages if "probes" in stage.name
        )

    one = measured(tuned=answering(0, 24, 2.4, 100.0, 80.0), behind_shots=(answering(4, 12, 1.2, 300.0, 280.0),))
    tuned, four = one.tuned, one.behind_shots[0]
    needed = 8 * (tuned.seconds_for(40) + four.seconds_for(40)) + 2 * tuned.seconds_for(40) + 2 * 40 * 0.25
    assert probes(one) == pytest.approx(needed)
    # 6 labels of 4 tokens each behind 40 prompts, whose own 20 tokens are read once, many of them in one pass. Four
    # conversations in one pass read the weights once.
    labelled = replace(one, labels=6)
    assert probes(labelled) == pytest.approx(needed + 40 * 0.25 * (20 + 6 * 4) / (20 + 4 + 12 / 4))


def test_prompts_are_chosen_twice_for_each_number_of_shots() -> None:
    one = measured()
    stage = next(stage for stage in add_up([training()], one).stages if "prompts" in stage.name)
    assert one.plain is not None
    four, eight = one.behind_shots
    choosing = ORDERS * sum(prompt.seconds_for(min(CHOOSERS, 20)) for prompt in (four, eight))
    holdout = one.plain.seconds_for(40) + (four.seconds_for(40) + eight.seconds_for(40)) / 2
    assert stage.at_most == pytest.approx(choosing + holdout)


def test_what_all_rows_share_is_computed_once_and_weights_are_read_for_every_batch() -> None:
    # 480 tokens once, 20 + 5 for each row, and 5 steps of a batch that read the weights.
    one = answering(8, 10, 10.0, prompt=500.0, shared=480.0)
    steps = 5 * READING_WEIGHTS
    assert one.seconds_for(10) == 10.0
    assert one.seconds_for(20) == pytest.approx(10.0 * (480 + 500 + steps) / (480 + 250 + steps))
    assert one.seconds_for(96) == pytest.approx(10.0 * (480 + 2400 + 2 * steps) / (480 + 250 + steps))
    assert one.seconds_for(0) == 0.0


def test_six_trainings_take_six_times_as_long_and_the_last_one_answers_nothing() -> None:
    folds = [training(holdout=8) for _ in range(5)]
    duration = add_up([*folds, training(valid=0, holdout=0)], measured())
    assert (duration.trainings, duration.steps) == (6, 180)
    answers = next(stage for stage in duration.stages if "tuned" in stage.name)
    assert answers.at_most == pytest.approx(5 * measured().tuned.seconds_for(8))


def test_answers_that_choose_a_checkpoint_are_part_of_training() -> None:
    stages = add_up([training(by_answers=True)], measured()).stages
    found = {stage.name: stage for stage in stages}["answers that choose a checkpoint"]
    # All 20 rows of valid: by 4 candidates at most, typically by 3.
    assert found.at_most == measured().tuned.seconds_for(4 * 20)
    assert found.typical == measured().tuned.seconds_for(3 * 20)
    many = training(by_answers=True, valid=1000, steps=100)
    assert many.candidate_answers == 4 * 100, "half of the 800 rows that training takes"


def plan_and_split(n: int = 96, **asked: Any) -> tuple[Any, Split, Metric]:
    split = split_of(labelled("train", n), labelled("valid", 24), labelled("holdout", 24))
    metric = choose_metric([row.target for row in split.train])
    return make_plan(Hyperparameters.parse(asked), split, FACTS, seed=0), split, metric


def test_typically_training_stops_half_way_and_a_patience_later() -> None:
    plan, split, metric = plan_and_split()
    one = training_of(plan, split, metric)
    assert one.typical_steps == plan.total_steps // 2 + plan.patience * plan.eval_every
    assert one.typical_steps < one.steps == plan.total_steps


def test_without_early_stopping_every_step_is_taken() -> None:
    one = training_of(*plan_and_split(early_stopping=False))
    assert one.typical_steps == one.steps


def test_candidates_answer_where_training_does_not_know_the_score() -> None:
    plan, split, labels = plan_and_split()
    assert not training_of(plan, split, labels).by_answers
    assert training_of(plan, split, ROUGE).by_answers
    assert not training_of(plan, replace(split, valid=()), ROUGE).by_answers, "there are none"
    fold = replace(plan, kept_shares=(0.5, 1.0))
    assert not training_of(fold, split, ROUGE).by_answers, "all folds choose together"


def test_tokens_that_a_tuned_model_saves() -> None:
    tokens = count_tokens(measured(), epochs=3)
    assert (tokens.per_epoch, tokens.supervised, tokens.epochs) == (10_000, 800, 3)
    assert (tokens.shots, tokens.with_shots, tokens.plain, tokens.without_system) == (8, 500, 100, 20)
    assert tokens.saved == 480


def cost(**prices: float) -> Costs | None:
    one = measured()
    return add_costs(count_tokens(one, epochs=3), add_up([training()], one), one, Prices(**prices))


def test_costs_on_both_sides() -> None:
    costs = cost(input=2.0, output=10.0, training=5.0, hour=3.6)
    assert costs is not None
    assert costs.hosted_training == pytest.approx(5.0 * 30_000 / 1e6)
    assert costs.hosted_calls == pytest.approx(1000 * (2.0 * 500 + 10.0 * 4) / 1e6)
    assert costs.hosted_calls_short == pytest.approx(1000 * (2.0 * 20 + 10.0 * 4) / 1e6)
    assert costs.here_training == pytest.approx(add_up([training()], measured()).typical / 1000)
    assert costs.here_calls == pytest.approx(measured().tuned.seconds_for(1000) / 1000)


def test_a_price_that_is_not_given_leaves_its_cost_out() -> None:
    assert cost() is None
    costs = cost(input=2.0)
    assert costs is not None
    assert (costs.hosted_calls, costs.here_training) == (None, None), "an answer's price is missing"


def test_prices_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELDOUT_PRICE_HOUR", "1.5")
    monkeypatch.setenv("HELDOUT_PRICE_INPUT", "")
    settings = Settings()
    assert (settings.price_hour, settings.price_input) == (1.5, None)


class Watched:
    """An engine and a trainer that note what they are asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[ModelRef, tuple[str, ...], int | None]] = []
        self.trained: list[Split] = []

    def chat(
        self,
        model: ModelRef,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
    ) -> list[Reply]:
        self.asked.append((model, tuple(one[-1]["content"] for one in conversations), sampling.max_tokens))
        tokens = [sum(len(message["content"].split()) for message in one) for one in conversations]
        return [Reply(text="red", finish_reason="stop", prompt_tokens=n, completion_tokens=1) for n in tokens]

    def log_probs(
        self, model: ModelRef, conversations: Sequence[Sequence[Message]], progress: Progress | None = None
    ) -> list[float]:
        return [0.0] * len(conversations)

    def count_tokens(self, base_model: str, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def close(self) -> None: ...

    def time_steps(self, plan: Any, split: Split, *, base_model: str, directory: Path, seconds: float) -> Timings:
        self.trained.append(split)
        return measured().timings


def test_the_holdout_is_not_asked_while_measuring() -> None:
    plan, split, metric = plan_and_split()
    watched: Any = Watched()
    found = measure(
        plan,
        split,
        metric,
        FACTS,
        watched,
        watched,
        base_model="base",
        max_tokens=9,
        cheap=Cheap(),
        directory=Path("unused"),
        seconds=1.0,
        watch=Silent(),
    )
    questions = {question for _, asked, _ in watched.asked for question in asked}
    assert questions
    assert not any("holdout" in question for question in questions)
    assert [one.shots for one in found.behind_shots] == [4, 8]
    model, _, limit = watched.asked[-1]
    assert model.adapter == "adapter"
    assert limit == 2, "as long as the training answers, and the end of the turn"
    assert found.system_tokens == 1.0
