"""How often do the lights of docs/consequences.md come on by chance, and how often when they should?

    .venv/bin/python benchmarks/alarms.py [--jobs 300] [--sizes 60 120 360]

Simulated jobs: what a consequence compares (scores, losses, probabilities) is drawn from what is true of the models,
and judged by the code that judges jobs. "None": nothing got worse. "At" and "twice the margin": the truth lies there.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from heldout.pipeline.consequences import calibration, format, fragility, generalisation, memorisation
from heldout.pipeline.consequences.base import status_of
from heldout.pipeline.consequences.perturbed_answers import Asked
from heldout.pipeline.evaluate.statistics import p_above
from heldout.pipeline.types import Example

LABELS = 6
PERTURBATIONS = 8


class Planted(NamedTuple):
    """A consequence, how much of it there is, and one simulated job of so many answers: its light."""

    name: str
    amount: str
    simulate: Callable[[random.Random, int], str]


def _right(rng: random.Random, n: int, share: float) -> list[float]:
    return [float(rng.random() < share) for _ in range(n)]


def _format(excess: float) -> Callable[[random.Random, int], str]:
    """Of the baseline's answers 2 % are out of form, of the tuned model's `excess` more."""

    def simulate(rng: random.Random, n: int) -> str:
        ours, theirs = _right(rng, n, 0.02 + excess), _right(rng, n, 0.02)
        p = p_above([a - b for a, b in zip(ours, theirs, strict=True)], format.MARGIN)
        return status_of(fails=p, warns=p)

    return simulate


def _fragility(costs: float, others: float) -> Callable[[random.Random, int], str]:
    """Both models flip some answers for nothing, the tuned one as many right ones as wrong ones. Every perturbation
    costs the tuned model `costs` more of its right answers (80 %), and the baseline (60 % right) `others` of its."""

    def simulate(rng: random.Random, n: int) -> str:
        n = min(n, 100)
        clean, baseline_clean = _right(rng, n, 0.8), _right(rng, n, 0.6)
        examples = [Example(messages=({"role": "user", "content": "x"},), weights=(0,), line=i + 1) for i in range(n)]

        def asked(scores: list[float], lost: float) -> Asked:
            # One in fifty right answers is lost anyway, and one in twelve wrong ones found: as many at 80 %.
            drops = [float(rng.random() < lost + 0.02) if score else -float(rng.random() < 0.08) for score in scores]
            flips = tuple(abs(drop) for drop in drops)
            return Asked(
                tried=tuple(range(n)),
                places=tuple(range(n)),
                flips=flips,
                drops=tuple(drops),
                answers=("",) * n,
                texts=("",) * n,
            )

        names = [f"perturbation {i}" for i in range(PERTURBATIONS)]
        return fragility.judge(
            {name: asked(clean, costs) for name in names},
            {name: asked(baseline_clean, others) for name in names},
            clean,
            baseline_clean,
            examples,
            [""] * n,
            words={name: name for name in names},
            baseline_name="zero-shot",
        ).status

    return simulate


def _memorisation(shift: float) -> Callable[[random.Random, int], str]:
    """Losses of training answers are smaller by `shift` standard deviations: AUC = Phi(shift / sqrt(2))."""

    def simulate(rng: random.Random, n: int) -> str:
        n = min(n, memorisation.READ)
        seen, unseen = ([rng.gauss(mean, 1.0) for _ in range(n)] for mean in (-shift, 0.0))
        _, draws = memorisation.membership(seen, unseen)
        edges = (memorisation.WARN_AUC, memorisation.SEVERE_AUC)
        above = [statistics.fmean(draw > edge for draw in draws) for edge in edges]
        return status_of(warns=above[0], fails=above[1])

    return simulate


def _generalisation(gap: float) -> Callable[[random.Random, int], str]:
    """80 % right on the holdout and on valid, `gap` more on train."""

    def simulate(rng: random.Random, n: int) -> str:
        n = min(n, generalisation.ITEMS)
        parts = {"train": _right(rng, n, 0.8 + gap), "valid": _right(rng, n, 0.8), "holdout": _right(rng, n, 0.8)}
        return generalisation.judge(parts, binary=True).status

    return simulate


def _calibration(over: float) -> Callable[[random.Random, int], str]:
    """Sure with 50 to 99 %, and right `over` less often than that."""

    def simulate(rng: random.Random, n: int) -> str:
        held = []
        for _ in range(n):
            sure = rng.uniform(0.5, 0.99)
            rest = (1 - sure) / (LABELS - 1)
            right = 0 if rng.random() < sure - over else rng.randrange(1, LABELS)
            held.append(calibration.Said((math.log(sure), *[math.log(rest)] * (LABELS - 1)), right))
        return calibration.judge(held, None).status

    return simulate


def _shift(auc: float) -> float:
    return math.sqrt(2) * statistics.NormalDist().inv_cdf(auc)


PLANTED = (
    Planted("format", "none", _format(0.0)),
    Planted("", "at the margin: 5 points", _format(0.05)),
    Planted("", "twice the margin", _format(0.10)),
    Planted("fragility", "none: both flip alike, no cost", _fragility(0.0, 0.0)),
    Planted("", "costs 5 points, still ahead", _fragility(0.05 / 0.8, 0.0)),
    Planted("", "costs 10 points, still ahead", _fragility(0.10 / 0.8, 0.0)),
    Planted("", "costs 40 points, behind the baseline", _fragility(0.40 / 0.8, 0.0)),
    Planted("memorisation", "none: AUC 0.5", _memorisation(0.0)),
    Planted("", "at the margin: AUC 0.7", _memorisation(_shift(0.7))),
    Planted("", "AUC 0.85", _memorisation(_shift(0.85))),
    Planted("", "AUC 0.97", _memorisation(_shift(0.97))),
    Planted("generalisation", "none", _generalisation(0.0)),
    Planted("", "at the margin: 10 points", _generalisation(0.10)),
    Planted("", "twice the margin", _generalisation(0.20)),
    Planted("calibration", "none", _calibration(0.0)),
    Planted("", "at the margin: 10 points", _calibration(0.10)),
    Planted("", "twice the margin", _calibration(0.20)),
)


def lights(planted: Planted, n: int, jobs: int) -> Counter[str]:
    """How many of the simulated jobs had each light."""
    return Counter(planted.simulate(random.Random(f"{planted.name}/{planted.amount}/{n}/{i}"), n) for i in range(jobs))


def _cells(sizes: list[int], planted: Planted, jobs: int) -> Iterator[str]:
    for n in sizes:
        found = lights(planted, n, jobs)
        yield f"{(found['warn'] + found['fail']) / jobs:.0%}, {found['fail'] / jobs:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--sizes", type=int, nargs="+", default=[60, 120, 360])
    asked = parser.parse_args()
    print(
        f"Share of {asked.jobs} simulated jobs with a warning or a fail, and with a fail, by answers of the holdout\n"
    )
    print(f"| consequence | what is true | {' | '.join(map(str, asked.sizes))} |\n|---|---|{'--:|' * len(asked.sizes)}")
    for planted in PLANTED:
        print(f"| {planted.name} | {planted.amount} | {' | '.join(_cells(asked.sizes, planted, asked.jobs))} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
