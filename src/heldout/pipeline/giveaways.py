"""Held-out questions that give their answers away: asked without the code that does, as they will be asked in use.

A code that somebody's tool wrote into every row tells the answer there and in the rows held out of the same file, so
that a model which learned nothing but the code looks perfect to the verdict.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from heldout.engine.base import Message
from heldout.engine.labels import user_text
from heldout.pipeline.checks.parts import name_lines, name_some
from heldout.pipeline.checks.rows import Rows, Sampled
from heldout.pipeline.checks.shortcuts import (
    HOLDS,
    MIN_LABEL_ROWS,
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
    texts: frozenset[str]  # folded, without the marks around them
    outside: tuple[str, ...] = ()  # the words that stand before them at the beginning, or behind them at the end

    def without(self, text: str) -> str:
        """The text without its code, and without what stands outside it; as it is where it has no such code there, or
        is JSON."""
        words = [word for word in _WORD.finditer(text) if bare_token(word.group())]
        bare = [bare_token(word.group()) for word in words]
        if not -len(words) <= self.place < len(words) or bare[self.place] not in self.texts or _is_json(text):
            return text
        if _outside(bare, self.place) != self.outside:
            return text
        word = words[self.place]
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
        asked = self.asked(rows)
        changed = [row.line for row, one in zip(rows, asked, strict=True) if row != one]
        tells = {(token.text, token.label): token for token in self.tokens}
        kept: list[int] = []
        seen: set[Token] = set()
        for one in asked:
            text = user_text(one.prompt)
            label = label_of(Sampled(one.line, text, one.target))
            if found := {tells[token, label] for token in tokens_of(text) if (token, label) in tells}:
                kept.append(one.line)
                seen |= found
        of = f"of {len(rows)} held-out questions"
        without = f"{len(changed)} {of} are asked without the code that tells their answer"
        having = f"{len(kept)} {of} have a word in them that tells their answer"
        findings, caveats = [], []
        if changed and self.codes:
            codes = [token for token in self.tokens if token.text in self.codes.texts]
            findings.append(_finding("giveaway_removed", "note", without, _WITHOUT, codes, changed, file))
            caveats.append(f"{without}: {_WITHOUT}")
        if kept:
            words = [token for token in self.tokens if token in seen]
            findings.append(_finding("giveaway_kept", "warning", having, _WITH, words, kept, file))
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
    """The codes that surely mean nothing: of letters and digits with a mark in or around them, at one place near an end
    of the text, in rows of several labels that are half of the file, outside of which all rows have the same words. A
    code that spells its label may be what is to be read out; then all stay, for having one would tell the answer as
    well."""
    codes = [token for token in tokens if token.place is not None and -EDGE <= token.place < EDGE and _is_opaque(token)]
    if not codes or any(token.label in re.split(r"[\W_]+", token.text) for token in codes):
        return None
    place = Counter(token.place for token in codes).most_common(1)[0][0]
    here = [token for token in codes if token.place == place]
    labels = Counter(map(label_of, sample))
    told = {token.label for token in here}
    if place is None or len(told) < 2 or 2 * sum(labels[label] for label in told) < len(sample):
        return None
    texts = [tokens_of(row.text) for row in sample]
    at_place = [text[place] if -len(text) <= place < len(text) else "" for text in texts]
    known = {token.text for token in here}
    outside = Counter(_outside(text, place) for text, code in zip(texts, at_place, strict=True) if code in known)
    common, n = outside.most_common(1)[0]
    if n < ONE_PLACE * outside.total():
        return None
    return Codes(place, frozenset(known | _of_rare_labels(known, at_place, sample, labels)), common)


def _of_rare_labels(
    known: Set[str], at_place: Sequence[str], sample: Sequence[Sampled], labels: Counter[str]
) -> set[str]:
    """What stands at the codes' place in all rows of a label too rare to be judged alone, in no other's, and has the
    shape of a code."""
    shapes = {_shape(code) for code in known}
    rows_of: dict[str, list[str]] = {}
    for row, code in zip(sample, at_place, strict=True):
        rows_of.setdefault(label_of(row), []).append(code)
    having = Counter(code for codes in rows_of.values() for code in set(codes))
    return {
        codes[0]
        for label, codes in rows_of.items()
        if labels[label] < MIN_LABEL_ROWS and len(set(codes)) == 1 and having[codes[0]] == 1
        if _shape(codes[0]) in shapes
    }


def _outside(words: Sequence[str], place: int) -> tuple[str, ...]:
    """The words between this place and the text's nearer end."""
    return tuple(words[:place] if place >= 0 else words[place:][1:])


def _is_opaque(token: Token) -> bool:
    """True of "[a7]", "q-17"; not of "404", "9am", "ps5" and words, which somebody may have to read."""
    text = token.text
    has = any(map(str.isdigit, text)), any("a" <= one <= "z" for one in text), not text.isalnum()
    return all(has)


def _shape(text: str) -> str:
    """ "[a9]": letters as a, digits as 9."""
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


def _finding(
    code: str, severity: Severity, what: str, means: str, tokens: Sequence[Token], lines: Sequence[int], file: str
) -> Finding:
    shown = name_some([token.told for token in one_of_each(tokens)])
    return Finding(
        code=code,
        severity=severity,
        message=f"{what} ({shown}): {name_lines(lines)}; {means}.",
        file=file,
        lines=tuple(lines),
    )
