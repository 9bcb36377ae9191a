"""Held-out questions that give their answers away: asked without the code that does, as they will be asked in use.

A code that somebody's tool wrote into every row tells the answer there and in the rows held out of the same file, so
that a model which learned nothing but the code looks perfect to the verdict.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from heldout.engine.base import Message
from heldout.engine.labels import user_text
from heldout.pipeline.checks.parts import name_lines, name_some
from heldout.pipeline.checks.rows import Rows, Sampled
from heldout.pipeline.checks.shortcuts import (
    HOLDS,
    ONE_PLACE,
    Token,
    bare_token,
    label_of,
    one_of_each,
    shortcut_tokens,
    tokens_of,
)
from heldout.pipeline.types import Example, Finding, Severity, Split

#: Codes are looked for among so many words at either end of a text.
EDGE = 3
_WORD = re.compile(r"\S+")
_AFTER, _BEFORE = re.compile(r"^\s*(?:[|,;:·–—-]+\s+)?"), re.compile(r"(?:\s+[|,;:·–—-]+)?\s*$")


@dataclass(frozen=True)
class Codes:
    """Codes at one place of the questions, each of which tells an answer and means nothing else."""

    place: int  # which word: 0 the first, -1 the last
    shapes: frozenset[str]  # "[a9]": letters as a, digits as 9

    def without(self, text: str) -> str:
        """The text without its code, and without what stands before it at the beginning or behind it at the end; as it
        is where it has no such code, or is JSON."""
        words = [word for word in _WORD.finditer(text) if bare_token(word.group())]
        if not -len(words) <= self.place < len(words) or _is_json(text):
            return text
        word = words[self.place]
        if _shape(bare_token(word.group())) not in self.shapes:
            return text
        if self.place < 0:
            return _BEFORE.sub("", text[: word.start()])
        return _AFTER.sub("", text[word.end() :])


@dataclass(frozen=True, kw_only=True)
class Giveaways:
    """What gives answers away in the questions of a job's files."""

    tokens: tuple[Token, ...] = ()
    codes: Codes | None = None  # are left out of what is asked

    def asked(self, rows: Sequence[Example]) -> tuple[Example, ...]:
        """The rows as they are asked. One that would ask nothing is asked as it is."""
        return tuple(map(self._without_code, rows))

    def told(self, rows: Sequence[Example], file: str) -> tuple[tuple[Finding, ...], tuple[str, ...]]:
        """What a reader must know of these held-out rows: findings, and caveats for the verdict (with no data in
        them: they are published)."""
        tokens = {token.text for token in self.tokens}
        asked = self.asked(rows)
        changed = [row.line for row, one in zip(rows, asked, strict=True) if row != one]
        telling = [one.line for one in asked if not tokens.isdisjoint(tokens_of(user_text(one.prompt)))]
        of = f"of {len(rows)} held-out questions"
        without = f"{len(changed)} {of} are asked without the code that tells their answer"
        having = f"{len(telling)} {of} have a word in them that tells their answer"
        findings, caveats = [], []
        if changed:
            findings.append(self._finding("giveaway_removed", "note", without, _WITHOUT, changed, file))
            caveats.append(f"{without}: {_WITHOUT}")
        if telling:
            findings.append(self._finding("giveaway_kept", "warning", having, _WITH, telling, file))
            caveats.append(f"{having}: {_WITH}")
        return tuple(findings), tuple(caveats)

    def _without_code(self, row: Example) -> Example:
        if self.codes is None:
            return row
        turns = [i for i, message in enumerate(row.prompt) if message["role"] == "user"]
        if not turns:
            return row
        turn = turns[0 if self.codes.place >= 0 else -1]
        text = self.codes.without(row.messages[turn]["content"])
        if not tokens_of(text):
            return row
        message: Message = {**row.messages[turn], "content": text}
        return replace(row, messages=(*row.messages[:turn], message, *row.messages[turn + 1 :]))

    def _finding(self, code: str, severity: Severity, what: str, means: str, lines: list[int], file: str) -> Finding:
        shown = name_some([token.told for token in one_of_each(self.tokens)])
        return Finding(
            code=code,
            severity=severity,
            message=f"{what} ({shown}): {name_lines(lines)}; {means}.",
            file=file,
            lines=tuple(lines),
        )


_WITHOUT = "scores say what is known without it; if real prompts have it, keep it (--keep-leaks, x_keep_leaks)"
_WITH = "scores may measure this word and not the task"


def find_giveaways(rows: Rows, *, with_valid: bool, with_holdout: bool = False, keep: bool = False) -> Giveaways:
    """The shortcut tokens (checks/shortcuts.py) of the training file that tell the answers of held-out rows too.

    Args:
        rows: of the training file, the validation file (`with_valid`) and the holdout file (`with_holdout`), which is
            asked as it is.
        keep: ask all questions as they are.
    """
    tokens = shortcut_tokens(rows, with_valid=with_valid)
    if with_holdout:
        tokens = _holding(tokens, rows.samples[-1])
    return Giveaways(tokens=tokens, codes=None if keep or with_holdout else _codes(tokens, rows.samples[0]))


def as_asked(split: Split) -> Split:
    """The split with training and validation rows as the held-out ones are asked: for what compares them."""
    if split.giveaways is None:
        return split
    return replace(split, train=split.giveaways.asked(split.train), valid=split.giveaways.asked(split.valid))


def _codes(tokens: Sequence[Token], sample: Sequence[Sampled]) -> Codes | None:
    """The codes that surely mean nothing: of letters and digits, at one place near an end of the text, in rows of
    several labels that are half of the file, behind (or before) the same words in all rows. A code that spells its
    label may be what is to be read out; then all stay, for having one would tell the answer as well."""
    codes = [token for token in tokens if token.place is not None and -EDGE <= token.place < EDGE and _is_opaque(token)]
    if not codes or any(token.label in re.split(r"[\W_]+", token.text) for token in codes):
        return None
    place = Counter(token.place for token in codes).most_common(1)[0][0]
    here = [token for token in codes if token.place == place]
    labels = Counter(map(label_of, sample))
    told = {token.label for token in here}
    if place is None or len(told) < 2 or 2 * sum(labels[label] for label in told) < len(sample):
        return None
    shapes = frozenset(_shape(token.text) for token in here)
    texts = [tokens_of(row.text) for row in sample]
    coded = [text for text in texts if -len(text) <= place < len(text) and _shape(text[place]) in shapes]
    outside = Counter(tuple(text[:place] if place >= 0 else text[place:][1:]) for text in coded)
    return Codes(place, shapes) if outside.most_common(1)[0][1] >= ONE_PLACE * len(coded) else None


def _is_opaque(token: Token) -> bool:
    text = token.text
    return token.is_code and any(map(str.isdigit, text)) and any("a" <= character <= "z" for character in text)


def _shape(text: str) -> str:
    return re.sub(r"\d", "9", re.sub(r"[^\W\d_]", "a", text))


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _holding(tokens: Sequence[Token], rows: Sequence[Sampled]) -> tuple[Token, ...]:
    """The tokens whose rows have their label here, too."""
    labels: dict[str, list[str]] = {token.text: [] for token in tokens}
    for row in rows:
        for text in labels.keys() & set(tokens_of(row.text)):
            labels[text].append(label_of(row))
    return tuple(
        token for token in tokens if labels[token.text].count(token.label) >= HOLDS * len(labels[token.text]) > 0
    )
