"""Small changes to what a user wrote that leave its meaning, and so the right answer, as it is.

Each is a function (text, rng) -> text in CHANGES. None touches a stretch in which every character may matter:
numbers, quotations, code, addresses, JSON, names of things that no dictionary has. Where nothing is left to
change, the text comes back as it was.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

Change = Callable[[str, random.Random], str]


class Piece(NamedTuple):
    """A stretch of a text. `free` says that it is words and white space."""

    text: str
    free: bool


#: Words between two typing slips, and how many a text gets at most (SCIENCE §4).
WORDS_A_SLIP, SLIPS = 12, 3
#: Share of the gaps between words that get a mark, at most (AEDA, Karimi et al. 2021).
MARKED = 0.3
#: Share of the droppable words that go.
DROPPED = 0.5

#: What lies around a key on a QWERTY keyboard, letters only.
_KEYS = dict(
    one.split(":")
    for one in (
        "q:wa w:qesa e:wrsd r:etfd t:ryfg y:tugh u:yij i:uok o:ipl p:o a:qsz s:adwx d:sfec f:dgrv g:fhtc h:gjyv j:hkun "
        "k:jli l:ko z:xa x:zcs c:xvd v:cbf b:vng n:bmh m:nj"
    ).split()
)
#: Neither "!" nor "?": these say something about the writer.
_MARKS = (",", ";", ".", ":")
#: English words without which a sentence says the same. No negation, no preposition, no pronoun, no number.
_DROPPABLE = frozenset("a an the please just really very actually basically simply".split())
#: Words by which English is recognised, to which an English opening may be added.
_ENGLISH = frozenset(
    "the what how my you is are with have please can of and this that i'm it's does when where".split()
)
#: No thanks and no praise: a text whose feeling is asked for must keep it.
_OPENINGS = ("Hello, ", "Hi, ", "Hi there, ", "Hello. ", "Please have a look: ", "One more: ")
_CLOSINGS = (" Please answer.", " Let me know.", " Regards")

_SPANS = (
    re.compile(r"```.*?(?:```|\Z)", re.DOTALL),
    re.compile(r"`[^`\n]*`"),
    re.compile(r'"[^"]*(?:"|\Z)'),
    re.compile(r"[“„«][^”“»]*(?:[”“»]|\Z)"),
    re.compile(r"(?<!\w)['‘][^'’\n]*['’](?!\w)"),  # not the apostrophe of "don't"
    re.compile(r"<[^<>\s][^<>]*>"),
    re.compile(r"\[[^\[\]]*\]"),
)
#: Numbers, addresses, URLs, file names, identifiers, formulas: a token that is more than a word and its closing marks.
_TOKEN = re.compile(r"\S+")
_ODD = re.compile(r"[\d_/\\@#$%^&*+=|~<>{}\[\]]|\w[.:]\w|[a-zß-öø-ÿ][A-ZÀ-ÖØ-Þ]")
_OBJECT, _ARRAY = re.compile(r"\{"), re.compile(r"\[\s*[\[{\"\d-]")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_GAP = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
_CLOSING_MARKS = re.compile(r"[.,;:?!…]+(?=\s|\Z)")
_DROP = re.compile(rf"\b(?:{'|'.join(sorted(_DROPPABLE))})\b ", re.IGNORECASE)


@lru_cache(maxsize=1024)  # several changes look at one text
def pieces(text: str) -> tuple[Piece, ...]:
    """The text taken apart; joined, the pieces are the text."""
    protected = sorted(
        [
            *_bracketed(text),
            *(found.span() for span in _SPANS for found in span.finditer(text)),
            *(found.span() for found in _TOKEN.finditer(text) if _ODD.search(found.group())),
        ]
    )
    parts, at = [], 0
    for start, end in protected:
        if start > at:
            parts.append(Piece(text[at:start], True))
        if end > at:
            parts.append(Piece(text[max(at, start) : end], False))
            at = end
    if at < len(text):
        parts.append(Piece(text[at:], True))
    return tuple(parts)


def slip(text: str, rng: random.Random) -> str:
    """Slips of the keyboard: two neighbours swapped, or the key beside the right one. One in twelve words, three at
    most, in words of four letters or more, never the first letter."""
    words = [(number, found) for number, found in _words(text) if len(found.group()) >= 4 and _has_case(found.group())]
    parts = [one.text for one in pieces(text)]
    chosen = rng.sample(words, min(len(words), SLIPS, max(1, len(words) // WORDS_A_SLIP)))
    # From the end, so that what lies before stays where it is.
    for number, found in sorted(chosen, key=lambda one: (one[0], one[1].start()), reverse=True):
        start, end = found.span()
        parts[number] = parts[number][:start] + _slipped(found.group(), rng) + parts[number][end:]
    return "".join(parts)


def lower(text: str, rng: random.Random) -> str:
    """All in small letters."""
    return "".join(one.text.lower() if one.free else one.text for one in pieces(text))


def mark(text: str, rng: random.Random) -> str:
    """Marks put between words (AEDA)."""
    parts = [one.text for one in pieces(text)]
    gaps = [(i, found.start()) for i, one in enumerate(pieces(text)) if one.free for found in _GAP.finditer(one.text)]
    if not gaps:
        return text
    count = rng.randint(1, int(MARKED * len(gaps)) + 1)
    for number, at in sorted(rng.sample(gaps, min(count, len(gaps))), reverse=True):
        parts[number] = f"{parts[number][:at]} {rng.choice(_MARKS)}{parts[number][at:]}"
    return "".join(parts)


def unmark(text: str, rng: random.Random) -> str:
    """No closing marks."""
    free = "".join(_CLOSING_MARKS.sub("", one.text) if one.free else one.text for one in pieces(text))
    return free if free.strip() else text


def greet(text: str, rng: random.Random) -> str:
    """An opening or a closing that says nothing. English is added to English only."""
    if not any(found.group().lower() in _ENGLISH for _, found in _words(text)):
        return text
    if rng.random() < 0.7:
        return rng.choice(_OPENINGS) + text
    return text + rng.choice(_CLOSINGS)


def drop(text: str, rng: random.Random) -> str:
    """Half of the words that say nothing (articles, "please", "just") are left out. English only: any other word may
    be the one that matters, as "not" is."""
    return "".join(
        _DROP.sub(lambda found: "" if rng.random() < DROPPED else found.group(), one.text) if one.free else one.text
        for one in pieces(text)
    )


#: What a robust copy is made with. Adding a change is adding a function here.
CHANGES: tuple[Change, ...] = (slip, lower, mark, unmark, greet, drop)


def _bracketed(text: str) -> Iterator[tuple[int, int]]:
    """JSON and its like, from the first brace (or bracket before an item) to the last one: nested ones need no parser,
    and too much is protected rather than too little."""
    for opening, closing in ((_OBJECT, "}"), (_ARRAY, "]")):
        if found := opening.search(text):
            yield found.start(), max(text.rfind(closing) + 1, found.end())


def _words(text: str) -> list[tuple[int, re.Match[str]]]:
    """Free words, with the number of the piece that each is in."""
    return [(i, found) for i, one in enumerate(pieces(text)) if one.free for found in _WORD.finditer(one.text)]


def _has_case(word: str) -> bool:
    # Where there are no capitals (Chinese, Arabic, Hindi), letters are not typed one by one, or join others.
    return word.lower() != word.upper()


def _slipped(word: str, rng: random.Random) -> str:
    places = [i for i in range(1, len(word) - 1) if word[i].isalpha() and word[i + 1].isalpha()]
    swaps = [i for i in places if word[i] != word[i + 1]]
    keys = [i for i in places if word[i] in _KEYS]
    if swaps and (not keys or rng.random() < 0.5):
        at = rng.choice(swaps)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if keys:
        at = rng.choice(keys)
        return word[:at] + rng.choice(_KEYS[word[at]]) + word[at + 1 :]
    return word
