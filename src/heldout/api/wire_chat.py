"""The shapes of chat completions on the wire, whole and in chunks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, StrictInt

from heldout.api.wire import Body
from heldout.engine.base import ChatRequest, Message, Piece, Reply, Sampling, TokenChoice
from heldout.errors import InvalidValue
from heldout.records import new_id, now

Tokens = Annotated[StrictInt, Field(ge=1)]


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


class ChatMessage(BaseModel):
    """One message; `content` is text, or parts of type text, or absent."""

    role: str
    content: Any = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class StreamOptions(BaseModel):
    """`include_usage` asks for one more chunk, with the token counts."""

    include_usage: bool | None = None


class ChatCompletion(Body):
    """The request. What a local model cannot do is refused by name; what only a hosted service cares
    about (`user`, `store`, `metadata`, `service_tier`, …) is ignored."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=16)] | None = None
    max_completion_tokens: Tokens | None = None
    max_tokens: Tokens | None = None
    stop: Annotated[list[str], BeforeValidator(_as_list), Field(max_length=4)] = Field(default_factory=list)
    seed: StrictInt | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    modalities: list[str] | None = None
    audio: Any = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def to_request(self) -> ChatRequest:
        """What an engine is asked. Raises InvalidValue naming what it cannot be asked."""
        self._refuse_unsupported()
        return ChatRequest(
            model=self.model,
            messages=[_message(index, message) for index, message in enumerate(self.messages)],
            sampling=Sampling(
                max_tokens=self.max_completion_tokens or self.max_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                seed=self.seed,
                stop=tuple(text for text in self.stop if text),
            ),
            n=self.n or 1,
            log_probs=bool(self.logprobs),
        )

    def _refuse_unsupported(self) -> None:
        for name in ("tools", "functions", "logit_bias", "audio"):
            if getattr(self, name):
                raise _unsupported(name, f"'{name}' is not supported by this version.")
        if self.top_logprobs and not self.logprobs:
            raise InvalidValue("top_logprobs needs logprobs to be true.", param="top_logprobs")
        for name in ("frequency_penalty", "presence_penalty"):
            if getattr(self, name):
                raise _unsupported(name, f"'{name}' must be 0 in this version.")
        if (self.response_format or {}).get("type", "text") != "text":
            raise _unsupported("response_format", "Only response_format {'type': 'text'} is supported.")
        if (self.modalities or ["text"]) != ["text"]:
            raise _unsupported("modalities", "Only modalities ['text'] is supported.")
        if self.stream and (self.n or 1) > 1:
            raise _unsupported("n", "n must be 1 when stream is true.")


def _message(index: int, message: ChatMessage) -> Message:
    where = f"messages[{index}]"
    role = "system" if message.role == "developer" else message.role
    if role in ("tool", "function") or message.tool_calls or message.function_call:
        raise _unsupported(where, f"{where}: tool calls and their results are not supported by this version.")
    if role not in ("system", "user", "assistant"):
        raise InvalidValue(
            f"{where}.role is {role!r}; expected 'system', 'developer', 'user' or 'assistant'.",
            param=f"{where}.role",
        )
    return {"role": role, "content": _text(where, message.content)}


def _text(where: str, content: Any) -> str:
    if content is None:
        return ""
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise InvalidValue(f"{where}.content must be a string or a list of parts.", param=f"{where}.content")
    return "".join(_part(f"{where}.content[{index}]", part) for index, part in enumerate(parts))


def _part(where: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        part = part.get("text")
    elif isinstance(part, dict):
        raise _unsupported(where, f"{where} is of type {part.get('type')!r}; only 'text' is supported.")
    if not isinstance(part, str):
        raise InvalidValue(f"{where} has no text.", param=where)
    return part


def _unsupported(name: str, message: str) -> InvalidValue:
    return InvalidValue(message, code="unsupported_value", param=name)


def completion(model: str, replies: Sequence[Reply], log_probs: LogProbs) -> dict[str, Any]:
    """The whole answer. The prompt is counted once, however many replies it got."""
    return {
        **_head(model, "chat.completion"),
        "choices": [_choice(index, reply, log_probs) for index, reply in enumerate(replies)],
        "usage": _usage(replies[0].prompt_tokens, sum(reply.completion_tokens for reply in replies)),
    }


class LogProbs:
    """Puts log-probabilities on the wire, if they were asked for."""

    def __init__(self, body: ChatCompletion) -> None:
        self.wanted, self.top = bool(body.logprobs), body.top_logprobs or 0

    def of(self, tokens: Sequence[TokenChoice]) -> dict[str, Any] | None:
        """Raises InvalidValue when they were asked for and are not known."""
        if not self.wanted:
            return None
        if not tokens:
            raise no_log_probs()
        entries = [{**_scored(one.text, one.log_prob), "top_logprobs": self._top(one)} for one in tokens]
        return {"content": entries, "refusal": None}

    def _top(self, one: TokenChoice) -> list[dict[str, Any]]:
        return [_scored(text, log_prob) for text, log_prob in one.top[: self.top]]


def no_log_probs() -> InvalidValue:
    """The model generates text, and this version does not tell its tokens' log-probabilities."""
    return _unsupported("logprobs", "'logprobs' is supported for classifiers only (a model fine-tuned on an encoder).")


class Chunks:
    """The chunks of one streamed answer: same `id`, `created` and `model` throughout."""

    def __init__(self, model: str, log_probs: LogProbs, *, include_usage: bool) -> None:
        self.head = _head(model, "chat.completion.chunk")
        self.log_probs = log_probs
        self.include_usage = include_usage

    def start(self) -> str:
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, piece: Piece) -> str:
        return self._chunk({"content": piece.text}, log_probs=self.log_probs.of(piece.tokens))

    def finish(self, last: Piece) -> str:
        """The finish reason, the counts if they were asked for, and the end mark."""
        end = self._chunk({}, last.finish_reason)
        if self.include_usage:
            usage = _usage(last.prompt_tokens, last.completion_tokens)
            end += data({**self.head, "choices": [], "usage": usage})
        return end + "data: [DONE]\n\n"

    def _chunk(
        self, delta: dict[str, str], finish_reason: str | None = None, log_probs: dict[str, Any] | None = None
    ) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": log_probs, "finish_reason": finish_reason}
        usage = {"usage": None} if self.include_usage else {}
        return data({**self.head, "choices": [choice], **usage})


def data(body: dict[str, Any]) -> str:
    """One server-sent event."""
    # ASCII: some clients split events at U+2028, which is a line break to them and a letter to JSON.
    return f"data: {json.dumps(body)}\n\n"


def _head(model: str, kind: str) -> dict[str, Any]:
    return {
        "id": new_id("chatcmpl-"),
        "object": kind,
        "created": now(),
        "model": model,
        "system_fingerprint": "fp_heldout",
    }


def _choice(index: int, reply: Reply, log_probs: LogProbs) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": reply.text, "refusal": None},
        "finish_reason": reply.finish_reason,
        "logprobs": log_probs.of(reply.tokens),
    }


def _scored(text: str, log_prob: float) -> dict[str, Any]:
    return {"token": text, "logprob": log_prob, "bytes": list(text.encode("utf-8", "surrogatepass"))}


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
