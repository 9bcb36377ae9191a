"""Stopping, guard and selection rules on simulated trainings whose truth is known.

    .venv/bin/python benchmarks/stopping_simulation.py [--runs 200]

Stopping: 12 epochs of 4 validations. An example's loss is a falling part, a floor and an overfitting part, each
times a random share of its own (gamma, mean 1), so the population's mean is known. Checkpoints differ from the
smooth curve by a common factor that is real (autocorrelated), and each example's loss by a factor of its own that
is noise. Regret: true loss of the kept checkpoint above that of the best of all 48, in percent.
Guard: 500 batch losses without trouble (how often is it alarmed?) and with trouble (how often and how soon?).
Selection: right-or-wrong answers of 12 checkpoints with known true accuracies; the sixth has the lowest loss.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any

import numpy as np

from heldout.pipeline.selection import Candidate, Kind, select
from heldout.train.guard import Guard
from heldout.train.stopping import EarlyStopping, Evaluation

EVALUATIONS, PER_EPOCH, PATIENCE = 48, 4, 4
#: shape: (evaluations until the falling part is down to 1/e, evaluation after which overfitting starts, its slope)
SHAPES = {
    "overfits early": (2.0, 4, 0.030),
    "overfits late": (6.0, 14, 0.012),
    "flattens out": (6.0, EVALUATIONS, 0.0),
    "falls to the end": (14.0, EVALUATIONS, 0.0),
}
#: noise: (spread of the checkpoints' common factor, spread of each example's own)
NOISES = {"quiet": (0.01, 0.10), "noisy": (0.03, 0.25)}
SIZES = (24, 60, 150)
Rng = np.random.Generator
Array = Any  # numpy's float arrays


def simulate(shape: str, noise: str, n: int, rng: Rng) -> tuple[Array, Array]:
    """True loss of each evaluation [48], and the loss of each validation example [n, 48]."""
    fall, onset, slope = SHAPES[shape]
    common, own = NOISES[noise]
    t = np.arange(1, EVALUATIONS + 1)
    falling = np.exp(-t / fall)
    over = slope * np.maximum(0, t - onset)
    over = 0.7 * over / (1 + over / 2)
    wobble = np.exp(autocorrelated(EVALUATIONS, 0.5, rng) * common)
    share = [rng.gamma(k, 1 / k, (n, 1)) for k in (2.0, 0.7, 0.5)]
    each = np.exp(rng.normal(0, own, (n, EVALUATIONS)) - own**2 / 2)
    true = (falling + 0.35 + over) * wobble
    return true, (falling * share[0] + 0.35 * share[1] + over * share[2]) * wobble * each


def autocorrelated(n: int, rho: float, rng: Rng) -> Array:
    values = rng.normal(size=n)
    for k in range(1, n):
        values[k] = rho * values[k - 1] + np.sqrt(1 - rho**2) * values[k]
    return values


# A rule takes the losses [n, 48] and gives the evaluation it stops at and the one it keeps, both from 0.


def keep_the_last(losses: Array) -> tuple[int, int]:
    return EVALUATIONS - 1, EVALUATIONS - 1


def keep_the_lowest(losses: Array) -> tuple[int, int]:
    return EVALUATIONS - 1, int(losses.mean(axis=0).argmin())


def patience_alone(losses: Array) -> tuple[int, int]:
    means = losses.mean(axis=0)
    for k in range(EVALUATIONS):
        best = int(means[: k + 1].argmin())
        if k - best >= max(PATIENCE, PER_EPOCH):
            return k, best
    return EVALUATIONS - 1, int(means.argmin())


class Unsmoothed(EarlyStopping):
    def _smoothed(self) -> Evaluation:
        return self.recent[-1]


def ours(losses: Array, kind: type[EarlyStopping] = EarlyStopping) -> tuple[int, int]:
    early = kind(PATIENCE, PER_EPOCH)
    for k in range(EVALUATIONS):
        early.update(k + 1, losses[:, k].tolist())
        if early.reason:
            break
    return k, early.best_step - 1


def ours_unsmoothed(losses: Array) -> tuple[int, int]:
    return ours(losses, Unsmoothed)


RULES: dict[str, Callable[[Array], tuple[int, int]]] = {
    "all steps, keep the last": keep_the_last,
    "all steps, keep the lowest": keep_the_lowest,
    "patience alone": patience_alone,
    "half an error, unsmoothed": ours_unsmoothed,
    "**ours**": ours,
}


def stopping_tables(runs: int) -> None:
    rng = np.random.default_rng(0)
    found: dict[tuple[str, str, int, str], list[tuple[float, float, float]]] = {}
    for shape in SHAPES:
        for noise in NOISES:
            for n in SIZES:
                for _ in range(runs):
                    true, losses = simulate(shape, noise, n, rng)
                    oracle = int(true.argmin())
                    for name, rule in RULES.items():
                        stop, kept = rule(losses)
                        wasted = max(0, stop - oracle) / (oracle + 1)
                        result = (100 * (true[kept] / true[oracle] - 1), stop + 1.0, 100 * wasted)
                        found.setdefault((shape, noise, n, name), []).append(result)

    def cell(shape: str = "", noise: str = "", n: int = 0, name: str = "") -> str:
        wanted = [
            np.array(results)
            for (a, b, c, d), results in found.items()
            if (not shape or a == shape) and (not noise or b == noise) and (not n or c == n) and d == name
        ]
        regret, stop, _ = np.concatenate(wanted).T
        return f"{regret.mean():.1f} ({np.quantile(regret, 0.95):.0f}), {stop.mean():.0f}"

    groups: list[dict[str, Any]] = [{"shape": shape} for shape in SHAPES]
    print(f"\nMean regret in % (95th percentile), evaluations taken of {EVALUATIONS}; all noises and sizes\n")
    table(["rule", *SHAPES], [[name, *(cell(**group, name=name) for group in groups)] for name in RULES])
    groups = [*({"n": n} for n in SIZES), *({"noise": noise} for noise in NOISES)]
    print("\nThe same by validation examples, and by noise; all shapes\n")
    rows = [[name, *(cell(**group, name=name) for group in groups)] for name in RULES]
    table(["rule", *(f"n = {n}" for n in SIZES), *NOISES], rows)
    print("\nEvaluations after the true best, in % of those up to it (where there is a best to pass)\n")
    overfitting = list(SHAPES)[:2]
    rows = []
    for name in RULES:
        shares = [
            np.concatenate([np.array(r)[:, 2] for (a, _, _, d), r in found.items() if a == shape and d == name])
            for shape in overfitting
        ]
        rows.append([name, *(f"{np.median(one):.0f}" for one in shares)])
    table(["rule", *(f"{shape}, median" for shape in overfitting)], rows)


def healthy(rng: Rng) -> Iterator[tuple[str, Callable[[], Array]]]:
    """Losses of 500 batches without trouble."""
    steps = 500
    t = np.arange(steps)
    falling = 0.15 + 2.5 * np.exp(-t / 25)

    def lognormal(spread: float) -> Array:
        return np.exp(spread * rng.normal(size=steps))

    def wrong_labels() -> Array:
        return 0.07 * falling * lognormal(0.7) + rng.binomial(8, 0.05, steps) * 0.4 * rng.gamma(2, 0.5, steps)

    def sorted_windows() -> Array:
        window = np.sort(rng.normal(size=(steps // 16 + 1, 16)), axis=1).ravel()[:steps]
        return falling * np.exp(0.3 * window) * lognormal(0.3)

    yield "falls, batches differ by a factor of 1.6 (one SD)", lambda: falling * lognormal(0.5)
    yield "nothing is learnt, batches differ by 1.35", lambda: lognormal(0.3)
    yield "nothing is learnt, batches differ by 2.7", lambda: lognormal(1.0)
    yield "memorised but for 5 % wrong labels", wrong_labels
    yield "a stair down at every epoch", lambda: (2.5 * np.exp(-0.8 * (t // 30)) + 0.05) * lognormal(0.4)
    yield (
        "2 % of batches ten times as high",
        lambda: falling * lognormal(0.3) * np.where(rng.random(steps) < 0.02, 10, 1),
    )
    yield "batches sorted by length in windows of 16", sorted_windows
    yield "batches correlate (0.5) and nothing is learnt", lambda: np.exp(0.4 * autocorrelated(steps, 0.5, rng))


def troubled(rng: Rng) -> Iterator[tuple[str, Callable[[int], Array]]]:
    """Losses of 500 batches with trouble from step `at` on."""
    steps = 500
    t = np.arange(1, steps + 1)

    def run(broken: Callable[[int], Array]) -> Callable[[int], Array]:
        def losses(at: int) -> Array:
            sound = 0.15 + 2.5 * np.exp(-t / 25)
            return np.where(t < at, sound, broken(at)) * np.exp(0.3 * rng.normal(size=steps))

        return losses

    yield "jumps to twice the first loss", run(lambda at: np.full(steps, 5.3))
    yield "jumps back to the first loss", run(lambda at: np.full(steps, 2.65))
    yield (
        "climbs by 20 % a step, up to 11",
        run(lambda at: np.minimum(11, (0.15 + 2.5 * np.exp(-at / 25)) * 1.2 ** np.maximum(0, t - at))),
    )


def guard_tables(runs: int) -> None:
    rng = np.random.default_rng(1)
    rows = []
    for name, draw in healthy(rng):
        alarms = sum(first_alarm(draw()) > 0 for _ in range(runs))
        rows.append([name, f"{alarms} of {runs}"])
    print("\nFalse alarms in runs of 500 steps\n")
    table(["losses", "runs with an alarm"], rows)
    rows = []
    for name, broken in troubled(rng):
        cells = []
        for at in (12, 40, 200):
            steps = np.array([first_alarm(broken(at)) for _ in range(max(1, runs // 10))])
            seen = steps >= at
            late = f", {np.median(steps[seen]) - at:.0f} steps later" if seen.any() else ""
            cells.append(f"{100 * seen.mean():.0f} %{late}")
        rows.append([name, *cells])
    print("\nTrouble that was found, and the median delay\n")
    table(["loss", "from step 12", "from step 40", "from step 200"], rows)


def first_alarm(losses: Array) -> int:
    """The step of the first alarm, 0 without one."""
    guard = Guard(1e-3)
    for step, loss in enumerate(losses.tolist(), start=1):
        if guard.look(step, loss, 1.0, ()):
            return step
    return 0


def selection_table(runs: int) -> None:
    rng = np.random.default_rng(2)
    # True accuracies of 12 checkpoints: up to 0.8 at the sixth, which has the lowest loss, then on by so much.
    rise = np.linspace(0.65, 0.80, 6)
    cases = {f"{after:+.0%} after the lowest loss": after for after in (-0.06, 0.0, 0.02, 0.06)}
    rows: dict[str, list[str]] = {"lowest loss": [], "highest score": [], "last": [], "**ours**": []}
    for after in cases.values():
        truth = np.concatenate([rise, 0.80 + after * np.arange(1, 7) / 6])
        for n in SIZES:
            lost: dict[str, list[float]] = {rule: [] for rule in rows}
            for _ in range(runs):
                # Checkpoints of one training mostly agree: their answers' luck correlates by 0.8.
                luck = np.sqrt(0.8) * rng.normal(size=(1, n)) + np.sqrt(0.2) * rng.normal(size=(12, n))
                scores = (luck < np.array([[quantile(share)] for share in truth])).astype(float)
                highest = int(scores.sum(axis=1).argmax())
                kinds: list[tuple[Kind, int]] = [("best_loss", 5), ("best_metric", highest), ("last", 11)]
                candidates = [
                    Candidate(kind=kind, step=k, valid_loss=0.4 + 0.01 * abs(k - 5), scores=tuple(scores[k].tolist()))
                    for kind, k in kinds
                ]
                chosen = select(candidates, metric="exact_match").chosen.step
                for rule, k in zip(rows, (5, highest, 11, chosen), strict=True):
                    lost[rule].append(truth.max() - truth[k])
            for rule in rows:
                rows[rule].append(f"{100 * np.mean(lost[rule]):.1f}")
    print(f"\nTrue accuracy lost against the best of 12 checkpoints, in points; {SIZES} validation examples\n")
    of = len(SIZES)
    cells = [[rule, *(", ".join(row[k : k + of]) for k in range(0, len(row), of))] for rule, row in rows.items()]
    table(["rule", *cases], cells)


def quantile(share: float) -> float:
    return NormalDist().inv_cdf(share)


def table(head: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|---" + "|--:" * (len(head) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="trainings per shape, noise and size; the guard gets 25x")
    runs = parser.parse_args().runs
    stopping_tables(runs)
    guard_tables(25 * runs)
    selection_table(10 * runs)


if __name__ == "__main__":
    main()
