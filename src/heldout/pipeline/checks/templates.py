"""Many rows made from one pattern: a few words change, the rest is the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from heldout.pipeline.checks.parts import Parts, name_lines, name_some, shorten
from heldout.pipeline.checks.rows import plain
from heldout.pipeline.types import Finding

#: A word of at least this share of the rows belongs to a pattern; a rarer one fills a slot.
COMMON = 0.05
#: A pattern is worth a note with so many rows, at least this share of the file, and so many fixed words ...
MIN_ROWS, MIN_SHARE, MIN_WORDS = 20, 0.05, 3
#: ... that are at least this share of its letters: "what is my ..." is a way of asking, not a pattern.
FIXED = 0.5
SLOT = "…"
_CHARACTERS = 600  # a pattern shows at the beginning of a text


def find_templates(parts: Parts) -> Iterator[Finding]:
    """Patterns that make up much of the training file."""
    sample = parts.rows.samples[0]
    texts = [plain(row.text[:_CHARACTERS]).split() for row in sample]
    counts = Counter(word for words in texts for word in set(words))
    common = {word for word, n in counts.items() if n >= COMMON * len(texts) and not any(map(str.isdigit, word))}
    rows: dict[str, list[int]] = {}
    for position, words in enumerate(texts):
        pattern = _pattern(words, common)
        if pattern:
            rows.setdefault(pattern, []).append(position)
    least = max(MIN_ROWS, MIN_SHARE * len(texts))
    # Copies of one text are told as duplicates.
    found = {
        pattern: members
        for pattern, members in rows.items()
        if len(members) >= least and len({tuple(texts[one]) for one in members}) * 2 > len(members)
    }
    if not found:
        return
    most = sorted(found.items(), key=lambda item: -len(item[1]))
    lines = tuple(sorted(sample[one].line for members in found.values() for one in members))
    of = f"{len(texts)} rows" if len(texts) == len(parts.train) else f"{len(texts)} rows that were looked at (evenly)"
    shown = name_some([f"{shorten(pattern)}: {len(members)} rows" for pattern, members in most])
    yield Finding(
        code="template",
        severity="note",
        message=(
            f"{len(lines)} of {of} are made from {'one pattern' if len(found) == 1 else f'{len(found)} patterns'} "
            f"({shown}; {name_lines(lines, at_most=3)}). Rows that differ in a slot teach one thing many times: real "
            "inputs are less alike, and a score on such rows says little about them. Mix in other wordings."
        ),
        file=parts.train.name,
        lines=lines,
        example=shorten(sample[most[0][1][0]].text, at_most=200),
    )


def _pattern(words: list[str], common: set[str]) -> str:
    """The text with its rare words as slots; empty where too little is fixed, or nothing varies."""
    shown: list[str] = []
    for word in words:
        if word in common:
            shown.append(word)
        elif not shown or shown[-1] != SLOT:
            shown.append(SLOT)
    fixed = [word for word in shown if word != SLOT]
    letters = sum(map(len, words))
    if len(fixed) < MIN_WORDS or len(fixed) == len(shown) or sum(map(len, fixed)) < FIXED * letters:
        return ""
    return " ".join(shown)
