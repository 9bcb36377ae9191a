"""Rows that are too long for a model, or for their file."""

from __future__ import annotations

from collections.abc import Sequence

from heldout.engine.catalogue import CHAT, ENCODER
from heldout.engine.labels import text_of
from heldout.pipeline.checks import ModelTools, Parts
from heldout.pipeline.checks.length import find_cut_answers, find_overlong_examples, find_too_long
from heldout.pipeline.types import Dataset, Example

from .conftest import example, labelled


def dataset(*rows: Example, name: str = "train.jsonl") -> Dataset:
    return Dataset(name=name, examples=rows)


def words(examples: Sequence[Example]) -> list[int]:
    """A tokenizer whose tokens are words, and a template that refuses a row that says so."""
    return [
        0 if "refuse" in one.target else sum(len(str(message["content"]).split()) for message in one.messages)
        for one in examples
    ]


def conversation(turns: int, line: int = 1) -> Example:
    messages = tuple({"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(turns))
    return Example(messages=messages, weights=(0,) * (turns - 1) + (1,), line=line)


CHAT_MODEL = ModelTools(kind=CHAT, limit=49, count_tokens=words)


def test_chat_rows_beyond_the_limit_are_an_error_in_every_file():
    long = example(" ".join(["word"] * 60), "yes", 21)
    parts = Parts(train=dataset(*labelled("t", 20)), valid=dataset(long, name="valid.jsonl"), model=CHAT_MODEL)
    error = next(finding for finding in find_too_long(parts) if finding.severity == "error")
    assert (error.code, error.file, error.lines) == ("too_long", "valid.jsonl", (21,))
    assert "1 of 1 rows are longer than max_length (49 tokens): line 21 (62 tokens)." in error.message


def test_a_row_of_just_the_limit_is_fine():
    exactly = example(" ".join(["word"] * 47), "yes", 1)
    findings = list(find_too_long(Parts(train=dataset(exactly), model=CHAT_MODEL)))
    assert [(finding.code, finding.severity) for finding in findings] == [("token_counts", "note")]
    assert "the longest 49" in findings[0].message


def test_rows_that_the_template_refuses_are_named():
    findings = list(
        find_too_long(Parts(train=dataset(*labelled("t", 20), example("x", "refuse", 21)), model=CHAT_MODEL))
    )
    assert [(one.code, one.lines) for one in findings if one.lines] == [("not_in_template", (21,))]


def test_an_encoder_does_not_read_a_system_prompt_that_all_rows_share():
    def count(examples: Sequence[Example]) -> list[int]:
        return [len(text_of(one.prompt, with_system=True).split()) for one in examples]

    long = example(" ".join(["word"] * 50), "yes", 21)
    rows = (*labelled("t", 20, ("yes", "no")), long)
    tools = ModelTools(kind=ENCODER, limit=49, count_tokens=count)
    (error, _) = find_too_long(Parts(train=dataset(*rows), model=tools))
    assert (error.code, error.severity, error.lines) == ("too_long", "error", (21,))
    fitting = ModelTools(kind=ENCODER, limit=50, count_tokens=count)
    assert [one.code for one in find_too_long(Parts(train=dataset(*rows), model=fitting))] == ["token_counts"]


def test_without_a_model_lengths_are_estimated_and_only_noted():
    long = example("ab " * 6_000, "yes", 3)
    (finding,) = find_too_long(Parts(train=dataset(example("a", "b", 1), long)))
    assert (finding.code, finding.severity, finding.lines) == ("too_long", "note", (3,))
    assert "4 characters each" in finding.message
    assert list(find_too_long(Parts(train=dataset(example("ab " * 5_000, "yes", 3))))) == []


def test_rows_that_stand_out_by_their_length_are_one_warning():
    usual = [
        example("How do I change the filter of my coffee machine? " * (1 + i % 3), "Open it.", i + 1) for i in range(40)
    ]
    rows = (*usual, example("log " * 900, "Open it.", 50), example("short", "bla " * 2_000, 51), conversation(60, 52))
    (finding,) = find_overlong_examples(Parts(train=dataset(*rows)))
    assert (finding.code, finding.severity, finding.lines) == ("overlong_example", "warning", (50, 51, 52))
    assert "60 turns" in finding.message


def test_lengths_that_vary_widely_have_no_outlier():
    rows = [example("word " * (3 << (i % 9)), "fine", i + 1) for i in range(90)]
    assert list(find_overlong_examples(Parts(train=dataset(*rows)))) == []


def test_a_second_kind_of_long_rows_is_no_outlier():
    rows = [example("word " * (2_000 if i % 5 == 0 else 5), "fine", i + 1) for i in range(60)]
    assert list(find_overlong_examples(Parts(train=dataset(*rows)))) == []


def test_a_row_ten_times_as_long_that_is_still_short_is_no_outlier():
    rows = [example("hi there you", "fine", i + 1) for i in range(60)]
    assert list(find_overlong_examples(Parts(train=dataset(*rows, example("word " * 300, "fine", 61))))) == []


def test_holdout_answers_that_no_model_may_write_to_the_end_are_named():
    train = dataset(*(example(f"q{i}", "x" * 100, i + 1) for i in range(20)))
    holdout = dataset(example("a", "x" * 141, 1), example("b", "x" * 142, 2), name="holdout.jsonl")
    (finding,) = find_cut_answers(Parts(train=train, holdout=holdout))
    assert (finding.code, finding.file, finding.lines) == ("answer_cut", "holdout.jsonl", (2,))
    assert list(find_cut_answers(Parts(train=train))) == []
