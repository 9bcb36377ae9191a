"""JSONL bytes -> Dataset of Examples, with every problem of every line reported at once.

A row is never dropped silently: the Dataset holds the sound rows, the Findings name all others, and any
finding of severity "error" means that the job must fail with the list.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

from heldout.engine.base import Message
from heldout.pipeline.checks.parts import name_lines
from heldout.pipeline.types import Dataset, Example, Finding, Severity

_UTF8_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 4096
_MAX_NAMED_KEYS = 10

#: First bytes of files that people upload by mistake.
_MAGIC = {
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PK\x03\x04": "a ZIP archive or an Office document",
    b"%PDF": "a PDF document",
    b"PAR1": "a Parquet file",
    b"SQLite format 3\x00": "an SQLite database",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}
_CONTROL_BYTES = bytes(set(range(0x20)) - set(b"\t\n\v\f\r"))
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id", "audio")
_MESSAGE_KEYS = {"role", "content", "weight", "name"}
_TOP_LEVEL_KEYS = {"messages", "metadata", "parallel_tool_calls"}
_TEXT_ONLY = "This version trains on text only; leave the example out or write it as text."

#: Keys that give away another format -> what to tell its user.
_OTHER_FORMATS = (
    (
        ("prompt", "completion"),
        "this is the prompt/completion format of the old completions API. Write "
        '{"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": COMPLETION}]}.',
    ),
    (
        ("preferred_output",),
        "this is the preference (DPO) format. This version trains by the 'supervised' method only: "
        "write the input's messages followed by the preferred answer as one 'messages' list.",
    ),
    (
        ("preferred_completion",),
        "this is the preference (DPO) format. This version trains by the 'supervised' method only: "
        "write the input's messages followed by the preferred answer as one 'messages' list.",
    ),
    (
        ("conversations",),
        "this is the ShareGPT format. Rename 'conversations' to 'messages', 'from' to 'role' and 'value' to "
        "'content', with the roles 'system', 'user' and 'assistant'.",
    ),
    (
        ("instruction", "output"),
        "this is the Alpaca format. Write the instruction and input as a user message and the output as an "
        "assistant message.",
    ),
    (("message",), "the key is 'message', expected 'messages'. Rename it."),
)


class _Problem(NamedTuple):
    """One thing seen in one line. `text` continues "Line 7: "; `keys` are listed behind it, once per file."""

    code: str
    text: str
    severity: Severity = "error"
    keys: tuple[str, ...] = ()


class _Unreadable(Exception):
    """How a line that is no JSON value leaves the parser."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.problem = _Problem(code, text)


def read_dataset(content: bytes | BinaryIO, *, name: str) -> tuple[Dataset, tuple[Finding, ...]]:
    """The sound examples of a JSONL file, in order, and everything that is wrong with the others.

    A problem that many lines share is one Finding with all the lines; its message shows the first. Errors
    come before warnings, warnings before notes. Lines are counted from 1 by line feed, blank ones included.
    `content` is read once, line by line, and not closed.
    """
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    # Up to a line's end, so that the lines of the head and of the rest can be chained.
    head = stream.read(_HEAD_BYTES) + stream.readline()
    report = _Report(file=name)
    refusal = _not_json_lines(head)
    if refusal is not None:
        report.add_file(refusal)
        return Dataset(name=name, examples=()), report.findings()

    if head.startswith(_UTF8_BOM):
        report.add_file(_Problem("byte_order_mark", "the UTF-8 byte order mark at its start is ignored", "note"))
    examples = []
    empty = True
    for line, raw in enumerate(chain(io.BytesIO(head.removeprefix(_UTF8_BOM)), stream), start=1):
        empty = empty and not raw.strip()
        example, problems = _read_line(raw, line)
        report.add_line(line, problems)
        if example is not None:
            examples.append(example)
    if empty:
        report.add_file(_Problem("empty_file", "it has no examples. Put one JSON object on each line"))
    return Dataset(name=name, examples=tuple(examples)), report.findings()


@dataclass
class _Group:
    """The lines that share a problem, and the first of them in words."""

    severity: Severity
    text: str
    lines: list[int] = field(default_factory=list)
    keys: dict[str, None] = field(default_factory=dict)  # a set that remembers its order


@dataclass
class _Report:
    """Collects problems by code while the file is read."""

    file: str
    groups: dict[str, _Group] = field(default_factory=dict)

    def add_line(self, line: int, problems: Iterable[_Problem]) -> None:
        for problem in problems:
            text = f"Line {line}: {problem.text}"
            group = self.groups.setdefault(problem.code, _Group(problem.severity, text))
            group.keys.update(dict.fromkeys(problem.keys))
            if not group.lines or group.lines[-1] != line:
                group.lines.append(line)

    def add_file(self, problem: _Problem) -> None:
        self.groups[problem.code] = _Group(problem.severity, f"{self.file}: {problem.text}.")

    def findings(self) -> tuple[Finding, ...]:
        rank = {"error": 0, "warning": 1, "note": 2}
        ordered = sorted(self.groups.items(), key=lambda item: rank[item[1].severity])
        return tuple(
            Finding(
                code=code,
                severity=group.severity,
                message=_group_message(group),
                file=self.file,
                lines=tuple(group.lines),
            )
            for code, group in ordered
        )


def _group_message(group: _Group) -> str:
    message = group.text
    if group.keys:
        named = ", ".join(_show(key) for key in list(group.keys)[:_MAX_NAMED_KEYS])
        more = len(group.keys) - _MAX_NAMED_KEYS
        message += f": {named}{f' and {more} more' if more > 0 else ''}."
    if len(group.lines) > 1:
        message += f" Also on {name_lines(group.lines[1:])}."
    return message


def _not_json_lines(head: bytes) -> _Problem | None:
    """What kind of file this is, when it is none with lines of JSON: one sentence instead of thousands."""
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return _Problem("not_a_text_file", f"the file is {what}. Upload the JSONL text itself, as UTF-8")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _Problem("wrong_encoding", "the file is UTF-16 or UTF-32. Save it as UTF-8")
    sample = head[:_HEAD_BYTES]
    controls = len(sample) - len(sample.translate(None, _CONTROL_BYTES))
    # A stray control character is a problem of its line; one byte in twenty is another kind of file.
    if controls >= 8 and controls * 20 > len(sample):
        if sample.count(0) * 3 > len(sample):
            return _Problem("wrong_encoding", "the file looks like UTF-16 or UTF-32. Save it as UTF-8")
        return _Problem("not_a_text_file", "the file is binary. Upload the JSONL text itself, as UTF-8")
    return _one_json_document(head)


def _one_json_document(head: bytes) -> _Problem | None:
    lines = [line for line in (line.strip() for line in head.removeprefix(_UTF8_BOM).splitlines()) if line]
    is_array = bool(lines) and lines[0] in (b"[", b"[{")
    is_object = len(lines) > 1 and lines[0] == b"{" and not lines[1].startswith(b"{")
    if not (is_array or is_object):
        return None
    return _Problem(
        "not_json_lines",
        f"the file is {'one JSON array' if is_array else 'JSON spread over several lines'}. "
        "JSON Lines has one complete object on each line, with no brackets around and no commas between them",
    )


def _read_line(raw: bytes, line: int) -> tuple[Example | None, list[_Problem]]:
    """The line's example, or None when any of its problems is an error or the line is blank."""
    if not raw.strip():
        return None, [_Problem("blank_line", "the line is blank and is skipped.", "warning")]
    try:
        row, repeated_keys = _parse(raw.removesuffix(b"\n").removesuffix(b"\r"))
    except _Unreadable as unreadable:
        return None, [unreadable.problem]
    problems = [
        _Problem("duplicate_json_key", f"the key {_show(key)} occurs twice in one object. Keep one of them.")
        for key in repeated_keys
    ]
    problems += _row_problems(row)
    if any(problem.severity == "error" for problem in problems):
        return None, problems
    return _example(row, line), problems


def _parse(raw: bytes) -> tuple[Any, list[str]]:
    """The JSON value of a line, and the keys that occur twice in one of its objects."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = raw[error.start : error.end].hex(" ").upper()
        raise _Unreadable(
            "invalid_utf8",
            f"byte {error.start} of the line (counted from 0) is not UTF-8: {found}. Save the file as UTF-8.",
        ) from None

    repeated: list[str] = []

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated.extend(key for key, count in counts.items() if count > 1)
        return found

    # json, not msgspec: msgspec cannot tell repeated keys, so json would have to read every line anyway.
    try:
        return json.loads(text, object_pairs_hook=to_object, parse_constant=_refuse_constant), repeated
    except json.JSONDecodeError as error:
        raise _describe_json_error(text, error) from None
    except RecursionError:
        raise _Unreadable(
            "nested_too_deeply", "the JSON is nested too deeply to be an example. Remove the nesting."
        ) from None
    except ValueError as error:  # a number with thousands of digits
        raise _Unreadable("invalid_json", f"invalid JSON: {error}.") from None


def _refuse_constant(constant: str) -> None:
    raise _Unreadable("invalid_json", f"invalid JSON: {constant} is not JSON. Write null or a number.")


def _describe_json_error(text: str, error: json.JSONDecodeError) -> _Unreadable:
    where = f"character {error.pos} (counted from 0)"
    rest = text[error.pos :].rstrip()
    if error.msg.startswith("Extra data") and rest[:1] in ("{", "["):
        return _Unreadable(
            "several_objects_on_line", f"a second object starts at {where}. Put each example on its own line."
        )
    if _is_cut_off(error, rest):
        return _Unreadable(
            "truncated_json",
            f"the line ends in the middle of its JSON ({error.msg}, {where}). Complete it; a line break "
            r"inside a text must be written as \n.",
        )
    if text.startswith("\ufeff"):
        return _Unreadable(
            "invalid_json",
            "invalid JSON: a byte order mark inside the file, as when files were joined. Remove it.",
        )
    seen = f"near {_show(rest[:20])}" if rest else "at the end"
    return _Unreadable("invalid_json", f"invalid JSON at {where}, {seen}: {error.msg}.")


def _is_cut_off(error: json.JSONDecodeError, rest: str) -> bool:
    """True when more text could have made the line valid."""
    if not rest or error.msg.startswith("Unterminated string"):
        return True
    if "escape" in error.msg:
        return re.fullmatch(r"\\?u?[0-9a-fA-F]{0,3}", rest) is not None
    return error.msg == "Expecting value" and any(word.startswith(rest) for word in ("true", "false", "null", "-"))


def _row_problems(row: Any) -> Iterator[_Problem]:
    if not isinstance(row, dict):
        yield _Problem(
            "not_an_object",
            f"the line is {_kind(row)}, expected an object with the key 'messages'.",
        )
        return
    yield from _top_level_problems(row)
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        yield _Problem("missing_messages", _why_no_messages(row))
        return
    for position, message in enumerate(messages, start=1):
        yield from _message_problems(message, f"message {position}")
    yield from _order_problems([_role(message) for message in messages])
    yield from _learning_problems(messages)


def _top_level_problems(row: dict[str, Any]) -> Iterator[_Problem]:
    for key in ("tools", "functions"):
        if row.get(key):
            yield _Problem("unsupported_content", f"the row defines {key!r}. {_TEXT_ONLY}")
    if "messages" in row:
        unknown = tuple(key for key in row if key not in _TOP_LEVEL_KEYS | {"tools", "functions"})
        if unknown:
            yield _Problem("unknown_top_level_key", "training ignores these keys of a row", "note", unknown)


def _why_no_messages(row: dict[str, Any]) -> str:
    if "messages" in row:
        value = row["messages"]
        what = "an empty list" if value == [] else _kind(value)
        return f"'messages' is {what}, expected a list of messages that ends with an assistant's answer."
    for marks, advice in _OTHER_FORMATS:
        if all(key in row for key in marks):
            return f"there is no 'messages': {advice}"
    keys = ", ".join(_show(key) for key in list(row)[:_MAX_NAMED_KEYS]) or "none"
    return (
        f"there is no 'messages' (keys found: {keys}). An example is "
        '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.'
    )


def _role(message: Any) -> str | None:
    """The message's role as templates know it; None when it has none that we train on."""
    role = message.get("role") if isinstance(message, dict) else None
    return _ROLES.get(role) if isinstance(role, str) else None


def _message_problems(message: Any, where: str) -> Iterator[_Problem]:
    if not isinstance(message, dict):
        yield _Problem("not_an_object", f"{where} is {_kind(message)}, expected an object with 'role' and 'content'.")
        return
    yield from _role_problems(message, where)
    calls = [key for key in _TOOL_KEYS if message.get(key)]
    for key in calls:
        yield _Problem("unsupported_content", f"{where} has {key!r}. {_TEXT_ONLY}")
    # Exported assistant messages carry "refusal": null and the like; an absent value is nothing to report.
    unknown = tuple(key for key in message if key not in _MESSAGE_KEYS and key not in _TOOL_KEYS and message[key])
    if unknown:
        yield _Problem("unknown_key", "training ignores these keys of a message", "warning", unknown)
    if message.get("name"):
        yield _Problem("name_ignored", "'name' is not trained on: chat templates leave it out.", "note")
    yield from _weight_problems(message, where)
    if not (calls and message.get("content") is None):  # a tool call has no text, and that is reported
        yield from _content_problems(message, where)


def _role_problems(message: dict[str, Any], where: str) -> Iterator[_Problem]:
    if "role" not in message:
        yield _Problem("missing_field", f"{where} has no 'role'. Add 'system', 'user' or 'assistant'.")
        return
    role = message["role"]
    if role in ("tool", "function"):
        yield _Problem("unsupported_content", f"{where} has the role {role!r}. {_TEXT_ONLY}")
    elif _role(message) is None:
        yield _Problem(
            "unknown_role",
            f"{where} has the role {_show(role)}, expected 'system', 'user' or 'assistant' in lower case.",
        )


def _weight_problems(message: dict[str, Any], where: str) -> Iterator[_Problem]:
    weight = message.get("weight")
    if weight is None:
        return
    if _role(message) in ("system", "user"):
        yield _Problem(
            "misplaced_weight",
            f"{where} has a 'weight', but its role is {message['role']!r}. Only assistant messages are "
            "learned from; remove it.",
        )
    elif not _is_weight(weight):
        yield _Problem("invalid_weight", f"{where} has the 'weight' {_show(weight)}, expected 0 or 1.")


def _is_weight(weight: Any) -> bool:
    return type(weight) is int and weight in (0, 1)


def _content_problems(message: dict[str, Any], where: str) -> Iterator[_Problem]:
    if "content" not in message:
        yield _Problem("missing_field", f"{where} has no 'content'. Add its text.")
        return
    role, content = _role(message), message["content"]
    if content is None and role == "assistant":
        yield _Problem("empty_assistant", f"{where} (assistant) is null. Write the answer to learn.")
        return
    if isinstance(content, list):
        found = list(_part_problems(content, where))
        yield from found
        if found:
            return
    elif not isinstance(content, str):
        yield _Problem("content_not_text", f"{where} has {_kind(content)} as 'content', expected a text.")
        return
    text = _text(content)
    if role in ("user", "assistant") and not text.strip():
        what = "Write the answer to learn." if role == "assistant" else "Write what the user asks."
        yield _Problem(f"empty_{role}", f"{where} ({role}) has no text. {what}")
    surrogate = _LONE_SURROGATE.search(text)
    if surrogate:
        yield _Problem(
            "lone_surrogate",
            f"{where} has \\u{ord(surrogate.group()):04x} at character {surrogate.start()} (counted from 0), "
            "half of a character written as two escapes. Write both halves or the character itself.",
        )


def _part_problems(parts: list[Any], where: str) -> Iterator[_Problem]:
    for position, part in enumerate(parts, start=1):
        here = f"{where}, part {position} of 'content'"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            yield _Problem(
                "content_not_text",
                f'{here} is {_kind(part)}, expected {{"type": "text", "text": …}}.',
            )
        elif kind != "text":
            yield _Problem("unsupported_content", f"{here} is of type {_show(kind)}. {_TEXT_ONLY}")
        elif not isinstance(part.get("text"), str):
            found = _kind(part.get("text"))
            yield _Problem("content_not_text", f"{here} has {found} as 'text', expected a text.")


def _order_problems(roles: list[str | None]) -> Iterator[_Problem]:
    if None not in roles:
        yield from _first_out_of_turn(roles)
    if roles[-1] in ("system", "user"):
        yield _Problem(
            "last_not_assistant",
            f"the last message has the role {roles[-1]!r}, expected 'assistant'. Training learns from "
            "assistant answers; end every example with one.",
        )


def _first_out_of_turn(roles: list[str | None]) -> Iterator[_Problem]:
    start = 1 if roles[0] == "system" else 0
    for position, role in enumerate(roles[start:]):
        expected = ("user", "assistant")[position % 2]
        if role != expected:
            yield _Problem(
                "role_order",
                f"message {start + position + 1} has the role {role!r}, expected {expected!r}. After an "
                "optional first system message, user and assistant take turns; join neighbours of one role.",
            )
            return


def _learning_problems(messages: list[Any]) -> Iterator[_Problem]:
    weights = [message.get("weight") for message in messages if _role(message) == "assistant"]
    if not weights:
        return
    if all(_is_weight(weight) and weight == 0 for weight in weights):
        yield _Problem(
            "nothing_to_learn",
            "every assistant message has 'weight' 0. Give the answer to learn 'weight' 1, or leave the row out.",
        )
    elif _role(messages[-1]) == "assistant" and _is_weight(weights[-1]) and weights[-1] == 0:
        yield _Problem(
            "last_answer_not_learned",
            "the last answer has 'weight' 0: evaluation compares with it, although training does not learn "
            "it. End the example with an answer to learn.",
            "warning",
        )


def _example(row: dict[str, Any], line: int) -> Example:
    """Only for a row without errors."""
    rows = row["messages"]
    messages: list[Message] = [{"role": _role(row), "content": _text(row["content"])} for row in rows]
    weights = [
        0 if message["role"] != "assistant" or row.get("weight") == 0 else 1
        for row, message in zip(rows, messages, strict=True)
    ]
    return Example(messages=tuple(messages), weights=tuple(weights), line=line)


def _text(content: str | list[dict[str, str]]) -> str:
    """Text parts are joined with nothing between them, as the chat endpoint must do too."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    words = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return words[type(value)]


def _show(value: Any) -> str:
    """A value in a sentence, short whatever a file holds."""
    if isinstance(value, (list, dict)):
        return _kind(value)
    shown = ascii(value) if isinstance(value, str) and _LONE_SURROGATE.search(value) else repr(value)
    return shown if len(shown) <= 40 else f"{shown[:39]}…"
