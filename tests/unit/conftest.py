"""Examples, scores and rungs made by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from heldout.pipeline.evaluate.scores import Scores
from heldout.pipeline.evaluate.statistics import mean_interval
from heldout.pipeline.ladder import Rung
from heldout.pipeline.types import Example, Split


def example(prompt: str, answer: str, line: int = 1) -> Example:
    """One question with a system message before it."""
    messages = (
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    )
    return Example(messages=messages, weights=(0, 0, 1), line=line)


def labelled(part: str, n: int, labels: Sequence[str] = ("red", "green", "blue")) -> tuple[Example, ...]:
    """n examples of one part; the part's name stands in every question, the labels take turns."""
    return tuple(example(f"{part} {i}", labels[i % len(labels)], i + 1) for i in range(n))


def split_of(
    train: Iterable[Example], valid: Iterable[Example] = (), holdout: Iterable[Example] = (), *, seed: int = 0
) -> Split:
    """Three given parts."""
    parts = {"train": tuple(train), "valid": tuple(valid), "holdout": tuple(holdout)}
    return Split(**parts, seed=seed, groups=sum(map(len, parts.values())))


def rung(
    name: str, per_example: Sequence[float], *, kind: str = "prompt", binary: bool = True, description: str = ""
) -> Rung:
    """A rung with these scores."""
    scores = Scores(
        metric="exact match" if binary else "ROUGE-L",
        binary=binary,
        mean=sum(per_example) / len(per_example),
        interval=mean_interval(per_example, binary=binary),
        per_example=tuple(per_example),
        answers=("",) * len(per_example),
    )
    return Rung(name=name, kind=kind, description=description, scores=scores)


def right(n: int, k: int) -> list[float]:
    """n right-or-wrong scores of which the first k are right."""
    return [1.0] * k + [0.0] * (n - k)
