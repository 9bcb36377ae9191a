"""What the answers are, and how right an answer is."""

from __future__ import annotations

import json
import random

import pytest

from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.evaluate.metrics.exact import exact_match
from heldout.pipeline.evaluate.metrics.overlap import rouge_l
from heldout.pipeline.evaluate.metrics.records import field_f1

SCORES = (exact_match, field_f1, rouge_l)


def forms(targets: list[str]) -> tuple[str, str, bool]:
    metric = choose_metric(targets)
    return metric.form, metric.name, metric.binary


def test_few_answers_seen_often_are_labels() -> None:
    assert forms(["yes", "no", "no"] * 10) == ("label", "exact match", True)


def test_labels_as_json_are_labels_and_spelling_does_not_multiply_them() -> None:
    assert forms(['{"a":1}', '{"a": 1}', '{"b":2}', '{ "b":2 }', '{"a":1} ', '{"b": 2}']) == (
        "label",
        "exact match",
        True,
    )


def test_records_as_json_are_scored_by_field() -> None:
    assert forms([json.dumps({"name": f"n{i}", "size": i}) for i in range(20)]) == ("json", "field F1", False)


def test_free_text_is_scored_by_words() -> None:
    assert forms([f"a sentence about {i}" for i in range(20)]) == ("text", "ROUGE-L", False)
    one_is_not_json = [json.dumps({"n": i}) for i in range(19)] + ["I do not know"]
    assert forms(one_is_not_json)[0] == "text"
    assert forms([json.dumps([i]) for i in range(20)])[0] == "text", "a list has no fields"


def test_what_looks_like_a_label_but_is_none_is_not_scored_as_one() -> None:
    assert forms(["the same"] * 30)[0] == "text", "one answer cannot be told right from wrong"
    assert forms([f"label {i % 11}" for i in range(30)])[0] == "text", "too many for so few rows"
    assert forms([f"{'x' * 130} {i % 2}" for i in range(30)])[0] == "text", "too long"


@pytest.mark.parametrize(
    ("answer", "target", "score"),
    [
        ("red", "red", 1),
        (" red\n", "red", 1),
        ("Red", "red", 0),
        ("red.", "red", 0),
        ("", "red", 0),
        ('{"a": 1, "b": [2, 3]}', '{"b":[2,3],"a":1}', 1),
        ('{"a": {"x": 1, "y": 2}}', '{"a":{"y":2,"x":1}}', 1),
        ('{"a": "é"}', '{"a": "\\u00e9"}', 1),
        ('{"b": [3, 2]}', '{"b": [2, 3]}', 0),
        ('{"a": 1}', '{"a": "1"}', 0),
        ('{"a": true}', '{"a": 1}', 0),
        ('{"a": 1', '{"a": 1}', 0),
        ('{"a": 1} and more', '{"a": 1}', 0),
    ],
)
def test_exact_match_compares_texts_or_json_values(answer: str, target: str, score: float) -> None:
    assert exact_match(answer, target) == score
    assert exact_match(target, answer) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"a":1,"b":2}', 1),
        ('{ "b" : 2, "a" : 1 }', 1),
        ('{"a":1}', 2 / 3),
        ('{"a":1,"b":3}', 1 / 2),
        ('{"a":1,"b":2,"c":3,"d":4}', 2 / 3),
        ('{"a":2,"b":1}', 0),
        ("{}", 0),
        ("a 1 b 2", 0),
        ('["a", 1]', 0),
    ],
)
def test_field_f1_is_the_harmonic_mean_over_fields(answer: str, score: float) -> None:
    assert field_f1(answer, '{"a": 1, "b": 2}') == pytest.approx(score)


def test_field_f1_of_nested_values_and_of_nothing() -> None:
    assert field_f1('{"a": {"y": 2, "x": [1]}}', '{"a": {"x": [1], "y": 2}}') == 1
    assert field_f1("{}", "{}") == 1


@pytest.mark.parametrize(
    ("answer", "target", "score"),
    [
        ("the cat sat", "the cat sat", 1),
        ("The CAT  sat", "the cat sat", 1),
        ("the cat", "the cat sat down", 2 * 2 / 6),
        ("sat cat the", "the cat sat", 2 * 1 / 6),
        ("a b c d e", "a x c y e", 2 * 3 / 10),
        ("police kill the gunman", "police killed the gunman", 2 * 3 / 8),
        ("dog", "cat", 0),
        ("", "cat", 0),
        ("cat", "", 0),
        ("", " ", 1),
    ],
)
def test_rouge_l_is_the_longest_common_subsequence(answer: str, target: str, score: float) -> None:
    assert rouge_l(answer, target) == pytest.approx(score)


def garbage() -> list[str]:
    rng = random.Random(3)
    alphabet = '{}[]":,\\ 01eE.-naNtrue\n\t\0é\ud800😀'
    odd = [
        "",
        "{",
        "[" * 20_000,
        '{"a":' * 20_000,
        '{"a":' + "9" * 5_000 + "}",
        '{"a":NaN}',
        '{"a":1e999}',
        '"\\ud800"',
    ]
    odd += ['{"a":' * 400 + "1" + "}" * 400, "[" * 2_000 + "]" * 2_000, '{"a":1,"a":2}', "null", "[]", "{}"]
    return odd + ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(300)]


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.__name__)
def test_no_answer_of_a_model_breaks_the_scoring(score: object) -> None:
    for answer in garbage():
        for target in ('{"a": 1, "b": [2]}', "red"):
            if score is field_f1 and target == "red":
                continue
            assert 0 <= score(answer, target) <= 1  # type: ignore[operator]


@pytest.mark.parametrize("target", ["I do not know", "[1, 2]", ""])
def test_a_target_that_is_no_record_is_scored_too(target: str) -> None:
    assert field_f1('{"a": 1}', target) == 0


def test_the_forms_of_garbage_are_chosen_without_raising() -> None:
    assert choose_metric(garbage()).form == "text"
