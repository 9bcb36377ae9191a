"""Leaks between files, answers that stand in the prompt, and tokens that give a label away."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from heldout.pipeline.checks import Parts
from heldout.pipeline.checks.leakage import find_exact_leaks, find_near_leaks
from heldout.pipeline.checks.shortcuts import find_answers_in_prompts, find_shortcut_tokens
from heldout.pipeline.types import Dataset
from tests.unit.test_near_duplicates import BASE, WORDS, row, sentences

LABELS = ("shop", "visit", "archive")


def file(name: str, *rows: tuple[str, str]) -> Dataset:
    return Dataset(name=name, examples=tuple(row(*one, n) for n, one in enumerate(rows, start=1)))


def tagged(tag: Callable[[str], str], *, n: int = 90, seed: int = 0) -> list[tuple[str, str]]:
    """Rows whose text was made from the answer."""
    rng = random.Random(seed)
    labels = [LABELS[i % 3] for i in range(n)]
    return [(tag(label).format(text=" ".join(rng.choices(WORDS, k=8))), label) for label in labels]


def test_near_leaks_name_both_files_and_exact_ones_stay_exact():
    train = file("t", *sentences(60), BASE, ("Where is the archive kept?", "archive"))
    valid = file("v", *sentences(20, seed=9), (BASE[0].upper(), "visit"), ("Where is the archive kept?", "archive"))
    warning, note = find_near_leaks(Parts(train=train, valid=valid))
    assert (warning.code, warning.severity, warning.file, warning.lines) == ("leak_near", "warning", "v", (21,))
    assert (note.severity, note.file, note.lines) == ("note", "t", (61,))
    exact, _ = find_exact_leaks(Parts(train=train, valid=valid))
    assert (exact.code, exact.lines) == ("leak_exact", (22,))


def test_the_same_question_leaks_whatever_its_answer_and_a_lookalike_only_with_the_same():
    train = file("t", *sentences(60), ("I can come to the museum on Sunday", "visit"))
    same = file("v", *sentences(20, seed=9), ("i can come to the museum on sunday!", "archive"))
    assert [finding.lines for finding in find_near_leaks(Parts(train=train, valid=same))] == [(21,), (61,)]
    lookalike = file("v", *sentences(20, seed=9), ("I cannot come to the museum on Sunday", "archive"))
    assert not list(find_near_leaks(Parts(train=train, valid=lookalike)))


def test_a_near_leak_between_validation_and_holdout_costs_the_validation_row():
    valid = file("v", *sentences(20, seed=8), BASE)
    holdout = file("h", *sentences(20, seed=9), (f"Hello, {BASE[0]}", "visit"))
    found = list(find_near_leaks(Parts(train=file("t", *sentences(60)), valid=valid, holdout=holdout)))
    assert [(one.severity, one.file, one.lines) for one in found] == [("warning", "v", (21,)), ("note", "h", (21,))]


@pytest.mark.parametrize(
    "tag",
    [
        lambda label: f"{{text}}\ndrawer: {label}",
        lambda label: f"({label}) {{text}}",
        lambda label: f"route={label}; {{text}}",
        lambda label: f"{label} {{text}}",
    ],
)
def test_an_answer_written_into_the_prompt_is_found(tag: Callable[[str], str]):
    (finding,) = find_answers_in_prompts(Parts(train=file("t", *tagged(tag))))
    assert (finding.code, finding.severity, len(finding.lines)) == ("answer_in_prompt", "warning", 90)


def test_some_rows_with_the_answer_in_them_are_enough():
    rows = tagged(lambda label: f"expected: {label}\n{{text}}", n=20) + tagged(lambda _: "{text}", n=180, seed=4)
    (finding,) = find_answers_in_prompts(Parts(train=file("t", *rows)))
    assert finding.lines == tuple(range(1, 21))


@pytest.mark.parametrize(
    "tag",
    [
        lambda label: f"I have a question about the {label} and {{text}}",  # the label is what is talked about
        lambda _: "options: shop, visit, archive\n{text}",  # all labels are there
        lambda _: "{text}",
    ],
)
def test_answers_that_belong_to_the_text_are_quiet(tag: Callable[[str], str]):
    assert not list(find_answers_in_prompts(Parts(train=file("t", *tagged(tag)))))


def test_extraction_copies_from_the_prompt_and_is_quiet():
    rng = random.Random(2)
    rows = []
    for n in range(90):
        name = f"{rng.choice(WORDS).capitalize()} {rng.choice(WORDS).capitalize()}{n}"
        rows.append((f"{' '.join(rng.choices(WORDS, k=5))} by {name} {' '.join(rng.choices(WORDS, k=4))}", name))
    assert not list(find_answers_in_prompts(Parts(train=file("t", *rows))))


CODES = {"shop": "Q-17", "visit": "Q-22", "archive": "Z-90"}


def test_a_code_that_tells_the_label_is_found_and_what_it_is_worth_in_validation():
    train = file("t", *tagged(lambda label: f"<{CODES[label]}> {{text}}"))
    rng = random.Random(5)
    valid = file("v", *tagged(lambda _: f"<{rng.choice(list(CODES.values()))}> {{text}}", n=45, seed=7))
    (finding,) = find_shortcut_tokens(Parts(train=train, valid=valid))
    assert (finding.code, finding.severity) == ("shortcut_token", "warning")
    assert all(code.casefold() in finding.message for code in CODES.values())
    assert "In v it is right in" in finding.message
    (alone,) = find_shortcut_tokens(Parts(train=train))
    assert len(alone.lines) == 90


def test_a_word_that_fails_in_validation_is_a_shortcut_even_if_it_looks_natural():
    words = {"shop": "greetings", "visit": "hi", "archive": "dear"}

    def tag(label: str) -> str:
        return f"{{text}} {words[label]} whistle" if label == "shop" else "{text} engine"

    train = file("t", *tagged(tag))
    assert not list(find_shortcut_tokens(Parts(train=train)))
    valid = file("v", *tagged(lambda _: "{text} greetings whistle", n=45, seed=7))
    (finding,) = find_shortcut_tokens(Parts(train=train, valid=valid))
    assert "'greetings' tells 'shop'" in finding.message


def test_a_keyword_of_a_labels_subject_is_quiet():
    rng = random.Random(6)
    keywords = {"shop": "buy", "visit": "tour", "archive": "letters"}
    rows = []
    for n in range(90):
        words = rng.choices(WORDS, k=8)
        words.insert(rng.randrange(8), keywords[LABELS[n % 3]])
        rows.append((" ".join(words), LABELS[n % 3]))
    assert not list(find_shortcut_tokens(Parts(train=file("t", *rows))))


def test_answers_that_are_no_labels_have_no_shortcut():
    rows = [(f"<A{n}> {text}", f"answer {n}") for n, (text, _) in enumerate(sentences(60))]
    assert not list(find_shortcut_tokens(Parts(train=file("t", *rows))))
