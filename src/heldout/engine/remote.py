"""Chat at another process over HTTP: our inference process, or any OpenAI-compatible chat server."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx

from heldout.engine.base import ChatRequest, Piece, Reply, TokenChoice
from heldout.errors import ContextLengthExceeded, EngineUnavailable, ModelNotFound, UserError

_BY_CODE: dict[str, type[UserError]] = {
    "model_not_found": ModelNotFound,
    "context_length_exceeded": ContextLengthExceeded,
    "engine_unavailable": EngineUnavailable,
}


class RemoteChat:
    """A ChatService at `base_url` (with its `/v1`). Errors over there are raised here with the same
    status, code and parameter; a process that does not answer is EngineUnavailable."""

    def __init__(self, base_url: str, *, api_key: str = "", timeout: float = 600) -> None:
        # Not the environment's proxies: the engine is the operator's own process, often on loopback.
        self._client = httpx.Client(
            base_url=base_url.rstrip("/"),
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout, connect=5),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            trust_env=False,
        )

    def chat(self, request: ChatRequest) -> list[Reply]:
        """`request.n` replies."""
        with self._reachable():
            response = self._client.post("/chat/completions", json=_body(request))
        _raise_for_error(response)
        answer = response.json()
        return [_reply(choice, answer.get("usage") or {}, request.n) for choice in answer["choices"]]

    def stream(self, request: ChatRequest) -> Iterator[Piece]:
        """The reply in pieces. Closing the iterator closes the connection, and with that the other side
        stops generating."""
        body = _body(request) | {"stream": True, "stream_options": {"include_usage": True}}
        with self._reachable(), self._client.stream("POST", "/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
                _raise_for_error(response)
            yield from _pieces(_lines(response))

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            raise EngineUnavailable(f"The inference process at {self._where} did not answer in time.") from error
        except httpx.ConnectError as error:
            raise EngineUnavailable(
                f"The inference process at {self._where} is starting or has stopped. Try again in a moment."
            ) from error
        except httpx.TransportError as error:
            # A connection that ends and one that is reset are the same to whoever waits for the rest.
            raise EngineUnavailable(
                f"The inference process at {self._where} stopped in the middle of an answer: {error}."
            ) from error

    @property
    def _where(self) -> str:
        return str(self._client.base_url).rstrip("/")


def _body(request: ChatRequest) -> dict[str, Any]:
    sampling = request.sampling
    body = {
        "model": request.model,
        "messages": request.messages,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "n": request.n,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
        "stop": list(sampling.stop) or None,
        "logprobs": request.log_probs or None,
        # All that the wire allows: whoever asked for fewer is shown fewer.
        "top_logprobs": 20 if request.log_probs else None,
    }
    return {name: value for name, value in body.items() if value is not None}


def _reply(choice: dict[str, Any], usage: dict[str, Any], n: int) -> Reply:
    # The wire counts all replies together; only the sum is ever shown again.
    first = choice["index"] == 0
    total = usage.get("completion_tokens", 0)
    return Reply(
        text=choice["message"]["content"] or "",
        finish_reason=choice["finish_reason"],
        prompt_tokens=usage.get("prompt_tokens", 0),
        completion_tokens=total // n + (total % n if first else 0),
        tokens=_tokens(choice),
    )


def _tokens(choice: dict[str, Any]) -> tuple[TokenChoice, ...]:
    return tuple(
        TokenChoice(
            text=one["token"],
            log_prob=one["logprob"],
            top=tuple((other["token"], other["logprob"]) for other in one.get("top_logprobs") or []),
        )
        for one in (choice.get("logprobs") or {}).get("content") or []
    )


def _pieces(lines: Iterator[str]) -> Iterator[Piece]:
    finish_reason: str | None = None
    usage: dict[str, int] = {}
    for chunk in _chunks(lines):
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices", []):
            finish_reason = choice.get("finish_reason") or finish_reason
            if text := choice["delta"].get("content"):
                yield Piece(text=text, tokens=_tokens(choice))
    if finish_reason is None:
        raise EngineUnavailable("The inference process stopped in the middle of an answer.")
    yield Piece(
        finish_reason=finish_reason,
        prompt_tokens=usage.get("prompt_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
    )


def _lines(response: httpx.Response) -> Iterator[str]:
    # Not httpx's own: it also splits at U+2028 and its like, which an answer may hold in the middle.
    rest = b""
    for block in response.iter_bytes():
        *lines, rest = (rest + block).split(b"\n")
        yield from (line.decode() for line in lines)
    yield rest.decode()


def _chunks(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        content = line.removeprefix("data:").strip()
        if not line.startswith("data:") or content == "[DONE]":
            continue
        chunk: dict[str, Any] = json.loads(content)
        if "error" in chunk:
            raise _user_error(500, chunk["error"])
        yield chunk


def _raise_for_error(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        body = response.json()
    except ValueError:
        body = {"message": f"{response.status_code} from the inference process: {response.text[:500]}"}
    # Older vLLM has the four keys at the top, without "error" around them.
    raise _user_error(response.status_code, body.get("error", body))


def _user_error(status: int, error: dict[str, Any]) -> UserError:
    code = error.get("code")
    if status == 404 and not isinstance(code, str):
        code = "model_not_found"  # vLLM puts the status where OpenAI has the code
    kind = _BY_CODE.get(str(code), UserError)
    raised = kind(
        str(error.get("message", error)),
        code=code if isinstance(code, str) else None,
        param=error.get("param"),
    )
    raised.status = status if kind is UserError else kind.status
    raised.type = error.get("type") or raised.type
    return raised
