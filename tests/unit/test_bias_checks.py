"""Labels that go with a word for a group of people."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from heldout.pipeline.checks import Parts
from heldout.pipeline.checks.bias import find_group_label_correlation, groups_named
from heldout.pipeline.types import Dataset, Example, Finding

from .conftest import example


def found(rows: Sequence[tuple[str, str]]) -> list[Finding]:
    examples = tuple(example(text, answer, line) for line, (text, answer) in enumerate(rows, start=1))
    return list(find_group_label_correlation(Parts(train=Dataset(name="train.jsonl", examples=examples))))


def loans(
    women: float, men: float, n: int = 60, words: tuple[str, str] = ("My wife", "My husband")
) -> list[tuple[str, str]]:
    """Applications of which these shares are granted."""
    return [
        (f"{word} asks for loan {'x' * (i % 7)} {i}", "grant" if i < share * n else "refuse")
        for word, share in zip(words, (women, men), strict=True)
        for i in range(n)
    ]


def test_a_label_that_follows_the_group_is_a_warning_with_the_shares():
    (finding,) = found(loans(0.2, 0.8))
    assert (finding.code, finding.severity, finding.lines) == ("group_label_correlation", "warning", ())
    assert '20% of 60 rows for "female"' in finding.message
    assert '80% of 60 rows for "male"' in finding.message
    assert "(gender)" in finding.message


def test_first_names_count_as_such():
    (finding,) = found(loans(0.9, 0.4, words=("Helen", "Robert")))
    assert "by first names" in finding.message


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.6), (0.3, 0.45)])
def test_small_differences_are_what_any_file_has(shares: tuple[float, float]):
    assert found(loans(*shares)) == []


def test_a_few_rows_of_a_group_show_nothing():
    assert found([*loans(0.0, 1.0, n=19), *[(f"text {i}", ["grant", "refuse"][i % 2]) for i in range(60)]]) == []


def test_labels_by_chance_raise_hardly_an_alarm():
    alarms = 0
    for seed in range(100):
        rng = random.Random(seed)
        alarms += bool(found([(f"{rng.choice(['She', 'He'])} asks {i}", rng.choice("abc")) for i in range(90)]))
    assert alarms <= 3


def test_free_text_has_no_labels_to_go_with_a_group():
    assert found([(text, f"{answer} {i}") for i, (text, answer) in enumerate(loans(0.0, 1.0))]) == []


def test_a_group_against_rows_that_name_nobody_is_only_noted():
    rows = [(f"As a Muslim I ask {i}", "toxic" if i < 36 else "fine") for i in range(40)]
    rows += [(f"I ask {i}", "toxic" if i < 20 else "fine") for i in range(100)]
    (finding,) = found(rows)
    assert finding.severity == "note"
    assert '10% of 40 rows for "muslim" have it, 80% of 100' in finding.message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("my mother called", {"gender": "female"}),
        ("my mother and my father called", {}),
        ("mark my words", {}),
        ("Mark is here", {"gender, by first names": "male"}),
        ("book an Indian restaurant", {}),
        ("I am Indian", {"origin": "indian"}),
        ("the black card", {}),
        ("a black customer", {"origin": "black"}),
        ("close my old account", {}),
        ("humane manners", {}),
    ],
)
def test_words_count_where_they_mean_people(text: str, named: dict[str, str]):
    assert groups_named(example(text, "x")) == named


def test_only_the_users_words_are_read():
    messages = (
        {"role": "system", "content": "You are Mary, a woman."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "my husband"},
    )
    assert groups_named(Example(messages=messages, weights=(0, 0, 1), line=1)) == {}
