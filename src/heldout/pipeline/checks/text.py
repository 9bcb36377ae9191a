"""What happened to the texts on their way into the file: broken encodings, characters that nobody sees, HTML."""

from __future__ import annotations

import html.entities
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from heldout.pipeline.checks.parts import Parts, name_lines
from heldout.pipeline.types import Dataset, Finding, Severity

#: When more rows than this have HTML in them, HTML is what the task is about.
HTML_SHARE = 0.2

_AROUND = 20


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A kind of damage. `find` gives where in a text it is, or None."""

    code: str
    find: Callable[[str], tuple[int, int] | None]
    what: str  # "3 rows have …"
    advice: str
    is_markup: bool = False
    severity: Severity = "warning"


@dataclass
class _Seen:
    lines: array[int] = field(default_factory=lambda: array("I"))
    example: str = ""


def find_damaged_texts(parts: Parts) -> Iterator[Finding]:
    """Rows with a message whose characters are not what somebody typed."""
    for dataset in parts.given():
        yield from _look_at(dataset)


def _look_at(dataset: Dataset) -> Iterator[Finding]:
    seen = {kind.code: _Seen() for kind in _KINDS}
    known: dict[str, tuple[tuple[_Kind, int, int], ...]] = {}  # of the last few system prompts
    for example in dataset.examples:
        for message in example.messages:
            text = message["content"]
            if _is_plain(text):
                continue
            found = known.get(text)
            if found is None:
                found = tuple((kind, *place) for kind in _KINDS if (place := kind.find(text)))
                if message["role"] == "system":
                    if len(known) >= 16:
                        known.clear()
                    known[text] = found
            for kind, start, end in found:
                _note(seen[kind.code], example.line, text, start, end)
    for kind in _KINDS:
        lines = seen[kind.code].lines
        if lines and not (kind.is_markup and len(lines) > HTML_SHARE * len(dataset)):
            yield _finding(dataset, kind, seen[kind.code])


def _note(seen: _Seen, line: int, text: str, start: int, end: int) -> None:
    if not seen.lines:
        seen.example = _show(text, start, end)
    if not seen.lines or seen.lines[-1] != line:
        seen.lines.append(line)


def _finding(dataset: Dataset, kind: _Kind, seen: _Seen) -> Finding:
    n = len(seen.lines)
    return Finding(
        code=kind.code,
        severity=kind.severity,
        message=(f"{n} {'row has' if n == 1 else 'rows have'} {kind.what} ({name_lines(seen.lines)}). {kind.advice}"),
        file=dataset.name,
        lines=tuple(seen.lines),
        example=seen.example,
    )


def _show(text: str, start: int, end: int) -> str:
    """The place in a text; what cannot be seen, or would not print, as an escape."""
    shown = "".join(_show_character(c) for c in text[max(0, start - _AROUND) : min(end, start + 20) + _AROUND])
    return f"{'…' if start > _AROUND else ''}{shown}{'…' if end + _AROUND < len(text) else ''}"


def _show_character(c: str) -> str:
    if c == " " or (c.isprintable() and not unicodedata.category(c).startswith("C")):
        return c
    return c.encode("unicode_escape").decode("ascii")


# --- characters that should not be there ---------------------------------------------------------------


def _find_nul(text: str) -> tuple[int, int] | None:
    place = text.find("\x00")
    return None if place < 0 else (place, place + 1)


def _find_replacement(text: str) -> tuple[int, int] | None:
    place = text.find("\ufffd")
    return None if place < 0 else (place, place + 1)


def _is_plain(text: str) -> bool:
    """True for a text that cannot have any of this: most texts of most files, told in no time."""
    return text.isascii() and "&" not in text and "<" not in text and "\x00" not in text


#: Characters without a shape of their own: zero width, direction marks, soft hyphens, fillers, tags.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_DIRECTION = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u2066\u2067\u2068\u2069")
_OVERRIDE = "\u202e"
_ZWNJ, _ZWJ, _ZWSP, _SOFT_HYPHEN = "\u200c", "\u200d", "\u200b", "\u00ad"
#: Scripts that are written without blanks between words, where a zero-width space allows a line break.
_NO_BLANKS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u3040-\u30ff\u4e00-\u9fff]")
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff\U00010800-\U00010fff\U0001e800-\U0001eeff]")
_FLAG = "\U0001f3f4"  # flags of England, Scotland and Wales are this and tags


def _find_invisible(text: str) -> tuple[int, int] | None:
    for match in _INVISIBLE.finditer(text):
        if not _belongs(text, match.start()):
            return match.span()
    return None


def _belongs(text: str, place: int) -> bool:
    """True where a script or an emoji needs the invisible character at this place."""
    c = text[place]
    before = text[place - 1] if place else ""
    after = text[place + 1] if place + 1 < len(text) else ""
    if c == _ZWNJ:
        return _joins(before) and (_joins(after) or not after.isalnum())
    if c == _ZWJ:
        return (_joins(before) and (_joins(after) or not after.isalnum())) or (_is_emoji(before) and _is_emoji(after))
    if c == _ZWSP:
        return bool(_NO_BLANKS.match(before) or _NO_BLANKS.match(after))
    if c in _DIRECTION:
        return _RIGHT_TO_LEFT.search(text) is not None
    if c == _SOFT_HYPHEN:  # half of a misread "έ" is found as such
        runs = _MISREAD.finditer(text)
        return any(run.start() <= place < run.end() and _is_misread(text, run) for run in runs)
    if "\U000e0020" <= c <= "\U000e007f":
        return _FLAG in text[max(0, place - 7) : place]
    return False


def _joins(c: str) -> bool:
    """True for characters of scripts that change their shape with their neighbours: Arabic, Indic and others."""
    return bool(c) and c >= "\u0600" and unicodedata.category(c)[0] in "LM" and not "\u1e00" <= c <= "\u2dff"


def _is_emoji(c: str) -> bool:
    # So: pictures; Sk: skin tones; Mn: what asks for the picture form (U+FE0F); Sm: ♾ and arrows in a picture.
    return bool(c) and c > "\u00ff" and unicodedata.category(c) in ("So", "Sk", "Mn", "Sm", "Cn")


# --- UTF-8 that was read as something else ---------------------------------------------------------------

#: What Windows-1252 makes of the bytes 0x80 to 0xBF, and what Latin-1 makes of them.
_WINDOWS = {bytes([b]).decode("cp1252", "ignore") or chr(b): b for b in range(0x80, 0xC0)}
_BYTES = {**_WINDOWS, **{chr(b): b for b in range(0x80, 0x100)}}
_TAIL = "[" + re.escape("".join(sorted({*_WINDOWS, *map(chr, range(0x80, 0xC0))}))) + "]"
_MISREAD = re.compile(f"(?:[\u00c2-\u00df]{_TAIL}|[\u00e0-\u00ef]{_TAIL}{{2}}|[\u00f0-\u00f4]{_TAIL}{{3}})+")
#: What may follow a capital letter at the end of a word: closing marks, a dash, a blank that does not break.
_CLOSING = frozenset("\u2026\u201c\u201d\u2019\u2018\u203a\u00bb\u00ab\u2039\u2013\u2014\u00a0")


def _find_mojibake(text: str) -> tuple[int, int] | None:
    for match in _MISREAD.finditer(text):
        if _is_misread(text, match):
            return match.span()
    return None


def _is_misread(text: str, match: re.Match[str]) -> bool:
    """True when a run of accented letters and signs is UTF-8 that somebody read byte by byte.

    Real text has such pairs too, mostly a capital with a closing mark behind it. What it does not have is what
    they stand for: a letter or sign that fits in there.
    """
    run = match.group()
    try:
        meant = bytes(_BYTES[c] for c in run).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return False
    if any(c in "\ufeff\ufffd" or "\U0001f000" <= c <= "\U0001faff" for c in meant):
        return True
    if any("\u2010" <= c <= "\u2044" or c in "\u20ac\u2122" for c in meant):
        return run.startswith("\u00e2")
    letters = [c for c in meant if c.isalpha()]
    if len(letters) >= 3 and len(letters) * 2 > len(meant):
        return _one_script(letters)
    if len(meant) > 2 or not all("\u00a1" <= c <= "\u024f" or c == "\u00a0" for c in meant):
        return False
    return not _could_be_meant(text, match)


def _one_script(letters: list[str]) -> bool:
    scripts = {unicodedata.name(c, "").split(" ")[0] for c in letters}
    return len(scripts) == 1 or scripts <= {"CJK", "HIRAGANA", "KATAKANA"}


def _could_be_meant(text: str, match: re.Match[str]) -> bool:
    """True for a capital that ends a word, with a mark behind it: "CAFÉ…", "5 Å »"."""
    before = text[match.start() - 1] if match.start() else ""
    after = text[match.end()] if match.end() < len(text) else ""
    lead, tail = match.group()[0], match.group()[1]
    if tail not in _CLOSING or before.islower():  # a capital behind a small letter is none
        return False
    if before.isupper():
        return True
    # No word begins with "Â" or "Ã", so alone they are half of something.
    return lead not in "ÂÃ" and (tail in "\u00a0\u2026" or not after.isalpha())


# --- HTML ------------------------------------------------------------------------------------------------

_ENTITY = re.compile(r"&(?:#[0-9]{2,7}|#[xX][0-9a-fA-F]{2,6}|[A-Za-z][A-Za-z0-9]{1,31});")
#: Elements that only lay out or emphasise. Others (title, summary, code …) are common names in prompts.
_ELEMENTS = "p|div|span|b|i|u|em|strong|a|font|ul|ol|li|table|tr|td|th|h[1-6]|center|small|sub|sup|blockquote|pre"
_BREAK = re.compile(r"<(?:br|hr)\s*/?>|<img\s[^<>]*>", re.IGNORECASE)
_PAIR = re.compile(rf"<({_ELEMENTS})(?:\s[^<>]*)?>[^<]*(?:<[^<]*)??</\1\s*>", re.IGNORECASE)


def _find_entity(text: str) -> tuple[int, int] | None:
    if _is_code(text):
        return None
    for match in _ENTITY.finditer(text):
        name = match.group()[1:]
        if name.startswith("#") or name in html.entities.html5:
            return match.span()
    return None


def _find_markup(text: str) -> tuple[int, int] | None:
    if "<" not in text or _is_code(text):
        return None
    match = _BREAK.search(text) or _PAIR.search(text)
    return match.span() if match else None


def _is_code(text: str) -> bool:
    """True for a text that shows code: HTML in it is meant."""
    return "`" in text


_KINDS = (
    _Kind(
        code="nul_character",
        find=_find_nul,
        what="a NUL character in a text",
        advice="Nobody types it, and some programs end the text there; remove it.",
    ),
    _Kind(
        code="mojibake",
        find=_find_mojibake,
        what="UTF-8 in a text that was read as another encoding",
        advice='Read the source again as UTF-8: "é" should not be "Ã©".',
    ),
    _Kind(
        code="replacement_character",
        find=_find_replacement,
        what="the mark U+FFFD, which stands for bytes that were lost",
        advice="Take the text from its source again, with the right encoding.",
    ),
    _Kind(
        code="invisible_character",
        find=_find_invisible,
        what="characters that cannot be seen (zero-width, soft hyphen or direction marks)",
        advice="The model reads them as other tokens than the plain text; remove them.",
    ),
    _Kind(
        code="html_entities",
        find=_find_entity,
        what="HTML entities in a text",
        advice='Decode them ("&amp;" is "&"), unless users write so.',
        is_markup=True,
    ),
    _Kind(
        code="html_markup",
        find=_find_markup,
        what="HTML markup in a text",
        advice="Remove the tags, unless users write them.",
        is_markup=True,
    ),
)
