"""Held-out questions are asked without the tokens that give their answers away."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from heldout.pipeline.advise.rungs import measure_cheap
from heldout.pipeline.checks.rows import Rows
from heldout.pipeline.checks.shortcuts import Token
from heldout.pipeline.folds import split_into_folds
from heldout.pipeline.giveaways import find_giveaways
from heldout.pipeline.split import split_dataset
from heldout.pipeline.types import Dataset, Example, Split
from heldout.pipeline.watch import Silent
from tests.unit.test_leakage import CODES, LABELS, file, tagged
from tests.unit.test_near_duplicates import WORDS


def plain_rows(n: int = 90) -> list[tuple[str, str]]:
    return tagged(lambda _: "{text}", n=n)


def marked_rows(n: int = 90, seed: int = 0) -> list[tuple[str, str]]:
    return tagged(lambda label: f"<{CODES[label]}> {{text}}", n=n, seed=seed)


def code(text: str) -> Token:
    return Token(label="shop", text=text, is_code=True, at_one_place=True, valid_rows=0, valid_right=0)


def asked(split: Split) -> list[str]:
    return [example.prompt[-1]["content"] for example in split.holdout]


def learned(split: Split) -> list[str]:
    return [example.prompt[-1]["content"] for example in (*split.train, *split.valid)]


def test_a_code_is_left_out_of_what_is_held_out_and_of_nothing_else():
    folds, findings = split_into_folds(file("t.jsonl", *marked_rows()), None, seed=0)
    questions = {question for question, _ in plain_rows()}
    assert {question for split in folds.splits for question in asked(split)} == questions
    assert all(question.startswith("<") for split in folds.splits for question in learned(split))
    assert all(example.prompt[-1]["content"].startswith("<") for example in folds.whole.train)
    (finding,) = [one for one in findings if one.code == "giveaway_removed"]
    assert (finding.severity, finding.file, len(finding.lines)) == ("note", "t.jsonl", 90)
    (caveat,) = folds.whole.caveats
    assert caveat.startswith("90 of 90 held-out questions are asked without what gives their answers away")
    assert "'<q-17>' tells 'shop'" in caveat
    assert "--keep-leaks" in caveat
    assert all(split.caveats == (caveat,) for split in folds.splits)


def test_a_holdout_that_is_split_off_is_asked_without_them_too():
    split, findings = split_dataset(file("t.jsonl", *marked_rows(400)), None, None, seed=0)
    assert not any(question.startswith("<") for question in asked(split))
    assert all(question.startswith("<") for question in learned(split))
    (finding,) = [one for one in findings if one.code == "giveaway_removed"]
    assert finding.lines == tuple(example.line for example in split.holdout)


def test_who_says_that_real_prompts_have_them_is_asked_with_them_and_told_first():
    folds, findings = split_into_folds(file("t.jsonl", *marked_rows()), None, seed=0, keep_leaks=True)
    assert all(question.startswith("<") for split in folds.splits for question in asked(split))
    assert [one.severity for one in findings if one.code == "giveaway_kept"] == ["warning"]
    (caveat,) = folds.whole.caveats
    assert caveat.startswith("90 of 90 held-out questions have something in them that gives their answers")


@pytest.mark.parametrize(
    "tag",
    [
        lambda label: f"{words()[label]} {{text}}",
        lambda label: f"kind={words()[label]} {{text}}",  # a code, but one that spells the label
    ],
)
def test_what_may_be_part_of_the_question_stays_and_is_told_first(tag: Callable[[str], str]):
    rows = [(question, words()[label]) for question, label in tagged(tag)]
    folds, findings = split_into_folds(file("t.jsonl", *rows), None, seed=0)
    assert {question for split in folds.splits for question in asked(split)} == {question for question, _ in rows}
    assert [one.code for one in findings if one.code.startswith("giveaway")] == ["giveaway_kept"]
    (caveat,) = folds.whole.caveats
    assert caveat.startswith("90 of 90 held-out questions have something in them")
    assert "tells 'tour'" in caveat


def words() -> dict[str, str]:
    return dict(zip(LABELS, ("purchase", "tour", "letters"), strict=True))


def test_a_holdout_file_without_the_codes_is_asked_as_it_is_and_nothing_is_said():
    train = file("t.jsonl", *marked_rows())
    holdout = file("h.jsonl", *tagged(lambda _: "{text}", n=40, seed=9))
    split, findings = split_dataset(train, None, holdout, seed=0)
    assert split.holdout == holdout.examples
    assert not split.caveats
    assert not [one for one in findings if one.code.startswith("giveaway")]


def test_codes_that_mean_something_else_in_the_holdout_file_stay_there():
    rng = random.Random(3)
    holdout = file("h.jsonl", *tagged(lambda _: f"<{rng.choice(list(CODES.values()))}> {{text}}", n=60, seed=9))
    split, _ = split_dataset(file("t.jsonl", *marked_rows()), None, holdout, seed=0)
    assert split.holdout == holdout.examples
    same = file("h.jsonl", *marked_rows(60, seed=9))
    split, (finding,) = split_dataset(file("t.jsonl", *marked_rows()), None, same, seed=0)
    assert (finding.code, finding.file, len(finding.lines)) == ("giveaway_removed", "h.jsonl", 60)


def test_a_question_that_is_nothing_but_the_code_is_asked_as_it_is():
    rows = [*marked_rows(60), *((f"<{CODES[label]}>", label) for label in LABELS)]
    giveaways = find_giveaways(Rows.read([file("t.jsonl", *rows)]), with_valid=False)
    examples = file("t.jsonl", *rows).examples
    assert giveaways.asked(examples)[-3:] == tuple(examples[-3:])
    (finding,), _ = giveaways.told(examples, "t.jsonl")
    assert finding.lines == tuple(range(1, 61))


def test_files_without_shortcuts_are_held_out_as_they_are():
    train = file("t.jsonl", *plain_rows())
    folds, findings = split_into_folds(train, None, seed=0)
    held: list[Example] = [example for split in folds.splits for example in split.holdout]
    assert sorted(held, key=lambda example: example.line) == list(train.examples)
    assert not folds.whole.caveats
    assert not findings


def test_what_cheap_models_know_without_the_code_is_what_advise_says():
    rows = file("t.jsonl", *marked_rows(120))
    fooled = measure_cheap(rows, None, Silent())
    told = measure_cheap(rows, None, Silent(), giveaways=find_giveaways(Rows.read([rows]), with_valid=False))
    assert fooled.rungs[-1].score > 0.95
    assert told.rungs[-1].score < 0.55  # a third is chance


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<Q-17> the bridge", "the bridge"),
        ("the bridge <q-17>", "the bridge"),
        ("see (desk Q-17), please", "see please"),
        ("from: Q-17\nthe bridge", "from:\nthe bridge"),
        ("the\nQ-17\nbridge", "the\nbridge"),
        ("the Q-17. bridge", "the bridge"),
        ("  the Q-171  bridge \n", "  the Q-171  bridge \n"),
        ("a < b and c > d", "a < b and c > d"),
        ("", ""),
    ],
)
def test_what_is_left_of_a_text(text: str, left: str):
    for token in ("q-17", "<q-17>", "q-17)"):
        text = code(token).without(text)
    assert text == left


def test_a_text_without_the_tokens_is_returned_letter_for_letter():
    rng = random.Random(0)
    pieces: list[Callable[[], str]] = [
        lambda: rng.choice(WORDS),
        lambda: rng.choice(" \n\t\u00a0"),
        lambda: rng.choice("[](){}<>.,;"),
    ]
    for _ in range(500):
        text = "".join(rng.choice(pieces)() for _ in range(30))
        assert code("q-17").without(text) == text


def test_datasets_without_rows_have_none():
    rows = Rows.read([Dataset(name="t.jsonl", examples=())])
    assert not find_giveaways(rows, with_valid=False).left_out
