"""Intervals, paired comparisons and the smallest visible difference, against numbers worked out elsewhere."""

from __future__ import annotations

import random

import pytest

from heldout.pipeline.evaluate.statistics import compare, mcnemar_mid_p, mean_interval, smallest_detectable, wilson
from heldout.pipeline.verdict import decide
from tests.unit.conftest import right, rung


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (80, 100, 0.711, 0.867),  # Wilson's formula, worked by hand
        (24, 30, 0.627, 0.905),
        (800, 1000, 0.774, 0.824),
        (0, 30, 0.0, 0.114),
        (0, 50, 0.0, 0.071),
        (50, 50, 0.929, 1.0),
        (1, 10, 0.0179, 0.4042),  # R: prop.test(1, 10, correct = FALSE)
    ],
)
def test_wilson_intervals_are_the_known_ones(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=6e-4)


def test_an_interval_shrinks_with_the_number_of_examples_and_holds_the_mean() -> None:
    for binary, scores in ((True, [1.0, 1.0, 1.0, 0.0]), (False, [0.9, 0.2, 0.5, 0.4])):
        mean = sum(scores) / 4
        widths = []
        for times in (5, 20, 80):
            low, high = mean_interval(scores * times, binary=binary)
            assert 0 <= low < mean < high <= 1
            widths.append(high - low)
        assert widths[1] == pytest.approx(widths[0] / 2, rel=0.2)
        assert widths[2] == pytest.approx(widths[1] / 2, rel=0.2)


def test_equal_scores_do_not_claim_certainty() -> None:
    low, high = mean_interval([0.5] * 40, binary=False)
    assert 0.45 < low < 0.5 < high < 0.55
    same = compare([1.0] * 40, [1.0] * 40, binary=True)
    assert same.interval[0] < 0 < same.interval[1]
    assert same.smallest_detectable > 0.05


def test_no_scores_say_nothing() -> None:
    assert mean_interval([], binary=True) == (0.0, 1.0)


def test_the_probability_of_being_better_is_the_beta_posterior_of_the_wins() -> None:
    # 3 wins, 1 loss: P(share > 1/2) under Beta(4, 2) is P(at most 3 heads of 5) = 26/32.
    three_to_one = compare([1, 1, 1, 0, 1, 0], [0, 0, 0, 1, 1, 0], binary=True)
    assert three_to_one.p_better == pytest.approx(26 / 32)
    assert three_to_one.difference == pytest.approx(2 / 6)
    assert three_to_one.discordant == pytest.approx(4 / 6)
    assert three_to_one.n == 6
    # 5 wins, no loss: Beta(6, 1), 1 - 2^-6.
    assert compare(right(10, 5), right(10, 0), binary=True).p_better == pytest.approx(1 - 2**-6)


@pytest.mark.parametrize("binary", [True, False])
def test_a_comparison_turned_round_is_its_mirror_image(binary: bool) -> None:
    rng = random.Random(1)
    a, b = ([float(rng.random() < p) for _ in range(60)] for p in (0.8, 0.6))
    if not binary:
        a, b = ([0.3 + 0.5 * x * rng.random() for x in scores] for scores in (a, b))
    one, other = compare(a, b, binary=binary), compare(b, a, binary=binary)
    assert other.difference == pytest.approx(-one.difference)
    assert other.p_better == pytest.approx(1 - one.p_better, abs=0.01)
    assert other.interval == pytest.approx((-one.interval[1], -one.interval[0]), abs=0.01)
    assert other.smallest_detectable == one.smallest_detectable
    assert other.discordant == one.discordant
    assert one.interval[0] < one.difference < one.interval[1]


@pytest.mark.parametrize("binary", [True, False])
def test_equal_models_are_as_likely_better_as_worse(binary: bool) -> None:
    scores = right(50, 30) if binary else [i / 50 for i in range(50)]
    assert compare(scores, scores, binary=binary).p_better == pytest.approx(0.5, abs=0.02)
    # Not only the same answers: as many wins as losses.
    assert compare(scores, scores[::-1], binary=binary).p_better == pytest.approx(0.5, abs=0.02)


def test_at_most_three_points_worse_is_likelier_than_better() -> None:
    a, b = right(200, 150), right(200, 152)
    one = compare(a, b, binary=True)
    assert one.p_better < 0.3 < 0.9 < one.p_not_worse
    assert compare(a, right(200, 190), binary=True).p_not_worse < 0.01


def test_the_same_scores_give_the_same_comparison() -> None:
    a, b = right(40, 30), right(40, 20)
    assert compare(a, b, binary=False) == compare(a, b, binary=False)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 0.0]), ([], [])])
def test_a_comparison_needs_the_same_examples(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=f"{len(a)} scores against {len(b)}"):
        compare(a, b, binary=True)


@pytest.mark.parametrize(
    ("n", "discordant", "points", "tolerance"),
    [
        (100, 0.2, 12.1, 0.6),
        (100, 0.3, 15.1, 0.6),
        (200, 0.1, 6.0, 0.4),
        (200, 0.2, 8.7, 0.4),
        (500, 0.3, 6.8, 0.2),
        (1000, 0.2, 3.9, 0.1),
    ],
)
def test_the_smallest_visible_difference_is_that_of_the_mcnemar_test(
    n: int, discordant: float, points: float, tolerance: float
) -> None:
    # Published table: 80 % power, two-sided 5 %, simulated for the mid-p McNemar test.
    assert 100 * smallest_detectable(n, spread=discordant) == pytest.approx(points, abs=tolerance)


def test_more_examples_show_smaller_differences_and_noise_hides_them() -> None:
    by_n = [smallest_detectable(n, spread=0.2) for n in (30, 100, 300, 1000)]
    assert by_n == sorted(by_n, reverse=True)
    by_noise = [smallest_detectable(100, spread=d) for d in (0.05, 0.1, 0.2, 0.4)]
    assert by_noise == sorted(by_noise)
    assert all(0 < smallest_detectable(n, spread=1.0) <= 1 for n in (1, 2, 5))


def test_a_null_difference_is_seldom_shipped() -> None:
    rng = random.Random(7)
    shipped = 0
    for _ in range(300):
        tuned, baseline = [], []
        for _ in range(60):
            hard = rng.random()  # examples differ in difficulty, so the two models agree on most
            tuned.append(float(rng.random() < hard))
            baseline.append(float(rng.random() < hard))
        shipped += decide([rung("zero-shot", baseline)], rung("tuned", tuned, kind="tuned")).outcome == "ship"
    assert shipped <= 0.08 * 300
    assert shipped > 0, "a rule that never ships would pass too"


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (6, 3, 0.34375),  # 2 * P(X <= 3) - P(X = 3) of Binomial(9, 1/2): (2 * 130 - 84) / 512
        (8, 1, 0.0215),
        (0, 6, 0.0156),
    ],
)
def test_mid_p_values_of_mcnemars_test_are_the_known_ones(wins: int, losses: int, p: float) -> None:
    assert mcnemar_mid_p(wins, losses) == pytest.approx(p, abs=5e-5)
    assert mcnemar_mid_p(losses, wins) == mcnemar_mid_p(wins, losses)


@pytest.mark.parametrize(("n", "in_cluster"), [(30, 1), (60, 1), (200, 1), (90, 3)])
def test_nineteen_of_twenty_intervals_hold_the_true_difference(n: int, in_cluster: int) -> None:
    """Of two models that differ on 30 % of the examples, by 10 points; those of a cluster are answered alike. With 30
    clusters the bootstrap's intervals are a little short, as they are known to be."""
    rng = random.Random(0)
    held, draws = 0, 300
    for _ in range(draws):
        pairs = [rng.choices([(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)], [0.2, 0.1, 0.7])[0] for _ in range(n // in_cluster)]
        a, b = ([pair[side] for pair in pairs for _ in range(in_cluster)] for side in (0, 1))
        found = compare(a, b, binary=True, clusters=[i // in_cluster for i in range(n)] if in_cluster > 1 else ())
        held += found.interval[0] <= 0.1 <= found.interval[1]
    assert (0.90 if in_cluster > 1 else 0.92) <= held / draws <= 0.99
