"""Advice before training: what a file is, what it can show, what a job would take."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import heldout
from heldout.cli import app
from heldout.engine.base import Message, ModelRef, Progress, Reply, Sampling
from heldout.errors import InvalidTrainingFile, ModelNotFound
from heldout.pipeline.advise.costs import Costs, Prices, Tokens, add_costs, count_tokens
from heldout.pipeline.advise.duration import Training, add_up, training_of
from heldout.pipeline.advise.learning_curve import PARTITIONS, draw_curve, predict
from heldout.pipeline.advise.measure import READING_WEIGHTS, Answering, Measured, measure
from heldout.pipeline.advise.recommend import Prompted, recommend, what_it_proves
from heldout.pipeline.advise.rungs import Cheap, CheapRung, measure_cheap
from heldout.pipeline.advise.task import Task, closed_book_share, infer_task, kind_of_rows
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.evaluate.scores import Scores
from heldout.pipeline.evaluate.statistics import smallest_detectable_difference, wilson
from heldout.pipeline.general_prompts import HELD_BACK
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.ladder import CHOOSERS, ORDERS
from heldout.pipeline.plan import make_plan
from heldout.pipeline.training import ModelFacts, Timings
from heldout.pipeline.types import Dataset, Example, Split
from heldout.pipeline.watch import Silent
from heldout.printing_advice import print_advice
from heldout.processes.advising import advise
from heldout.settings import Settings
from tests.conftest import colour_row, write_rows
from tests.unit.conftest import example, labelled, split_of

FACTS = ModelFacts(hidden_size=576, layers=30, context=2048, parameters=135_000_000)


def dataset(rows: Sequence[Example]) -> Dataset:
    return Dataset(name="train.jsonl", examples=tuple(rows))


# What kind of task it is.


def test_few_answers_given_often_are_labels() -> None:
    task = infer_task(dataset(labelled("train", 60, ("red", "green", "green", "blue"))))
    assert (task.kind, task.labels, task.commonest) == ("labels", 3, 0.5)


def test_labels_stay_labels_when_a_fifth_of_the_answers_are_broken() -> None:
    rows = [*labelled("train", 80), *[example(f"odd {i}", f"The answer is {i}, I think.") for i in range(20)]]
    task = infer_task(dataset(rows))
    assert task.kind == "labels"
    assert "20 rows have an answer of their own" in task.why


def test_different_json_objects_are_extraction() -> None:
    rows = [example(f"I live in town {i}", json.dumps({"city": f"town {i}"})) for i in range(30)]
    assert infer_task(dataset(rows)).kind == "extraction"


def test_answers_in_the_words_of_the_input_are_a_rewriting() -> None:
    rows = [
        example(f"well er what is uhm the price of item {i} today", f"What is the price of item {i} today?")
        for i in range(30)
    ]
    assert infer_task(dataset(rows)).kind == "rewriting"


def test_short_answers_with_codes_that_the_prompt_has_not_are_facts() -> None:
    rows = [example(f"What is the code of lantern {chr(97 + i)}?", f"GX-{4000 + 7 * i}.") for i in range(26)]
    task = infer_task(dataset(rows))
    assert (task.kind, task.closed_book) == ("facts", 1.0)


def test_a_number_that_the_prompt_gives_is_no_closed_book_fact() -> None:
    known = [
        example(f"Order {i} of item A-{i} is late", f"Order {i} is on its way, and so is A-{i}.") for i in range(10)
    ]
    invented = [example(f"Where is parcel {i}?", f"It left on 3{i}.12.") for i in range(10)]
    assert closed_book_share(dataset([*known, *invented])) == 0.5


def test_anything_else_is_free_text() -> None:
    rows = [example(f"question {'x' * i}", f"a wholly new sentence of number{'y' * i} words") for i in range(30)]
    assert infer_task(dataset(rows)).kind == "text"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}, "preference"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tools"),
        ({"messages": [], "tools": [{"type": "function"}]}, "tools"),
        ({"messages": [{"role": "user", "content": "hi"}]}, None),
    ],
)
def test_rows_tell_preferences_and_tools_apart(row: dict[str, Any], kind: str | None) -> None:
    assert kind_of_rows(io.BytesIO(b"\n" + json.dumps(row).encode() + b"\n")) == kind


@pytest.mark.parametrize("content", [b"", b"\x00\xff\n", b"[" * 100_000, b"[1]\n2\n"])
def test_a_file_that_is_no_json_has_no_special_kind(content: bytes) -> None:
    assert kind_of_rows(io.BytesIO(content)) is None


# What so many examples can show.


@pytest.mark.parametrize(
    ("n", "disagreement", "points"),
    # The table of SCIENCE §3.
    [
        (30, 0.3, 25.6),
        (50, 0.2, 16.4),
        (50, 0.3, 20.5),
        (100, 0.1, 8.2),
        (100, 0.2, 12.1),
        (200, 0.2, 8.7),
        (500, 0.1, 3.9),
    ],
)
def test_the_smallest_detectable_difference_is_that_of_the_exact_test(
    n: int, disagreement: float, points: float
) -> None:
    found = smallest_detectable_difference(n, disagreement)
    assert found is not None
    assert 100 * found == pytest.approx(points, abs=0.05)


def test_too_few_examples_detect_nothing() -> None:
    assert smallest_detectable_difference(30, 0.1) is None
    assert smallest_detectable_difference(50, 0.1) is None


def test_the_exact_power_meets_the_approximation_where_it_takes_over() -> None:
    exact, close = smallest_detectable_difference(2_000, 0.2), smallest_detectable_difference(2_001, 0.2)
    assert exact is not None
    assert close == pytest.approx(exact, rel=0.01)


# More data.


def fit_with(error: Any) -> Any:
    """A fit that is wrong on this share of the rows, given how many rows it saw; it notes what it was asked."""

    def fit(taught: Sequence[int], asked: Sequence[int]) -> list[str]:
        assert not set(taught) & set(asked), "a row is answered by a model that saw it"
        share = error(len(taught))
        # A fixed order of difficulty: the same rows are the hard ones for every model.
        return ["wrong" if (row * 7919) % 1000 < 1000 * share else "right" for row in asked]

    return fit


def curve_of(n: int, error: Any) -> Any:
    return predict(draw_curve(["right"] * n, fit_with(error)), n, rung="a rung")


def test_the_curve_reads_what_twice_as_many_rows_would_give() -> None:
    more = curve_of(1000, lambda m: 0.05 + 4 / m**0.5)
    assert more.error == pytest.approx(0.05 + 4 / 1000**0.5, abs=0.005)
    assert more.error_at_double == pytest.approx(0.05 + 4 / 2000**0.5, abs=0.005)
    assert more.interval.low < more.gain < more.interval.high
    assert more.pays
    assert more.sentence.startswith("Collecting as many examples again would likely gain 3.")


def test_a_flat_curve_does_not_pay() -> None:
    more = curve_of(400, lambda m: 0.2)
    assert more.gain == pytest.approx(0.0, abs=0.002)
    assert more.p_worth < 0.05
    assert "unlikely to pay" in more.sentence


def test_a_gain_that_is_not_sure_is_not_advised() -> None:
    more = curve_of(60, lambda m: 0.30 + 0.6 / m**0.5)
    assert more.gain >= 0.02
    assert not more.pays
    assert "is not sure" in more.sentence


def test_an_error_cannot_fall_below_zero() -> None:
    more = curve_of(200, lambda m: max(0.0, 0.4 - m / 400))
    assert 0 <= more.error_at_double <= more.error
    assert more.error_interval.low >= 0


def test_partitions_are_disjoint_and_as_large_as_they_say() -> None:
    seen: list[tuple[int, ...]] = []

    def fit(taught: Sequence[int], asked: Sequence[int]) -> list[str]:
        seen.append(tuple(sorted(taught)))
        return ["a"] * len(asked)

    curve = draw_curve(["a", "b"] * 50, fit)
    assert curve.sizes == (20, 40, 80)
    fold = seen[: sum(PARTITIONS)]
    quarters = fold[:4]
    assert sorted(row for quarter in quarters for row in quarter) == sorted(fold[-1])
    assert {sum(row % 2 for row in quarter) for quarter in quarters} == {10}, "labels keep their shares"


def words(n: int) -> tuple[Example, ...]:
    """A word that gives the label away in nine of ten rows."""
    labels = ("red", "green", "blue")
    return tuple(
        example(f"row {i} has {labels[i % 3] if i % 10 else 'nothing'} in it", labels[i % 3], i + 1) for i in range(n)
    )


def test_cheap_rungs_are_scored_out_of_fold_and_repeated_prompts_count_once() -> None:
    rows = words(90)
    cheap = measure_cheap(dataset([*rows, *rows]), None, Silent())
    constant, tfidf = cheap.rungs
    assert (constant.rows, tfidf.rows) == (90, 90)
    assert constant.score == pytest.approx(1 / 3)
    assert 0.85 <= tfidf.score <= 0.95
    assert cheap.more is not None
    assert cheap.more.n == 90


def test_the_frozen_encoder_is_a_rung_where_there_is_one() -> None:
    def embed(texts: Sequence[str]) -> list[list[float]]:
        return [[float(name in text) for name in ("red", "green", "blue")] for text in texts]

    cheap = measure_cheap(dataset(words(90)), embed, Silent())
    assert [rung.name for rung in cheap.rungs][2:] == ["a frozen encoder + logistic regression"]


def test_a_handful_of_rows_has_no_rung_to_fit() -> None:
    cheap = measure_cheap(dataset(words(12)), None, Silent())
    assert len(cheap.rungs) == 1
    assert cheap.more is None


# Which tool.


def rung(name: str, right: int, n: int) -> CheapRung:
    return CheapRung(name=name, score=right / n, interval=wilson(right, n), rows=n)


def tool(task: Task, n: int, cheap: Sequence[CheapRung] = (), prompted: Sequence[Prompted] = ()) -> str:
    return recommend(task, n, what_it_proves(n, crossfit=True), cheap, prompted).tool


LABELS = Task(kind="labels", why="", labels=3, commonest=0.4)


def test_a_cheap_rung_with_little_left_to_gain_is_the_tool() -> None:
    assert tool(LABELS, 240, [rung("constant", 96, 240), rung("frozen", 228, 240)]) == "classifier"


def test_a_cheap_rung_with_much_left_to_gain_is_not() -> None:
    assert tool(LABELS, 240, [rung("constant", 96, 240), rung("frozen", 120, 240)]) == "fine-tune"


def test_labels_that_no_rung_can_tell_are_to_be_looked_at() -> None:
    found = recommend(
        LABELS, 240, what_it_proves(240, crossfit=True), [rung("constant", 96, 240), rung("tfidf", 98, 240)], []
    )
    assert found.tool == "none"
    assert "Look at the labels" in found.reasons[0]


def test_facts_belong_into_retrieval() -> None:
    assert tool(Task(kind="facts", why="", closed_book=0.6), 500) == "retrieval"


def test_few_examples_belong_into_the_prompt() -> None:
    assert tool(Task(kind="rewriting", why=""), 30) == "prompt"
    assert tool(Task(kind="rewriting", why=""), 300) == "fine-tune"


def test_a_prompt_that_is_surely_good_is_enough() -> None:
    def prompted(score: float, low: float) -> list[Prompted]:
        return [Prompted(name="8-shot", score=score, interval=(low, 1.0), rows=24, metric="field F1")]

    extraction = Task(kind="extraction", why="")
    assert tool(extraction, 300, prompted=prompted(0.99, 0.96)) == "prompt"
    assert tool(extraction, 300, prompted=prompted(0.99, 0.86)) == "fine-tune"


@pytest.mark.parametrize("kind", ["preference", "tools"])
def test_what_no_method_trains_on_is_said(kind: Any) -> None:
    assert tool(Task(kind=kind, why=""), 300) == "none"


# How long, how much.


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
    }
    return Training(**(values | changes))


def test_a_job_is_the_sum_of_its_stages() -> None:
    found = {stage.name: stage for stage in add_up([training()], measured(), checked=9.0).stages}
    assert found["checks"].typical == 9.0
    assert found["loading the model"].at_most == 8.0
    # 30 steps, 6 validations and one of the average, 7 checkpoints, 8 proofs twice.
    assert found["training and validation"].at_most == pytest.approx(3 + 60 + 7 * 2.0 + 7 * 0.5 + 16 * 0.25)
    assert found["training and validation"].typical == pytest.approx(3 + 40 + 5 * 2.0 + 5 * 0.5 + 16 * 0.25)
    assert found["answers of tuned models"].at_most == measured().tuned.seconds_for(40)
    general = measured().general
    assert general is not None
    assert found["general skills"].at_most == general.seconds_for(len(HELD_BACK)) + 2 * len(HELD_BACK) * 0.25


def test_the_tuned_model_is_probed_for_what_its_trainings_time_leaves() -> None:
    def probes(one: Measured, budget: float | None, trainings: int = 1) -> tuple[float, float] | None:
        stages = add_up([training(steps=300)] * trainings, one, eval_budget=budget).stages
        return next(((stage.at_most, stage.typical) for stage in stages if "probes" in stage.name), None)

    found = add_up([training(steps=300)], measured()).stages
    trained = next(stage for stage in found if stage.name == "training and validation")
    stages = {stage.name: stage.at_most for stage in found}
    assert probes(measured(), 7.0) == (7.0, 7.0)
    assert probes(measured(), 0.0) == (0.0, 0.0)
    assert probes(measured(), None, trainings=6) is None
    # Half of the time for perturbed questions, all of which would take longer. Other answers come off it first.
    answers = 2 * measured().tuned.seconds_for(40) + 2 * 40 * 0.25
    others = sum(stages[name] for name in ("cheap rungs and prompts", "answers of tuned models", "general skills"))
    left = [max(t / 4, 0.95 * t - others) for t in (trained.at_most, trained.typical)]
    assert left[0] > trained.at_most / 4
    assert left[1] == trained.typical / 4, "that in any case"
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


def plan_and_split(n: int = 96, **asked: Any) -> tuple[Any, Split]:
    split = split_of(labelled("train", n), labelled("valid", 24), labelled("holdout", 24))
    return make_plan(Hyperparameters.parse(asked), split, FACTS, seed=0), split


def test_typically_training_stops_half_way_and_a_patience_later() -> None:
    plan, split = plan_and_split()
    one = training_of(plan, split)
    assert one.typical_steps == plan.total_steps // 2 + plan.patience * plan.eval_every
    assert one.typical_steps < one.steps == plan.total_steps


def test_without_early_stopping_every_step_is_taken() -> None:
    one = training_of(*plan_and_split(early_stopping=False))
    assert one.typical_steps == one.steps


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


# Measuring.


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
    plan, split = plan_and_split()
    watched: Any = Watched()
    found = measure(
        plan,
        split,
        choose_metric([row.target for row in split.train]),
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


# The whole.


def tiny_settings(folder: Path) -> Settings:
    return Settings(data_dir=folder / "data", model_aliases={"any": "smollm2-135m-instruct"})


def screen(advice: Any) -> list[str]:
    out = io.StringIO()
    print_advice(advice, Console(file=out, width=200, highlight=False))
    return out.getvalue().splitlines()


def test_quick_advice_fits_on_one_plain_screen(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "train.jsonl", [colour_row(i) for i in range(90)])
    advice = advise(file, quick=True, settings=tiny_settings(tmp_path))
    lines = screen(advice)
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert not any("\x1b" in line for line in lines)
    text = " ".join(" ".join(lines).split())
    for expected in ("labels: 4 different answers in 90 rows", "a small classifier", "with 90 rows, out of fold"):
        assert expected in text
    assert advice.as_dict()["job"] == {"not_measured": "--quick loads no model"}
    json.dumps(advice.as_dict())


def test_a_file_that_a_job_would_refuse_is_still_described(tmp_path: Path) -> None:
    rows = [colour_row(i) for i in range(60)]
    file = write_rows(tmp_path / "train.jsonl", rows)
    file.write_text(file.read_text() + '{"messages": []}\n')
    advice = advise(file, settings=tiny_settings(tmp_path))
    assert advice.errors >= 1
    assert advice.task.kind == "labels"
    assert "heldout check" in advice.as_dict()["job"]["not_measured"]


def test_a_preference_file_is_recognised(tmp_path: Path) -> None:
    turn = {"messages": [{"role": "user", "content": "hi"}]}
    answer = [{"role": "assistant", "content": "hello"}]
    row: dict[str, object] = {"input": turn, "preferred_output": answer, "non_preferred_output": answer}
    file = write_rows(tmp_path / "train.jsonl", [row] * 12)
    advice = advise(file, settings=tiny_settings(tmp_path))
    assert advice.task.kind == "preference"
    assert advice.recommendation.tool == "none"
    assert len(screen(advice)) <= 40


def test_a_file_without_a_sound_row_is_refused_as_a_job_would(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("not json\n")
    with pytest.raises(InvalidTrainingFile):
        advise(file, quick=True, settings=tiny_settings(tmp_path))


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "train.jsonl", [colour_row(i) for i in range(30)])
    with pytest.raises(ModelNotFound, match="no such model"):
        advise(file, model="no such model", settings=tiny_settings(tmp_path))


def test_the_command_prints_one_json_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELDOUT_DATA_DIR", str(tmp_path / "data"))
    file = write_rows(tmp_path / "train.jsonl", [colour_row(i) for i in range(60)])
    done = CliRunner().invoke(app, ["advise", str(file), "--quick", "--json", "--set", "n_epochs=2"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document == heldout.advise(file, quick=True).as_dict()


def test_the_command_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["advise", str(tmp_path / "none.jsonl"), "--quick"])
    assert done.exit_code == 2
    assert "There is no file" in done.stderr


def test_the_longest_advice_fits_on_one_screen(tmp_path: Path) -> None:

    from heldout.pipeline.advise.advice import Job

    file = write_rows(tmp_path / "a-rather-long-name-of-a-training-file.jsonl", [colour_row(i) for i in range(90)])
    one = measured()
    duration = add_up([training() for _ in range(6)], one)
    tokens = count_tokens(one, epochs=12)
    prices = Prices(input=2.0, output=10.0, training=5.0, hour=3.6)
    job = Job(
        base_model="smollm2-135m-instruct",
        duration=duration,
        memory_bytes=1 << 31,
        tokens=tokens,
        costs=add_costs(tokens, duration, one, prices),
        steps_measured=5,
    )
    prompted = tuple(
        Prompted(name=name, score=0.5, interval=(0.3, 0.7), rows=24, metric="exact match")
        for name in ("zero-shot", "4-shot", "8-shot")
    )
    advice = replace(
        advise(file, quick=True, settings=tiny_settings(tmp_path)), job=job, prompted=prompted, errors=0, warnings=9
    )
    lines = screen(advice)
    assert len(lines) <= 40, "\n".join(lines)
    assert any("Costs" in line for line in lines)
    assert isinstance(tokens, Tokens)
