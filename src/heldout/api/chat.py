"""`/v1/chat/completions`, over any ChatService: the server's passes the request on, the inference
process's answers it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from heldout.api import failures
from heldout.api import wire_chat as wire
from heldout.api.deps import ChatDep, GateDep
from heldout.api.streaming import ClosingStream
from heldout.engine.base import ChatRequest, ChatService, Piece
from heldout.errors import UserError

log = logging.getLogger(__name__)

router = APIRouter()

#: On answers of a model whose verdict is not `ship`; its value is the outcome.
VERDICT_HEADER = "x-heldout-verdict"


@router.post("/v1/chat/completions")
def create_chat_completion(body: wire.ChatCompletion, request: Request, chat: ChatDep, gate: GateDep) -> Response:
    asked, log_probs = body.to_request(), wire.LogProbs(body)
    headers = _warning(request, body.model, gate(body.model)) if gate else {}
    if body.stream:
        chunks = wire.Chunks(body.model, log_probs, include_usage=body.include_usage)
        return _stream(chunks, asked, chat, request.state.request_id, headers)
    return JSONResponse(wire.completion(body.model, chat.chat(asked), log_probs), headers=headers)


def _warning(request: Request, model: str, outcome: str | None) -> dict[str, str]:
    """The headers that tell of a verdict other than `ship`. A body with more in it would break strict clients."""
    if outcome is None:
        return {}
    warned: set[str] = request.app.state.warned
    if model not in warned:  # once, not with every question
        warned.add(model)
        log.warning("%s answers although the verdict of its job is %s (HELDOUT_GATE=warn)", model, outcome)
    return {VERDICT_HEADER: outcome}


def _stream(
    chunks: wire.Chunks, asked: ChatRequest, chat: ChatService, request_id: str, warning: dict[str, str]
) -> Response:
    pieces = chat.stream(asked)
    # Before the reply begins: an error up to the first token can still have its status.
    first = next(pieces)
    events = _reporting(_events(chunks, itertools.chain([first], pieces)), request_id)
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **warning}
    return ClosingStream(events, source=pieces, media_type="text/event-stream", headers=headers)


def _events(chunks: wire.Chunks, pieces: Iterator[Piece]) -> Iterator[str]:
    yield chunks.start()
    last = Piece()
    for last in pieces:
        if last.text:
            yield chunks.text(last)
    yield chunks.finish(last)


def _reporting(events: Iterator[str], request_id: str) -> Iterator[str]:
    """The events; what goes wrong after the first becomes one too, which the client raises as APIError."""
    try:
        yield from events
    except UserError as error:
        yield wire.data(failures.of_user_error(error))
    except Exception:
        log.exception("A streamed answer failed (%s)", request_id)
        body: dict[str, Any] = failures.of_bug(request_id)
        yield wire.data(body)
