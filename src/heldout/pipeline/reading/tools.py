"""Rows in which the assistant calls functions: what is declared, what is called, and whether it is answered.

A function call is a text that a program will read. What is wrong with it in training is wrong in use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from heldout.pipeline.reading.messages import calls_tools, role_of
from heldout.pipeline.reading.parse import InvalidJson, load_json
from heldout.pipeline.reading.problems import Problem
from heldout.pipeline.reading.words import kind, show

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class _Function(NamedTuple):
    """A function as a row declares it. `parameters` is None where any argument may be given."""

    parameters: frozenset[str] | None
    required: tuple[str, ...]


class _Call(NamedTuple):
    where: str
    id: str | None  # None in the old spelling, which has no ids
    name: str
    arguments: str


def uses_tools(row: dict[str, Any], messages: Sequence[Any]) -> bool:
    """True for a row that declares functions, calls one or has a tool's turn."""
    if row.get("tools") or row.get("functions"):
        return True
    return any(calls_tools(message) or _is_answer(message) for message in messages)


def _is_answer(message: Any) -> bool:
    return isinstance(message, dict) and bool(role_of(message) == "tool" or message.get("tool_call_id"))


def tool_problems(row: dict[str, Any], messages: Sequence[Any]) -> Iterator[Problem]:
    """Everything about functions that is wrong in a row. `row` has `tools`, `messages` is its conversation."""
    if not uses_tools(row, messages):
        return
    declared: dict[str, _Function] = {}
    yield from _declaration_problems(row, declared)
    open_ids: dict[str, str] = {}  # ids that no tool's turn has answered yet -> who called
    called = False  # whether the turn before, tools' turns left out, has a call
    for position, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            continue
        where = f"message {position}"
        role = role_of(message)
        if role == "tool":
            yield from _answer_problems(message, where, open_ids, called)
            continue
        yield from _unanswered(open_ids)
        open_ids.clear()
        called = calls_tools(message)
        if not called:
            continue
        if role != "assistant":
            yield Problem(
                "invalid_tool_call", f"{where} calls a function, but its role is {show(message.get('role'))}."
            )
            continue
        calls: list[_Call] = []
        yield from _call_problems(message, where, calls)
        is_last = position == len(messages)
        for call in calls:
            if call.id is not None and not is_last:
                open_ids[call.id] = call.where
            for problem in _judge_call(call, declared):
                yield problem._replace(example={"name": call.name, "arguments": call.arguments})
        if len(calls) > 1 and row.get("parallel_tool_calls") is False:
            yield Problem(
                "parallel_calls",
                f"{where} has {len(calls)} calls, but 'parallel_tool_calls' is false. Set it to true, or call one "
                "function a turn.",
                "warning",
            )
    yield from _unanswered(open_ids)


def _declaration_problems(row: dict[str, Any], declared: dict[str, _Function]) -> Iterator[Problem]:
    """Fills `declared`."""
    parallel = row.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        yield Problem("invalid_tools", f"'parallel_tool_calls' is {show(parallel)}, expected true or false.")
    for key in ("tools", "functions"):
        tools = row.get(key)
        if not tools:
            continue
        if not isinstance(tools, list):
            yield Problem("invalid_tools", f"{key!r} is {kind(tools)}, expected a list of functions.")
            continue
        for position, tool in enumerate(tools, start=1):
            for problem in _tool_problems(tool, key, f"entry {position} of {key!r}", declared):
                yield problem._replace(example=tool)


def _tool_problems(tool: Any, key: str, where: str, declared: dict[str, _Function]) -> Iterator[Problem]:
    function = tool.get("function") if key == "tools" and isinstance(tool, dict) else tool
    if not isinstance(function, dict) or (key == "tools" and tool.get("type") != "function"):
        yield Problem(
            "invalid_tools",
            f"{where} is no function. Write "
            + ('{"type": "function", "function": {"name": …, "parameters": …}}.' if key == "tools" else '{"name": …}.'),
        )
        return
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        yield Problem(
            "invalid_tools",
            f"{where} has the name {show(name)}, expected 1 to 64 letters, digits, '_' or '-'.",
        )
        return
    if name in declared:
        yield Problem("duplicate_function", f"the function {show(name)} is declared twice. Keep one of them.")
        return
    declared[name] = _Function(None, ())
    if parameters is None:
        return
    properties = parameters.get("properties", {}) if isinstance(parameters, dict) else None
    required = parameters.get("required", []) if isinstance(parameters, dict) else None
    if not isinstance(properties, dict) or not isinstance(required, list):
        yield Problem(
            "invalid_tools",
            f"{where}: 'parameters' of {show(name)} is no JSON schema of an object. Write "
            '{"type": "object", "properties": {…}, "required": […]}.',
        )
        return
    # A schema that is put together from others, or open on purpose, has names that we do not see.
    is_open = parameters.get("additionalProperties") not in (None, False)
    is_open = is_open or any(key in parameters for key in ("$ref", "allOf", "anyOf", "oneOf", "patternProperties"))
    known = None if is_open else frozenset(properties)
    declared[name] = _Function(known, tuple(key for key in required if isinstance(key, str)))


def _call_problems(message: dict[str, Any], where: str, calls: list[_Call]) -> Iterator[Problem]:
    """What is wrong with the form of a turn's calls; fills `calls` with those that have a name and arguments."""
    if message.get("function_call"):
        call = message["function_call"]
        yield from _form_problems(call, f"{where}, 'function_call'", None, calls)
    tool_calls = message.get("tool_calls")
    if not tool_calls:
        return
    if not isinstance(tool_calls, list):
        yield Problem("invalid_tool_call", f"{where} has {kind(tool_calls)} as 'tool_calls', expected a list.")
        return
    ids: set[str] = set()
    for position, call in enumerate(tool_calls, start=1):
        here = f"{where}, call {position}"
        if not isinstance(call, dict) or call.get("type", "function") != "function":
            yield Problem(
                "invalid_tool_call",
                f'{here} is no function call. Write {{"id": …, "type": "function", "function": {{"name": …, '
                '"arguments": "…"}}.',
            )
            continue
        call_id = call.get("id")
        if not isinstance(call_id, str) or not call_id:
            yield Problem("invalid_tool_call", f"{here} has no 'id'. Give it one, and use it in the tool's answer.")
        elif call_id in ids:
            yield Problem("invalid_tool_call", f"{here} has the 'id' {show(call_id)} of another call of this turn.")
        else:
            ids.add(call_id)
            yield from _form_problems(call.get("function"), here, call_id, calls)


def _form_problems(function: Any, where: str, call_id: str | None, calls: list[_Call]) -> Iterator[Problem]:
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        yield Problem("invalid_tool_call", f"{where} names no function. Give it a 'name' and 'arguments'.")
        return
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        yield Problem(
            "invalid_arguments",
            f"{where} has {kind(arguments)} as 'arguments', expected a JSON object written as a string.",
            example=function,
        )
        return
    calls.append(_Call(where, call_id, name, arguments))


def _judge_call(call: _Call, declared: dict[str, _Function]) -> Iterator[Problem]:
    """Whether the arguments are JSON, and whether the call fits a function that the row declares."""
    function = declared.get(call.name)
    if function is None:
        known = ", ".join(show(name) for name in list(declared)[:10]) or "none"
        yield Problem(
            "unknown_function",
            f"{call.where} calls {show(call.name)}, which the row does not declare (declared: {known}). Declare it "
            "in 'tools' or correct the name.",
        )
    try:
        arguments, repeated = load_json(call.arguments)
    except (json.JSONDecodeError, InvalidJson) as error:
        yield Problem("invalid_arguments", f"{call.where} has 'arguments' that are no JSON: {error}.")
        return
    except RecursionError:
        yield Problem("invalid_arguments", f"{call.where} has 'arguments' that are nested too deeply.")
        return
    if not isinstance(arguments, dict):
        yield Problem("invalid_arguments", f"{call.where} has {kind(arguments)} in 'arguments', expected an object.")
        return
    if repeated is not None:
        yield Problem("invalid_arguments", f"{call.where} has the argument {show(repeated)} twice.")
    if function is None:
        return
    unknown = [key for key in arguments if function.parameters is not None and key not in function.parameters]
    if unknown:
        yield Problem(
            "unknown_argument",
            f"{call.where} gives {show(call.name)} the argument {show(unknown[0])}, which it does not declare. "
            "Declare it or correct the name.",
            "warning",
        )
    missing = [key for key in function.required if key not in arguments]
    if missing:
        yield Problem(
            "missing_argument",
            f"{call.where} calls {show(call.name)} without {show(missing[0])}, which it requires. Add the argument.",
        )


def _answer_problems(message: dict[str, Any], where: str, open_ids: dict[str, str], called: bool) -> Iterator[Problem]:
    """Whether a tool's turn answers a call; takes the call out of `open_ids`."""
    if message.get("role") == "function":
        if not message.get("name"):
            yield Problem("unknown_tool_call", f"{where} has the role 'function' and no 'name' of the function.")
        elif not called:
            yield Problem("unknown_tool_call", f"{where} answers a function that no message before it calls.")
        return
    call_id = message.get("tool_call_id")
    if not isinstance(call_id, str) or not call_id:
        yield Problem("unknown_tool_call", f"{where} has the role 'tool' and no 'tool_call_id'. Add the call's 'id'.")
    elif open_ids.pop(call_id, None) is None:
        yield Problem(
            "unknown_tool_call",
            f"{where} answers the call {show(call_id)}, which the turn before it does not make or which is answered "
            "already. Correct the 'tool_call_id'.",
        )


def _unanswered(open_ids: dict[str, str]) -> Iterator[Problem]:
    for call_id, where in open_ids.items():
        yield Problem(
            "unanswered_tool_call",
            f"{where} (id {show(call_id)}) is answered by no 'tool' message before the next turn. Add the tool's "
            "answer, or end the example with the call.",
        )
