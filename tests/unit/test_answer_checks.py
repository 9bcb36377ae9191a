"""Answers in another form than most of their file are told by kind; files without a usual form stay quiet."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest

from heldout.pipeline.checks.answers import find_odd_answers
from heldout.pipeline.checks.forms import read_answer, similar, spacing
from heldout.pipeline.checks.languages import language_of
from heldout.pipeline.checks.parts import Parts
from heldout.pipeline.types import Dataset, Example, Finding

COLOURS = ("red", "green", "blue")


def example(answer: str, line: int, *, system: str = "", asked: str = "", earlier: Sequence[str] = ()) -> Example:
    messages = [{"role": "system", "content": system}] if system else []
    for text in earlier:
        messages += [{"role": "user", "content": "go on"}, {"role": "assistant", "content": text}]
    messages += [{"role": "user", "content": asked or f"question {line}"}, {"role": "assistant", "content": answer}]
    weights = tuple(int(message["role"] == "assistant") for message in messages)
    return Example(messages=tuple(messages), weights=weights, line=line)


def findings(answers: Sequence[str], *, system: str = "", asked: Sequence[str] = ()) -> dict[str, Finding]:
    rows = (
        example(answer, line, system=system, asked=asked[line - 1] if asked else "")
        for line, answer in enumerate(answers, start=1)
    )
    found = list(find_odd_answers(Parts(train=Dataset(name="train.jsonl", examples=tuple(rows)))))
    assert len({finding.code for finding in found}) == len(found)  # one defect is one finding
    return {finding.code: finding for finding in found}


def lines(answers: Sequence[str], **more: object) -> dict[str, tuple[int, ...]]:
    return {code: finding.lines for code, finding in findings(answers, **more).items()}  # type: ignore[arg-type]


def orders(n: int) -> list[str]:
    """Records with numbers, a list of objects, and texts of their own."""
    rng = random.Random(1)
    return [
        json.dumps(
            {
                "order": {"id": i, "paid": bool(i % 2)},
                "items": [
                    {"name": f"article {rng.random()}", "price": rng.randrange(90) + 0.5} for _ in range(i % 3 + 1)
                ],
                "tags": rng.sample(["new", "gift", "urgent"], 2),
                "note": None if i % 5 else f"call {i}",
            }
        )
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("odd", "code"),
    [
        ("{'colour': 'red'}", "answer_invalid_json"),
        ('{"colour": "red"', "answer_invalid_json"),
        ('"colour": "red"}', "answer_invalid_json"),
        ('{"colour": NaN}', "answer_invalid_json"),
        ('{"colour": "red", "colour": "blue"}', "answer_invalid_json"),
        ('```json\n{"colour": "red",}\n```', "answer_invalid_json"),
        ('{"colour": "red" // warm\n}', "answer_invalid_json"),
        ('```\n{"colour": "red"}\n```', "answer_code_fence"),
        ('~~~json\n{"colour": "red"}\n~~~', "answer_code_fence"),
        ('`{"colour": "red"}`', "answer_code_fence"),
        ('Here you are:\n```json\n{"colour": "red"}\n```\nAnything else?', "answer_extra_text"),
        ('<think>hm</think>{"colour": "red"}', "answer_extra_text"),
        ('{"colour": "red"}\n{"colour": "blue"}', "answer_extra_text"),
        ("I am sorry, I cannot tell.", "answer_prose"),
        ("red", "answer_prose"),
        ('"red"', "answer_type"),
        ('["red"]', "answer_type"),
        ('{"colour": 7}', "answer_type"),
        ('{"colour": {"value": "red"}}', "answer_type"),
        ('{"Colour": "red"}', "answer_key_name"),
        ('{"color": "red"}', "answer_key_name"),
        ('{"shade": "red"}', "answer_key_name"),
        ('{"colour": "red", "sure": true}', "answer_extra_key"),
        ("{}", "answer_missing_key"),
        ('{"colour": "Red"}', "answer_value_case"),
        ('{"colour":"red"}', "answer_spacing"),
        ('{\n  "colour": "red"\n}', "answer_spacing"),
        ('{"colour": "red"}\n', "answer_whitespace"),
        ('\ufeff{"colour": "red"}', "answer_whitespace"),
    ],
)
def test_one_odd_answer_among_forty_is_told_by_its_kind(odd: str, code: str):
    answers = [json.dumps({"colour": COLOURS[i % 3]}) for i in range(40)]
    answers[7] = odd
    assert lines(answers) == {code: (8,)}


def test_a_finding_shows_where_and_what_in_a_sentence():
    answers = [json.dumps({"colour": COLOURS[i % 3]}) for i in range(40)]
    answers[7] = answers[9] = '{"Colour": "red"}'
    finding = findings(answers)["answer_key_name"]
    assert finding.severity == "warning"
    assert finding.lines == (8, 10)
    assert "2 of 40 rows (line 8: 'Colour' for 'colour')" in finding.message
    assert "Colour" in finding.example


def test_records_with_lists_numbers_and_empty_places_are_in_one_form():
    assert lines(orders(60)) == {}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda row: row["order"].update(id=str(row["order"]["id"])), "answer_type"),
        (lambda row: row["order"].update(Paid=row["order"].pop("paid")), "answer_key_name"),
        (lambda row: row["items"][0].pop("price"), "answer_missing_key"),
        (lambda row: row["items"][-1].update(colour="red"), "answer_extra_key"),
        (lambda row: row.update(tags="new"), "answer_type"),
        (lambda row: row["tags"].__setitem__(0, "New"), "answer_value_case"),
        (lambda row: row.update(order=row.pop("order")), "answer_key_order"),
    ],
)
def test_what_is_odd_deep_inside_a_record_is_found(change, code: str):
    answers = orders(60)
    row = json.loads(answers[20])
    change(row)
    answers[20] = json.dumps(row)
    assert lines(answers) == {code: (21,)}


def test_optional_keys_of_all_frequencies_are_part_of_the_form():
    rng = random.Random(0)
    slots = {f"slot_{i}": 0.5 / (i + 1) for i in range(25)}
    answers = [
        json.dumps(
            {"intent": "a", **{slot: f"v{rng.random()}" for slot, share in slots.items() if rng.random() < share}}
        )
        for _ in range(300)
    ]
    assert lines(answers) == {}
    answers[10] = json.dumps({"intent": "a", "Slot_0": "x"})
    assert lines(answers) == {"answer_key_name": (11,)}


def test_an_object_whose_keys_are_data_has_no_key_too_many():
    answers = [json.dumps({"counts": {f"word{i}": 1, f"word{i * 7}x": 2}}) for i in range(200)]
    assert lines(answers) == {}


def test_two_kinds_of_record_in_one_file_are_both_usual():
    answers = [json.dumps({"answer": f"text {i}"} if i % 8 else {"error": f"reason {i}"}) for i in range(80)]
    assert lines(answers) == {}


def test_a_key_that_the_prompt_names_is_not_too_many():
    answers = [json.dumps({"colour": COLOURS[i % 3]}) for i in range(60)]
    answers[5] = json.dumps({"colour": "red", "hint": "dark"})
    assert lines(answers) == {"answer_extra_key": (6,)}
    assert lines(answers, system="Answer with colour and, if you must, hint.") == {}


def test_two_names_for_one_key_are_found_however_many_use_the_second():
    answers = [json.dumps({"topic" if i % 10 else "label": COLOURS[i % 3]}) for i in range(100)]
    assert lines(answers) == {"answer_key_name": tuple(range(1, 101, 10))}


def test_values_copied_from_the_question_keep_their_case():
    places = ["Berlin", "Oslo", "Rome"]
    answers = [json.dumps({"city": places[i % 3]}) for i in range(60)]
    answers[4] = json.dumps({"city": "BERLIN"})
    asked = ["weather?"] * 60
    assert lines(answers, asked=asked) == {"answer_value_case": (5,)}
    asked[4] = "BERLIN WEATHER"
    assert lines(answers, asked=asked) == {}


def test_when_all_answers_are_fenced_the_bare_one_is_odd():
    answers = [f"```json\n{json.dumps({'n': i})}\n```" for i in range(30)]
    assert lines(answers) == {}
    answers[3] = '{"n": 3}'
    assert lines(answers) == {"answer_code_fence": (4,)}


def test_letters_written_as_escapes_are_another_way_to_write_json():
    answers = [json.dumps({"word": f"süß {i}"}, ensure_ascii=False) for i in range(40)]
    answers[0] = json.dumps({"word": "süß 0"})
    assert lines(answers) == {"answer_spacing": (1,)}


@pytest.mark.parametrize(
    ("odd", "code"),
    [
        ("Spam", "answer_value_case"),
        ("spam.", "answer_extra_text"),
        ("I think it is spam", "answer_extra_text"),
        ("```\nspam\n```", "answer_code_fence"),
        ('{"label": "spam"}', "answer_type"),
        ("spam ", "answer_whitespace"),
    ],
)
def test_bare_labels_have_a_form_too(odd: str, code: str):
    answers = [("spam", "ham", "not spam")[i % 3] for i in range(60)]
    answers[30] = odd
    assert lines(answers) == {code: (31,)}


def test_free_text_has_no_form():
    rng = random.Random(2)
    answers = [
        " ".join(rng.choices(["{", "a", "[1]", "```", "Yes.", "x: y", "7", "\n"], k=9)).strip() for _ in range(99)
    ]
    assert lines(answers) == {}


def test_white_space_around_free_text_is_a_note():
    answers = [f"sentence number {i}" for i in range(40)]
    answers[0] = "sentence \n"
    assert findings(answers)["answer_whitespace"].severity == "note"
    assert lines([f" completion {i}" for i in range(40)]) == {}  # the old completions format begins with a blank


def test_half_json_and_half_prose_is_meant():
    assert lines([json.dumps({"a": i}) if i % 2 else f"Please tell me more about {i}." for i in range(60)]) == {}


def test_earlier_answers_are_compared_with_earlier_answers():
    rows = [example(json.dumps({"n": i}), i + 1, earlier=(f"Which number, {i}?",)) for i in range(30)]
    assert not list(find_odd_answers(Parts(train=Dataset(name="t", examples=tuple(rows)))))
    rows = [example(json.dumps({"n": i}), i + 1, earlier=(json.dumps({"n": 0}),)) for i in range(30)]
    rows[4] = example(json.dumps({"n": 4}), 5, earlier=("{'n': 0}",))
    (finding,) = find_odd_answers(Parts(train=Dataset(name="t", examples=tuple(rows))))
    assert (finding.code, finding.lines) == ("answer_invalid_json", (5,))


def test_an_answer_in_another_language_is_a_note_unless_it_was_asked_in_it():
    answers = [f"You can find the form number {i} in the app, and it is not hard." for i in range(40)]
    german, russian = (
        "Das ist nicht schwer, und die Form wird auf der Seite angezeigt.",
        "Это можно найти в приложении.",
    )
    answers[3], answers[8] = german, russian
    finding = findings(answers)["answer_language"]
    assert (finding.severity, finding.lines) == ("note", (4, 9))
    asked = ["Where is it?"] * 40
    asked[3], asked[8] = "Wo ist das, und wird es auf der Seite nicht angezeigt?", "Где это?"
    assert lines(answers, asked=asked) == {}


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Refunds for the order you made are with your bank.", "English"),
        ("Les frais sont affichés dans votre espace pour une semaine.", "French"),
        ("Los pagos con tarjeta se muestran en las cuentas del cliente.", "Spanish"),
        ("こんにちは", "Chinese or Japanese"),
        ("OK", None),
        ("42 %", None),
        ("", None),
        ("👍", None),
    ],
)
def test_a_language_is_told_only_where_it_is_plain(text: str, language: str | None):
    assert language_of(text) == language


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, "{" * 1000 + "}", '"' + "\\" * 9999, "`" * 5000, "9" * 9999]
)
def test_no_answer_is_too_strange_to_read(text: str):
    assert read_answer(text).shape in ("broken", "text")


def test_names_are_similar_by_spelling_not_by_number():
    assert similar("first_name", "firstName")
    assert similar("adress", "address")
    assert not similar("line1", "line2")
    assert not similar("id", "ix")


def test_spacing_sees_only_structure():
    assert spacing('{"a, b": "c:d"}') == {"after {": "", "before :": "", "after :": " ", "before }": ""}
