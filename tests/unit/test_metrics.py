"""Every way of comparing two texts, and how one is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heldout.errors import InvalidValue
from heldout.pipeline.crossfit import pool
from heldout.pipeline.evaluate.answers import SCORERS, USUAL, choose_metric
from heldout.pipeline.evaluate.metrics import exact, overlap
from heldout.pipeline.evaluate.scores import Scores, score_answers
from heldout.pipeline.ladder import Rung
from heldout.pipeline.types import Example

Score = Callable[[str, str], float]

GRADED: dict[str, Score] = {
    "token_f1": overlap.token_f1,
    "rouge_l": overlap.rouge_l,
    "rouge_1": lambda a, b: overlap.rouge_n(a, b, n=1),
    "chrf": overlap.chrf,
    "bleu": overlap.bleu,
    "gleu": overlap.gleu,
    "fuzzy_match": overlap.fuzzy_match,
}
ALL = {**GRADED, **{name: scorer.score for name, scorer in SCORERS.items()}}

WORDS = st.lists(st.sampled_from("the cat sat on a mat , dog . House 12 é".split()), max_size=9).map(" ".join)


def row(target: str, line: int = 1) -> Example:
    messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": target})
    return Example(messages=messages, weights=(0, 1), line=line)


@pytest.mark.parametrize("name", ALL)
@given(answer=st.one_of(st.text(), WORDS), target=st.one_of(st.text(), WORDS))
def test_a_score_lies_between_0_and_1_and_the_same_text_has_1(name: str, answer: str, target: str) -> None:
    assert 0 <= ALL[name](answer, target) <= 1
    assert ALL[name](target, target) == pytest.approx(1)


@pytest.mark.parametrize("name", ["token_f1", "rouge_l", "rouge_1", "gleu", "fuzzy_match"])
@given(one=WORDS, other=WORDS)
def test_what_is_an_f1_is_the_same_both_ways(name: str, one: str, other: str) -> None:
    assert GRADED[name](one, other) == pytest.approx(GRADED[name](other, one))


def by_table(one: Sequence[str], other: Sequence[str]) -> int:
    """The longest common subsequence as a textbook computes it."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.text("abc"), st.text("abc"))
def test_the_common_subsequence_in_bits_is_the_one_of_the_table(one: str, other: str) -> None:
    assert overlap._common_subsequence(one, other) == by_table(one, other)


# chrF and BLEU by sacreBLEU 2.6 (BLEU of our words, effective order), GLEU by NLTK 3.10, the ratio by RapidFuzz 3.14.
REFERENCE = [
    ("the cat sat on the mat", "the cat is on the mat", 0.645779, 0.379918, 0.5, 0.930233),
    ("The quick brown fox jumps.", "A quick brown dog jumped over it.", 0.401544, 0.128726, 0.153846, 0.677966),
    ("Guten Morgen, Welt", "Guten Abend, Welt!", 0.375488, 0.275348, 0.285714, 0.777778),
    ("abc", "xyz", 0, 0, 0, 0),
]


@pytest.mark.parametrize(("answer", "target", "chrf", "bleu", "gleu", "ratio"), REFERENCE)
def test_the_numbers_are_those_of_well_known_programs(
    answer: str, target: str, chrf: float, bleu: float, gleu: float, ratio: float
) -> None:
    assert overlap.chrf(answer, target) == pytest.approx(chrf, abs=1e-5)
    assert overlap.bleu(answer, target) == pytest.approx(bleu, abs=1e-5)
    assert overlap.gleu(answer, target) == pytest.approx(gleu, abs=1e-5)
    assert overlap.fuzzy_match(answer, target) == pytest.approx(ratio, abs=1e-5)


def test_runs_of_words_are_counted_as_often_as_they_occur() -> None:
    assert overlap.rouge_n("a b a b", "a b c", n=1) == pytest.approx(2 * 2 / 7)
    assert overlap.rouge_n("a b a b", "a b c", n=2) == pytest.approx(2 * 1 / 5)
    assert overlap.rouge_n("a b", "b a", n=2) == 0
    assert overlap.token_f1("The cat, the dog!", "the DOG") == pytest.approx(2 * 2 / 6)


@pytest.mark.parametrize(
    ("answer", "target", "same"),
    [
        ("Red.", "red", True),
        (' "red"', "red", True),
        ("«red».", "Red", True),
        ("dark red", "red", False),
        ('{"a": "Red"}', '{"a":"red"}', True),
        ("", "red", False),
    ],
)
def test_label_accuracy_forgives_case_quotes_and_a_full_stop(answer: str, target: str, same: bool) -> None:
    assert exact.label_accuracy(answer, target) == same


@pytest.mark.parametrize(
    ("answer", "target", "same"),
    [
        ("42", "42", True),
        ("42.0", "42", True),
        ("1,234.50", "1234.5", True),
        ("$5", "5", True),
        ("-$5", "-5", True),
        ("−5", "-5", True),
        ("1e3", "1000", True),
        ("12 %", "12%", True),
        ("The answer is 42.", "42", True),
        ("She has 3, so 3 * 14 = 42.\n#### 42", "42", True),
        ("3 * 14 = 42", "42", False),
        ("it is 42 and again 42.0", "42", True),
        ("42 apples", "42", True),
        ("T42", "42", False),
        ("2024-05-01", "2024", False),
        ("0.333", "0.3333", False),
        ("none", "42", False),
        ("", "42", False),
        ("unknown", "unknown", True),
    ],
)
def test_numbers_are_compared_as_numbers(answer: str, target: str, same: bool) -> None:
    assert exact.same_number(answer, target) == same


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_number_is_the_same_with_thousands_separated(value: object) -> None:
    assert exact.same_number(f"{value:,}", str(value)) == 1


@pytest.mark.parametrize("text", ["007", "", "-", "e5", ".", "1,23", "1.2.3", "12 34", "٣", "NaN", "0x10"])
def test_what_is_no_number_is_not_taken_for_one(text: str) -> None:
    assert exact.number(text) is None


QUERY = "SELECT name FROM users WHERE city = 'Bonn' AND age >= 3"


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("select name from users where city='Bonn' and age>=3;", True),
        ("```sql\nSELECT name\n  FROM users -- all\n WHERE city = 'Bonn' AND age >= 3\n```", True),
        ("SELECT name FROM users WHERE city = 'bonn' AND age >= 3", False),
        ("SELECT name FROM users WHERE city = 'Bonn' AND age > 3", False),
        ("SELECT name FROM users WHERE age >= 3 AND city = 'Bonn'", False),
        ("", False),
    ],
)
def test_sql_is_compared_by_its_words(answer: str, same: bool) -> None:
    assert exact.same_sql(answer, QUERY) == same


def test_a_comment_inside_quotes_is_none_and_two_signs_of_unequal_are_one() -> None:
    assert exact.same_sql("select '--a' from t where b <> 1", "SELECT '--a' FROM t WHERE b != 1") == 1
    assert exact.same_sql("select '--a' from t", "select '--b' from t") == 0


@pytest.mark.parametrize(
    ("targets", "form", "name"),
    [
        ([str(i * 1.5) for i in range(1, 20)], "number", "same number"),
        ([f"${i},000" for i in range(1, 20)], "number", "same number"),
        (["1", "2", "3"] * 10, "label", "exact match"),
        ([f"{i:05d}" for i in range(20)], "text", "ROUGE-L"),
        ([f"SELECT a FROM t{i};" for i in range(20)], "sql", "same SQL"),
        ([f"```sql\nWITH a AS (SELECT {i}) SELECT * FROM a\n```" for i in range(20)], "sql", "same SQL"),
        ([f"Select the {i}th chair, please" for i in range(20)], "text", "ROUGE-L"),
        ([*(str(i * 1.5) for i in range(1, 20)), "none"], "text", "ROUGE-L"),
    ],
)
def test_numbers_and_sql_are_seen_by_their_look(targets: list[str], form: str, name: str) -> None:
    metric = choose_metric(targets)
    assert (metric.form, metric.name) == (form, name)


def test_a_metric_can_be_asked_for_by_name_and_the_answers_stay_what_they_are() -> None:
    metric = choose_metric(["red", "blue", "blue"] * 10, "chrf")
    assert (metric.form, metric.name, metric.binary) == ("label", "chrF", False)
    with pytest.raises(InvalidValue, match=r"no metric 'accuracy'. Metrics: exact_match, label_accuracy"):
        choose_metric(["red"], "accuracy")


def scored(targets: list[str], answers: list[str]) -> Scores:
    return score_answers(choose_metric(["red", "blue", "blue"] * 10), [row(one) for one in targets], answers)


def test_macro_f1_stands_beside_the_score_of_imbalanced_labels() -> None:
    scores = scored(["red"] * 3 + ["blue"] * 9, ["blue"] * 12)
    assert scores.mean == 0.75
    assert scores.macro_f1 == pytest.approx((0 + 2 * 9 / (12 + 9)) / 2)
    assert scores.as_dict()["macro_f1"] == scores.macro_f1
    pooled = pool([scored(["red"] * 3, ["red"] * 3), scored(["blue"] * 9, ["blue"] * 9)])
    assert pooled.macro_f1 == 1, "rows of several folds count together"


def test_a_rung_tells_its_macro_f1_behind_what_it_is() -> None:
    def told(targets: list[str]) -> str:
        scores = scored(targets, ["blue"] * len(targets))
        return Rung(name="constant", kind="constant", description="always 'blue'", scores=scores).explained

    assert told(["red"] + ["blue"] * 9) == "always 'blue'; macro-F1 47.4%"
    assert told(["red"] * 9 + ["blue"] * 9) == "always 'blue'"


def test_balanced_labels_and_free_texts_have_no_macro_f1() -> None:
    assert scored(["red"] * 5 + ["blue"] * 9, ["blue"] * 14).macro_f1 is None
    text = choose_metric([f"text {i}" for i in range(9)])
    assert "macro_f1" not in score_answers(text, [row("a"), row("b")], ["a", "c"]).as_dict()


def test_labels_as_json_are_one_label_however_they_are_spelled() -> None:
    targets = [json.dumps({"a": "x"}), '{"a":"x"}', '{"a": "x" }', '{"a":"y"}']
    assert exact.macro_f1(['{"a":"x"}'] * 3 + ['{"a": "y"}'], targets) == 1
    assert exact.are_imbalanced(targets)


def test_every_metric_and_similarity_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name, scorer in SCORERS.items():
        assert f"| `{name}` | {scorer.name} | {'yes' if scorer.binary else 'no'} |" in page
    for name in ("fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_5", "rouge_l"):
        assert f"`{name}`" in page
    for form, name in USUAL.items():
        assert f"| `{name}` |" in page, form
