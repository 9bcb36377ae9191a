"""Personal data and secrets: a model can repeat what it was trained on, word for word.

How each kind is told is in docs/checks/personal-data.md. Values are never shown whole: reports are passed around.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence

from heldout.pipeline.checks.identifiers import Seen, scan
from heldout.pipeline.checks.parts import Parts, name_lines
from heldout.pipeline.types import Dataset, Finding

#: A value in more rows than this, and in more than that share of them, is a shop's or a service's, not a person's.
PUBLIC_ROWS, PUBLIC_SHARE = 5, 0.01
#: Different values that are counted; later ones count as new.
COUNTED = 500_000


def find_personal_data(parts: Parts) -> Iterator[Finding]:
    """Rows with personal data or secrets. Values that many rows share are told apart: they are rather public."""
    for dataset in parts.given():
        # Of the other files nothing is learned.
        yield from _of_dataset(dataset, is_learned=dataset is parts.train)


def _of_dataset(dataset: Dataset, *, is_learned: bool) -> Iterator[Finding]:
    import numpy as np

    lines, types, values = array("q"), array("b"), array("q")
    names: list[str] = []
    rows: Counter[int] = Counter()  # by value
    first: dict[int, str] = {}  # what a value looks like, for the message's example
    for example in dataset.examples:
        seen = {one for message in example.messages for one in scan(str(message["content"]))}
        for one in sorted(seen):
            if one.type not in names:
                names.append(one.type)
            key = hash(one)
            if key in rows or len(rows) < COUNTED:
                rows[key] += 1
            lines.append(example.line)
            types.append(names.index(one.type))
            values.append(key)
            if len(first) < 100:
                first.setdefault(key, f"line {example.line}: {one.type} {mask(one)}")
    if not lines:
        return
    most = max(PUBLIC_ROWS, int(PUBLIC_SHARE * len(dataset)))
    public = np.array([rows[value] > most for value in values])
    all_lines, all_types = np.array(lines), np.array(types)
    for chosen, is_public in ((~public, False), (public, True)):
        if chosen.any():
            counts = Counter(names[i] for i in all_types[chosen].tolist())
            shown = [
                first[value] for value, is_it in zip(values, chosen.tolist(), strict=True) if is_it and value in first
            ]
            where = sorted(set(all_lines[chosen].tolist()))
            message = _public(dataset, where, counts) if is_public else _personal(dataset, where, counts)
            yield Finding(
                code="personal_data",
                severity="warning" if is_learned and not is_public else "note",
                message=message,
                file=dataset.name,
                lines=tuple(where),
                example=shown[0] if shown else "",
            )


def _personal(dataset: Dataset, lines: Sequence[int], counts: Counter[str]) -> str:
    return (
        f"{len(lines)} of {len(dataset)} rows hold personal data or secrets ({_told(counts)}; {name_lines(lines)}). A "
        "model can repeat what it was trained on: put placeholders such as <EMAIL> in their place, or make sure that "
        "they may be used. A secret that stands in a file is to be changed."
    )


def _public(dataset: Dataset, lines: Sequence[int], counts: Counter[str]) -> str:
    return (
        f"{len(lines)} of {len(dataset)} rows hold contact data that many rows share ({_told(counts)}), so they seem "
        "to be public. Make sure that nobody minds if the model repeats them."
    )


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def mask(seen: Seen) -> str:
    """A value as it may be shown."""
    value = seen.value
    if seen.type == "email":
        return f"{value[0]}…@{value.rpartition('@')[2]}"
    if seen.type == "secret" or len(value) < 10:
        return f"{value[0]}…" if len(value) < 16 else f"{value[:4]}…"
    return f"{value[:2]}…{value[-2:]}"
