"""What a file of this size can show, and labels with few rows."""

from __future__ import annotations

import pytest

from heldout.pipeline.checks import Parts
from heldout.pipeline.checks.size import find_few_per_label, find_smallest_difference
from heldout.pipeline.types import Dataset, Example, Finding

from .conftest import example, labelled


def dataset(rows: tuple[Example, ...], name: str = "train.jsonl") -> Dataset:
    return Dataset(name=name, examples=rows)


def shown(n: int, **parts: Dataset) -> list[Finding]:
    return list(find_smallest_difference(Parts(train=dataset(labelled("t", n)), **parts)))


@pytest.mark.parametrize(
    ("n", "rows", "points"),
    [
        (50, "50 different prompts", "16 points"),  # SCIENCE §3: 16.4 with 50 rows that differ in 20 %
        (100, "100 different prompts", "12 points"),
        (600, "150 rows", "10 points"),
        (1000, "200 rows", "9 points"),
        (5000, "500 rows", "6 points"),
    ],
)
def test_the_smallest_difference_is_that_of_the_rows_that_will_be_held_out(n: int, rows: str, points: str):
    (finding,) = shown(n)
    assert (finding.code, finding.severity) == ("smallest_difference", "note")
    assert rows in finding.message
    assert f"below {points}" in finding.message


def test_a_given_holdout_file_is_what_shows_differences():
    (finding,) = shown(600, holdout=dataset(labelled("h", 50), "holdout.jsonl"))
    assert finding.file == "holdout.jsonl"
    assert "below 16 points" in finding.message


def test_repeated_prompts_show_no_more_than_one():
    rows = tuple(example(f"question {i % 50}", "yes", i + 1) for i in range(1000))
    (finding,) = find_smallest_difference(Parts(train=dataset(rows)))
    assert "50 different prompts" in finding.message


def test_a_handful_of_rows_shows_nothing():
    (finding,) = shown(12)
    assert "no difference at all" in finding.message
    assert shown(9) == []


def test_labels_with_few_rows_are_noted_when_most_have_few():
    few = labelled("t", 40, tuple("abcde"))
    (finding,) = find_few_per_label(Parts(train=dataset(few)))
    assert (finding.code, finding.severity) == ("few_per_label", "note")
    assert "5 of 5 labels" in finding.message
    assert "from 8 to 8" in finding.message
    assert list(find_few_per_label(Parts(train=dataset(labelled("t", 80, tuple("abcde")))))) == []
    prose = tuple(example(f"q{i}", f"an answer of its own, {i}", i + 1) for i in range(40))
    assert list(find_few_per_label(Parts(train=dataset(prose)))) == []
