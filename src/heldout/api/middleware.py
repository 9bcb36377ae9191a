"""What surrounds every request: its stamp, the API key, the size of its body.

Plain ASGI, not `BaseHTTPMiddleware`: a streamed answer passes through untouched, piece by piece.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from heldout import disk
from heldout.api import failures
from heldout.errors import TooLarge, Unauthorized
from heldout.records import new_id
from heldout.settings import Settings

log = logging.getLogger(__name__)

#: Form fields and part headers around an uploaded file.
FORM_OVERHEAD = 1 << 20
#: A JSON body is read into memory whole, so it has a limit of its own.
MAX_JSON_BYTES = 32 << 20


class Stamp:
    """Gives each request an id and each reply OpenAI's headers; answers for what nobody caught."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = new_id("req_").lower()
        scope.setdefault("state", {})["request_id"] = request_id
        reply = _StampedReply(send, lambda headers: self._stamp(headers, request_id, started))
        started = time.perf_counter()
        try:
            await self.app(scope, receive, reply)
        except Exception as error:
            log.exception("%s %s failed (%s)", scope["method"], scope["path"], request_id)
            if reply.started:
                raise  # too late for an error reply: the server closes the connection
            if disk.is_full(error):
                response = failures.full_disk_reply(error, self.settings)
            else:
                response = failures.reply(failures.of_bug(request_id), 500)
            await response(scope, receive, reply)

    def _stamp(self, headers: MutableHeaders, request_id: str, started: float) -> None:
        headers["x-request-id"] = request_id
        headers["openai-processing-ms"] = str(round((time.perf_counter() - started) * 1000))
        headers["openai-version"] = "2020-10-01"
        headers["openai-organization"] = self.settings.organization


class _StampedReply:
    """A `send` that stamps the reply's headers and knows whether the reply has begun."""

    def __init__(self, send: Send, stamp: Callable[[MutableHeaders], None]) -> None:
        self.send = send
        self.stamp = stamp
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.stamp(MutableHeaders(scope=message))
        await self.send(message)


class KeyGuard:
    """Lets only requests with the API key through, before anything of their body is read."""

    OPEN = ("/", "/health")

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self.expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self.OPEN:
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("authorization", "")
        if hmac.compare_digest(given.encode(), self.expected):
            return await self.app(scope, receive, send)
        response = failures.user_error_reply(Unauthorized(_complaint(given)))
        return await response(scope, receive, send)


def _complaint(given: str) -> str:
    if not given:
        return "You didn't provide an API key. Send it in the Authorization header: Authorization: Bearer <key>."
    return "Incorrect API key provided. This server expects the key it was started with (HELDOUT_API_KEY)."


class BodyLimit:
    """Refuses a body that is too large: at once when its length is announced, else as it grows."""

    def __init__(self, app: ASGIApp, max_file_bytes: int) -> None:
        self.app = app
        self.max_upload = max_file_bytes + FORM_OVERHEAD

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        upload = headers.get("content-type", "").startswith("multipart/form-data")
        limit = self.max_upload if upload else MAX_JSON_BYTES
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            response = failures.user_error_reply(TooLarge(_too_large(limit)))
            return await response(scope, receive, send)
        return await self.app(scope, _limited(receive, limit), send)


def _limited(receive: Receive, limit: int) -> Receive:
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            # FastAPI turns any other exception, raised while it reads a body, into a 400.
            raise HTTPException(413, _too_large(limit))
        return message

    return counted


def _too_large(limit: int) -> str:
    return f"The request's body is larger than this server takes ({limit} bytes)."
