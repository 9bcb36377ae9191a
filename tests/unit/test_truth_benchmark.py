"""The benchmark of verdicts: its traps spring as they say, its cells are judged right, and it goes on where it was."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from benchmarks import truth, truth_traps
from benchmarks.common import SHARED
from benchmarks.truth_report import is_covered, is_false_reject, is_false_ship, is_right, marks, report
from benchmarks.truth_traps import TRAPS, answer, asked, invented_facts, rows_for, solved

needs_tasks = pytest.mark.skipif(not (SHARED / "tasks").is_dir(), reason="the task files are not beside the project")


def cell(**changes: Any) -> dict[str, Any]:
    """A cell whose tuned model is 20 points better than its best prompt, and was shipped."""
    known: dict[str, Any] = {
        "name": "sms-spam",
        "n": 64,
        "seed": 0,
        "outcome": "ship",
        "because": "better",
        "ended_with": "tuned",
        "baseline": "few-shot",
        "truth_tuned": 0.9,
        "truth_rungs": {"few-shot": 0.7},
        "scores": dict.fromkeys(("best-prompt", "trl-default", "trl-advised", "three-epochs"), 0.7) | {"ours": 0.9},
        "ceiling": 0.92,
        "ceiling_unseen": 0.91,
        "verdict": {"tuned": 0.91, "interval": [0.1, 0.3]},
        "cell_seconds": 60.0,
    }
    return known | changes


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, False),
        ({"truth_tuned": 0.7}, True),
        ({"truth_tuned": 0.6}, True),
        ({"truth_tuned": 0.69, "because": "cheaper"}, False),
        ({"truth_tuned": 0.6, "because": "cheaper"}, True),
        ({"truth_tuned": 0.6, "outcome": "inconclusive"}, False),
    ],
)
def test_to_ship_what_is_no_better_is_false(changes: dict[str, Any], wrong: bool) -> None:
    assert is_false_ship(cell(**changes)) == wrong


def test_to_refuse_a_gain_is_false_unless_something_else_has_it() -> None:
    scores = cell()["scores"]
    refused = {"outcome": "dont_ship", "because": "not_better"}
    assert is_false_reject(cell(**refused, scores=scores | {"ours": 0.7}))
    assert not is_false_reject(cell(**refused, scores=scores | {"ours": 0.88})), "a classical model is as good"
    assert not is_false_reject(cell(outcome="inconclusive", scores=scores | {"ours": 0.7}))


def test_a_trap_that_is_never_to_be_shipped_is_judged_wrong_even_by_luck() -> None:
    assert not is_right(cell(name="shuffled-labels"))
    assert is_right(cell(name="shuffled-labels", outcome="inconclusive"))
    assert is_right(cell(name="noise30"))
    assert not is_right(cell(name="noise30", truth_tuned=0.6))


def test_marks_say_when_there_are_too_few_cells_to_say() -> None:
    few = {mark.name: mark for mark in marks([cell(), cell(seed=1)])}
    assert few["false ship"].verdict == "too few cells to say"
    many = [cell(seed=seed, name=name) for name in truth_traps.TASKS for seed in range(20)]
    found = {mark.name: mark for mark in marks(many)}
    assert found["false ship"].verdict == "PASS"
    assert found["ours over TRL as advised"].verdict == "PASS"
    bad = [one | {"truth_tuned": 0.6} for one in many]
    assert {mark.name: mark.verdict for mark in marks(bad)}["false ship"] == "MISSED"
    assert is_covered(cell())
    assert not is_covered(cell(truth_tuned=0.75))
    assert "**false ship**" in report(bad)


def test_a_run_goes_on_behind_finished_cells_and_an_unfinished_line(tmp_path: Path) -> None:
    out = tmp_path / "cells.jsonl"
    cells = [truth.Cell(name="sms-spam", n=64, seed=seed) for seed in range(3)]
    truth.append(out, {"key": cells[0].key})
    with out.open("a") as file:
        file.write('{"key": "half a')
    assert truth.left(cells, truth.read_cells(out)) == cells[1:]
    truth.append(out, {"key": cells[1].key})
    assert truth.left(cells, truth.read_cells(out)) == cells[2:]
    other = truth.Cell(name="sms-spam", n=64, seed=0, depth="full")
    assert truth.left([other], truth.read_cells(out)) == [other], "other settings are another cell"


def test_facts_and_words_are_drawn_anew_for_every_seed_and_alike_for_the_same() -> None:
    for spring in (invented_facts, solved):
        one, again, other = (spring(32, random.Random(seed)) for seed in (1, 1, 2))
        assert one == again
        assert one != other
        assert not {asked(row) for row in one.train} & {asked(row) for row in one.truth}
    assert all(asked(row) == answer(row) for row in solved(32, random.Random(0)).train)


@needs_tasks
@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_every_trap_has_rows_for_a_user_and_a_truth_that_they_do_not_give_away(trap: truth_traps.Trap) -> None:
    rows = rows_for(trap.name, 64, 0, truth=60)
    assert rows == rows_for(trap.name, 64, 0, truth=60)
    assert len(rows.train) == 64
    assert len(rows.truth) == 60
    assert not {asked(row) for row in rows.train} & {asked(row) for row in rows.truth}


@needs_tasks
def test_noise_and_marks_are_in_the_users_rows_alone() -> None:
    marked = rows_for("shortcut", 64, 0, truth=60)
    assert all(asked(row).startswith(("[A7]", "[B2]", "[C5]")) for row in marked.train)
    assert not any(asked(row).startswith(("[A7]", "[B2]", "[C5]")) for row in marked.truth)
    right = {
        asked(row): answer(row) for row in truth_traps.task_rows("banking12", 64, random.Random("noise30/64/0")).train
    }
    wrong = sum(answer(row) != right[asked(row)] for row in rows_for("noise30", 64, 0, truth=60).train)
    assert wrong == round(0.3 * 64)
