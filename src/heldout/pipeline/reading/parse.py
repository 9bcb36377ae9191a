"""The bytes of a line -> its JSON value, or what is wrong with them and where."""

from __future__ import annotations

import json
import re
from typing import Any

from heldout.pipeline.reading.lines import MAX_LINE_BYTES, Line
from heldout.pipeline.reading.problems import Problem
from heldout.pipeline.reading.words import excerpt, show


class Unreadable(Exception):
    """How a line that is no JSON value leaves the parser."""

    def __init__(self, code: str, text: str, *, place: str = "", example: str = "") -> None:
        super().__init__(text)
        self.problem = Problem(code, text, place=place, example=example)


class InvalidJson(Exception):
    """What is wrong with a text that should be JSON, in a few words."""


def parse_line(line: Line) -> tuple[Any, str | None]:
    """The JSON value of a line, and the first key that occurs twice in one of its objects.

    Raises Unreadable. Bytes and characters are counted from 0.
    """
    if line.is_too_long:
        raise Unreadable(
            "line_too_long",
            f"the line has {line.size / 2**20:,.0f} MiB; at most {MAX_LINE_BYTES >> 20} MiB are read. Split the "
            "example, leave it out, or check that every line ends with a line feed.",
            example=excerpt(line.raw, 0),
        )
    raw = line.raw.removesuffix(b"\r")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        in_line = line.skipped + error.start
        found = raw[error.start : error.end].hex(" ").upper()
        raise Unreadable(
            "invalid_utf8",
            f"byte {in_line} of the line (counted from 0) is not UTF-8: {found}. It is byte {line.start + in_line} "
            "of the file. Save the file as UTF-8.",
            place=f"byte {in_line}, of the file {line.start + in_line}",
            example=excerpt(raw, error.start),
        ) from None
    try:
        return load_json(text)
    except json.JSONDecodeError as error:
        raise _describe(text, error) from None
    except InvalidJson as error:
        raise Unreadable("invalid_json", f"invalid JSON: {error}.", example=excerpt(raw, 0)) from None
    except RecursionError:
        raise Unreadable(
            "nested_too_deeply",
            "the JSON is nested too deeply to be an example. Remove the nesting.",
            example=excerpt(raw, 0),
        ) from None


def load_json(text: str) -> tuple[Any, str | None]:
    """The value, and the first key that occurs twice in one object. Raises JSONDecodeError, InvalidJson, or
    RecursionError."""
    repeated: list[str] = []

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        # One is enough to name the line: a line of megabytes may repeat a million keys.
        if len(found) < len(pairs) and not repeated:
            seen: set[str] = set()
            repeated.append(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
        return found

    # json, not msgspec: msgspec cannot tell repeated keys.
    try:
        value = json.loads(text, object_pairs_hook=to_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a number with thousands of digits
        raise InvalidJson(str(error)) from None
    return value, repeated[0] if repeated else None


def _refuse_constant(constant: str) -> None:
    raise InvalidJson(f"{constant} is not JSON. Write null or a number")


def _describe(text: str, error: json.JSONDecodeError) -> Unreadable:
    where = f"character {error.pos} (counted from 0)"
    rest = text[error.pos : error.pos + 100].rstrip()
    shown = text[max(0, error.pos - 40) : error.pos + 40]
    if error.msg.startswith("Extra data") and rest[:1] in ("{", "["):
        return Unreadable(
            "several_objects_on_line",
            f"a second object starts at {where}. Put each example on its own line.",
            example=shown,
        )
    if _is_cut_off(error, rest):
        return Unreadable(
            "truncated_json",
            f"the line ends in the middle of its JSON ({error.msg}, {where}). Complete it; a line break "
            r"inside a text must be written as \n.",
            example=text[-80:],
        )
    if text.startswith("\ufeff"):
        return Unreadable(
            "invalid_json",
            "invalid JSON: a byte order mark inside the file, as when files were joined. Remove it.",
            example=shown,
        )
    if _is_row_of_table(text, error):
        return Unreadable(
            "invalid_json",
            f"this is not JSON: it begins with {show(text[:20])}. Each line must be one object, "
            '{"messages": [...]}; a table (CSV) must be converted first.',
            example=text[:80],
        )
    seen = f"near {show(rest[:20])}" if rest else "at the end"
    return Unreadable("invalid_json", f"invalid JSON at {where}, {seen}: {error.msg}.", example=shown)


def _is_row_of_table(text: str, error: json.JSONDecodeError) -> bool:
    """True of a line that begins as no JSON does, or is a text or a number with a comma behind it."""
    begun = text.lstrip()
    if error.msg.startswith("Extra data"):
        return begun[:1] not in ("{", "[") and text[error.pos : error.pos + 1] in (",", ";", "\t")
    return error.pos <= len(text) - len(begun) and begun[:1].isalnum()


def _is_cut_off(error: json.JSONDecodeError, rest: str) -> bool:
    """True when more text could have made the line valid."""
    if not rest or error.msg.startswith("Unterminated string"):
        return True
    if "escape" in error.msg:
        return re.fullmatch(r"\\?u?[0-9a-fA-F]{0,3}", rest) is not None
    return error.msg == "Expecting value" and any(word.startswith(rest) for word in ("true", "false", "null", "-"))
