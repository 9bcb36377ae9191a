"""Checks: what is planted is found, and clean files stay quiet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from heldout.pipeline.checks import Parts, check
from heldout.pipeline.checks.groups import (
    count_labels,
    fingerprint,
    fold,
    prompt_fingerprint,
    shown_prompts,
)
from heldout.pipeline.checks.parts import name_lines
from heldout.pipeline.dataset import read_dataset
from heldout.pipeline.types import Dataset, Example, Finding

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not beside this checkout")


def example(prompt: str, answer: str, line: int = 1, *, earlier: tuple[str, ...] = ()) -> Example:
    turns = [*earlier, prompt, answer]
    roles = ("user", "assistant")
    messages = tuple({"role": roles[n % 2], "content": text} for n, text in enumerate(turns))
    return Example(messages=messages, weights=tuple(n % 2 for n in range(len(turns))), line=line)


def dataset(*pairs: tuple[str, str], name: str = "train.jsonl") -> Dataset:
    return Dataset(name=name, examples=tuple(example(*pair, line=line) for line, pair in enumerate(pairs, start=1)))


def numbered(n: int, *, start: int = 0, name: str = "train.jsonl") -> Dataset:
    """n rows with different prompts and answers: nothing to report but the size."""
    return dataset(*((f"question {i}", f"answer {i}") for i in range(start, start + n)), name=name)


def found(code: str, **parts: Any) -> list[Finding]:
    return [finding for finding in check(Parts(**parts)) if finding.code == code]


def loud(parts: Parts) -> list[Finding]:
    """Warnings and errors: notes tell what is good to know of any file."""
    return [finding for finding in check(parts) if finding.severity != "note"]


def test_folding_ignores_case_white_space_and_unicode_composition():
    assert fold("  Caf\u00e9\u00a0 STRASSE\n") == fold("cafe\u0301 straße")
    assert fold("a b") != fold("ab")


def test_a_fingerprint_tells_roles_and_message_borders_apart():
    user = {"role": "user", "content": "ab"}
    assert fingerprint([user]) == fingerprint([{"role": "user", "content": " AB"}])
    assert fingerprint([user]) != fingerprint([{"role": "assistant", "content": "ab"}])
    split = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert fingerprint([user]) != fingerprint(split)


def test_a_prompt_is_the_same_with_and_without_closing_punctuation():
    def of(text: str) -> str:
        return prompt_fingerprint([{"role": "user", "content": text}])

    assert of("Where is my card") == of("where is my card ?!")
    assert of("?") != of("!")
    assert of("3.5") != of("35")


def test_a_conversation_shows_the_prompt_of_every_answer_it_teaches():
    long = example("and then?", "c", earlier=("a?", "b"))
    assert prompt_fingerprint(example("A", "x").prompt) in shown_prompts(long)
    masked = Example(messages=long.messages, weights=(0, 0, 0, 1), line=1)
    assert shown_prompts(masked) == {prompt_fingerprint(long.prompt)}


def test_answers_are_labels_when_there_are_many_rows_for_each():
    def labelled(n_labels: int, times: int) -> Dataset:
        return dataset(*((f"q{i}", f"label {i % n_labels}") for i in range(n_labels * times)))

    assert count_labels(labelled(2, 3).examples) == {"label 0": 3, "label 1": 3}
    assert count_labels(labelled(77, 7).examples)
    assert count_labels(labelled(1000, 3).examples)
    assert count_labels(labelled(10, 2).examples) is None
    assert count_labels(labelled(1, 9).examples) is None
    often_the_same = dataset(*((f"q{i}", "I do not know." if i < 90 else f"answer {i}") for i in range(100)))
    assert count_labels(often_the_same.examples) is None


def test_lines_are_named_in_words():
    assert name_lines([3]) == "line 3"
    assert name_lines([3, 8]) == "lines 3 and 8"
    assert name_lines([1, 2, 3, 4], at_most=2) == "lines 1, 2 and 2 more"


def test_too_few_rows_are_refused_in_the_words_of_openai():
    (finding,) = check(Parts(train=numbered(7)))
    assert (finding.code, finding.severity) == ("invalid_n_examples", "error")
    assert finding.message == "Training file has 7 example(s), but must have at least 10 examples"


@pytest.mark.parametrize(("n", "codes"), [(10, ["few_examples"]), (49, ["few_examples"]), (50, [])])
def test_a_small_training_file_is_warned_about(n: int, codes: list[str]):
    findings = loud(Parts(train=numbered(n)))
    assert [finding.code for finding in findings] == codes
    assert all(finding.severity == "warning" for finding in findings)


def test_small_validation_and_holdout_files_are_warned_about():
    valid = numbered(9, start=100, name="valid.jsonl")
    holdout = numbered(25, start=200, name="holdout.jsonl")
    findings = loud(Parts(train=numbered(50), valid=valid, holdout=holdout))
    assert [(finding.code, finding.file) for finding in findings] == [
        ("small_validation", "valid.jsonl"),
        ("small_holdout", "holdout.jsonl"),
    ]
    assert "±20 points" in findings[1].message
    assert not loud(Parts(train=numbered(50), valid=numbered(10, start=100), holdout=numbered(30, start=200)))


def test_an_empty_holdout_file_is_no_division_by_zero():
    assert found("small_holdout", train=numbered(50), holdout=numbered(0))


def test_copies_are_exact_duplicates_and_other_case_and_blanks_make_near_ones():
    train = dataset(("a", "x"), ("b", "y"), (" A ", "X"), ("b", "y"), ("b", "other"), ("a", "x"))
    (exact,) = found("exact_duplicate", train=train)
    assert exact.severity == "warning"
    assert exact.lines == (1, 2, 4, 6)
    assert "2 of 6 rows" in exact.message
    assert "lines 1 and 6; lines 2 and 4" in exact.message
    (near,) = found("near_duplicate", train=train)
    assert near.lines == (1, 3)


def test_one_duplicate_in_a_hundred_rows_is_only_noted():
    rows = [(f"q{i}", f"a{i}") for i in range(99)]
    (finding,) = found("exact_duplicate", train=dataset(*rows, rows[0]))
    assert finding.severity == "note"


def test_one_prompt_with_two_answers_is_a_conflict():
    train = dataset(("a?", "x"), ("b", "y"), ("A", "z"), ("b", "Y "))
    (finding,) = found("conflicting_answers", train=train)
    assert finding.severity == "warning"
    assert finding.lines == (1, 3)
    assert "lines 1 and 3: 'x' against 'z'" in finding.message


def test_a_leak_names_the_lines_of_both_files():
    train = numbered(50)
    valid = dataset(("new", "n"), ("question 7", "other"), name="valid.jsonl")
    warning, note = found("leak_exact", train=train, valid=valid)
    assert (warning.severity, warning.file, warning.lines) == ("warning", "valid.jsonl", (2,))
    assert (note.severity, note.file, note.lines) == ("note", "train.jsonl", (8,))
    assert "line 2 and line 8 of train.jsonl" in warning.message
    assert "left out of scoring" in warning.message


def test_files_of_one_name_do_not_mix_up_their_leaks():
    warning, note = found("leak_exact", train=numbered(20), valid=numbered(20, start=19))
    assert warning.lines == (1,)
    assert note.lines == (20,)


def test_a_leak_between_validation_and_holdout_costs_the_validation_row():
    valid = dataset(("one", "n"), ("two", "n"), name="valid.jsonl")
    holdout = dataset(("zero", "n"), ("two", "n"), ("two", "m"), name="holdout.jsonl")
    warning, note = found("leak_exact", train=numbered(50), valid=valid, holdout=holdout)
    assert (warning.file, warning.lines) == ("valid.jsonl", (2,))
    assert (note.file, note.lines) == ("holdout.jsonl", (2, 3))


def test_a_prompt_answered_in_an_earlier_turn_of_a_training_row_is_a_leak():
    train = Dataset(name="train.jsonl", examples=(example("and?", "c", line=5, earlier=("a", "b")),))
    warning, note = found("leak_exact", train=train, valid=dataset(("a", "b"), name="valid.jsonl"))
    assert (warning.lines, note.lines) == ((1,), (5,))


def test_a_label_that_training_never_shows_is_named():
    train = dataset(*((f"q{i}", f"label {i % 3}") for i in range(60)))
    holdout = dataset(("x", "label 9"), ("y", "LABEL 1"), name="holdout.jsonl")
    (finding,) = found("unknown_label", train=train, holdout=holdout)
    assert (finding.severity, finding.file, finding.lines) == ("warning", "holdout.jsonl", (1,))
    assert "'label 9'" in finding.message


def test_free_text_has_no_unknown_labels():
    assert not found("unknown_label", train=numbered(60), valid=numbered(20, start=100))


def test_a_label_21_times_as_frequent_as_another_is_an_imbalance():
    def train(common: int) -> Dataset:
        return dataset(*((f"q{i}", "ham") for i in range(common)), ("x", "spam"), ("y", "spam"))

    assert not found("class_imbalance", train=train(40))
    (finding,) = found("class_imbalance", train=train(41))
    assert finding.severity == "warning"
    assert finding.lines == (42, 43)


def dirty(name: str) -> tuple[dict[str, Any], Parts]:
    """What is expected of a file, and its sound rows."""
    expected = json.loads((DATA / "dirty" / f"{name}.expected.json").read_text(encoding="utf-8"))
    train = load(DATA / "dirty" / f"{name}.jsonl")
    valid = load(DATA / "dirty" / expected["validation_file"]) if "validation_file" in expected else None
    return expected, Parts(train=train, valid=valid)


def load(path: Path) -> Dataset:
    return read_dataset(path.read_bytes(), name=path.name)[0]


@needs_data
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("duplicates", "exact_duplicate"),
        ("inconsistent_labels", "conflicting_answers"),
        ("leakage", "leak_exact"),
        ("mixed", "exact_duplicate"),
        ("mixed", "conflicting_answers"),
        ("mixed", "leak_exact"),
    ],
)
def test_every_planted_pair_is_found_and_no_sound_line_is_named(name: str, kind: str):
    expected, parts = dirty(name)
    by_file = {finding.file: set(finding.lines) for finding in found(kind, train=parts.train, valid=parts.valid)}
    planted = [defect for defect in expected["defects"] if defect["kind"] == kind]
    assert planted
    for defect in planted:
        assert set(defect["lines"]) <= by_file[parts.train.name]
        if parts.valid:
            assert set(defect.get("validation_lines", ())) <= by_file.get(parts.valid.name, set())
    assert by_file[parts.train.name] <= set(expected["lines_with_defects"])


@needs_data
def test_eight_rows_are_too_few():
    _, parts = dirty("too_few")
    assert [finding.code for finding in check(parts) if finding.severity == "error"] == ["invalid_n_examples"]


@needs_data
@pytest.mark.parametrize("name", ["imbalance_two", "imbalance_many"])
def test_planted_imbalance_is_found(name: str):
    _, parts = dirty(name)
    assert found("class_imbalance", train=parts.train)


@needs_data
@pytest.mark.parametrize(("name", "codes"), [("control_clean", []), ("control_unusual", ["few_examples"])])
def test_controls_raise_no_false_alarm(name: str, codes: list[str]):
    _, parts = dirty(name)
    assert [finding.code for finding in check(parts) if finding.severity != "note"] == codes


@needs_data
@pytest.mark.parametrize("folder", sorted(DATA.glob("tasks/*/")), ids=lambda folder: folder.name)
def test_clean_tasks_have_no_error_and_at_most_one_warning(folder: Path):
    parts = Parts(
        train=load(folder / "train.jsonl"),
        valid=load(folder / "validation.jsonl"),
        holdout=load(folder / "test.jsonl"),
    )
    severities = [finding.severity for finding in check(parts)]
    assert "error" not in severities
    assert severities.count("warning") <= 1
