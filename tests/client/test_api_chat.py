from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from heldout.engine.base import Sampling
from heldout.errors import EngineUnavailable

HELLO = [{"role": "user", "content": "hello big world"}]


def ask(live, **options):
    return live.client.chat.completions.create(**{"model": "m", "messages": HELLO, **options})


def test_a_chat_answers_with_text_finish_reason_and_counts(live):
    answer = ask(live)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "hello big world")
    assert (choice.finish_reason, answer.model) == ("stop", "m")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        7,
        3,
        10,
    )


def test_n_replies_are_indexed_and_the_prompt_is_counted_once(live):
    answer = ask(live, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 9)


def test_the_wires_defaults_are_openais_not_the_engines(live, echo):
    ask(live)
    assert echo.requests[0].sampling == Sampling(temperature=1.0, top_p=1.0)


def test_every_sampling_option_reaches_the_engine(live, echo):
    ask(live, max_tokens=5, max_completion_tokens=4, temperature=0, top_p=0.5, seed=1, stop="x")
    ask(live, max_tokens=5, stop=[])
    first, second = (request.sampling for request in echo.requests)
    assert first == Sampling(max_tokens=4, temperature=0.0, top_p=0.5, seed=1, stop=("x",))
    assert (second.max_tokens, second.stop) == (5, ())


def test_developer_messages_and_text_parts_become_plain_messages(live, echo):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    ask(live, messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    assert echo.requests[0].messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one two"},
    ]


def test_what_only_a_hosted_service_cares_about_is_ignored(live):
    ignored = {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "logit_bias": {}}
    neutral = {"tools": [], "response_format": {"type": "text"}, "presence_penalty": 0, "logprobs": False}
    assert ask(live, **ignored, **neutral, parallel_tool_calls=False).choices


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{"name": "f"}]),
        ("logprobs", True),
        ("logit_bias", {"1": 5}),
        ("presence_penalty", 0.5),
        ("response_format", {"type": "json_object"}),
    ],
)
def test_what_the_engine_cannot_do_is_refused_by_name(live, name, value):
    with pytest.raises(openai.BadRequestError, match=name) as raised:
        ask(live, **{name: value})
    assert (raised.value.param, raised.value.code) == (name, "unsupported_value")


def test_a_picture_is_refused_and_its_place_named(live):
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(openai.BadRequestError, match="'image_url'") as raised:
        ask(live, messages=[{"role": "user", "content": ["look", picture]}])
    assert raised.value.param == "messages[0].content[1]"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2, "stream": True}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
    ],
)
def test_a_value_out_of_range_is_a_400_naming_it(live, options, param):
    body = {"model": "m", "messages": HELLO, **options}
    reply = httpx.post(
        f"{live.url}/v1/chat/completions",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_a_404_streamed_or_not(live, stream):
    with pytest.raises(openai.NotFoundError) as raised:
        ask(live, model="unknown", stream=stream)
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_a_stream_has_the_role_first_one_finish_reason_and_one_head(live):
    chunks = list(ask(live, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert [delta.role for delta in deltas[1:]] == [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == "hello big world"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_include_usage_adds_one_last_chunk_with_the_counts(live):
    *chunks, last = ask(live, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (7, 3)
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)


def test_a_stream_ends_with_done(live):
    body = {"model": "m", "messages": HELLO, "stream": True}
    reply = httpx.post(f"{live.url}/v1/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.endswith("\n\ndata: [DONE]\n\n")


def test_a_failure_before_the_first_token_is_an_http_error(live, echo):
    echo.fail_after = 0
    with pytest.raises(openai.InternalServerError) as raised:
        live.client.with_options(max_retries=0).chat.completions.create(model="m", messages=HELLO, stream=True)
    assert (raised.value.code, raised.value.status_code) == ("server_error", 500)
    assert "secret" not in raised.value.message
    assert raised.value.request_id in raised.value.message


def test_a_failure_in_mid_stream_raises_apierror_after_the_first_words(live, echo):
    echo.fail_after = 2
    stream = ask(live, stream=True)
    words: list[str] = []
    with pytest.raises(openai.APIError) as raised:
        words.extend(chunk.choices[0].delta.content for chunk in stream)
    assert words == ["", "hello", " big"]
    assert (raised.value.code, "secret" in raised.value.message) == ("server_error", False)


def test_a_starting_engine_says_when_to_come_back(live, echo):
    echo.fail_after, echo.failure = 0, EngineUnavailable("starting")
    reply = httpx.post(f"{live.url}/v1/chat/completions", json={"model": "m", "messages": HELLO})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_unavailable")
    assert int(reply.headers["retry-after"]) > 0


def test_a_client_that_hangs_up_stops_the_engine(live, echo):
    long = [{"role": "user", "content": "word " * 300_000}]
    stream = ask(live, messages=long, stream=True)
    next(iter(stream))
    stream.close()
    assert echo.closed.wait(10)


def test_fifty_waiting_chats_do_not_lock_out_a_poll(live, echo):
    echo.go = threading.Event()
    with ThreadPoolExecutor(50) as pool:
        answers = [pool.submit(ask, live) for _ in range(50)]
        deadline = time.monotonic() + 10
        while len(echo.requests) < 50 and time.monotonic() < deadline:
            time.sleep(0.05)
        try:
            assert len(echo.requests) == 50
            assert httpx.get(f"{live.url}/v1/fine_tuning/jobs", timeout=10).status_code == 200
        finally:
            echo.go.set()
    assert {answer.result().choices[0].finish_reason for answer in answers} == {"stop"}
