"""Intervals and paired comparisons for small holdouts. Formulas and their sources are in
docs/design/verdict.md. Everything random is seeded: the same answers give the same verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DRAWS = 10_000

#: The chance of finding a difference that is there, of "smallest detectable" ones.
POWER = 0.8
#: Above so many examples the normal approximation is as good as the exact power.
EXACT = 2_000


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Model A against model B on the same examples; differences are A minus B, in score units (0 to 1)."""

    difference: float
    interval: tuple[float, float]  # 95 %
    p_better: float  # posterior probability that A is better
    p_not_worse: float  # … that A is at most 3 points worse
    discordant: float  # share of examples on which the two differ
    smallest_detectable: float  # the true difference this holdout finds in 80 of 100 cases
    n: int
    clusters: int  # pieces of evidence: examples, with those that belong together counted as one
    mid_p: float | None  # two-sided mid-p McNemar test of right-or-wrong scores; None for graded ones
    needed: int  # examples that find `difference`, or one of a point if that is larger, in 80 of 100 cases

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the report."""
        return {
            "difference": self.difference,
            "interval": list(self.interval),
            "p_better": self.p_better,
            "p_not_worse": self.p_not_worse,
            "discordant": self.discordant,
            "smallest_detectable": self.smallest_detectable,
            "n": self.n,
            "clusters": self.clusters,
            "mcnemar_mid_p": self.mid_p,
            "needed": self.needed,
        }


#: A model that loses at most this much counts as "as good".
AS_GOOD = 0.03
#: A difference below one point is of no use, and no number of examples is asked for to show it.
WORTH = 0.01


def mean_interval(scores: Sequence[float], *, binary: bool, clusters: Sequence[int] = ()) -> tuple[float, float]:
    """95 % interval of the mean: Wilson for right-or-wrong scores, Bayesian bootstrap for graded ones, and for all
    where examples belong together: `clusters[i]` is the number of the cluster that example i is in."""
    n = len(scores)
    if n == 0:
        return (0.0, 1.0)
    if binary and not _share(clusters):
        return wilson(sum(scores), n)
    return _quantiles(_bootstrap(scores, 0.0, 1.0, clusters))


def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927)."""
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (max(0.0, centre - half), min(1.0, centre + half))


def compare(a: Sequence[float], b: Sequence[float], *, binary: bool, clusters: Sequence[int] = ()) -> Comparison:
    """Compare two models answer by answer.

    Right-or-wrong scores: the share of discordant examples that A wins has the posterior
    Beta(1 + wins, 1 + losses); A is better when that share is above one half. Graded scores: paired
    Bayesian bootstrap (Rubin 1981). Where examples belong together (`clusters[i]` is the number of the cluster
    of example i), wins and losses count as many times less as the design effect says (ten wins in one document are
    one), and the bootstrap draws whole clusters.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} scores against {len(b)}: a paired comparison needs the same examples")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    wins = sum(d > 0 for d in differences)
    losses = sum(d < 0 for d in differences)
    n = len(differences)
    draws = _bootstrap(differences, -1.0, 1.0, clusters)
    difference, spread = sum(differences) / n, _spread(differences)
    repeated = design_effect(differences, clusters)
    # A bootstrap of right-or-wrong scores would be sure of every model that never loses, even by one cluster.
    p_better = _share_above_half(wins / repeated, losses / repeated) if binary else float((draws > 0).mean())
    return Comparison(
        difference=difference,
        interval=_quantiles(draws),
        p_better=p_better,
        p_not_worse=float((draws > -AS_GOOD).mean()),
        discordant=(wins + losses) / n,
        smallest_detectable=smallest_detectable(n / repeated, spread=spread),
        n=n,
        clusters=len(set(clusters)) if clusters else n,
        mid_p=mcnemar_mid_p(wins, losses) if binary else None,
        needed=math.ceil(examples_needed(difference, spread=spread) * repeated),
    )


def mcnemar_mid_p(wins: int, losses: int) -> float:
    """Two-sided mid-p value of McNemar's test: wins and losses are as likely (Fagerland et al. 2013)."""
    from scipy.stats import binom

    n, fewer = wins + losses, min(wins, losses)
    return float(min(1.0, 2 * binom.cdf(fewer, n, 0.5) - binom.pmf(fewer, n, 0.5)))


def design_effect(differences: Sequence[float], clusters: Sequence[int]) -> float:
    """How many examples that belong together are worth one of their own: the variance of the mean by clusters over
    that by single examples, at least 1 (Kish 1965)."""
    if not _share(clusters):
        return 1.0
    mean = sum(differences) / len(differences)
    sums: dict[int, float] = {}
    for difference, cluster in zip(differences, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + difference - mean
    alone = sum((difference - mean) ** 2 for difference in differences)
    return max(1.0, sum(one * one for one in sums.values()) / alone) if alone else 1.0


def examples_needed(difference: float, *, spread: float) -> int:
    """How many examples a two-sided 5 % paired test needs to find a true difference of this size (of WORTH, if it
    is smaller) in 80 of 100 cases: `smallest_detectable`, solved for n."""
    delta = max(abs(difference), WORTH)
    return math.ceil(((1.959964 * math.sqrt(spread) + 0.841621 * math.sqrt(max(0.0, spread - delta**2))) / delta) ** 2)


def smallest_detectable(n: float, *, spread: float) -> float:
    """The true difference that a two-sided 5 % paired test on n examples finds with 80 % power.

    Normal approximation (Connor 1987): (1.96·√d + 0.84·√(d − Δ²))/√n = Δ, where d is the mean squared
    difference of a pair (for right-or-wrong scores the share of discordant examples).
    """
    delta = 0.0
    for _ in range(50):
        delta = (1.959964 * math.sqrt(spread) + 0.841621 * math.sqrt(max(0.0, spread - delta**2))) / math.sqrt(n)
    return min(1.0, delta)


def smallest_detectable_difference(n: int, disagreement: float) -> float | None:
    """The true difference of two models that n examples find in 80 of 100 cases, before either is asked.

    Exact power of a two-sided 5 % mid-p McNemar test when the two disagree on that share of the answers
    (docs/design/verdict.md). None when not even a model that wins every disagreement would be found.
    """
    import numpy as np
    from scipy.stats import binom

    if n > EXACT:
        return smallest_detectable(n, spread=disagreement)
    counts = np.arange(n + 1)  # of disagreements
    chances = binom.pmf(counts, n, disagreement)
    counts, chances = counts[chances > 1e-9], chances[chances > 1e-9]
    needed = np.asarray([_wins_needed(int(count)) for count in counts])

    def power(difference: float) -> float:
        share = (1 + difference / disagreement) / 2  # of the disagreements that the better model wins
        found = binom.sf(needed - 1, counts, share) + binom.cdf(counts - needed, counts, share)
        return float((chances * found).sum())

    if power(disagreement) < POWER:
        return None
    low, high = 0.0, disagreement
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    return high


def _wins_needed(count: int) -> int:
    """How many of so many disagreements a model must win for p <= 0.05; one more than all when none is enough."""
    import numpy as np
    from scipy.stats import binom

    wins = np.arange(count // 2, count + 1)
    enough = wins[2 * binom.sf(wins, count, 0.5) + binom.pmf(wins, count, 0.5) <= 0.05]
    return int(enough[0]) if len(enough) else count + 1


def _spread(differences: Sequence[float]) -> float:
    # One imagined example more keeps two models that never differ from claiming perfect resolution.
    return (sum(d * d for d in differences) + 1) / (len(differences) + 1)


def _share_above_half(wins: float, losses: float) -> float:
    from scipy.stats import beta

    return float(beta.sf(0.5, 1 + wins, 1 + losses))


def _share(clusters: Sequence[int]) -> bool:
    """True when two examples are in one cluster."""
    return len(set(clusters)) < len(clusters)


def _bootstrap(values: Sequence[float], low: float, high: float, clusters: Sequence[int] = ()) -> Any:
    """DRAWS means of `values` under random Dirichlet weights, one weight for each cluster; a numpy array.

    Half an imagined example at each end of the possible range keeps the interval from collapsing when
    all values are equal.
    """
    import numpy as np

    of = np.unique(clusters, return_inverse=True)[1] if clusters else np.arange(len(values))
    sizes = np.asarray([*np.bincount(of), 1, 1], dtype=float)
    sums = np.asarray([*np.bincount(of, weights=values), low, high], dtype=float)
    weights = np.random.default_rng(0).standard_exponential((DRAWS, len(sums)))
    weights[:, -2:] *= 0.5
    return weights @ sums / (weights @ sizes)


def _quantiles(draws: Any) -> tuple[float, float]:
    import numpy as np

    low, high = np.quantile(draws, [0.025, 0.975])
    return (float(low), float(high))


def p_above(values: Sequence[float], margin: float) -> float:
    """Posterior probability that the mean of `values`, each from -1 to 1, is above `margin` (Bayesian bootstrap)."""
    return float((_bootstrap(values, -1.0, 1.0) > margin).mean())


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of a - b over the same examples, and its standard error; infinite below two examples."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n if n else 0.0
    if n < 2:
        return mean, math.inf
    return mean, math.sqrt(math.fsum((one - mean) ** 2 for one in differences) / (n - 1) / n)


def paired_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, each from -1 to 1."""
    return _quantiles(_bootstrap(values, -1.0, 1.0))
