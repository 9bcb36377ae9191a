"""Files that call tools, hold preferences or images: recognised, and checked for their structure line by line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from heldout.errors import InvalidTrainingFile, InvalidValidationFile
from heldout.pipeline.checks import Parts, check
from heldout.pipeline.dataset import UNTRAINABLE, read_dataset
from heldout.pipeline.intake import check_files, refuse_errors
from heldout.pipeline.request import Request, Source
from heldout.pipeline.types import Dataset, Finding

USER = {"role": "user", "content": "Weather in Bern?"}
ANSWER = {"role": "assistant", "content": "Sunny."}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string"}},
            "required": ["city"],
        },
    },
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
OLD = {"functions": [TOOL["function"]]}


def one_call(call_id: str = "c1", name: str = "get_weather", arguments: Any = '{"city": "Bern"}') -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(calls or [one_call()]), **more}


def called(name: str = "get_weather", arguments: Any = '{"city": "Bern"}') -> dict[str, Any]:
    """In the old spelling."""
    return {"role": "assistant", "content": None, "function_call": {"name": name, "arguments": arguments}}


def row(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), "tools": [TOOL], **more}


def read(*rows: Any) -> tuple[Dataset, dict[str, Finding]]:
    content = b"".join(json.dumps(one).encode() + b"\n" for one in rows)
    dataset, findings = read_dataset(content, name="train.jsonl")
    return dataset, {finding.code: finding for finding in findings}


#: A function with nothing but a name, which takes no arguments that we know of.
BARE = {"type": "function", "function": {"name": "get_weather"}}
OPEN = {"type": "function", "function": {"name": "get_weather", "parameters": {"additionalProperties": True}}}
NO_SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"properties": []}}}
#: What may be told beside a code: an answer to no call leaves the call unanswered, or stands in another's place.
_BESIDE = {"unknown_tool_call": {"unanswered_tool_call"}, "role_order": {"unknown_tool_call"}}

SOUND_TOOL_ROWS = {
    "ends with a call": row(USER, calling()),
    "a call, its answer, a reply": row(USER, calling(content="Let me see."), RESULT, ANSWER),
    "two calls answered in the other order": row(
        USER, calling(one_call("c1"), one_call("c2")), {**RESULT, "tool_call_id": "c2"}, RESULT, ANSWER
    ),
    "call after call": row(USER, calling(), RESULT, calling(one_call("c2")), {**RESULT, "tool_call_id": "c2"}, ANSWER),
    "the same id in a later turn": row(USER, calling(), RESULT, ANSWER, USER, calling(), RESULT, ANSWER),
    "tools that are not called": row(USER, ANSWER),
    "no parameters": row(USER, calling(one_call(arguments="{}")), tools=[BARE]),
    "open parameters": row(
        USER,
        calling(one_call(arguments='{"when": 1}')),
        tools=[OPEN],
    ),
    "one call where one is allowed": row(USER, calling(), parallel_tool_calls=False),
    "the old spelling": {
        "messages": [USER, called(), {"role": "function", "name": "get_weather", "content": "sunny"}, ANSWER],
        **OLD,
    },
    "masked calls": row(USER, calling(weight=0), RESULT, ANSWER),
}


@pytest.mark.parametrize("sound", SOUND_TOOL_ROWS.values(), ids=SOUND_TOOL_ROWS.keys())
def test_a_sound_row_with_tools_is_recognised_and_has_no_error(sound: Any):
    dataset, findings = read(sound)
    assert dataset.format == "tools"
    assert (len(dataset), dataset.other_rows) == (0, 1)
    assert {code: finding.severity for code, finding in findings.items()} == {UNTRAINABLE: "warning"}
    assert findings[UNTRAINABLE].lines == (1,)


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        (row(USER, calling(), ANSWER), "unanswered_tool_call", "message 2, call 1 (id 'c1')"),
        (row(USER, calling(one_call("c1"), one_call("c2")), RESULT, ANSWER), "unanswered_tool_call", "'c2'"),
        (row(USER, calling(), {**RESULT, "tool_call_id": "c9"}, ANSWER), "unknown_tool_call", "'c9'"),
        (row(USER, calling(), RESULT, RESULT, ANSWER), "unknown_tool_call", "answered already"),
        (row(USER, calling(), {"role": "tool", "content": "x"}, ANSWER), "unknown_tool_call", "no 'tool_call_id'"),
        (row(USER, calling(), RESULT), "last_not_assistant", "'tool'"),
        (row(USER, RESULT, ANSWER), "unknown_tool_call", "the turn before it does not make"),
        (row(USER, ANSWER, RESULT, ANSWER), "role_order", "'tool', expected 'user'"),
        (row(USER, calling(), RESULT, USER, ANSWER), "role_order", "message 4"),
        (row(USER, calling(one_call(name="get_wether"))), "unknown_function", "declared: 'get_weather'"),
        ({"messages": [USER, calling()]}, "unknown_function", "declared: none"),
        (row(USER, calling(one_call(arguments='{"city": '))), "invalid_arguments", "no JSON"),
        (row(USER, calling(one_call(arguments="NaN"))), "invalid_arguments", "NaN"),
        (row(USER, calling(one_call(arguments='["Bern"]'))), "invalid_arguments", "a list"),
        (row(USER, calling(one_call(arguments={"city": "Bern"}))), "invalid_arguments", "written as a string"),
        (row(USER, calling(one_call(arguments='{"city": 1, "city": 2}'))), "invalid_arguments", "'city' twice"),
        (row(USER, calling(one_call(arguments='{"unit": "C"}'))), "missing_argument", "without 'city'"),
        (row(USER, calling(one_call(), one_call())), "invalid_tool_call", "'c1' of another call"),
        (row(USER, calling({"type": "function", "function": {}})), "invalid_tool_call", "no 'id'"),
        (row(USER, calling({"id": "c1", "function": {}})), "invalid_tool_call", "names no function"),
        (row(USER, calling("get_weather")), "invalid_tool_call", "no function call"),
        (row(USER, {"role": "assistant", "tool_calls": "get_weather"}), "invalid_tool_call", "a string"),
        (row({**USER, "tool_calls": [one_call()]}, ANSWER), "invalid_tool_call", "role is 'user'"),
        (row(USER, ANSWER, tools=[TOOL, TOOL]), "duplicate_function", "'get_weather' is declared twice"),
        (row(USER, ANSWER, tools={"a": 1}), "invalid_tools", "an object"),
        (row(USER, ANSWER, tools=[TOOL["function"]]), "invalid_tools", '"type": "function"'),
        (row(USER, ANSWER, tools=[{"type": "function", "function": {"name": "a b"}}]), "invalid_tools", "'a b'"),
        (
            row(USER, ANSWER, tools=[NO_SCHEMA]),
            "invalid_tools",
            "JSON schema",
        ),
        (row(USER, ANSWER, parallel_tool_calls="no"), "invalid_tools", "'no', expected true or false"),
        (row(USER, calling(), {**RESULT, "content": None}, ANSWER), "content_not_text", "message 3 has null"),
        (row(USER, calling(weight=2)), "invalid_weight", "2"),
        ({"messages": [USER, called("f")], **OLD}, "unknown_function", "'f'"),
        ({"messages": [USER, called(arguments="{")], **OLD}, "invalid_arguments", "'function_call'"),
        (
            {"messages": [USER, called(), {"role": "function", "content": "x"}, ANSWER], **OLD},
            "unknown_tool_call",
            "no 'name'",
        ),
    ],
)
def test_what_is_wrong_with_a_call_is_told_with_its_place(wrong: Any, code: str, words: str):
    dataset, findings = read(SOUND_TOOL_ROWS["ends with a call"], wrong)
    errors = {one for one, finding in findings.items() if finding.severity == "error"}
    assert code in errors
    assert errors <= {code} | _BESIDE.get(code, set())
    assert findings[code].lines == (2,)
    assert words in findings[code].message
    assert dataset.other_rows == 1


def test_an_undeclared_argument_and_parallel_calls_are_warned_about():
    unknown = row(USER, calling(one_call(arguments='{"city": "Bern", "when": "now"}')))
    parallel = row(USER, calling(one_call("c1"), one_call("c2")), parallel_tool_calls=False)
    dataset, findings = read(unknown, parallel)
    assert dataset.other_rows == 2
    assert "'when'" in findings["unknown_argument"].message
    assert findings["parallel_calls"].lines == (2,)
    assert all(finding.severity == "warning" for finding in findings.values())


def test_text_rows_of_a_file_with_tools_are_examples():
    dataset, findings = read({"messages": [USER, ANSWER]}, row(USER, calling()), {"messages": [USER, ANSWER]})
    assert [example.line for example in dataset.examples] == [1, 3]
    assert (dataset.format, dataset.other_rows, dataset.sound_rows) == ("tools", 1, 3)
    assert findings[UNTRAINABLE].lines == (2,)


BETTER, WORSE = {"role": "assistant", "content": "Sunny."}, {"role": "assistant", "content": "No idea."}


def openai(better: Any = (BETTER,), worse: Any = (WORSE,), **more: Any) -> dict[str, Any]:
    return {
        "input": {"messages": [USER], **more},
        "preferred_output": list(better),
        "non_preferred_output": list(worse),
    }


SOUND_PREFERENCES = {
    "OpenAI": openai(),
    "OpenAI with tools": openai([calling()], tools=[TOOL], parallel_tool_calls=True),
    "OpenAI, the schema's words": {
        "input": {"messages": [USER], "tools": []},
        "preferred_completion": [BETTER],
        "non_preferred_completion": [WORSE],
    },
    "TRL, texts": {"prompt": "Weather?", "chosen": "Sunny.", "rejected": "No idea."},
    "TRL, messages": {"prompt": [USER], "chosen": [BETTER], "rejected": [WORSE]},
    "TRL, the prompt in both answers": {"chosen": [USER, BETTER], "rejected": [USER, WORSE]},
    "TRL, the prompt everywhere": {"prompt": "Weather in Bern?", "chosen": [USER, BETTER], "rejected": [USER, WORSE]},
}


@pytest.mark.parametrize("sound", SOUND_PREFERENCES.values(), ids=SOUND_PREFERENCES.keys())
def test_a_sound_preference_row_is_recognised_in_every_spelling(sound: Any):
    dataset, findings = read(sound)
    assert dataset.format == "preference"
    assert dataset.sound_rows == 1
    assert {code: finding.severity for code, finding in findings.items()} == {UNTRAINABLE: "warning"}
    assert "preference pairs" in findings[UNTRAINABLE].message


def test_the_example_of_a_preference_row_is_the_prompt_with_the_preferred_answer():
    for name, sound in SOUND_PREFERENCES.items():
        dataset, _ = read(sound)
        if "tools" not in name:
            (example,) = dataset.examples
            assert [message["role"] for message in example.messages] == ["user", "assistant"]
            assert example.target == "Sunny."
            assert example.weights == (0, 1)


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        (
            {"input": {"messages": [USER]}, "preferred_output": [BETTER]},
            "missing_answer",
            "'non_preferred_output' is",
        ),
        (openai([]), "missing_answer", "'preferred_output' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "missing_answer", "'rejected' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "missing_answer", "a number"),
        ({"preferred_output": [BETTER], "non_preferred_output": [WORSE]}, "missing_messages", "'input.messages'"),
        (
            {"input": {"messages": []}, "preferred_output": [BETTER], "non_preferred_output": [WORSE]},
            "missing_messages",
            "no",
        ),
        ({"chosen": [BETTER], "rejected": [WORSE]}, "missing_messages", "'prompt'"),
        (openai([BETTER], [BETTER]), "same_answers", "nothing is preferred"),
        ({"prompt": "a", "chosen": "b", "rejected": " b\n"}, "same_answers", "nothing is preferred"),
        (openai([USER]), "role_order", "with 'preferred_output' as the answer"),
        (openai([BETTER], [WORSE, USER]), "last_not_assistant", "with 'non_preferred_output'"),
        (openai([BETTER], [{**WORSE, "content": ""}]), "empty_assistant", "message 1 of 'non_preferred_output'"),
        (openai([{"role": "bot", "content": "x"}]), "unknown_role", "'bot'"),
        ({**openai(), "input": {"messages": [USER, ANSWER]}}, "role_order", "the prompt ends with an assistant's"),
        (openai([calling(one_call(name="f"))], tools=[TOOL]), "unknown_function", "'f'"),
        ({"prompt": [7], "chosen": "b", "rejected": "c"}, "not_an_object", "message 1 of the prompt"),
    ],
)
def test_what_is_wrong_with_a_preference_is_told_with_its_line(wrong: Any, code: str, words: str):
    dataset, findings = read(SOUND_PREFERENCES["OpenAI"], wrong)
    errors = {code_ for code_, finding in findings.items() if finding.severity == "error"}
    assert code in errors
    assert errors <= {code, "last_not_assistant"}
    assert findings[code].lines == (2,)
    assert words in findings[code].message
    assert dataset.sound_rows == 1


def test_texts_that_share_their_prompt_are_warned_about():
    dataset, findings = read({"chosen": "Q: a? A: b", "rejected": "Q: a? A: c"})
    assert findings["no_prompt"].severity == "warning"
    assert (len(dataset), dataset.other_rows) == (0, 1)


def test_scores_beside_a_preference_are_only_noted():
    _, findings = read({**SOUND_PREFERENCES["TRL, texts"], "score_chosen": 5})
    assert findings["unknown_top_level_key"].severity == "note"


def test_conversations_and_preferences_do_not_mix():
    chat = {"messages": [USER, ANSWER]}
    _, findings = read(chat, openai(), chat)
    assert findings["mixed_formats"].severity == "error"
    assert findings["mixed_formats"].lines == (2,)
    dataset, findings = read(openai(), chat, openai())
    assert dataset.format == "preference"
    assert findings["mixed_formats"].lines == (2,)


def test_images_are_refused_with_a_sentence():
    image = {
        "role": "user",
        "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {}}],
    }
    _, findings = read({"messages": [image, ANSWER]}, {"messages": [image, ANSWER]})
    assert list(findings) == ["vision_example"]
    assert findings["vision_example"].severity == "error"
    assert findings["vision_example"].lines == (1, 2)
    assert "part 2 of 'content' is an image" in findings["vision_example"].message
    assert "no method that trains on images" in findings["vision_example"].message


def rows_of(kind: str, n: int = 60) -> list[dict[str, Any]]:
    """Different sound rows of a kind."""
    user = [{"role": "user", "content": f"Weather in place {i}?"} for i in range(n)]
    reply = [{"role": "assistant", "content": f"It rains {i} mm."} for i in range(n)]
    if kind == "tools":
        return [row(user[i], calling(one_call(arguments=f'{{"city": "{i}"}}'))) for i in range(n)]
    if kind == "preference":
        return [{"prompt": [user[i]], "chosen": [reply[i]], "rejected": [WORSE]} for i in range(n)]
    return [{"messages": [user[i], reply[i]]} for i in range(n)]


def source(name: str, rows: list[dict[str, Any]]) -> Source:
    content = b"".join(json.dumps(one).encode() + b"\n" for one in rows)
    return Source(name=name, open=lambda: io.BytesIO(content))


@pytest.mark.parametrize("kind", ["tools", "preference"])
def test_a_sound_file_of_another_kind_passes_the_linter_and_is_refused_by_a_job(kind: str):
    request = Request(base_model="", training=source("train.jsonl", rows_of(kind)), directory=Path())
    _, findings = check_files(request)
    assert not [finding for finding in findings if finding.severity == "error"]
    with pytest.raises(InvalidTrainingFile, match="'supervised' method of this version trains on text only"):
        refuse_errors(request, findings)


def test_a_job_names_the_file_that_it_cannot_train_on():
    request = Request(
        base_model="",
        training=source("train.jsonl", rows_of("chat")),
        validation=source("valid.jsonl", rows_of("preference")),
        directory=Path(),
    )
    with pytest.raises(InvalidValidationFile, match=r"^valid.jsonl: "):
        refuse_errors(request, check_files(request)[1])


def test_rows_with_tools_count_as_rows():
    dataset, _ = read(*rows_of("tools", 9))
    (finding,) = (one for one in check(Parts(train=dataset)) if one.code == "invalid_n_examples")
    assert "9 example(s)" in finding.message
    dataset, _ = read(*rows_of("tools", 60))
    assert not check(Parts(train=dataset))
