"""The server's view of the inference process: the same service, reached over HTTP."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import openai
import pytest

from heldout.api.app import create_chat_app
from heldout.engine.base import ChatRequest, Sampling
from heldout.engine.remote import RemoteChat
from heldout.errors import ContextLengthExceeded, EngineUnavailable, ModelNotFound, UserError
from heldout.settings import Settings


@pytest.fixture
def remote(serving_app, echo, tmp_path):
    url = serving_app(create_chat_app(settings=Settings(data_dir=tmp_path), chat=echo))
    service = RemoteChat(f"{url}/v1")
    yield service
    service.close()


def request(text="hello big world", **options):
    return ChatRequest(**{"model": "m", "messages": [{"role": "user", "content": text}], **options})


@contextlib.contextmanager
def answering(event, linger=None):
    """A chat server that sends one event, whatever it is asked, and hangs up; lingering 0 s resets the connection."""

    def answer():
        connection, _ = listener.accept()
        with connection:
            if linger is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, linger))
            connection.recv(65536)
            head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
            connection.sendall(f"{head}{event}\n\n".encode())

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield RemoteChat(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        thread.join(timeout=5)


def open_connections(remote):
    return [one for one in remote._client._transport._pool.connections if not one.is_idle()]


def test_a_reply_is_the_same_as_if_it_were_made_here(remote, echo):
    assert remote.chat(request()) == echo.chat(request())
    assert list(remote.stream(request()))[-1] == list(echo.stream(request()))[-1]
    assert "".join(piece.text for piece in remote.stream(request())) == "hello big world"


def test_the_request_arrives_as_it_was_asked(remote, echo):
    asked = request(sampling=Sampling(max_tokens=3, temperature=0.5, top_p=0.9, seed=4, stop=("x",)), n=2)
    assert len(remote.chat(asked)) == 2
    plain = request()
    remote.chat(plain)
    assert echo.requests == [asked, plain]


def test_several_replies_keep_the_sum_of_their_tokens(remote):
    replies = remote.chat(request(n=3))
    assert (replies[0].prompt_tokens, sum(reply.completion_tokens for reply in replies)) == (7, 9)


def test_a_line_separator_inside_an_answer_does_not_break_the_stream():
    with answering('data: {"choices": [{"delta": {"content": "a\u2028b\x85c"}, "finish_reason": "stop"}]}') as remote:
        assert next(remote.stream(request())).text == "a\u2028b\x85c"


def test_the_environments_proxy_is_not_asked_for_the_engine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with answering('data: {"choices": [{"delta": {"content": "direct"}}]}') as remote:
        assert next(remote.stream(request())).text == "direct"


@pytest.mark.parametrize(
    "failure",
    [
        ModelNotFound("no such model"),
        ContextLengthExceeded("maximum context length is 9 tokens"),
        EngineUnavailable("loading"),
        UserError("odd", code="odd_code", param="odd_param"),
    ],
)
def test_an_error_over_there_is_the_same_error_here(remote, echo, failure):
    echo.fail_after, echo.failure = 0, failure
    for call in (lambda: remote.chat(request()), lambda: next(remote.stream(request()))):
        with pytest.raises(type(failure), match=str(failure)) as raised:
            call()
        error = raised.value
        expected = (failure.status, failure.type, failure.code, failure.param)
        assert (error.status, error.type, error.code, error.param) == expected
    assert open_connections(remote) == []


def test_a_failure_in_mid_stream_is_raised_after_the_words_before_it(remote, echo):
    echo.fail_after = 2
    words: list[str] = []
    with pytest.raises(UserError) as raised:
        words.extend(piece.text for piece in remote.stream(request()))
    assert (words, raised.value.code) == (["hello", " big"], "server_error")


def test_a_process_that_is_not_there_is_a_503_that_says_so():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    remote = RemoteChat(f"http://127.0.0.1:{port}/v1")
    for call in (lambda: remote.chat(request()), lambda: next(remote.stream(request()))):
        with pytest.raises(EngineUnavailable, match="is starting or has stopped") as raised:
            call()
        assert raised.value.status == 503


@pytest.mark.parametrize("linger", [None, 0])
def test_a_process_that_breaks_off_half_way_is_a_503(linger):
    with answering('data: {"choices": [{"delta": {"content": "half"}}]}', linger) as remote:
        pieces = remote.stream(request())
        with pytest.raises(EngineUnavailable, match="in the middle"):
            assert "".join(piece.text for piece in pieces) == "half"


def test_giving_up_a_stream_closes_the_connection_and_stops_the_engine(remote, echo):
    pieces = remote.stream(request("word " * 300_000))
    next(pieces)
    assert len(open_connections(remote)) == 1
    pieces.close()
    assert open_connections(remote) == []
    assert echo.closed.wait(10)


def test_a_client_that_hangs_up_on_the_server_stops_the_engine_behind_it(start, remote, echo):
    live = start(chat=remote)
    long = [{"role": "user", "content": "word " * 300_000}]
    stream = live.client.chat.completions.create(model="m", messages=long, stream=True)
    next(iter(stream))
    stream.close()
    assert echo.closed.wait(10)


def test_the_server_passes_on_what_the_engine_says(start, remote):
    live = start(chat=remote)
    hello = [{"role": "user", "content": "hello"}]
    answer = live.client.chat.completions.create(model="m", messages=hello)
    assert (answer.choices[0].message.content, answer.usage.total_tokens) == ("hello", 8)
    with pytest.raises(openai.NotFoundError) as raised:
        live.client.chat.completions.create(model="unknown", messages=hello, stream=True)
    assert raised.value.code == "model_not_found"
