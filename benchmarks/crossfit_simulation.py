"""How often do 95 % intervals from cross-fitting cover the truth? `python benchmarks/crossfit_simulation.py FOLDER…`

Draws small files from real tasks with labels, at random and with every label in its share, and cross-fits TF-IDF +
logistic regression with the pipeline's own folds. The pooled interval is compared with the accuracy on all rows
that were not drawn (the truth, known to a point or two): of the folds' models, on average, and of a model of all
drawn rows, as it would be served. Beside it the single holdout of a quarter, as a file of that size was split
before. A FOLDER has train, validation and test in `.jsonl`.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heldout.pipeline.checks.groups import group_by_prompt
from heldout.pipeline.dataset import read_dataset
from heldout.pipeline.evaluate.statistics import wilson
from heldout.pipeline.folds import split_into_folds
from heldout.pipeline.split import allocate, split_dataset
from heldout.pipeline.types import Dataset, Example

SIZES = (60, 240)
DRAWS = 60


def main() -> None:
    """One line per task and size."""
    print(f"{DRAWS} draws; shares of intervals that cover the accuracy of …, mean width; mean accuracies; in points")
    print("| task | rows | drawn | folds' models | served model | width | one holdout: its model | width |", end="")
    print(" score | folds' models | served model |")
    for folder in map(Path, sys.argv[1:]):
        rows = read_rows(folder)
        for n, by_label in itertools.product(SIZES, (False, True)):
            draws = [draw(rows, n, seed, by_label=by_label) for seed in range(DRAWS)]
            means = [100 * sum(column) / DRAWS for column in zip(*draws, strict=True)]
            how = "by label" if by_label else "at random"
            print(f"| {folder.name} | {n} | {how} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |", flush=True)


def read_rows(folder: Path) -> list[Example]:
    """All rows of a task, one for each prompt, numbered anew."""
    examples: list[Example] = []
    for part in ("train", "validation", "test"):
        examples += read_dataset((folder / f"{part}.jsonl").read_bytes(), name=part)[0].examples
    firsts = [group[0] for group in group_by_prompt(examples).values()]
    return [Example(messages=one.messages, weights=one.weights, line=i) for i, one in enumerate(firsts)]


def draw(rows: Sequence[Example], n: int, seed: int, *, by_label: bool) -> tuple[float, ...]:
    """One small file: what is covered (0 or 1), widths and accuracies."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    if by_label:
        places = allocate(Counter(row.target for row in rows), n)
        kept = []
        for i in order:
            places[rows[i].target] -= 1
            if places[rows[i].target] >= 0:
                kept.append(i)
        order = kept
    drawn = set(order[:n])
    small = Dataset(name="small", examples=tuple(row for row in rows if row.line in drawn))
    others = [row for row in rows if row.line not in drawn]
    folds, _ = split_into_folds(small, None, seed=seed)
    models = [fit(split.train) for split in folds.splits]
    right = sum(count(model, split.holdout) for model, split in zip(models, folds.splits, strict=True))
    low, high = wilson(right, n)
    of_folds = sum(count(model, others) for model in models) / len(models) / len(others)
    of_served = count(fit(small.examples), others) / len(others)
    one, _ = split_dataset(small, None, None, seed=seed)
    alone = fit(one.train)
    low_one, high_one = wilson(count(alone, one.holdout), len(one.holdout))
    of_alone = count(alone, others) / len(others)
    return (
        float(low <= of_folds <= high),
        float(low <= of_served <= high),
        high - low,
        float(low_one <= of_alone <= high_one),
        high_one - low_one,
        right / n,
        of_folds,
        of_served,
    )


def fit(examples: Sequence[Example]) -> Any:
    """The ladder's TF-IDF + logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    return model.fit([asked(row) for row in examples], [row.target for row in examples])


def count(model: Any, examples: Sequence[Example]) -> int:
    """Right answers."""
    answers = model.predict([asked(row) for row in examples])
    return sum(answer == row.target for answer, row in zip(answers, examples, strict=True))


def asked(example: Example) -> str:
    """What the user wrote."""
    return str(example.prompt[-1]["content"])


if __name__ == "__main__":
    main()
