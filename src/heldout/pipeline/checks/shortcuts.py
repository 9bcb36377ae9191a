"""Answers that can be read off the prompt: the answer itself, or a token that tells it and means nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import NamedTuple

from heldout.engine.labels import read_label
from heldout.pipeline.checks.parts import Parts, name_lines, name_some, shorten
from heldout.pipeline.checks.rows import Rows, Sampled
from heldout.pipeline.types import Finding

#: An answer behind one mark ("label:", "[") in so many rows, this share of them, with two answers or more ...
MIN_ROWS, MIN_SHARE = 5, 0.05
#: ... and what stands behind the mark is the row's own answer at least this often.
RELIABLE = 0.9
#: An answer that begins or ends the text is a coincidence ("Yes, please"), unless nearly all rows have it.
AT_AN_END = 0.8
_MARKS = ":=>[({<|#→"

#: A token tells a label when the rule "has it: this label" has this AUC: half of true and false rates' difference.
AUC = 0.98
MIN_LABEL_ROWS = 8
#: A token always stands at one place when this share of its rows have it there.
ONE_PLACE = 0.95
#: A token whose rows in the validation file have the label less often than this told it in training only.
HOLDS = 0.8
MIN_VALID_ROWS = 5
_TRIM = ".,!?;:'\"…"


def find_answers_in_prompts(parts: Parts) -> Iterator[Finding]:
    """The answer stands in the prompt behind a mark, row after row: it was written there by whoever made the file.

    An answer that is merely among the user's words (an extracted name, a label that is a common word) is not meant.
    """
    sample = parts.rows.samples[0]
    answers = [label_of(row) for row in sample]
    texts = [row.text.casefold() for row in sample]
    rows: dict[str, list[int]] = {}
    for position, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        for frame in _frames(text, answer):
            rows.setdefault(frame, []).append(position)
    told = None
    for frame, members in sorted(rows.items(), key=lambda item: -len(item[1])):
        least = AT_AN_END * len(sample) if frame in ("^", "$") else MIN_SHARE * len(sample)
        if len(members) < max(MIN_ROWS, least) or len({answers[one] for one in members}) < 2:
            continue
        having = len(members) if frame in ("^", "$") else sum(frame in text.split() or frame in text for text in texts)
        if len(members) >= RELIABLE * having:
            told = frame, members
            break
    if told is None:
        return
    frame, members = told
    where = {"^": "at its beginning", "$": "at its end"}.get(frame, f"behind {frame!r}")
    lines = tuple(sample[one].line for one in members)
    yield Finding(
        code="answer_in_prompt",
        severity="warning",
        message=(
            f"In {len(lines)} of {_of(parts, sample)} the prompt holds the answer, {where} ({name_lines(lines)}). A "
            "model learns to copy it and has nothing to copy when it is used; remove it, unless real prompts have "
            "it too."
        ),
        file=parts.train.name,
        lines=lines,
        example=shorten(sample[members[0]].text, at_most=200),
    )


def label_of(row: Sampled) -> str:
    """The label that it is answered with, folded; empty where the answer is none."""
    label = read_label(row.answer)
    return "" if label is None else label.name.strip().casefold()


def _frames(text: str, answer: str) -> set[str]:
    """The marks that the answer stands behind, and "^" or "$" where it is the first or the last of the text."""
    if not answer or answer not in text:
        return set()
    found = set()
    for match in re.finditer(f"(?<!\\w){re.escape(answer)}(?!\\w)", text):
        before = text[: match.start()].rstrip(" \t\"'`*")
        if not before:
            found.add("^")
        elif before[-1] in _MARKS:
            found.add(before.split()[-1] if before[-1] not in "[({<" else before[-1])
        if not text[match.end() :].strip(" \t\n\"'`*.!?)]}>"):
            found.add("$")
    return found


class Token(NamedTuple):
    """A token that tells a label: folded, without the marks around it."""

    label: str
    text: str
    is_code: bool  # no word: digits, brackets
    #: Which word of the text it always is, where it always is the same: 0 the first, -1 the last.
    place: int | None
    valid_rows: int  # rows of the validation file that have it, and how many of those have the label
    valid_right: int

    @property
    def fails(self) -> bool:
        """True when it does not hold in the validation file."""
        return self.valid_rows >= MIN_VALID_ROWS and self.valid_right < HOLDS * self.valid_rows

    @property
    def told(self) -> str:
        """What it does."""
        return f"{self.text!r} tells {shorten(self.label)}"


def shortcut_tokens(rows: Rows, *, with_valid: bool) -> tuple[Token, ...]:
    """Tokens in all rows of a label of the first file and in no others that are no part of what is asked; those that
    surely are none first.

    A word that belongs to a label's subject does the same, so a token must show that it is none: it does not hold
    in the validation file (the second, `with_valid`); or it is a code or always at one place, and several labels have
    such a token.
    """
    if not rows.labels():
        return ()
    sample = rows.samples[0]
    tokens = list(_telling(sample, rows.samples[1] if with_valid else ()))
    covered = Counter(label_of(row) for row in sample)
    codes = [token for token in tokens if token.is_code]
    placed = [token for token in tokens if token.place is not None]
    odd = {token for token in tokens if token.fails or (token.is_code and token.place is not None)}
    for several in (codes, placed):
        labels = {token.label for token in several}
        if len(labels) > 1 and 2 * sum(covered[label] for label in labels) >= len(sample):
            odd.update(several)
    return tuple(sorted(odd, key=lambda token: (not token.fails, not token.is_code, token.label, token.text)))


def one_of_each(tokens: Iterable[Token]) -> tuple[Token, ...]:
    """The first token of each label."""
    first: dict[str, Token] = {}
    for token in tokens:
        first.setdefault(token.label, token)
    return tuple(first.values())


def find_shortcut_tokens(parts: Parts) -> Iterator[Finding]:
    """Tokens that tell the label and are no part of what is asked."""
    chosen = one_of_each(shortcut_tokens(parts.rows, with_valid=parts.valid is not None))
    if not chosen:
        return
    sample = parts.rows.samples[0]
    shown = name_some([token.told for token in chosen], at_most=8)
    seen, right = sum(token.valid_rows for token in chosen), sum(token.valid_right for token in chosen)
    checked = f" In {parts.valid.name} it is right in {right} of {seen} rows." if parts.valid and seen else ""
    labels = {token.label for token in chosen}
    lines = tuple(row.line for row in sample if label_of(row) in labels)
    yield Finding(
        code="shortcut_token",
        severity="warning",
        message=(
            f"A single token gives the answer away in {_of(parts, sample)} ({shown}).{checked} A model learns the "
            "token and not the text; remove such tokens, unless real prompts have them with the same meaning."
        ),
        file=parts.train.name,
        lines=lines,
        example=next(shorten(row.text, at_most=200) for row in sample if label_of(row) == chosen[0].label),
    )


def _telling(sample: Sequence[Sampled], valid: Sequence[Sampled]) -> Iterator[Token]:
    labels = [label_of(row) for row in sample]
    texts = [tokens_of(row.text) for row in sample]
    of_label = Counter(labels)
    having = Counter(token for text in texts for token in set(text))
    together = Counter((label, token) for label, text in zip(labels, texts, strict=True) for token in set(text))
    telling = []
    for (label, token), n in together.items():
        rows, others = of_label[label], len(sample) - of_label[label]
        if rows >= MIN_LABEL_ROWS and others and (1 + n / rows - (having[token] - n) / others) / 2 >= AUC:
            telling.append((label, token))
    wanted = {token for _, token in telling}
    places = _places(texts, wanted)
    checked: dict[str, list[str]] = {}
    for row in valid:
        for token in wanted.intersection(tokens_of(row.text)):
            checked.setdefault(token, []).append(label_of(row))
    for label, token in telling:
        seen = checked.get(token, [])
        yield Token(
            label=label,
            text=token,
            is_code=not all(character.isalpha() or character in "'’-" for character in token),
            place=places.get(token),
            valid_rows=len(seen),
            valid_right=seen.count(label),
        )


def _places(texts: Sequence[Sequence[str]], tokens: Set[str]) -> dict[str, int]:
    """The place of each of these tokens that nearly always has the same, from the beginning or from the end."""
    found: dict[str, Counter[int]] = {}
    having: Counter[str] = Counter()
    for text in texts:
        first = {token: i for i, token in reversed(list(enumerate(text))) if token in tokens}
        last = {token: i - len(text) for i, token in enumerate(text) if token in tokens}
        for token in first:
            having[token] += 1
            found.setdefault(token, Counter()).update((first[token], last[token]))

    # Where texts are equally long, both ends say the same: the nearer one is meant.
    def rank(one: tuple[int, int]) -> tuple[int, int]:
        place, n = one
        return n, -max(place, -1 - place)

    most = {token: max(places.items(), key=rank) for token, places in found.items()}
    return {token: place for token, (place, n) in most.items() if n >= ONE_PLACE * having[token]}


def tokens_of(text: str) -> list[str]:
    """The text's words and codes as they are compared."""
    return [bare for token in text.split() if (bare := bare_token(token))]


def bare_token(token: str) -> str:
    """Folded, without the marks around it."""
    return token.casefold().strip(_TRIM)


def _of(parts: Parts, sample: Sequence[Sampled]) -> str:
    if len(sample) == len(parts.train):
        return f"{len(sample)} rows"
    return f"{len(sample)} rows that were looked at (evenly over the file's {len(parts.train)})"
