"""Values and bytes of a file as they can stand in a sentence: short, whatever the file holds."""

from __future__ import annotations

import json
import re
from typing import Any

LONE_SURROGATE = re.compile("[\ud800-\udfff]")

_AROUND = 40


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    words = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return words[type(value)]


def show(value: Any) -> str:
    """A value in a sentence."""
    if isinstance(value, (list, dict)):
        return kind(value)
    if isinstance(value, str):
        value = value[:41]  # a text of megabytes need not be escaped to be cut
    shown = ascii(value) if isinstance(value, str) and LONE_SURROGATE.search(value) else repr(value)
    return shown if len(shown) <= 40 else f"{shown[:39]}…"


def show_json(value: Any, *, at_most: int = 120) -> str:
    """The beginning of a value as it stands in the file."""
    shown = ""
    try:
        for piece in json.JSONEncoder(ensure_ascii=False).iterencode(value):
            shown += piece[: at_most + 1]
            if len(shown) > at_most:
                break
    except RecursionError:  # the beginning of what is nested so deeply is enough
        shown = shown.ljust(at_most + 1)
    shown = LONE_SURROGATE.sub("\ufffd", shown)
    return shown if len(shown) <= at_most else f"{shown[: at_most - 1].rstrip()}…"


def excerpt(raw: bytes, position: int) -> str:
    """The bytes around a position, those that are no UTF-8 as \\xNN."""
    start, end = max(0, position - _AROUND), position + _AROUND
    shown = raw[start:end].decode("utf-8", "backslashreplace")
    return f"{'…' if start else ''}{shown}{'…' if end < len(raw) else ''}"
