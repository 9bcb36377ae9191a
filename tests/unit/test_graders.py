"""Graders as OpenAI's API writes them: read, refused, and scoring."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heldout.engine.base import Message, Reply, Sampling
from heldout.errors import InvalidValue
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.evaluate.graders.formula import read_formula
from heldout.pipeline.evaluate.graders.read import grader_metric, parse_grader, read_grader
from heldout.pipeline.evaluate.metrics.overlap import fuzzy_match, rouge_n
from heldout.pipeline.evaluate.scores import score_answers
from heldout.pipeline.types import Example

USUAL = choose_metric(["free", "text"])
CHECK = {"type": "string_check", "input": "{{ sample.output_text }}", "reference": "{{ item.target }}"}
EQUAL = {**CHECK, "operation": "eq"}
ALIKE = {**EQUAL, "type": "text_similarity", "evaluation_metric": "fuzzy_match"}
del ALIKE["operation"]
JUDGE = {
    "type": "score_model",
    "model": "judge",
    "range": [1, 5],
    "input": [
        {"role": "system", "content": "Grade from 1 to 5."},
        {"role": "user", "content": {"type": "input_text", "text": "{{item.input}} -> {{sample.output_text}}"}},
    ],
}


def row(asked: str, target: str, line: int = 1) -> Example:
    messages = (
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": asked},
        {"role": "assistant", "content": target},
    )
    return Example(messages=messages, weights=(0, 0, 1), line=line)


class Judge:
    """Replies in turn with the given texts; `asked` is what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.asked: list[tuple[str, list[list[Message]], Sampling]] = []

    def __call__(self, model: str, conversations: Any, sampling: Sampling) -> list[Reply]:
        self.asked.append((model, list(conversations), sampling))
        return [
            Reply(text=text, finish_reason="stop", prompt_tokens=1, completion_tokens=1)
            for text, _ in zip(self.texts, conversations, strict=True)
        ]


def graded(raw: Any, *pairs: tuple[str, str], judge: Any = None, told: list[str] | None = None) -> list[float]:
    """Scores of answers, given as (answer, target)."""
    rows = [row(f"question {i}", target, line=i) for i, (_, target) in enumerate(pairs, start=1)]
    metric = grader_metric(read_grader(raw, judge, ([] if told is None else told).append), USUAL)
    return list(score_answers(metric, rows, [answer for answer, _ in pairs]).per_example)


def refusal(raw: Any, judge: Any = None) -> str:
    with pytest.raises(InvalidValue) as raised:
        read_grader(raw, judge)
    assert raised.value.param == "grader"
    return str(raised.value)


@pytest.mark.parametrize(
    ("operation", "scores"),
    [("eq", [1, 0, 0, 0]), ("ne", [0, 1, 1, 1]), ("like", [1, 0, 1, 0]), ("ilike", [1, 1, 1, 0])],
)
def test_a_string_check_compares_as_its_operation_says(operation: str, scores: list[float]) -> None:
    answers = ["red", "Red", "dark red", "blue"]
    assert graded({**CHECK, "operation": operation}, *((answer, "red") for answer in answers)) == scores
    assert read_grader({**CHECK, "operation": operation}).binary


def test_a_similarity_is_the_one_it_names_and_with_a_threshold_right_or_wrong() -> None:
    pair = ("the cat sat on the mat", "the cat is on the mat")
    assert graded(ALIKE, pair) == [fuzzy_match(*pair)]
    assert graded({**ALIKE, "evaluation_metric": "rouge_2"}, pair) == [rouge_n(*pair, n=2)]
    strict, lax = ({**ALIKE, "pass_threshold": at} for at in (0.95, fuzzy_match(*pair)))
    assert (graded(strict, pair), graded(lax, pair)) == ([0], [1])
    assert (read_grader(ALIKE).binary, read_grader(strict).binary) == (False, True)


@pytest.mark.parametrize(("metric", "why"), [("cosine", "text-embedding-3-large"), ("meteor", "WordNet")])
def test_a_similarity_that_would_be_another_one_here_is_refused_with_the_reason(metric: str, why: str) -> None:
    told = refusal({**ALIKE, "evaluation_metric": metric})
    assert why in told
    assert "fuzzy_match, bleu, gleu, rouge_1" in told


def test_templates_reach_into_the_row_and_into_json_answers() -> None:
    deep = {
        **EQUAL,
        "input": "{{ sample.output_json.a[0]['b'] }}/{{item.line}}",
        "reference": "{{ item.target_json.a[0].b }}/{{ item.line }}",
    }
    target = '{"a": [{"b": "x"}]}'
    assert graded(deep, (target, target), ('{"a": []}', target), ("x", target), ('{"a": "x"}', target)) == [1, 0, 0, 0]
    asked = {**EQUAL, "input": "{{item.messages[1].content}}", "reference": "{{ item.input }}"}
    assert graded(asked, ("", "")) == [1]
    whole = {**EQUAL, "input": "{{ item.messages }}", "reference": '[{"role": "system", "content": "Answer."}'}
    assert graded({**whole, "operation": "like"}, ("", "")) == [1], "what is no text is written as JSON"


def test_an_answer_with_braces_is_not_read_as_a_template() -> None:
    assert graded(EQUAL, ("{{ item.target }}", "red"), ("{{ item.target }}", "{{ item.target }}")) == [0, 1]


def test_a_row_without_what_a_template_names_is_an_error_with_its_line() -> None:
    target = '{"b": 1}'
    for path, line in [("target_json.b", 2), ("messages[7]", 1)]:
        with pytest.raises(InvalidValue, match=re.escape(f"line {line}: the row has no item.{path}")):
            graded({**EQUAL, "reference": f"{{{{ item.{path} }}}}"}, ("x", target), ("x", '{"c": 1}'))
    with pytest.raises(InvalidValue, match=r"line 1: the answer is no JSON, so there is no item\.target_json"):
        graded({**EQUAL, "reference": "{{ item.target_json.b }}"}, ("x", "red"))


@pytest.mark.parametrize(
    "inside",
    [
        "item",
        "sample.text",
        "items.target",
        "item.answer",
        "item.target.x",
        "item.target + 1",
        "",
        "sample.output_tools",
    ],
)
def test_a_template_that_names_nothing_is_refused_with_all_names(inside: str) -> None:
    told = refusal({**EQUAL, "input": f"{{{{ {inside} }}}}"})
    assert "input: there is no {{" in told
    assert "sample.output_text, sample.output_json and item.messages, item.input, item.target" in told


def multi(formula: Any, **graders: Any) -> dict[str, Any]:
    return {"type": "multi", "graders": graders or {"same": EQUAL, "near": ALIKE}, "calculate_output": formula}


def test_a_multi_grader_adds_up_its_graders() -> None:
    near = fuzzy_match("rad", "red")
    assert graded(multi("0.25 * same + 0.75 * near"), ("red", "red"), ("rad", "red")) == [1, pytest.approx(0.75 * near)]
    assert graded(multi("max(same, near ^ 2)"), ("rad", "red")) == [pytest.approx(near**2)]
    alone = {"type": "multi", "graders": {"name": "same", **EQUAL}, "calculate_output": "same / 2"}
    assert graded(alone, ("red", "red")) == [0.5], "the client's types have one grader there"


@pytest.mark.parametrize(
    "formula",
    [
        "__import__('os')",
        "same.real",
        "same if near else 1",
        "[same][0]",
        "(lambda: same)()",
        "other",
        "same and near",
        "exp(same, near)",
        "min(same)",
        "max(same, key=abs)",
        "True",
        "'a'",
        "1j",
        "",
        "same +",
        "(" * 500 + "same" + ")" * 500,
        "-" * 3000 + "same",
        None,
    ],
)
def test_a_formula_that_is_more_than_arithmetic_is_refused(formula: Any) -> None:
    assert "calculate_output: " in refusal(multi(formula))


@pytest.mark.parametrize(
    ("formula", "why"),
    [
        ("same / 0", "no value for same = 1, near = 1"),
        ("exp(1000 * same)", "no value"),
        ("9 ^ 9 ^ 9 ^ 9", "no value"),
        ("log(near - 1)", "no value"),
        ("sqrt(-near)", "no value"),
        ("(0 - same) ^ 0.5", "no value"),
        ("same + near", "gave 2 for same = 1, near = 1; a score lies between 0 and 1"),
        ("-same", "gave -1"),
    ],
)
def test_a_formula_without_a_score_is_an_error_with_the_line(formula: str, why: str) -> None:
    metric = grader_metric(read_grader(multi(formula)), USUAL)
    with pytest.raises(InvalidValue, match="line 2: ") as raised:
        score_answers(metric, [row("?", "red", line=2)], ["red"])
    assert why in str(raised.value)


@given(
    st.recursive(
        st.sampled_from(["a", "b", "1", "0.5", "2"]),
        lambda inner: st.builds(lambda x, sign, y: f"({x} {sign} {y})", inner, st.sampled_from(["+", "-", "*"]), inner),
        max_leaves=12,
    )
)
def test_a_formula_is_what_arithmetic_says(text: str) -> None:
    assert read_formula(text, ["a", "b"])({"a": 0.25, "b": 3.0}) == pytest.approx(eval(text, {"a": 0.25, "b": 3.0}))


def test_multi_graders_are_not_nested_and_name_what_is_wrong_inside() -> None:
    assert "cannot be nested" in refusal(multi("a", a=multi("same")))
    assert "grader 'a': operation: 'is' is not one of eq, ne, like, ilike" in refusal(
        multi("a", a={**CHECK, "operation": "is"})
    )
    assert "graders is an object" in refusal({"type": "multi", "graders": [EQUAL], "calculate_output": "1"})


def test_a_judge_is_asked_with_the_filled_in_messages_and_its_range_becomes_0_to_1() -> None:
    judge = Judge("5", '{"steps": [], "result": 2.0}', "I would say: 4")
    assert graded(JUDGE, ("a", "x"), ("b", "y"), ("c", "z"), judge=judge) == [1, 0.25, 0.75]
    model, conversations, sampling = judge.asked[0]
    assert model == "judge"
    assert conversations[1] == [
        {"role": "system", "content": "Grade from 1 to 5."},
        {"role": "user", "content": "question 2 -> b"},
    ]
    assert sampling.temperature == 0, "a score must not depend on luck"


def test_a_judge_that_gives_no_score_counts_as_0_and_is_told_of() -> None:
    told: list[str] = []
    judge = Judge("between 2 and 4", "6", '{"result": "5"}', "3")
    assert graded(JUDGE, *[("a", "x")] * 4, judge=judge, told=told) == [0, 0, 0, 0.5]
    assert told == ["judge gave no score from 1 to 5 for 3 of 4 answers (lines 1, 2, 3); they count as 0"]


def test_a_judge_takes_part_in_a_multi_grader_and_passes_by_a_threshold() -> None:
    both = multi("(same + taste) / 2", same=EQUAL, taste=JUDGE)
    assert graded(both, ("red", "red"), ("blue", "red"), judge=Judge("5", "1")) == [1, 0]
    assert read_grader(both, Judge()).judges == ("judge",)
    passing = {**JUDGE, "pass_threshold": 4, "sampling_params": {"seed": 3, "temperature": 0.5}}
    judge = Judge("4", "3")
    assert graded(passing, ("a", "x"), ("b", "y"), judge=judge) == [1, 0]
    assert (judge.asked[0][2].seed, judge.asked[0][2].temperature) == (3, 0.5)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ([], 'a JSON object with a "type"'),
        ({"type": "magic"}, "unknown type 'magic'. Expected string_check"),
        ({}, "unknown type None"),
        ({"type": "python", "name": "p", "source": "def grade(sample, item): …"}, "is not run"),
        ({"type": "label_model", "name": "p"}, "score_model"),
        ({**EQUAL, "name": 3}, "name is a text"),
        ({**EQUAL, "pass_threshold": 1}, "unknown 'pass_threshold'. A string_check grader has input, reference"),
        ({**EQUAL, "operation": ["eq"]}, "is not one of eq, ne"),
        ({**EQUAL, "reference": None}, "reference: expected a text"),
        ({**ALIKE, "evaluation_metric": "rouge_9"}, "is not one of fuzzy_match"),
        ({**ALIKE, "pass_threshold": 2}, "from 0 to 1"),
        ({**JUDGE, "range": [1, 1]}, "range is [lowest, highest]"),
        ({**JUDGE, "input": []}, "input is a list of messages"),
        ({**JUDGE, "input": [{"role": "robot", "content": "x"}]}, "input[0]: expected a message"),
        ({**JUDGE, "model": ""}, "names the model"),
        ({**JUDGE, "sampling_params": {"reasoning_effort": "low"}}, "an object of numbers: seed, top_p"),
    ],
)
def test_what_is_no_grader_is_refused_with_the_reason(raw: Any, why: str) -> None:
    assert why in refusal(raw, Judge())


def test_a_judge_is_for_evaluations_alone() -> None:
    assert "a job asks no judge" in refusal(JUDGE)


def test_a_file_that_is_no_json_is_named() -> None:
    assert parse_grader(json.dumps(EQUAL).encode(), "g.json") == EQUAL
    with pytest.raises(InvalidValue, match=r"g\.json: no JSON"):
        parse_grader(b"{", "g.json")
    with pytest.raises(InvalidValue, match=r"g\.json: no JSON"):
        parse_grader(b"[" * 100_000, "g.json")
    with pytest.raises(InvalidValue, match=r"g\.json: a grader is a JSON object"):
        parse_grader(b"[1]", "g.json")
