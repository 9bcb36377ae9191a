"""Answers that are labels: read from the file's form and written back letter for letter; others are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from heldout.engine.catalogue import CHAT, ENCODER
from heldout.engine.labels import Label, Labels, read_label, text_of, varies_in_system
from heldout.errors import InvalidTrainingFile
from heldout.pipeline.checks import ModelTools, Parts, check
from heldout.pipeline.types import Dataset, Example, Finding
from tests.unit.conftest import example, labelled

COLOURS = ('{"colour":"red"}', '{"colour":"blue"}')


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("refund", Label(None, "refund")),
        (" refund\n", Label(None, "refund")),
        ('{"topic": "refund"}', Label("topic", "refund")),
        ('{"spam":true}', Label("spam", "true")),
        ("[NAME] is angry", Label(None, "[NAME] is angry")),
        ("3", Label(None, "3")),
        ('{"topic":"a","also":"b"}', None),
        ('{"topic":["a"]}', None),
        ('["a"]', None),
        ("{}", None),
    ],
)
def test_a_label_is_bare_text_or_the_one_value_of_an_object(answer: str, label: Label | None) -> None:
    assert read_label(answer) == label


@pytest.mark.parametrize("answers", [("yes", "no", "maybe"), COLOURS, ('{ "a" : "ü \\u00fc" }', '{"a":"x"}')])
def test_an_answer_comes_back_letter_for_letter(answers: tuple[str, ...]) -> None:
    labels = Labels.of(answers * 3)
    for answer in answers:
        index = labels.index(answer)
        assert index is not None
        assert labels.answers[index] == answer


def test_of_two_spellings_the_commoner_is_answered() -> None:
    labels = Labels.of(['{"a": "x"}', '{"a":"x"}', '{"a":"x"}', '{"a":"y"}'])
    assert (labels.names, labels.answers) == (("x", "y"), ('{"a":"x"}', '{"a":"y"}'))
    assert labels.index('{"a": "x"}') == labels.index('{"a":"x"}') == 0


def test_what_is_no_known_answer_has_no_index() -> None:
    labels = Labels.of(COLOURS)
    assert [labels.index(one) for one in ("red", '{"color":"red"}', '{"colour":"green"}', "{}")] == [None] * 4


@pytest.mark.parametrize("answers", [["a", "a"], ["a", '{"k":"b"}'], ["a", "{}"]])
def test_labels_cannot_be_made_of_one_answer_or_of_two_forms(answers: list[str]) -> None:
    with pytest.raises(InvalidTrainingFile):
        Labels.of(answers)


def test_a_system_prompt_is_read_only_where_it_tells_rows_apart() -> None:
    def prompt(system: str) -> list[dict[str, Any]]:
        return [{"role": "system", "content": system}, {"role": "user", "content": "hello"}]

    assert not varies_in_system([prompt("a"), prompt("a")])
    assert varies_in_system([prompt("a"), prompt("b")])
    assert text_of(prompt("a"), with_system=False) == "hello"
    assert text_of(prompt("a"), with_system=True) == "system: a\nuser: hello"


def refused(parts: Parts, kind: str | None = ENCODER) -> list[Finding]:
    return [one for one in check(replace(parts, model=ModelTools(kind=kind))) if one.code == "answers_are_no_labels"]


def files(answers: tuple[str, ...], n: int = 30, **others: tuple[str, ...]) -> Parts:
    def dataset(name: str, chosen: tuple[str, ...]) -> Dataset:
        return Dataset(name=name, examples=labelled(name, n, chosen))

    return Parts(train=dataset("train", answers), **{part: dataset(part, one) for part, one in others.items()})


@pytest.mark.parametrize("answers", [("yes", "no"), COLOURS, tuple(f"intent_{i}" for i in range(10))])
def test_labels_are_not_refused(answers: tuple[str, ...]) -> None:
    assert refused(files(answers, valid=answers, holdout=answers)) == []


@pytest.mark.parametrize(
    ("answers", "says", "lines"),
    [
        (('{"a":"x","b":"y"}', '{"a":"x","b":"z"}'), "one key", 30),
        (("yes", '{"a":"no"}', "maybe"), "bare text", 10),
        (('{"a":"x"}', '{"a":"y"}', '{"b":"z"}'), '{"a": label}', 10),
        (tuple(f"a text of its own, number {i}" for i in range(30)), "30 of them only once", 0),
        (("always",), "nothing to tell apart", 0),
        (("a" * 121, "b"), "longer than 120", 15),
    ],
)
def test_what_are_no_labels_is_refused_with_its_lines(answers: tuple[str, ...], says: str, lines: int) -> None:
    (finding,) = refused(files(answers))
    assert says in finding.message
    assert (finding.severity, finding.file, len(finding.lines)) == ("error", "train", lines)
    assert refused(files(answers), kind=CHAT) == refused(files(answers), kind=None) == []


def test_another_form_in_the_validation_file_is_refused_there() -> None:
    (finding,) = refused(files(COLOURS, valid=("red", "blue")))
    assert (finding.file, len(finding.lines)) == ("valid", 30)


def test_rows_with_several_answers_to_learn_are_refused() -> None:
    one = example("a?", "yes", 7)
    two = Example(messages=(*one.messages, *one.messages[1:]), weights=(0, 0, 1, 0, 1), line=8)
    masked = Example(messages=two.messages, weights=(0, 0, 0, 0, 1), line=9)
    rows = (*labelled("t", 20, ("yes", "no")), one, two, masked)
    (finding,) = refused(Parts(train=Dataset(name="train", examples=rows)))
    assert finding.lines == (8,)
