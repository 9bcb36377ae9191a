"""Answers that are labels: labels nobody taught or named, labels that are missing, rare or drown the others.

Rows that contradict each other are found in `duplicates`, labels that do not fit their texts in `wrong_labels`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from heldout.engine.labels import Label, read_label
from heldout.pipeline.checks.enumerations import is_word_of, listed_labels
from heldout.pipeline.checks.forms import closed_set, plain
from heldout.pipeline.checks.groups import fold
from heldout.pipeline.checks.parts import Parts, name_lines, name_some, shorten
from heldout.pipeline.checks.prompts import system_prompt
from heldout.pipeline.evaluate.answers import LABEL_CHARACTERS
from heldout.pipeline.types import Dataset, Example, Finding

MAX_IMBALANCE = 20
#: From this share of one label on, always giving it looks like a result.
SWAMPING_SHARE = 0.8
#: With fewer examples a class is known by name only, and no split can both teach and test it.
MIN_PER_CLASS = 3
#: Rows below which rare and missing classes are no news: everything is rare then.
MIN_ROWS = 30
#: A label in more than this share of the rows is no slip, even where the prompt does not list it.
SLIP_SHARE = 0.01

_MAX_LABELS = 10_000
_MAX_COMPARED = 100  # unlisted labels that are compared with the known ones, to propose what was meant


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The labels of a training file. They are all in one form: bare (`key` is None) or as {"key": label}."""

    key: str | None
    counts: Mapping[str, int]  # by label as written
    listed: tuple[str, ...]  # what the system prompt lists; nothing when it lists no labels
    prompt: str  # the commonest system prompt

    @property
    def n(self) -> int:
        return sum(self.counts.values())

    def of(self, example: Example) -> str | None:
        """A row's label, when its answer is in this form."""
        label = _read(example)
        return label.name if label is not None and label.key == self.key else None

    def is_named(self, label: str) -> bool:
        """True when the system prompt names a label, in its list or elsewhere."""
        return label in self.listed or is_word_of(label, self.prompt)

    def is_slip(self, label: str) -> bool:
        """True for what is no label of its own: empty, unknown to a prompt that lists the labels, or a rare
        spelling of a frequent one."""
        count = self.counts[label]
        if not label.strip():
            return True
        if count >= MIN_PER_CLASS and count > SLIP_SHARE * self.n:
            return False
        if self.listed:
            return not self.is_named(label)
        return any(
            plain(other) == plain(label) and other != label and n > MAX_IMBALANCE / 4 * count
            for other, n in self.counts.items()
        )


def classes_of(dataset: Dataset) -> Classes | None:
    """The labels of a file, when its answers are labels."""
    counts: Counter[Label] = Counter()
    prompts: Counter[str] = Counter()
    read = 0
    for example in dataset.examples:
        label = _read(example)
        read += 1
        if label is not None and len(label.name) <= LABEL_CHARACTERS:
            counts[label] += 1
            if len(counts) > _MAX_LABELS:
                return None
        prompt = system_prompt(example)
        if prompt in prompts or len(prompts) < 100:
            prompts[prompt] += 1
    keys: Counter[str | None] = Counter()
    for label, n in counts.items():
        keys[label.key] += n
    if not keys:
        return None
    [(key, in_form)] = keys.most_common(1)
    names = {label.name: n for label, n in counts.items() if label.key == key}
    if in_form < 0.7 * read or not closed_set(names) or len(names) < 2:
        return None
    [(prompt, _)] = prompts.most_common(1)
    return Classes(key=key, counts=names, listed=listed_labels(prompt, names), prompt=prompt)


def find_unknown_labels(parts: Parts) -> Iterator[Finding]:
    """Labels that the prompt does not list, slips of others, and labels that the training file never shows."""
    classes = classes_of(parts.train)
    if classes is None:
        return
    yield from _unlisted(parts.train, classes)
    yield from _alike(parts.train, classes)
    known = {fold(label) for label in classes.counts}
    for dataset in (parts.valid, parts.holdout):
        if dataset is not None:
            yield from _untaught(dataset, parts.train, classes, known)


def _unlisted(train: Dataset, classes: Classes) -> Iterator[Finding]:
    slips = {label for label in classes.counts if classes.is_slip(label)}
    lines, meant = _lines_of(train, classes, slips), {}
    sound = [label for label in classes.counts if label not in slips] + list(classes.listed)
    for label in sorted(slips)[:_MAX_COMPARED]:
        meant[label] = _meant(label, sound)
    if lines:
        why = "that the system prompt does not list" if classes.listed else "that is a rare spelling of another one"
        shown = [
            f"{name_lines(where, at_most=3)}: {shorten(label)}"
            + (f", meant is perhaps {shorten(meant[label])}" if meant.get(label) else "")
            for label, where in lines.items()
        ]
        yield Finding(
            code="unknown_label",
            severity="warning",
            message=(
                f"A label {why}: {_count(lines)} of {len(train)} rows ({name_some(shown)}). Correct the label, or "
                "name it in the system prompt."
            ),
            file=train.name,
            lines=_sorted(lines),
        )
    unnamed = {
        label: n
        for label, n in classes.counts.items()
        if classes.listed and label not in slips and not classes.is_named(label)
    }
    if unnamed:
        shown = [f"{shorten(label)} {n}" for label, n in sorted(unnamed.items(), key=lambda item: -item[1])]
        yield Finding(
            code="unlisted_label",
            severity="note",
            message=(
                f"{name_some(shown)}: given as answers, but the system prompt, which lists the others, does not name "
                f"{'it' if len(unnamed) == 1 else 'them'}. Add {'it' if len(unnamed) == 1 else 'them'} to the list."
            ),
            file=train.name,
        )


def _alike(train: Dataset, classes: Classes) -> Iterator[Finding]:
    """Two frequent labels whose names are a slip apart: perhaps one class under two names."""
    labels = [label for label in classes.counts if not classes.is_slip(label)]
    pairs = [(a, b) for a, b in _close_pairs(labels) if not (classes.is_named(a) and classes.is_named(b))]
    if pairs:
        shown = [
            f"{shorten(a)} ({classes.counts[a]} rows) and {shorten(b)} ({classes.counts[b]} rows)" for a, b in pairs
        ]
        yield Finding(
            code="similar_labels",
            severity="note",
            message=(
                f"Labels that are spelled nearly the same: {name_some(shown)}. If they are one class, write it one "
                "way; a model has to learn the difference otherwise."
            ),
            file=train.name,
            lines=_sorted(
                _lines_of(train, classes, {min(pair, key=lambda one: classes.counts[one]) for pair in pairs})
            ),
        )


def _untaught(dataset: Dataset, train: Dataset, classes: Classes, known: set[str]) -> Iterator[Finding]:
    lines: list[int] = []
    labels: dict[str, None] = {}
    for example in dataset.examples:
        label = classes.of(example)
        if label is not None and fold(label) not in known:
            lines.append(example.line)
            labels.setdefault(shorten(label))
    if lines:
        yield Finding(
            code="unknown_label",
            severity="warning",
            message=(
                f"An answer that {train.name} never shows: {len(lines)} of {len(dataset)} rows of {dataset.name} "
                f"({name_some(list(labels))}). Training cannot teach it; correct the answer or add training rows with "
                "it."
            ),
            file=dataset.name,
            lines=tuple(lines),
        )


def find_rare_and_missing_classes(parts: Parts) -> Iterator[Finding]:
    """Labels that the prompt lists and no row has, and labels with one or two rows."""
    train = parts.train
    classes = classes_of(train)
    if classes is None or classes.n < MIN_ROWS:
        return
    missing = [label for label in classes.listed if label not in classes.counts]
    if missing:
        yield Finding(
            code="missing_class",
            severity="warning",
            message=(
                f"The system prompt lists {len(classes.listed)} labels; no row of {train.name} has "
                f"{name_some([shorten(label) for label in missing])}. A model that never sees a label given does not "
                "give it: add rows, or take it out of the prompt."
            ),
            file=train.name,
        )
    rare = {label for label, count in classes.counts.items() if count < MIN_PER_CLASS and not classes.is_slip(label)}
    if rare:
        lines = _lines_of(train, classes, rare)
        shown = [f"{shorten(label)}: {name_lines(where)}" for label, where in lines.items()]
        yield Finding(
            code="rare_class",
            severity="warning",
            message=(
                f"{len(rare)} of {len(classes.counts)} labels have fewer than {MIN_PER_CLASS} rows "
                f"({name_some(shown)}). So few can be learned by heart only, and not be tested; add rows for them."
            ),
            file=train.name,
            lines=_sorted(lines),
        )


def find_class_imbalance(parts: Parts) -> Iterator[Finding]:
    """One label more than 20 times as frequent as another in the training file, or most of the file."""
    classes = classes_of(parts.train)
    if classes is None:
        return
    counts = {label: n for label, n in classes.counts.items() if not classes.is_slip(label)}
    commonest = max(counts, key=lambda label: counts[label])
    most = counts[commonest]
    rare = {label: count for label, count in counts.items() if most > MAX_IMBALANCE * count}
    share = most / sum(counts.values())
    if rare:
        named = [f"{shorten(label)} {n}" for label, n in sorted(rare.items(), key=lambda item: (item[1], item[0]))]
        yield Finding(
            code="class_imbalance",
            severity="warning",
            message=(
                f"The label {shorten(commonest)} occurs {most} times, others hardly ever ({name_some(named)}). "
                f"Always giving the common label would be right in {share:.0%}; add rows for the rare ones."
            ),
            file=parts.train.name,
            lines=_sorted(_lines_of(parts.train, classes, set(rare))),
        )
    elif share >= SWAMPING_SHARE and classes.n >= MIN_ROWS:
        yield Finding(
            code="majority_class",
            severity="note",
            message=(
                f"{most} of {sum(counts.values())} rows have the label {shorten(commonest)}: always giving it would be "
                f"right in {share:.0%}. Judge a model by the other labels, not by its accuracy."
            ),
            file=parts.train.name,
        )


def _read(example: Example) -> Label | None:
    return read_label(example.target)


def _lines_of(dataset: Dataset, classes: Classes, labels: set[str]) -> dict[str, list[int]]:
    """The lines of some labels."""
    lines: dict[str, list[int]] = {}
    if labels:
        for example in dataset.examples:
            label = classes.of(example)
            if label in labels:
                lines.setdefault(str(label), []).append(example.line)
    return lines


def _count(lines: Mapping[str, list[int]]) -> int:
    return sum(len(where) for where in lines.values())


def _sorted(lines: Mapping[str, list[int]]) -> tuple[int, ...]:
    return tuple(sorted(line for where in lines.values() for line in where))


def _meant(label: str, known: list[str]) -> str:
    """The known label that an unknown one is probably a slip of; empty when none is close."""
    by_plain = {plain(one): one for one in reversed(known)}
    close = get_close_matches(plain(label), list(by_plain), n=1, cutoff=0.8)
    return by_plain[close[0]] if close else ""


def _close_pairs(labels: Iterable[str]) -> list[tuple[str, str]]:
    """Labels equal but for case and separators, or one letter apart (digits tell labels apart)."""
    groups: dict[tuple[int, str], list[str]] = {}
    for label in labels:
        name = plain(label)
        groups.setdefault((-1, name), []).append(label)
        if len(name) >= 6:
            for i, letter in enumerate(name):
                if not letter.isdigit():
                    # Equal without their i-th letters: one is changed. Equal to the whole other: one is added.
                    groups.setdefault((i, name[:i] + name[i + 1 :]), []).append(label)
                    groups.setdefault((-1, name[:i] + name[i + 1 :]), []).append(label)
    pairs = {
        (min(a, b), max(a, b))
        for group in groups.values()
        if 1 < len(group) <= 20
        for a in group
        for b in group
        if a != b
    }
    return sorted((a, b) for a, b in pairs if _is_slip_apart(plain(a), plain(b)))


def _is_slip_apart(a: str, b: str) -> bool:
    if a == b:
        return True
    if len(a) > len(b):
        a, b = b, a
    if len(b) - len(a) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    changed = b[start] + (a[start] if len(a) == len(b) else "")
    return not any(c.isdigit() for c in changed) and a[start + (len(a) == len(b)) :] == b[start + 1 :]
