"""What twice as many rows would gain, and what the cheap rungs score out of fold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from heldout.pipeline.advise.learning_curve import PARTITIONS, draw_curve, predict
from heldout.pipeline.advise.rungs import measure_cheap
from heldout.pipeline.types import Example
from heldout.pipeline.watch import Silent
from tests.unit.conftest import example
from tests.unit.test_advise_task import dataset


def fit_with(error: Any) -> Any:
    """A fit that is wrong on this share of the rows, given how many rows it saw; it notes what it was asked."""

    def fit(taught: Sequence[int], asked: Sequence[int]) -> list[str]:
        assert not set(taught) & set(asked), "a row is answered by a model that saw it"
        share = error(len(taught))
        # A fixed order of difficulty: the same rows are the hard ones for every model.
        return ["wrong" if (row * 7919) % 1000 < 1000 * share else "right" for row in asked]

    return fit


def curve_of(n: int, error: Any) -> Any:
    return predict(draw_curve(["right"] * n, fit_with(error)), n, rung="a rung")


def test_the_curve_reads_what_twice_as_many_rows_would_give() -> None:
    more = curve_of(1000, lambda m: 0.05 + 4 / m**0.5)
    assert more.error == pytest.approx(0.05 + 4 / 1000**0.5, abs=0.005)
    assert more.error_at_double == pytest.approx(0.05 + 4 / 2000**0.5, abs=0.005)
    assert more.interval.low < more.gain < more.interval.high
    assert more.pays
    assert more.sentence.startswith("Collecting as many examples again would likely gain 3.")


def test_a_flat_curve_does_not_pay() -> None:
    more = curve_of(400, lambda m: 0.2)
    assert more.gain == pytest.approx(0.0, abs=0.002)
    assert more.p_worth < 0.05
    assert "unlikely to pay" in more.sentence


def test_a_gain_that_is_not_sure_is_not_advised() -> None:
    more = curve_of(60, lambda m: 0.30 + 0.6 / m**0.5)
    assert more.gain >= 0.02
    assert not more.pays
    assert "is not sure" in more.sentence


def test_an_error_cannot_fall_below_zero() -> None:
    more = curve_of(200, lambda m: max(0.0, 0.4 - m / 400))
    assert 0 <= more.error_at_double <= more.error
    assert more.error_interval.low >= 0


def test_partitions_are_disjoint_and_as_large_as_they_say() -> None:
    seen: list[tuple[int, ...]] = []

    def fit(taught: Sequence[int], asked: Sequence[int]) -> list[str]:
        seen.append(tuple(sorted(taught)))
        return ["a"] * len(asked)

    curve = draw_curve(["a", "b"] * 50, fit)
    assert curve.sizes == (20, 40, 80)
    fold = seen[: sum(PARTITIONS)]
    quarters = fold[:4]
    assert sorted(row for quarter in quarters for row in quarter) == sorted(fold[-1])
    assert {sum(row % 2 for row in quarter) for quarter in quarters} == {10}, "labels keep their shares"


def words(n: int) -> tuple[Example, ...]:
    """A word that gives the label away in nine of ten rows."""
    labels = ("red", "green", "blue")
    return tuple(
        example(f"row {i} has {labels[i % 3] if i % 10 else 'nothing'} in it", labels[i % 3], i + 1) for i in range(n)
    )


def test_cheap_rungs_are_scored_out_of_fold_and_repeated_prompts_count_once() -> None:
    rows = words(90)
    cheap = measure_cheap(dataset([*rows, *rows]), None, Silent())
    constant, tfidf = cheap.rungs
    assert (constant.rows, tfidf.rows) == (90, 90)
    assert constant.score == pytest.approx(1 / 3)
    assert 0.85 <= tfidf.score <= 0.95
    assert cheap.more is not None
    assert cheap.more.n == 90


def test_the_frozen_encoder_is_a_rung_where_there_is_one() -> None:
    def embed(texts: Sequence[str]) -> list[list[float]]:
        return [[float(name in text) for name in ("red", "green", "blue")] for text in texts]

    cheap = measure_cheap(dataset(words(90)), embed, Silent())
    assert [rung.name for rung in cheap.rungs][2:] == ["a frozen encoder + logistic regression"]


def test_a_handful_of_rows_has_no_rung_to_fit() -> None:
    cheap = measure_cheap(dataset(words(12)), None, Silent())
    assert len(cheap.rungs) == 1
    assert cheap.more is None
