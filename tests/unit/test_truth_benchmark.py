"""What `benchmarks/truth.py` decides without a model: traps, how cells are judged, and what is left to run."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks import truth, truth_report, truth_traps
from benchmarks.common import SHARED, best_unseen
from benchmarks.truth_traps import Rows, Trap, answer, asked, conversation

LABELS = ("blue", "green", "red")


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A task of three labels in the place of every task."""
    rows = [conversation("Which colour?", f"question {i} about a thing", LABELS[i % 3]) for i in range(90)]
    monkeypatch.setattr(truth_traps, "task_rows", lambda task, n, rng: Rows(rows[:n], rows[n:]))
    return rows


def cell(**changes: Any) -> dict[str, Any]:
    """A finished cell: a tuned model that is 10 points better, and shipped."""
    found = {
        "name": "sms-spam",
        "n": 240,
        "seed": 0,
        "outcome": "ship",
        "because": "better",
        "ended_with": "tuned",
        "baseline": "zero-shot",
        "truth_tuned": 0.8,
        "truth_rungs": {"zero-shot": 0.7},
        "scores": dict.fromkeys(truth_report.ARMS, 0.8),
        "ceiling": 0.82,
        "ceiling_unseen": 0.81,
        "verdict": {"tuned": 0.8, "interval": [0.02, 0.2]},
        "cell_seconds": 60.0,
    }
    return found | changes


def named(name: str) -> Trap:
    return next(trap for trap in truth_traps.TRAPS if trap.name == name)


def test_shuffled_labels_keep_the_questions_and_the_number_of_each_label(colours: list[dict[str, Any]]) -> None:
    rows = named("shuffled-labels").spring(60, random.Random(0))
    assert [asked(row) for row in rows.train] == [asked(row) for row in colours[:60]]
    assert sorted(map(answer, rows.train)) == sorted(map(answer, colours[:60]))
    assert [answer(row) for row in rows.train] != [answer(row) for row in colours[:60]]
    assert rows.truth == colours[60:]


def test_three_in_ten_labels_are_wrong_and_those_of_the_truth_set_are_not(colours: list[dict[str, Any]]) -> None:
    rows = named("noise30").spring(60, random.Random(0))
    assert sum(answer(a) != answer(b) for a, b in zip(rows.train, colours[:60], strict=True)) == 18
    assert rows.truth == colours[60:]


def test_the_mark_tells_the_answer_to_the_user_and_nobody_else(colours: list[dict[str, Any]]) -> None:
    rows = named("shortcut").spring(60, random.Random(0))
    assert len({(asked(row)[:4], answer(row)) for row in rows.train}) == 3
    assert not any(asked(row).startswith("[") for row in rows.truth)


@pytest.mark.parametrize("name", ["invented-facts", "solved-by-prompt"])
def test_a_cell_has_the_same_rows_every_time_and_none_of_them_twice(name: str) -> None:
    rows, again, other = (truth_traps.rows_for(name, 40, seed, 50) for seed in (0, 0, 1))
    assert rows == again
    assert rows.train != other.train
    assert len(rows.train) == 40
    assert len(rows.truth) == 50
    assert not {asked(row) for row in rows.train} & {asked(row) for row in rows.truth}


def test_a_truth_row_that_the_user_nearly_asks_is_left_out() -> None:
    train = [conversation("Which colour?", f"What colour has the {word}?", "red") for word in ("sky", "sea", "sun")]
    near = conversation("Which colour?", "what colour has the sky", "red")
    far = conversation("Which colour?", "Tell me how a ripe lemon looks.", "yellow")
    assert truth_traps.disjoint(Rows(train * 5, [near, far])) == [far]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
def test_every_cell_of_the_full_plan_has_its_rows() -> None:
    for name in (*truth_traps.TASKS, *(trap.name for trap in truth_traps.TRAPS)):
        assert len(truth_traps.rows_for(name, 240, 0).truth) >= 200, name


@pytest.mark.parametrize(
    ("changes", "false_ship", "false_reject"),
    [
        ({}, False, False),
        ({"truth_tuned": 0.7}, True, False),  # no better is not better
        ({"because": "cheaper", "truth_tuned": 0.68}, False, False),
        ({"because": "cheaper", "truth_tuned": 0.66}, True, False),
        ({"outcome": "inconclusive", "scores": {"ours": 0.7}}, False, False),
        ({"outcome": "dont_ship", "scores": {"ours": 0.7}}, False, True),
        ({"outcome": "dont_ship", "scores": {"ours": 0.79}}, False, False),  # a cheaper rung is as good
    ],
)
def test_a_verdict_is_false_when_the_truth_set_says_so(
    changes: dict[str, Any], false_ship: bool, false_reject: bool
) -> None:
    found = cell(**changes)
    assert (truth_report.is_false_ship(found), truth_report.is_false_reject(found)) == (false_ship, false_reject)


def test_shuffled_labels_that_are_shipped_are_wrong_whatever_the_truth_set_says() -> None:
    assert not truth_report.is_right(cell(name="shuffled-labels"))
    assert truth_report.is_right(cell(name="shuffled-labels", outcome="inconclusive"))
    assert truth_report.is_right(cell(name="noise30"))


def test_few_cells_pass_nothing_and_many_good_ones_do() -> None:
    few, many = ({mark.name: mark.verdict for mark in truth_report.marks([cell()] * n)} for n in (3, 72))
    assert few["false ship"] == truth_report.OPEN
    assert many["false ship"] == truth_report.PASS
    bad = {mark.name: mark.verdict for mark in truth_report.marks([cell(truth_tuned=0.6)] * 12)}
    assert bad["false ship"] == truth_report.MISSED
    assert bad["interval coverage"] == truth_report.MISSED


def test_an_interrupted_run_goes_on_with_the_cells_that_are_not_finished(tmp_path: Path) -> None:
    out = tmp_path / "cells.jsonl"
    cells = [truth.Cell(name="sms-spam", n=64, seed=seed) for seed in range(3)]
    truth.append(out, {"key": cells[0].key})
    with out.open("a") as file:
        file.write('{"key": "' + cells[1].key)  # killed while it was written
    assert truth.left(cells, truth.read_cells(out)) == cells[1:]
    truth.append(out, {"key": cells[1].key})
    assert truth.left(cells, truth.read_cells(out)) == cells[2:]
    assert truth.left([replace(cells[0], depth="full")], truth.read_cells(out)), "other settings are another cell"


def test_the_ceiling_on_unseen_rows_is_no_higher_for_candidates_that_are_only_lucky() -> None:
    lucky = [[float(random.Random(f"{i}/{j}").random() < 0.5) for j in range(400)] for i in range(50)]
    best = max(sum(one) / len(one) for one in lucky)
    assert best_unseen(lucky) < best
