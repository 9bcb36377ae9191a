"""Which checkpoint is shipped: the lowest validation loss, unless another is better by more than noise."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from heldout.pipeline.selection import Candidate, Kind, Selection, in_question, select


def candidate(kind: Kind, right: int, *, n: int = 100, step: int, loss: float = 0.5) -> Candidate:
    """Right on the first `right` of n examples."""
    return Candidate(kind=kind, step=step, valid_loss=loss, scores=tuple([1.0] * right + [0.0] * (n - right)))


def choose(*candidates: Candidate) -> Selection:
    return select(candidates, metric="exact_match")


BEST = candidate("best_loss", 80, step=60, loss=0.41)


def test_a_candidate_within_one_standard_error_does_not_replace_the_lowest_loss() -> None:
    # One example of 100 more: a gain of exactly one standard error, whatever the rounding.
    for n in range(2, 200):
        best = candidate("best_loss", 1, n=n, step=60)
        assert choose(best, candidate("best_metric", 2, n=n, step=75)).chosen is best, n
    selection = choose(BEST, candidate("best_metric", 81, step=75))
    assert selection.chosen is BEST
    assert selection.reason == (
        "step 60 (the lowest validation loss) is chosen (validation loss 0.41): step 75 (the highest score during "
        "training) has exact_match 0.810 against 0.800 on 100 validation examples, which is not more than one standard "
        "error of the paired difference (0.010)"
    )


def test_a_candidate_better_by_more_than_one_standard_error_is_chosen() -> None:
    # 4 examples gained, none lost: 0.04, one standard error being 0.0197.
    better = candidate("best_metric", 84, step=75)
    selection = choose(BEST, better)
    assert selection.chosen is better
    assert selection.reason == (
        "step 75 (the highest score during training) is chosen: exact_match 0.840 on 100 validation examples, against "
        "0.800 for step 60 (the lowest validation loss); the gain of 0.040 is more than one standard error of the "
        "paired difference (0.020)"
    )


def test_the_error_is_that_of_the_paired_difference() -> None:
    # 12 gained and 8 lost are the same 4 as above, but much more noise: error 0.045.
    scores = [1.0] * 72 + [0.0] * 8 + [1.0] * 12 + [0.0] * 8
    assert choose(BEST, Candidate(kind="best_metric", step=75, valid_loss=0.5, scores=tuple(scores))).chosen is BEST


def test_the_highest_score_before_the_lowest_loss_needs_two_standard_errors() -> None:
    assert choose(BEST, candidate("best_metric", 83, step=75)).chosen.step == 75
    earlier = choose(BEST, candidate("best_metric", 83, step=30))
    assert earlier.chosen is BEST
    assert "2 standard errors" in earlier.reason
    far_better = choose(BEST, candidate("best_metric", 86, step=30))
    assert far_better.chosen.step == 30
    assert "more than 2 standard errors" in far_better.reason


def test_the_last_checkpoint_needs_two_standard_errors_under_any_name() -> None:
    assert choose(BEST, candidate("last", 83, step=90)).chosen is BEST
    assert choose(BEST, candidate("best_metric", 83, step=90)).chosen is not BEST
    both = choose(BEST, candidate("best_metric", 83, step=90), candidate("last", 83, step=90))
    assert both.chosen is BEST
    assert "2 standard errors" in both.reason
    assert choose(BEST, candidate("last", 86, step=90)).chosen.step == 90


def test_an_average_must_be_better_and_have_no_higher_loss() -> None:
    lower = candidate("average", 90, step=60, loss=0.41)
    assert choose(BEST, lower).chosen is lower
    higher = choose(BEST, candidate("average", 90, step=60, loss=0.42))
    assert higher.chosen is BEST
    assert "a higher validation loss" in higher.reason
    assert choose(BEST, candidate("average", 80, step=60, loss=0.3)).chosen is BEST


def test_of_two_that_pass_the_better_one_is_chosen_and_loss_breaks_ties() -> None:
    metric, last = candidate("best_metric", 88, step=75), candidate("last", 92, step=90)
    average = candidate("average", 92, step=60, loss=0.40)
    assert choose(BEST, metric, last).chosen is last
    assert choose(BEST, last, metric).chosen is last
    assert choose(BEST, metric, last, average).chosen is average


def test_the_same_step_under_another_name_is_no_rival() -> None:
    same = choose(BEST, candidate("best_metric", 80, step=60, loss=0.41), candidate("last", 80, step=60, loss=0.41))
    assert same.chosen is BEST
    assert same.reason.endswith("there is no other candidate")


@pytest.mark.parametrize("n", [0, 1])
def test_one_scored_example_or_none_decides_nothing(n: int) -> None:
    best = candidate("best_loss", 0, n=n, step=60)
    selection = choose(best, candidate("best_metric", n, n=n, step=30))
    assert selection.chosen is best
    assert "cannot show" in selection.reason


def test_equal_scores_leave_the_lowest_loss() -> None:
    others = [candidate("best_metric", 80, step=30, loss=0.6), candidate("last", 80, step=90, loss=0.6)]
    selection = choose(BEST, *others)
    assert selection.chosen is BEST
    assert selection.reason.endswith("no other candidate has a higher exact_match than its 0.800")


def test_a_loss_that_is_not_a_number_is_never_chosen() -> None:
    for loss in (math.nan, math.inf):
        broken = candidate("last", 100, step=90, loss=loss)
        selection = choose(BEST, broken)
        assert selection.chosen is BEST
        assert json.loads(json.dumps(selection.as_dict(), allow_nan=False))["candidates"][1]["valid_loss"] is None
        with pytest.raises(ValueError, match="nothing of this training can be shipped"):
            choose(candidate("best_loss", 80, step=60, loss=loss), candidate("last", 100, step=90))


def test_candidates_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"step 30 .* has 99 scores, step 60 .* 100: score the same"):
        choose(BEST, candidate("best_metric", 80, n=99, step=30))
    with pytest.raises(ValueError, match="exactly one best_loss"):
        choose(candidate("last", 80, step=90))
    with pytest.raises(ValueError, match="at most one of each other kind"):
        choose(BEST, candidate("last", 80, step=90), candidate("last", 80, step=91))
    for wrong in (math.nan, 1.5, -0.1):
        with pytest.raises(ValueError, match="outside 0 to 1"):
            choose(BEST, Candidate(kind="last", step=90, valid_loss=0.5, scores=(wrong,) * 100))


def test_only_those_are_in_question_whose_score_could_put_them_first() -> None:
    last, same = candidate("last", 0, step=90, loss=0.9), candidate("best_metric", 80, step=BEST.step)
    lower, higher = (candidate("average", 80, step=60, loss=loss) for loss in (0.39, 0.42))
    broken = candidate("best_metric", 100, step=30, loss=math.nan)
    assert in_question([BEST, same, last, lower]) == (BEST, last, lower)
    assert in_question([BEST, broken, last, higher]) == (BEST, last)
    for one in (same, broken, higher):
        assert choose(BEST, replace(one, scores=(1.0,) * 100)).chosen is BEST, one
    assert in_question([last]) == (last,)


def test_the_reason_says_that_a_checkpoint_could_not_be_read() -> None:
    selection = select([BEST], metric="exact_match", complete=False)
    assert selection.reason == f"of the checkpoints that can be read, {choose(BEST).reason}"
    assert not selection.complete


def test_the_report_gets_the_choice_the_reason_and_every_candidate() -> None:
    selection = choose(BEST, candidate("best_metric", 84, step=30))
    assert selection.as_dict() == {
        "chosen": {"kind": "best_metric", "step": 30, "valid_loss": 0.5, "score": pytest.approx(0.84)},
        "reason": selection.reason,
        "metric": "exact_match",
        "candidates": [
            {"kind": "best_loss", "step": 60, "valid_loss": 0.41, "score": pytest.approx(0.80)},
            {"kind": "best_metric", "step": 30, "valid_loss": 0.5, "score": pytest.approx(0.84)},
        ],
    }
