"""Answers that are labels: labels nobody taught, and labels that drown the others."""

from __future__ import annotations

from collections.abc import Iterator

from heldout.pipeline.checks.groups import count_labels, fold
from heldout.pipeline.checks.parts import Parts, name_some, shorten
from heldout.pipeline.types import Finding

MAX_IMBALANCE = 20


def find_unknown_labels(parts: Parts) -> Iterator[Finding]:
    """Labels of the validation or holdout file that the training file never shows."""
    known = count_labels(parts.train.examples)
    if known is None:
        return
    for dataset in (parts.valid, parts.holdout):
        if dataset is None:
            continue
        unknown = [example for example in dataset.examples if fold(example.target) not in known]
        if unknown:
            labels = list(dict.fromkeys(shorten(example.target) for example in unknown))
            yield Finding(
                code="unknown_label",
                severity="warning",
                message=(
                    f"{len(unknown)} of {len(dataset)} rows of {dataset.name} have an answer that "
                    f"{parts.train.name} never shows ({name_some(labels)}). Training cannot teach it; "
                    "correct the answer or add training rows with it."
                ),
                file=dataset.name,
                lines=tuple(example.line for example in unknown),
            )


def find_class_imbalance(parts: Parts) -> Iterator[Finding]:
    """One label more than 20 times as frequent as another in the training file."""
    counts = count_labels(parts.train.examples)
    if counts is None:
        return
    commonest, most = max(counts.items(), key=lambda item: item[1])
    rare = {label: count for label, count in counts.items() if most > MAX_IMBALANCE * count}
    if not rare:
        return
    named = [f"{shorten(label)} {count}" for label, count in sorted(rare.items(), key=lambda item: (item[1], item[0]))]
    yield Finding(
        code="class_imbalance",
        severity="warning",
        message=(
            f"The answer {shorten(commonest)} occurs {most} times, others hardly ever ({name_some(named)}). "
            "Always giving the common answer would look good; add rows for the rare ones."
        ),
        file=parts.train.name,
        lines=tuple(example.line for example in parts.train.examples if fold(example.target) in rare),
    )
