"""Ship, don't ship, or inconclusive; and every number in a reason can be looked up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from heldout.pipeline.crossfit import CrossFit, Fold
from heldout.pipeline.ladder import Rung
from heldout.pipeline.verdict import Verdict, decide
from tests.unit.conftest import right, rung


def judge(tuned: list[float], *rungs: Rung, binary: bool = True) -> Verdict:
    return decide(rungs, rung("tuned", tuned, kind="tuned", binary=binary))


def test_a_model_that_is_surely_better_ships() -> None:
    verdict = judge(right(100, 90), rung("zero-shot", right(100, 60)))
    assert verdict.outcome == "ship"
    assert verdict.best_baseline == "zero-shot"
    assert verdict.cheapest_as_good == "tuned"
    assert verdict.numbers["difference"] == pytest.approx(0.3)


@pytest.mark.parametrize("tuned", [40, 55])
def test_a_model_that_is_probably_worse_does_not_ship(tuned: int) -> None:
    verdict = judge(right(100, tuned), rung("zero-shot", right(100, 60)))
    assert verdict.outcome == "dont_ship"
    assert verdict.cheapest_as_good == "zero-shot"


def test_a_difference_that_may_be_luck_is_inconclusive() -> None:
    baseline = right(100, 60)
    tuned = [*[0.0] * 6, *[1.0] * 62, *[0.0] * 32]  # 8 wins, 6 losses
    verdict = judge(tuned, rung("zero-shot", baseline))
    assert verdict.outcome == "inconclusive"
    assert verdict.cheapest_as_good == "tuned", "it is not shown that the prompt is as good"


def test_a_sure_gain_below_one_point_is_not_worth_a_model() -> None:
    verdict = judge(right(1000, 507), rung("zero-shot", right(1000, 500)))
    assert verdict.numbers["p_better"] > 0.95
    assert verdict.outcome == "inconclusive"


def test_graded_scores_are_judged_too() -> None:
    low, high = [0.4 + 0.1 * (i % 3) for i in range(60)], [0.6 + 0.1 * (i % 4) for i in range(60)]
    assert judge(high, rung("zero-shot", low, binary=False), binary=False).outcome == "ship"
    assert judge(low, rung("zero-shot", high, binary=False), binary=False).outcome == "dont_ship"


@pytest.mark.parametrize(("n", "outcome"), [(29, "inconclusive"), (30, "ship")])
def test_fewer_than_thirty_examples_carry_no_verdict(n: int, outcome: str) -> None:
    verdict = judge(right(n, n), rung("zero-shot", right(n, 0)))
    assert verdict.outcome == outcome
    assert (f"{n} holdout examples are too few" in verdict.reasons[0]) == (n < 30)


def test_the_outcome_is_about_the_best_prompt_or_constant() -> None:
    rungs = [
        rung("constant", right(100, 50), kind="constant"),
        rung("tfidf-logistic", right(100, 85), kind="classical"),
        rung("zero-shot", right(100, 20)),
        rung("few-shot-8", right(100, 70)),
    ]
    assert judge(right(100, 90), *rungs).best_baseline == "few-shot-8"
    assert judge(right(100, 90), *rungs[:3]).best_baseline == "constant"


def test_a_classical_model_that_is_surely_better_overrules_a_gain_over_the_prompt() -> None:
    prompt = rung("zero-shot", right(100, 30))
    classical = rung("tfidf-logistic", right(100, 95), kind="classical")
    assert judge(right(100, 80), prompt).outcome == "ship"
    verdict = judge(right(100, 80), classical, prompt)
    assert verdict.outcome == "dont_ship"
    assert verdict.reasons[0].startswith("tfidf-logistic scores 95.0% and is better than the tuned model (80.0%)")
    assert verdict.cheapest_as_good == "tfidf-logistic"
    slightly = rung("tfidf-logistic", right(100, 81), kind="classical")
    assert judge(right(100, 80), slightly, prompt).outcome == "ship", "one more right answer is no proof"


def test_the_cheapest_rung_that_is_as_good_is_the_first_of_the_ladder() -> None:
    ladder = [
        rung("constant", right(400, 100), kind="constant"),
        rung("tfidf-logistic", right(400, 379), kind="classical"),
        rung("zero-shot", right(400, 380)),
        rung("few-shot-8", right(400, 399)),
    ]
    verdict = judge(right(400, 380), *ladder)
    assert verdict.cheapest_as_good == "tfidf-logistic"
    assert any("tfidf-logistic is cheaper and as good: 94.8% against 95.0%" in reason for reason in verdict.reasons)
    assert judge(right(400, 380), ladder[0], ladder[2], ladder[3]).cheapest_as_good == "zero-shot"
    assert judge(right(400, 380), ladder[0]).cheapest_as_good == "tuned"


def crossfitted(groups: int) -> CrossFit:
    """Five folds that answered rows of this many distinct prompts."""
    fold = Fold(
        number=1,
        train=40,
        valid=10,
        best_step=5,
        best_epoch=1.0,
        last_step=5,
        learning_rate=1e-3,
        valid_loss=None,
        stopped="",
        seconds=1.0,
        scores=rung("tuned", right(10, 5)).scores,
    )
    return CrossFit(folds=(fold,) * 5, groups=groups)


@pytest.mark.parametrize(("groups", "outcome"), [(29, "inconclusive"), (30, "ship")])
def test_by_cross_fitting_evidence_is_counted_in_distinct_prompts(groups: int, outcome: str) -> None:
    tuned = rung("tuned", right(60, 60), kind="tuned")
    verdict = decide([rung("zero-shot", right(60, 0))], tuned, crossfitted(groups))
    assert verdict.outcome == outcome
    assert ("29 distinct prompts are too few for a verdict" in verdict.reasons[0]) == (groups == 29)
    assert (verdict.numbers["groups"], verdict.numbers["folds"], verdict.numbers["n_holdout"]) == (groups, 5, 60)


def test_a_verdict_by_cross_fitting_says_that_the_served_model_was_not_measured() -> None:
    tuned = rung("tuned", right(60, 50), kind="tuned")
    verdict = decide([rung("zero-shot", right(60, 20))], tuned, crossfitted(60))
    assert verdict.reasons[0].startswith("on 60 out-of-fold answers of 5 models the tuned model scores 83.3%")
    assert "the served model was trained on all rows and was itself not measured" in verdict.reasons[1]
    assert not any("holdout" in reason for reason in verdict.reasons)
    plain = judge(right(60, 50), rung("zero-shot", right(60, 20)))
    assert not any("fold" in reason for reason in plain.reasons)


CASES = {
    "ship": (right(100, 90), [rung("zero-shot", right(100, 60))]),
    "ship, but a prompt is close": (right(400, 380), [rung("constant", right(400, 375), kind="constant")]),
    "dont_ship": (right(100, 41), [rung("constant", right(100, 60), kind="constant")]),
    "hopeless": (right(300, 3), [rung("few-shot-8", right(300, 297))]),
    "unsure": ([*[0.0] * 6, *[1.0] * 62, *[0.0] * 32], [rung("few-shot-4", right(100, 60))]),
    "too few": (right(17, 12), [rung("zero-shot", right(17, 5))]),
    "overruled": (
        right(100, 80),
        [rung("tfidf-logistic", right(100, 95), kind="classical"), rung("zero-shot", right(100, 30))],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_number_in_a_reason_is_in_the_evidence(case: str) -> None:
    tuned, rungs = CASES[case]
    verdict = judge(tuned, *rungs)
    evidence = {*leaves(verdict.as_dict()["numbers"]), *(one.scores.mean for one in rungs)}
    known = {f"{100 * abs(value):.1f}" for value in evidence} | {str(verdict.numbers["n_holdout"])}
    if verdict.numbers["p_better"] > 0.999:
        known.add("99.9")
    if verdict.numbers["p_better"] < 0.001:
        known.add("0.1")
    assert verdict.reasons
    quoted = 0
    for reason in verdict.reasons:
        for number in numbers_in(reason, [one.name for one in rungs]):
            assert number in known, reason
            quoted += 1
    assert quoted >= 6


def leaves(tree: Any) -> Iterator[float]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        for one in tree:
            yield from leaves(one)
    else:
        yield tree


def numbers_in(reason: str, names: list[str]) -> list[str]:
    """The numbers of a sentence without the rule's own constants and the names of rungs."""
    for constant in (*names, "95 % interval", "80 % power", "(95%)", "(20%)", "30 are the minimum"):
        reason = reason.replace(constant, "")
    return re.findall(r"\d+(?:\.\d+)?", reason)
