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
        yield from _of_dataset(dataset)


def _of_dataset(dataset: Dataset) -> Iterator[Finding]:
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
            yield _finding(dataset, where, counts, shown[0] if shown else "", is_public=is_public)


def _finding(dataset: Dataset, lines: Sequence[int], counts: Counter[str], example: str, *, is_public: bool) -> Finding:
    kinds = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    rows = f"{len(lines)} of {len(dataset)} rows"
    if is_public:
        message = (
            f"{rows} hold contact data that many rows share ({kinds}): public ones, it seems. Make sure that nobody "
            "minds if the model repeats them."
        )
    else:
        message = (
            f"{rows} hold personal data or secrets ({kinds}; {name_lines(lines)}). A model can repeat what it was "
            "trained on: replace them by placeholders such as <EMAIL>, or make sure that they may be used. A secret "
            "that stands here is to be changed."
        )
    return Finding(
        code="personal_data",
        severity="note" if is_public else "warning",
        message=message,
        file=dataset.name,
        lines=tuple(lines),
        example=example,
    )


def mask(seen: Seen) -> str:
    """A value as it may be shown."""
    value = seen.value
    if seen.type == "email":
        return f"{value[0]}…@{value.rpartition('@')[2]}"
    if seen.type == "secret" or len(value) < 10:
        return f"{value[0]}…" if len(value) < 16 else f"{value[:4]}…"
    return f"{value[:2]}…{value[-2:]}"
