"""Every failure in one form: `{"error": {"message", "type", "param", "code"}}`, all four keys present.

The openai client reads nothing else: FastAPI's own `{"detail": …}` gives its user no message and no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from heldout import disk
from heldout.errors import UserError
from heldout.settings import Settings

#: Seconds a client waits before it asks a starting engine again; its two retries then cover a cold start.
RETRY_AFTER = 5


def envelope(
    message: str, *, type: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error reply."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def of_user_error(error: UserError) -> dict[str, Any]:
    """The body for an error that knows its own code and parameter."""
    return envelope(str(error), type=error.type, param=error.param, code=error.code)


def of_bug(request_id: str) -> dict[str, Any]:
    """The body for an error of ours: nothing of the inside, but the id the log has it under."""
    message = f"The server had an error while processing your request. Its log has the details under {request_id}."
    return envelope(message, type="server_error", code="server_error")


def reply(body: dict[str, Any], status: int, headers: Mapping[str, str] | None = None) -> Response:
    """An error reply. ASCII: a message may quote a broken string, half of a surrogate pair for instance."""
    return Response(json.dumps(body), status, headers, media_type="application/json")


def user_error_reply(error: UserError) -> Response:
    """The reply to an error a user can act on."""
    headers = {"retry-after": str(RETRY_AFTER)} if error.status == 503 else None
    return reply(of_user_error(error), error.status, headers)


def full_disk_reply(error: Exception, settings: Settings) -> Response:
    """The reply to a request that could not be stored."""
    # The client would send the whole file twice more, at once.
    headers = {"x-should-retry": "false"}
    return reply(envelope(disk.refusal(error, settings), type="server_error", code=disk.CODE), 507, headers)


def install(app: FastAPI) -> None:
    """Override every handler of FastAPI's. Unexpected exceptions are the middleware's: only there do the
    reply's headers still get their stamp."""
    app.add_exception_handler(UserError, _on_user_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)


def _on_user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return user_error_reply(error)


def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    first = problems[0]
    message = " ".join(_sentence(problem) for problem in problems)
    param = None if first["type"] == "json_invalid" else _path(first["loc"])
    return reply(envelope(message, param=param, code=_code(first)), 400)


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if disk.is_full(error):
        raise error  # FastAPI takes it for a fault of the body it was reading; the middleware knows better
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = f"Invalid URL ({request.method} {request.url.path})", "unknown_url"
    elif error.status_code == 405:
        message, code = f"Not allowed to {request.method} on {request.url.path}.", "method_not_supported"
    elif error.status_code == 413:
        code = "content_too_large"
    return reply(envelope(message, code=code), error.status_code, error.headers)


def _code(problem: dict[str, Any]) -> str:
    if problem["type"] == "json_invalid":
        return "invalid_json"
    return "missing_required_parameter" if problem["type"] == "missing" else "invalid_value"


def _path(location: tuple[int | str, ...]) -> str | None:
    """`("body", "messages", 0, "role")` is `messages[0].role`; the body itself has no name."""
    path = ""
    for part in location[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or None


def _sentence(problem: dict[str, Any]) -> str:
    if problem["type"] == "json_invalid":
        reason = problem.get("ctx", {}).get("error", "")
        return f"The body of your request is not valid JSON: {reason} at character {problem['loc'][-1]}."
    path = _path(problem["loc"])
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if path is None:
        return "The request needs a JSON object as its body, sent as content-type: application/json."
    if problem["type"] == "missing":
        return f"Missing required parameter: '{path}'."
    return f"Invalid value for '{path}': {problem['msg']} (got {_short(problem.get('input'))})."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
