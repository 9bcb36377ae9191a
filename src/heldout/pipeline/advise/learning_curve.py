"""More data? A cheap rung's error at a quarter, a half and all of the rows, and what it would be at twice as many.

e(n) = a + b / sqrt(n), fitted to out-of-fold errors, neither a nor b below zero (SCIENCE §7; how well it predicts is
in docs/advise.md and benchmarks/learning_curve.py).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

#: Models that see a quarter, a half and all of what a fold trains on.
PARTITIONS = (4, 2, 1)
FOLDS = 5
#: More rows are not looked at: the curve is drawn from so many, and read at the file's own size.
MOST_ROWS = 2_000
#: Below, a quarter of a fold's rows is too few to learn anything from.
FEWEST_ROWS = 50
DRAWS = 1_000
#: Collecting is advised when doubling the rows gains at least so much, with at least so much probability.
WORTH, SURE = 0.02, 0.8
#: Exponents among which the interval does not choose, from nearly logarithmic on; the estimate itself is at 1/2.
EXPONENTS = (0.01, 0.5, 1.0)
#: What no such curve knows of how the next rows will be: standard deviation of a gain, by the benchmark.
UNKNOWN = 0.005

#: Learns from the rows of the first list and answers those of the second.
Fit = Callable[[Sequence[int], Sequence[int]], Sequence[str]]


class Interval(NamedTuple):
    """80 % of what is plausible."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class MoreData:
    """What twice as many examples would likely gain; errors and gains are shares of the answers."""

    rung: str
    n: int  # distinct prompts of the file
    looked_at: int  # of them, to draw the curve
    sizes: tuple[int, ...]  # rows trained on at each point of the curve
    errors: tuple[float, ...]  # out of fold, at each size
    error: float  # at n, by the curve
    error_at_double: float
    error_interval: Interval  # of error_at_double
    gain: float
    interval: Interval  # of gain
    p_worth: float  # probability that the gain is at least WORTH

    @property
    def pays(self) -> bool:
        """True when collecting as many again is advised."""
        return self.gain >= WORTH and self.p_worth >= SURE

    @property
    def sentence(self) -> str:
        """What to expect of collecting, in words."""
        gain, (low, high) = 100 * self.gain, (100 * one for one in self.interval)
        likely = f"{gain:.1f} points of {self.rung} (80 % interval {low:.1f} to {high:.1f})"
        if self.pays:
            return f"Collecting as many examples again would likely gain {likely}."
        if self.gain >= WORTH:
            return f"Whether collecting as many examples again pays is not sure: it would likely gain {likely}."
        return f"Collecting as many examples again is unlikely to pay: it would likely gain {likely}."

    def as_dict(self) -> dict[str, Any]:
        """As it goes into reports."""
        return {
            "rung": self.rung,
            "n": self.n,
            "looked_at": self.looked_at,
            "sizes": list(self.sizes),
            "errors": list(self.errors),
            "error": self.error,
            "error_at_double": self.error_at_double,
            "error_interval": list(self.error_interval),
            "gain": self.gain,
            "interval": list(self.interval),
            "p_worth": self.p_worth,
            "pays": self.pays,
            "sentence": self.sentence,
        }


class Curve(NamedTuple):
    """Out-of-fold answers of models that saw a quarter, a half and all of their fold's rows."""

    sizes: tuple[int, ...]  # rows trained on
    wrong: tuple[Any, ...]  # for each size a bool array [rows, partitions]
    answers: tuple[str, ...]  # of the models that saw all, for each row


def draw_curve(labels: Sequence[str], fit: Fit, *, seed: int = 0) -> Curve:
    """Answer every row by models that never saw it. Labels keep their shares in folds and partitions."""
    import numpy as np

    n = len(labels)
    rng = random.Random(f"{seed}/curve")
    wrong = [np.zeros((n, parts), dtype=bool) for parts in PARTITIONS]
    answers = [""] * n
    folds = deal(labels, range(n), FOLDS, rng)
    for held in folds:
        taught = sorted(set(range(n)) - set(held))
        for column, parts in enumerate(PARTITIONS):
            for part, rows in enumerate(deal(labels, taught, parts, rng)):
                given = fit(rows, held)
                wrong[column][held, part] = [answer != labels[row] for row, answer in zip(held, given, strict=True)]
                if parts == 1:
                    for row, answer in zip(held, given, strict=True):
                        answers[row] = answer
    whole = n * (FOLDS - 1) // FOLDS
    return Curve(tuple(whole // parts for parts in PARTITIONS), tuple(wrong), tuple(answers))


def deal(labels: Sequence[str], rows: Sequence[int], parts: int, rng: random.Random) -> list[list[int]]:
    """The rows in so many parts of equal size, every label dealt evenly."""
    of_label: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        of_label[labels[row]].append(row)
    order = sorted(of_label.values())
    for group in order:
        rng.shuffle(group)
    rng.shuffle(order)
    dealt = [row for group in order for row in group]
    return [dealt[part::parts] for part in range(parts)]


def predict(curve: Curve, n: int, *, rung: str, seed: int = 0) -> MoreData:
    """Read the curve at n and at 2n rows; intervals by bootstrap over rows and partitions."""
    import numpy as np

    rows = len(curve.answers)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(rows, [1 / rows] * rows, size=DRAWS)
    drawn = []
    for wrong in curve.wrong:
        parts = wrong.shape[1]
        means = counts @ wrong / rows  # [DRAWS, parts]
        chosen = rng.integers(parts, size=(DRAWS, parts))
        drawn.append(np.take_along_axis(means, chosen, axis=1).mean(axis=1))
    sizes = np.asarray(curve.sizes, dtype=float)
    errors = np.asarray([wrong.mean() for wrong in curve.wrong])
    now, double = read(errors[None], sizes, n, np.asarray([0.5]))
    exponents = rng.choice(EXPONENTS, size=DRAWS)
    nows, doubles = read(np.stack(drawn, axis=1), sizes, n, exponents, free=True)
    unknown = UNKNOWN * rng.standard_normal(DRAWS)
    gains, doubles = nows - doubles + unknown, np.maximum(0.0, doubles - unknown)
    return MoreData(
        rung=rung,
        n=n,
        looked_at=rows,
        sizes=curve.sizes,
        errors=tuple(map(float, errors)),
        error=float(now[0]),
        error_at_double=float(double[0]),
        error_interval=Interval(*map(float, np.quantile(doubles, [0.1, 0.9]))),
        gain=float(now[0] - double[0]),
        interval=Interval(*map(float, np.quantile(gains, [0.1, 0.9]))),
        p_worth=float((gains >= WORTH).mean()),
    )


def read(errors: Any, sizes: Any, n: int, exponents: Any, *, free: bool = False) -> tuple[Any, Any]:
    """Errors at n and at 2n rows of curves a + b m^-exponent through `errors` [curves, sizes], with b >= 0.

    An a below zero, which no error can end at, is not allowed unless the curve is `free`: some fall more steeply than
    m^-exponent while rows are few.
    """
    import numpy as np

    weights = sizes / sizes.sum()  # what lies near n says more about n
    x = sizes[None] ** -exponents[:, None]
    x_mean, y_mean = (x * weights).sum(1), (errors * weights).sum(1)
    spread = (weights * (x - x_mean[:, None]) ** 2).sum(1)
    b = np.maximum(0.0, (weights * (x - x_mean[:, None]) * (errors - y_mean[:, None])).sum(1) / spread)
    a = y_mean - b * x_mean
    if not free:
        through_zero = (weights * x * errors).sum(1) / (weights * x * x).sum(1)
        b, a = np.where(a < 0, through_zero, b), np.maximum(0.0, a)
    return np.maximum(0.0, a + b * float(n) ** -exponents), np.maximum(0.0, a + b * (2.0 * n) ** -exponents)
