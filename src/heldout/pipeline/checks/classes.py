"""What a classifier on an encoder cannot learn from: answers that are no labels.

Only for base models that are encoders; a chat model learns all of this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from heldout.engine.labels import Label, read_label
from heldout.pipeline.checks.groups import are_labels
from heldout.pipeline.checks.parts import Parts, name_lines, name_some, shorten
from heldout.pipeline.evaluate.answers import LABEL_CHARACTERS
from heldout.pipeline.types import Dataset, Finding

INSTEAD = "An encoder learns labels only; use a chat model for other answers"


def find_no_labels(parts: Parts) -> Iterator[Finding]:
    """Answers that are no labels, or not in one form; more than one answer to learn in a row."""
    for dataset in parts.given():
        yield from _no_label(dataset)
        yield from _several_answers(dataset)
    train = {example.line: read_label(example.target) for example in parts.train.examples}
    labels = [label for label in train.values() if label is not None]
    if len(labels) < len(train):
        return
    yield from _not_worth_a_class(parts.train, labels)
    commonest = Counter(label.key for label in labels).most_common(1)[0][0] if labels else None
    for dataset in parts.given():
        yield from _other_form(dataset, commonest)


def _no_label(dataset: Dataset) -> Iterator[Finding]:
    odd = [example for example in dataset.examples if read_label(example.target) is None]
    if odd:
        lines = [example.line for example in odd]
        yield _finding(
            dataset,
            f"The answers of {name_lines(lines)} are JSON, but not an object with one key and a label "
            f"({name_some([shorten(example.target) for example in odd], at_most=2)}). {INSTEAD}.",
            lines,
        )


def _several_answers(dataset: Dataset) -> Iterator[Finding]:
    lines = [example.line for example in dataset.examples if any(example.weights[:-1])]
    if lines:
        yield _finding(
            dataset,
            f"{name_lines(lines).capitalize()} have more than one answer to learn. An encoder learns the last answer "
            "alone: give the others weight 0, or use a chat model.",
            lines,
        )


def _not_worth_a_class(train: Dataset, labels: Sequence[Label]) -> Iterator[Finding]:
    counts = Counter(label.name for label in labels)
    long = [example.line for example in train.examples if len(example.target) > LABEL_CHARACTERS]
    if len(counts) == 1:
        yield _finding(train, f"All answers are {shorten(labels[0].name)}: there is nothing to tell apart.")
    elif long:
        yield _finding(
            train,
            f"The answers of {name_lines(long)} are longer than {LABEL_CHARACTERS} characters: no labels. {INSTEAD}.",
            long,
        )
    elif not are_labels(counts):
        once = sum(count == 1 for count in counts.values())
        yield _finding(
            train,
            f"{len(train)} rows have {len(counts)} different answers, {once} of them only once "
            f"({name_some([shorten(name) for name, n in counts.items() if n == 1][:2]) or 'none'}): "
            f"these look like texts of their own, not like labels. {INSTEAD}, or add rows until each label has "
            "three or more.",
        )


def _other_form(dataset: Dataset, key: str | None) -> Iterator[Finding]:
    lines = [
        example.line
        for example in dataset.examples
        if (label := read_label(example.target)) is not None and label.key != key
    ]
    if lines:
        form = "bare text" if key is None else f'{{"{key}": label}}'
        yield _finding(
            dataset,
            f"Most answers of the training file are {form}, those of {name_lines(lines)} are not. A classifier answers "
            "in one form: write all answers the same way.",
            lines,
        )


def _finding(dataset: Dataset, message: str, lines: Sequence[int] = ()) -> Finding:
    return Finding(
        code="answers_are_no_labels", severity="error", message=message, file=dataset.name, lines=tuple(lines)
    )
