"""Files too small to learn from or to measure with."""

from __future__ import annotations

from collections.abc import Iterator

from heldout.pipeline.checks.parts import Parts
from heldout.pipeline.types import Finding

MIN_TRAIN = 10
ADVISED_TRAIN = 50
ADVISED_VALID = 10
ADVISED_HOLDOUT = 30


def find_too_few_examples(parts: Parts) -> Iterator[Finding]:
    """Too few rows to train on (an error), or fewer than a sound result needs (a warning)."""
    yield from _train_size(parts)
    valid, holdout = parts.valid, parts.holdout
    if valid is not None and valid.sound_rows < ADVISED_VALID:
        yield Finding(
            code="small_validation",
            severity="warning",
            message=(
                f"The validation file has {valid.sound_rows} example(s). Fewer than {ADVISED_VALID} stop training "
                "by chance; add some, or leave the file out and let one be split off."
            ),
            file=valid.name,
        )
    if holdout is not None and holdout.sound_rows < ADVISED_HOLDOUT:
        yield Finding(
            code="small_holdout",
            severity="warning",
            message=(
                f"The holdout file has {holdout.sound_rows} example(s). Fewer than {ADVISED_HOLDOUT} can only show "
                f"large differences{_margin(holdout.sound_rows)}; expect an inconclusive verdict."
            ),
            file=holdout.name,
        )


def _train_size(parts: Parts) -> Iterator[Finding]:
    n = parts.train.sound_rows
    if n < MIN_TRAIN:
        # OpenAI's words: scripts look for them.
        message = f"Training file has {n} example(s), but must have at least {MIN_TRAIN} examples"
        yield Finding(code="invalid_n_examples", severity="error", message=message, file=parts.train.name)
    elif n < ADVISED_TRAIN:
        yield Finding(
            code="few_examples",
            severity="warning",
            message=(
                f"The training file has {n} examples. Gains usually show from {ADVISED_TRAIN} to 100; with "
                "fewer, the verdict will mostly be inconclusive."
            ),
            file=parts.train.name,
        )


def _margin(n: int) -> str:
    """Half the widest 95 % interval of an accuracy over n examples: 2 * sqrt(0.25 / n)."""
    return f" (about ±{100 / n**0.5:.0f} points)" if n else ""
