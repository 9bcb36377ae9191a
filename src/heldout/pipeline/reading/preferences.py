"""Preference rows: a prompt, an answer that is preferred, and one that is not. Two spellings, one check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from heldout.pipeline.reading.messages import message_problems, order_problems, role_of
from heldout.pipeline.reading.problems import Problem
from heldout.pipeline.reading.tools import tool_problems
from heldout.pipeline.reading.words import kind

#: (key of the preferred answer, key of the other one). The first two stand beside OpenAI's 'input', the last
#: beside an optional 'prompt', as in the TRL library.
_SIDES = (
    ("preferred_output", "non_preferred_output"),
    ("preferred_completion", "non_preferred_completion"),
    ("chosen", "rejected"),
)
TOP_LEVEL_KEYS = {"input", "prompt", "tools", "parallel_tool_calls", "metadata"}.union(*_SIDES)


class Pair(NamedTuple):
    """A preference row in one form: messages before, and two ways to go on. `row` is where its tools stand."""

    prompt: list[Any]
    preferred: list[Any]
    other: list[Any]
    row: dict[str, Any]


def is_preference(row: dict[str, Any]) -> bool:
    """True for a row that has either side of a preference, and no conversation of its own."""
    return "messages" not in row and any(key in row for sides in _SIDES for key in sides)


def preference_problems(row: dict[str, Any], pairs: list[Pair]) -> Iterator[Problem]:
    """Everything that is wrong with a preference row; fills `pairs` with the row in one form, when it has one."""
    keys = next(sides for sides in _SIDES if any(key in row for key in sides))
    sides: list[list[Any]] = []
    for key in keys:
        answer = _as_messages(row.get(key), "assistant")
        if answer:
            sides.append(answer)
        else:
            what = "is missing" if key not in row else f"is {_what(row[key])}"
            yield Problem(
                "missing_answer",
                f"{key!r} {what}. A preference has two answers, {keys[0]!r} and {keys[1]!r}: a text, or a list of "
                "messages that ends with the assistant's.",
            )
    if len(sides) < 2:
        return
    preferred, other = sides
    owner = row if keys[0] == "chosen" else row.get("input")
    if keys[0] == "chosen":
        prompt, preferred, other = _without_shared_beginning(row, preferred, other)
        if prompt is None and isinstance(row["chosen"], str):
            yield Problem(
                "no_prompt",
                "there is no 'prompt': 'chosen' and 'rejected' are texts that begin alike. Write what they share as "
                "'prompt'.",
                "warning",
            )
            if row["chosen"] == row["rejected"]:
                yield _same()
            return
    else:
        prompt = _as_messages(owner.get("messages"), "user") if isinstance(owner, dict) else None
    if not prompt or not isinstance(owner, dict):
        where = "'prompt'" if keys[0] == "chosen" else "'input.messages'"
        yield Problem("missing_messages", f"there is no {where}: what the two answers answer. Add it.")
        return
    yield from _conversation_problems(Pair(prompt, preferred, other, owner), keys)
    if list(map(_stripped, preferred)) == list(map(_stripped, other)):
        yield _same()
    pairs.append(Pair(prompt, preferred, other, owner))


def _same() -> Problem:
    return Problem(
        "same_answers", "both answers are the same, so nothing is preferred. Give a worse one, or leave the row out."
    )


def _conversation_problems(pair: Pair, keys: tuple[str, str]) -> Iterator[Problem]:
    for position, message in enumerate(pair.prompt, start=1):
        yield from message_problems(message, f"message {position} of the prompt")
    if role_of(pair.prompt[-1]) == "assistant":
        yield Problem(
            "role_order", "the prompt ends with an assistant's message, expected the user's. Move it into the answers."
        )
        return
    for key, answer in zip(keys, (pair.preferred, pair.other), strict=True):
        for position, message in enumerate(answer, start=1):
            yield from message_problems(message, f"message {position} of {key!r}")
        conversation = [*pair.prompt, *answer]
        found = list(order_problems(conversation))
        found += tool_problems(pair.row, conversation)
        # Messages are counted over prompt and answer here.
        yield from (problem._replace(text=f"with {key!r} as the answer, {problem.text}") for problem in found)


def _as_messages(value: Any, role: str) -> list[Any] | None:
    """A text is one message of `role`. None for what is neither text nor a list."""
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value else None
    if isinstance(value, dict):  # one message instead of a list of one
        return [value]
    return value if isinstance(value, list) else None


def _without_shared_beginning(
    row: dict[str, Any], chosen: list[Any], rejected: list[Any]
) -> tuple[list[Any] | None, list[Any], list[Any]]:
    """(prompt, chosen, rejected). Many files repeat the prompt in both answers, with or without a 'prompt'."""
    prompt = _as_messages(row.get("prompt"), "user")
    shared = 0
    if isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
        at_most = min(len(chosen), len(rejected)) - 1
        while shared < at_most and chosen[shared] == rejected[shared]:
            shared += 1
    # An answer that starts with what only a prompt has was written with its prompt.
    if shared and (prompt is None or role_of(chosen[0]) in ("system", "user")):
        return chosen[:shared], chosen[shared:], rejected[shared:]
    return prompt, chosen, rejected


def _stripped(message: Any) -> Any:
    """A message without the white space around its text: two answers that differ in that say the same."""
    text = message.get("content") if isinstance(message, dict) else None
    return {**message, "content": text.strip()} if isinstance(text, str) else message


def _what(value: Any) -> str:
    return "empty" if value in ("", [], None) else kind(value)
