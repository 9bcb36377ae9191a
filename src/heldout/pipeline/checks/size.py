"""Files too small to learn from or to measure with, and what a file of this size can show at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from heldout.pipeline.checks.groups import are_labels, fold, prompt_fingerprint
from heldout.pipeline.checks.parts import Parts
from heldout.pipeline.evaluate.answers import LABEL_CHARACTERS
from heldout.pipeline.evaluate.statistics import smallest_detectable_difference
from heldout.pipeline.types import Dataset, Finding

MIN_TRAIN = 10
ADVISED_TRAIN = 50
ADVISED_VALID = 10
ADVISED_HOLDOUT = 30
#: Rows of a label, below which tuning mostly loses to a frozen encoder with a linear head (docs/experiments.md).
ADVISED_PER_LABEL = 16
#: Two models of like quality mostly differ in so many answers (SCIENCE §3 has the table for 10 to 30 %).
DISAGREEMENT = 0.2
#: From so many different prompts on, no more rows are held out.
MOST_PROMPTS = 2_500
#: A file of more different answers than this has no labels with few rows; it has none, or they are many.
MAX_LABELS = 5_000


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


def find_few_per_label(parts: Parts) -> Iterator[Finding]:
    """Labels of which there are few rows each: told when that is so for most of them."""
    counts: Counter[str] = Counter()
    for example in parts.train.examples:
        if len(example.target) <= LABEL_CHARACTERS:
            counts[fold(example.target)] += 1
        if len(counts) > MAX_LABELS:
            return
    few = [count for count in counts.values() if count < ADVISED_PER_LABEL]
    if are_labels(counts) and 2 * len(few) > len(counts):
        yield Finding(
            code="few_per_label",
            severity="note",
            message=(
                f"{len(few)} of {len(counts)} labels have fewer than {ADVISED_PER_LABEL} rows (from {min(few)} to "
                f"{max(few)}). With so few, a frozen encoder with a linear head is mostly as good as a tuned model; "
                "look at that rung."
            ),
            file=parts.train.name,
        )


def find_smallest_difference(parts: Parts) -> Iterator[Finding]:
    """How large a difference of two models must be for the holdout of these files to show it (a note)."""
    # They import the checks.
    from heldout.pipeline.split import SMALL, part_sizes

    if len(parts.train) < MIN_TRAIN:
        return
    if parts.holdout is not None:
        n, whose = len(parts.holdout), f"the {len(parts.holdout)} rows of {parts.holdout.name}"
    else:
        prompts = _count_prompts(parts.train, at_most=MOST_PROMPTS)
        if prompts < SMALL:
            n, whose = prompts, f"{prompts} different prompts, each held out once (cross-fitting)"
        else:
            n = part_sizes(prompts, holdout=True, valid=parts.valid is None)[0]
            whose = f"the about {n} rows that will be held out"
    if not n:
        return
    smallest = smallest_detectable_difference(n, DISAGREEMENT)
    shown = (
        "no difference at all can be shown"
        if smallest is None
        else (f"a difference below {100 * smallest:.0f} points can hardly be shown")
    )
    yield Finding(
        code="smallest_difference",
        severity="note",
        message=(
            f"With {whose}, {shown} (80 % power, when two models differ in {DISAGREEMENT:.0%} of their answers). If "
            "less matters to you, add rows to hold out."
        ),
        file=parts.train.name if parts.holdout is None else parts.holdout.name,
    )


def _count_prompts(dataset: Dataset, *, at_most: int) -> int:
    prompts: set[str] = set()
    for example in dataset.examples:
        prompts.add(prompt_fingerprint(example.prompt))
        if len(prompts) >= at_most:
            break
    return len(prompts)


def _margin(n: int) -> str:
    """Half the widest 95 % interval of an accuracy over n examples: 2 * sqrt(0.25 / n)."""
    return f" (about ±{100 / n**0.5:.0f} points)" if n else ""
