"""What kind of task a file holds, and what it cannot be."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import pytest

from heldout.pipeline.advise.task import closed_book_share, infer_task, kind_of_rows
from heldout.pipeline.types import Dataset, Example
from tests.unit.conftest import example, labelled


def dataset(rows: Sequence[Example]) -> Dataset:
    return Dataset(name="train.jsonl", examples=tuple(rows))


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
