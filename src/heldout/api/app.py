"""The HTTP application: OpenAI's surface over a database, a blob store and a chat service."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator

from anyio import to_thread
from fastapi import APIRouter, FastAPI, Request

from heldout import gate
from heldout.api import chat as chat_completions
from heldout.api import failures, files, jobs, models
from heldout.api.deps import Look
from heldout.api.middleware import BodyLimit, KeyGuard, Stamp
from heldout.engine.base import ChatService
from heldout.settings import Settings
from heldout.store.blobs import Blobs
from heldout.store.db import Db

#: Requests served at once. A chat that waits for its answer holds a thread; with the usual 40, an
#: evaluation script with 50 connections would lock everybody out who asks how a job is doing.
THREADS = 200


def create_app(*, settings: Settings, db: Db, blobs: Blobs, chat: ChatService, look: Look | None = None) -> FastAPI:
    """The whole surface, as the server process serves it. `look`: who looks at training files at upload; nobody,
    if None."""
    app = _app(settings, api_key=settings.api_key)
    app.state.settings, app.state.db, app.state.blobs, app.state.chat = settings, db, blobs, chat
    app.state.look = look
    app.state.gate = functools.partial(gate.admit, settings.gate, db)
    app.state.warned = set()
    _include(app, files.router, jobs.router, models.router, chat_completions.router)
    app.add_api_route("/", _about)
    return app


def create_chat_app(*, settings: Settings, chat: ChatService) -> FastAPI:
    """Chat completions only, as the inference process serves them to the server process.

    It asks for no key: it listens where only this machine reaches it, and the server has asked already.
    """
    app = _app(settings, api_key="")
    app.state.chat = chat
    app.state.gate = None  # the service of that process asks by itself
    _include(app, chat_completions.router)
    return app


def _app(settings: Settings, *, api_key: str) -> FastAPI:
    app = FastAPI(title="Heldout", docs_url=None, redoc_url=None, lifespan=_lifespan)
    failures.install(app)
    # The last one added is the outermost: every reply is stamped, also those of the other two.
    app.add_middleware(BodyLimit, max_file_bytes=settings.max_file_bytes)
    if api_key:
        app.add_middleware(KeyGuard, api_key=api_key)
    app.add_middleware(Stamp, settings=settings)
    app.add_api_route("/health", _health)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    to_thread.current_default_thread_limiter().total_tokens = THREADS
    yield


def _include(app: FastAPI, *routers: APIRouter) -> None:
    for router in routers:
        app.include_router(router)


def _health() -> dict[str, str]:
    return {"status": "ok"}


def _about(request: Request) -> dict[str, str]:
    base_url = f"{request.base_url}v1"
    return {
        "name": "Heldout",
        "what": "Fine-tune on your own hardware through OpenAI's API, and ship only what generalises.",
        "base_url": base_url,
        "try": f'openai.OpenAI(base_url="{base_url}", api_key="…").fine_tuning.jobs.list()',
    }
