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
from heldout.errors import InvalidTrainingFile, ModelNotFound
from heldout.pipeline.advise.costs import Prices, Tokens, add_costs, count_tokens
from heldout.pipeline.advise.duration import add_up
from heldout.pipeline.advise.recommend import Prompted, recommend, what_it_proves
from heldout.pipeline.advise.rungs import CheapRung
from heldout.pipeline.advise.task import Task
from heldout.pipeline.evaluate.statistics import smallest_detectable_difference, wilson
from heldout.printing_advice import print_advice
from heldout.processes.advising import advise
from heldout.settings import Settings
from tests.conftest import colour_row, write_rows
from tests.unit.test_advise_duration import measured, training

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
