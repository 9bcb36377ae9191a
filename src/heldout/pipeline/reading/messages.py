"""The messages of a conversation: what each may hold, and in which order they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from heldout.pipeline.reading.problems import Problem
from heldout.pipeline.reading.words import LONE_SURROGATE, kind, show

#: Roles on the wire -> as templates know them. `function` is what `tool` was called before.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
TEXT_ONLY = "This version trains on text only; leave the example out or write it as text."

_KNOWN_KEYS = {"role", "content", "weight", "name", "tool_call_id", "audio", "tool_calls", "function_call"}
_IMAGE_PARTS = ("image_url", "input_image", "image", "image_file")


def role_of(message: Any) -> str | None:
    """The message's role as templates know it; None when it has none that we know."""
    role = message.get("role") if isinstance(message, dict) else None
    return ROLES.get(role) if isinstance(role, str) else None


def calls_tools(message: Any) -> bool:
    """True for an assistant's turn that calls a function instead of, or beside, saying something."""
    return isinstance(message, dict) and bool(message.get("tool_calls") or message.get("function_call"))


def text_of(content: Any) -> str:
    """Text parts are joined with nothing between them, as the chat endpoint must do too."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def is_weight(weight: Any) -> bool:
    """0 or 1, and neither a boolean nor 1.0."""
    return type(weight) is int and weight in (0, 1)


def message_problems(message: Any, where: str) -> Iterator[Problem]:
    """Whatever is wrong with one message by itself. `where` is how a sentence calls it: "message 2"."""
    if not isinstance(message, dict):
        yield Problem("not_an_object", f"{where} is {kind(message)}, expected an object with 'role' and 'content'.")
        return
    for problem in _object_problems(message, where):
        yield problem._replace(example=message)


def _object_problems(message: dict[str, Any], where: str) -> Iterator[Problem]:
    role = role_of(message)
    if "role" not in message:
        yield Problem("missing_field", f"{where} has no 'role'. Add 'system', 'user' or 'assistant'.")
    elif role is None:
        yield Problem(
            "unknown_role",
            f"{where} has the role {show(message['role'])}, expected 'system', 'user' or 'assistant' in lower case.",
        )
    if message.get("audio"):
        yield Problem("unsupported_content", f"{where} has 'audio'. {TEXT_ONLY}")
    # Exported assistant messages carry "refusal": null and the like; an absent value is nothing to report.
    unknown = tuple(key for key in message if key not in _KNOWN_KEYS and message[key])
    if unknown:
        yield Problem("unknown_key", "training ignores these keys of a message", "warning", unknown)
    if message.get("name") and role != "tool":
        yield Problem("name_ignored", "'name' is not trained on: chat templates leave it out.", "note")
    yield from _weight_problems(message, where)
    has_no_text = message.get("content") is None and (message.get("audio") or calls_tools(message))
    if not has_no_text:
        yield from _content_problems(message, where)


def _weight_problems(message: dict[str, Any], where: str) -> Iterator[Problem]:
    weight = message.get("weight")
    if weight is None:
        return
    if role_of(message) in ("system", "user", "tool"):
        yield Problem(
            "misplaced_weight",
            f"{where} has a 'weight', but its role is {message['role']!r}. Only assistant messages are "
            "learned from; remove it.",
        )
    elif not is_weight(weight):
        yield Problem("invalid_weight", f"{where} has the 'weight' {show(weight)}, expected 0 or 1.")


def _content_problems(message: dict[str, Any], where: str) -> Iterator[Problem]:
    if "content" not in message:
        yield Problem("missing_field", f"{where} has no 'content'. Add its text.")
        return
    role, content = role_of(message), message["content"]
    if content is None and role == "assistant":
        yield Problem("empty_assistant", f"{where} (assistant) is null. Write the answer to learn.")
        return
    if isinstance(content, list):
        found = False
        for problem in _part_problems(content, where):
            found = True
            yield problem
        if found:
            return
    elif not isinstance(content, str):
        yield Problem("content_not_text", f"{where} has {kind(content)} as 'content', expected a text.")
        return
    text = text_of(content)
    if role in ("user", "assistant") and not calls_tools(message) and (not text or text.isspace()):
        what = "Write the answer to learn." if role == "assistant" else "Write what the user asks."
        yield Problem(f"empty_{role}", f"{where} ({role}) has no text. {what}")
    surrogate = LONE_SURROGATE.search(text)
    if surrogate:
        yield Problem(
            "lone_surrogate",
            f"{where} has \\u{ord(surrogate.group()):04x} at character {surrogate.start()} (counted from 0), "
            "half of a character written as two escapes. Write both halves or the character itself.",
        )


def _part_problems(parts: list[Any], where: str) -> Iterator[Problem]:
    for position, part in enumerate(parts, start=1):
        here = f"{where}, part {position} of 'content'"
        kind_of_part = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind_of_part, str):
            yield Problem("content_not_text", f'{here} is {kind(part)}, expected {{"type": "text", "text": …}}.')
        elif kind_of_part in _IMAGE_PARTS:
            yield Problem(
                "vision_example",
                f"{here} is an image ({show(kind_of_part)}). This version has no method that trains on images; leave "
                "these examples out or describe the image in words.",
            )
        elif kind_of_part != "text":
            yield Problem("unsupported_content", f"{here} is of type {show(kind_of_part)}. {TEXT_ONLY}")
        elif not isinstance(part.get("text"), str):
            found = kind(part.get("text"))
            yield Problem("content_not_text", f"{here} has {found} as 'text', expected a text.")


def order_problems(messages: Sequence[Any]) -> Iterator[Problem]:
    """What is wrong with the order of a conversation's messages that ends with what is learned."""
    roles = [role_of(message) for message in messages]
    example = " → ".join(str(role) for role in roles[:20]) + (" → …" if len(roles) > 20 else "")
    if None not in roles:
        found = _out_of_turn(messages, roles)
        if found:
            position, expected = found
            yield Problem(
                "role_order",
                f"message {position + 1} has the role {roles[position]!r}, expected {expected!r}. After an "
                "optional first system message, user and assistant take turns; join neighbours of one role.",
                example=example,
            )
    if roles[-1] in ("system", "user", "tool"):
        yield Problem(
            "last_not_assistant",
            f"the last message has the role {roles[-1]!r}, expected 'assistant'. Training learns from "
            "assistant answers; end every example with one.",
            example=example,
        )


def _out_of_turn(messages: Sequence[Any], roles: Sequence[str | None]) -> tuple[int, str] | None:
    """(position, expected role) of the first message that is out of turn.

    A tool's turn is answered by the assistant; whether it belongs to a call is not judged here, nor is a
    call that is followed by no tool's turn.
    """
    expected = "user"
    for position in range(1 if roles[0] == "system" else 0, len(roles)):
        role = roles[position]
        if role == "tool" and expected != "assistant":
            return position, expected
        if role == "tool":
            continue
        if role != expected:
            return position, expected
        calls = role == "assistant" and calls_tools(messages[position])
        if calls and position + 1 < len(roles) and roles[position + 1] != "tool":
            return None
        expected = "assistant" if role == "user" or calls else "user"
    return None


def learning_problems(messages: Sequence[Any]) -> Iterator[Problem]:
    """Rows with nothing to learn, or whose last answer is not learned."""
    weights = [message.get("weight") for message in messages if role_of(message) == "assistant"]
    if not weights:
        return
    if all(is_weight(weight) and weight == 0 for weight in weights):
        yield Problem(
            "nothing_to_learn",
            "every assistant message has 'weight' 0. Give the answer to learn 'weight' 1, or leave the row out.",
        )
    elif role_of(messages[-1]) == "assistant" and is_weight(weights[-1]) and weights[-1] == 0:
        yield Problem(
            "last_answer_not_learned",
            "the last answer has 'weight' 0: evaluation compares with it, although training does not learn "
            "it. End the example with an answer to learn.",
            "warning",
        )
