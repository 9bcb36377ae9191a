"""One line -> an example, or every reason why it is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, TypedDict

import msgspec

from heldout.engine.base import Message
from heldout.pipeline.reading import preferences
from heldout.pipeline.reading.lines import Line
from heldout.pipeline.reading.messages import (
    learning_problems,
    message_problems,
    order_problems,
    role_of,
    text_of,
)
from heldout.pipeline.reading.parse import Unreadable, parse_line
from heldout.pipeline.reading.preferences import Pair, is_preference, preference_problems
from heldout.pipeline.reading.problems import Problem
from heldout.pipeline.reading.tools import tool_problems, uses_tools
from heldout.pipeline.reading.words import LONE_SURROGATE, kind, show
from heldout.pipeline.types import Example, Format

#: A line of megabytes may hold a million wrong messages; nobody reads about more than the first.
MAX_PROBLEMS = 1000

_CHAT_KEYS = {"messages", "metadata", "parallel_tool_calls", "tools", "functions"}
_MAX_NAMED_KEYS = 10

#: Keys that give away another format -> what to tell its user.
_OTHER_FORMATS = (
    (
        ("prompt", "completion"),
        "this is the prompt/completion format of the old completions API. Write "
        '{"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": COMPLETION}]}.',
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

#: Takes what is wrong with a line; returns nothing.
Tell = Callable[[Problem], None]


class Row(msgspec.Struct, frozen=True):
    """What a line was read as. `example` is None when a problem is an error, and for a row that is sound and
    is no text: one that calls tools."""

    example: Example | None = None
    format: Format | None = None  # None where it cannot be told: no JSON, no conversation
    is_sound: bool = False


class _PlainMessageNeeds(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


class _PlainMessage(_PlainMessageNeeds, total=False):
    weight: Literal[0, 1]


class _PlainRowNeeds(TypedDict):
    messages: list[_PlainMessage]


class _PlainRow(_PlainRowNeeds, total=False):
    metadata: dict[str, str | int | float | bool | None]


_plain_rows = msgspec.json.Decoder(_PlainRow)


def read_row(line: Line, tell: Tell) -> Row:
    """Read a line that is not blank. `tell` hears of each problem."""
    example = read_plain(line)
    return read_carefully(line, tell) if example is None else Row(example, "chat", True)


def read_carefully(line: Line, tell: Tell) -> Row:
    """Read any line, and tell everything that is wrong with it."""
    try:
        value, repeated = parse_line(line)
        pairs: list[Pair] = []
        problems = _problems(value, repeated, pairs)
        errors = count = 0
        for problem in islice(problems, MAX_PROBLEMS):
            tell(problem)
            count += 1
            errors += problem.severity == "error"
        if count == MAX_PROBLEMS and next(problems, None) is not None:
            errors += 1
            tell(Problem("too_many_problems", f"more than {MAX_PROBLEMS} things are wrong; the others are not told."))
        return _row(value, pairs, line.number, is_sound=not errors)
    except Unreadable as unreadable:
        tell(unreadable.problem)
    except RecursionError:
        tell(Problem("nested_too_deeply", "the JSON is nested too deeply to be an example. Remove the nesting."))
    return Row()


def read_plain(line: Line) -> Example | None:
    """The example of a sound row with nothing but messages and flat metadata, as most files have them.

    The same as the long way round, and several times as fast. None leaves the row to the long way.
    """
    if line.is_too_long:
        return None
    try:
        row = _plain_rows.decode(line.raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    messages, metadata = row["messages"], row.get("metadata")
    texts = 1 + sum(map(len, messages)) + 2 * len(messages)  # keys, and texts that are values
    if metadata is not None:
        texts += 1 + len(metadata) + sum(isinstance(value, str) for value in metadata.values())
        if isinstance(metadata.get("group"), bool):
            return None
    if not _has_quotes(line.raw, 2 * texts):
        return None
    first = 1 if messages and messages[0]["role"] == "system" else 0
    turns = len(messages) - first
    if turns < 2 or turns % 2:
        return None
    expected = "user"
    for position in range(first, len(messages)):
        message = messages[position]
        text = message["content"]
        if message["role"] != expected or not text or text.isspace():
            return None
        expected = "assistant" if expected == "user" else "user"
    weights = _plain_weights(first, turns)
    if texts > 1 + 4 * len(messages) and any("weight" in message for message in messages):
        if not _has_plain_weights(messages):
            return None
        weights = tuple(message.pop("weight", weight) for message, weight in zip(messages, weights, strict=True))
    group = _group(row) if metadata else None  # type: ignore[arg-type]
    return Example(messages=tuple(messages), weights=weights, line=line.number, group=group)  # type: ignore[arg-type]


def _has_plain_weights(messages: Sequence[_PlainMessage]) -> bool:
    """True when only answers have weights, and the last one is learned."""
    return messages[-1].get("weight", 1) == 1 and not any(
        "weight" in message for message in messages if message["role"] != "assistant"
    )


def _has_quotes(raw: bytes, n: int) -> bool:
    """True when a line has n quotation marks around its keys and texts, and certainly no more.

    The decoder drops unknown and repeated keys in silence; each would bring two more. Inside a text a quotation
    mark stands as \\" only; a text that ends in a backslash is the one case in which that count is wrong.
    """
    escaped = raw.count(b'\\"')
    return raw.count(b'"') - escaped == n and not (escaped and b'\\\\"' in raw)


@lru_cache(maxsize=256)
def _plain_weights(first: int, turns: int) -> tuple[int, ...]:
    return (0,) * first + (0, 1) * (turns // 2)


def _problems(row: Any, repeated: str | None, pairs: list[Pair]) -> Iterator[Problem]:
    """Fills `pairs` with a preference row in one form."""
    if repeated is not None:
        text = f"the key {show(repeated)} occurs twice in one object. Keep one of them."
        yield Problem("duplicate_json_key", text, example=row)
    if not isinstance(row, dict):
        text = f"the line is {kind(row)}, expected an object with the key 'messages'."
        # A string as an example is shown as it is.
        yield Problem("not_an_object", text, example=show(row) if isinstance(row, str) else row)
        return
    yield from _metadata_problems(row)
    if is_preference(row):
        yield from _unknown_keys(row, preferences.TOP_LEVEL_KEYS)
        yield from preference_problems(row, pairs)
        return
    if "messages" in row:
        yield from _unknown_keys(row, _CHAT_KEYS)
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        yield Problem("missing_messages", _why_no_messages(row), example=row)
        return
    for position, message in enumerate(messages, start=1):
        yield from message_problems(message, f"message {position}")
    yield from order_problems(messages)
    yield from learning_problems(messages)
    yield from tool_problems(row, messages)


def _unknown_keys(row: dict[str, Any], known: set[str]) -> Iterator[Problem]:
    unknown = tuple(key for key in row if key not in known)
    if unknown:
        yield Problem("unknown_top_level_key", "training ignores these keys of a row", "note", unknown)


def _metadata_problems(row: dict[str, Any]) -> Iterator[Problem]:
    group = _declared_group(row)
    if group is None or (isinstance(group, (str, int, float)) and not isinstance(group, bool)):
        return
    yield Problem(
        "invalid_group",
        f"'metadata.group' is {kind(group)}, expected a text or a number. It is ignored, so nothing keeps this row "
        "together with others.",
        "warning",
        example=row["metadata"],
    )


def _declared_group(row: dict[str, Any]) -> Any:
    metadata = row.get("metadata")
    return metadata.get("group") if isinstance(metadata, dict) else None


def _why_no_messages(row: dict[str, Any]) -> str:
    if "messages" in row:
        value = row["messages"]
        what = "an empty list" if value == [] else kind(value)
        return f"'messages' is {what}, expected a list of messages that ends with an assistant's answer."
    for marks, advice in _OTHER_FORMATS:
        if all(key in row for key in marks):
            return f"there is no 'messages': {advice}"
    keys = ", ".join(show(key) for key in list(row)[:_MAX_NAMED_KEYS]) or "none"
    return (
        f"there is no 'messages' (keys found: {keys}). An example is "
        '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.'
    )


def _row(row: Any, pairs: Sequence[Pair], line: int, *, is_sound: bool) -> Row:
    """What a parsed line is, once it is known whether it is sound."""
    if not isinstance(row, dict):
        return Row()
    if is_preference(row):
        pair = pairs[0] if is_sound and pairs else None
        if pair is None or uses_tools(pair.row, [*pair.prompt, *pair.preferred]):
            return Row(None, "preference", is_sound)
        learned = [False] * len(pair.prompt) + [True] * len(pair.preferred)
        return Row(_example(row, [*pair.prompt, *pair.preferred], learned, line), "preference", is_sound)
    messages = row.get("messages")
    if not isinstance(messages, list):
        return Row()
    if uses_tools(row, messages):
        return Row(None, "tools", is_sound)
    example = _example(row, messages, [True] * len(messages), line) if is_sound else None
    return Row(example, "chat", is_sound)


def _example(row: dict[str, Any], given: Sequence[Any], learned: Sequence[bool], line: int) -> Example:
    """Only for a row without errors."""
    messages: list[Message] = [{"role": role_of(one), "content": text_of(one["content"])} for one in given]
    weights = tuple(
        int(learn and message["role"] == "assistant" and one.get("weight") != 0)
        for one, message, learn in zip(given, messages, learned, strict=True)
    )
    return Example(messages=tuple(messages), weights=weights, line=line, group=_group(row))


def _group(row: dict[str, Any]) -> str | None:
    group = _declared_group(row)
    if group is None or isinstance(group, (bool, list, dict)):
        return None
    # An empty group is no group: else all rows of whom nothing is known would be one.
    return LONE_SURROGATE.sub("\ufffd", str(group)).strip() or None
