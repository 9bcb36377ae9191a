"""Ship, don't ship, or inconclusive; and every number in a reason can be looked up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from heldout.pipeline.crossfit import CrossFit, Fold
from heldout.pipeline.evaluate.statistics import mcnemar_mid_p
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
    assert verdict.reasons[0].startswith(
        "tfidf-logistic scores 95.0%, 15.0 points more than the tuned model (80.0%), at a fraction of its cost"
    )
    assert verdict.cheapest_as_good == "tfidf-logistic"
    slightly = rung("tfidf-logistic", right(100, 81), kind="classical")
    assert judge(right(100, 80), slightly, prompt).outcome == "ship", "one more right answer is no proof"


def test_a_cheaper_model_that_is_better_is_named_with_what_it_saves() -> None:
    classical = rung("frozen-encoder", right(100, 95), kind="classical")
    classical = replace(classical, scores=replace(classical.scores, milliseconds=2.0))
    tuned = rung("tuned", right(100, 84), kind="tuned", prompt_tokens=120)
    tuned = replace(tuned, scores=replace(tuned.scores, milliseconds=100.0))
    verdict = decide([rung("zero-shot", right(100, 30)), classical], tuned)
    assert verdict.reasons[0] == (
        "frozen-encoder scores 95.0%, 11.0 points more than the tuned model (84.0%), and is 50 times as fast "
        "(2 ms an answer, not 100): use that instead"
    )
    slower = replace(classical, scores=replace(classical.scores, milliseconds=400.0))
    told = decide([rung("zero-shot", right(100, 30)), slower], tuned).reasons[0]
    assert told.endswith("(84.0%) (400 ms an answer, not 100): use that instead")
    assert verdict.numbers["answers"]["tuned"] == {"score": 0.84, "milliseconds": 100.0, "prompt_tokens": 120}


def test_the_cheapest_rung_that_is_as_good_as_the_best_is_named_whoever_is_best() -> None:
    ladder = [
        rung("constant", right(400, 100), kind="constant"),
        rung("tfidf-logistic", right(400, 379), kind="classical"),
        rung("zero-shot", right(400, 380)),
        rung("few-shot-8", right(400, 399), prompt_tokens=800),
    ]
    verdict = judge(right(400, 380), *ladder[:3])
    assert verdict.cheapest_as_good == "tfidf-logistic"
    assert any(
        "tfidf-logistic is the cheapest that is as good as the best (zero-shot): 94.8% against 95.0%" in reason
        for reason in verdict.reasons
    )
    assert judge(right(400, 380), *ladder).cheapest_as_good == "few-shot-8", "the others are 5 points behind it"
    assert judge(right(400, 380), ladder[0], ladder[2]).cheapest_as_good == "zero-shot", "it needs no training"
    assert judge(right(400, 398), ladder[0], ladder[3]).cheapest_as_good == "tuned", "it reads a shorter prompt"
    assert judge(right(400, 380), ladder[0]).cheapest_as_good == "tuned"


def test_a_model_that_is_as_good_as_the_best_prompt_and_reads_half_of_it_ships() -> None:
    tuned = rung("tuned", right(400, 320), kind="tuned", prompt_tokens=100)
    verdict = decide([rung("few-shot-8", right(400, 321), prompt_tokens=900)], tuned)
    assert (verdict.outcome, verdict.because) == ("ship", "cheaper")
    assert "with 100 prompt tokens an answer instead of 900" in verdict.reasons[1]
    as_long = decide([rung("zero-shot", right(400, 321), prompt_tokens=150)], tuned)
    assert as_long.outcome != "ship", "two thirds of the prompt is no reason"
    worse = rung("tuned", right(400, 300), kind="tuned", prompt_tokens=100)
    assert decide([rung("few-shot-8", right(400, 321), prompt_tokens=900)], worse).outcome == "dont_ship"


def test_every_further_look_at_the_same_holdout_takes_more_to_ship() -> None:
    baseline, tuned = rung("zero-shot", right(100, 60)), rung("tuned", right(100, 66), kind="tuned")
    first, third, eighth = (decide([baseline], tuned, look=look) for look in (1, 3, 8))
    assert [one.numbers["p_needed"] for one in (first, third, eighth)] == pytest.approx(
        [0.95, 0.98333, 0.99375], abs=1e-5
    )
    assert [one.outcome for one in (first, third, eighth)] == ["ship", "ship", "inconclusive"]
    assert not any("the same examples" in reason for reason in first.reasons)
    assert "this is verdict 8 on (nearly) the same examples" in eighth.reasons[-1]
    assert "holdout file with examples that were never used" in eighth.reasons[-1]
    assert not any("never used" in reason for reason in third.reasons)


def test_examples_that_belong_together_are_one_piece_of_evidence() -> None:
    baseline, tuned = rung("zero-shot", right(100, 50)), rung("tuned", right(100, 60), kind="tuned")
    alone = decide([baseline], tuned)
    one_document = decide([baseline], tuned, clusters=[50 if 50 <= i < 60 else i for i in range(100)])
    assert (alone.outcome, one_document.outcome) == ("ship", "inconclusive"), "all wins are about one document"
    assert one_document.numbers["clusters"] == 91
    assert one_document.numbers["smallest_detectable"] > 2 * alone.numbers["smallest_detectable"]
    few = decide([baseline], tuned, clusters=[i // 4 for i in range(100)])
    assert few.reasons[0].startswith("25 groups of related examples (of 100 examples) are too few")


def test_an_inconclusive_verdict_says_how_many_more_examples_would_settle_it() -> None:
    verdict = judge([*[0.0] * 6, *[1.0] * 62, *[0.0] * 32], rung("zero-shot", right(100, 60)))
    more = verdict.numbers["more_needed"]
    assert f"to settle it takes about {more} more examples" in verdict.reasons[-1]
    # So many examples with the same shares find it in about 80 of 100 cases (normal approximation, mid-p test).
    n = 100 + more
    rng = np.random.default_rng(0)
    wins, losses, _ = rng.multinomial(n, [0.08, 0.06, 0.86], size=2000).T
    found = np.mean([mcnemar_mid_p(*one) <= 0.05 for one in zip(wins, losses, strict=True)])
    assert 0.76 < found < 0.87


def test_by_cross_fitting_the_tuned_model_must_be_ahead_in_four_folds_of_five() -> None:
    baseline = rung("zero-shot", [0.0] * 10 + [1.0, 0.0] * 20)
    in_one = rung("tuned", [1.0] * 10 + [1.0, 0.0] * 20, kind="tuned")
    in_all = rung(
        "tuned", [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0] + [1.0, 1.0, 1.0] * 10 + [1.0] * 10, kind="tuned"
    )
    one, everywhere = (decide([baseline], tuned, crossfitted(50)) for tuned in (in_one, in_all))
    assert one.numbers["p_better"] > 0.99
    assert (one.outcome, one.numbers["folds_ahead"]) == ("inconclusive", 1)
    assert any("it is ahead in 1 of 5 folds only" in reason for reason in one.reasons)
    assert (everywhere.outcome, everywhere.numbers["folds_ahead"]) == ("ship", 5)


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
    known |= {str(verdict.numbers["more_needed"]), str(max(0, 30 - verdict.numbers["n_holdout"]))}
    known.add(f"{100 * abs(verdict.numbers['best'] - verdict.numbers['tuned']):.1f}")
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
