"""A live server on a free port, with a real database and real blobs; only the model is a small stand-in."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from fastapi import FastAPI

from heldout.api.app import create_app
from heldout.engine.base import ChatRequest, ChatService, Piece, Reply
from heldout.errors import ModelNotFound
from heldout.processes.uploads import Uploads
from heldout.settings import Settings
from heldout.store.blobs import FileBlobs
from heldout.store.db import Db, open_db


@dataclass
class Echo:
    """A ChatService that answers with the last message, word by word.

    After `fail_after` words it raises `failure`; it waits for `go` before it answers; `requests` is what
    it was asked; `closed` says that a stream was given up before its end.
    """

    fail_after: int | None = None
    failure: Exception = field(default_factory=lambda: RuntimeError("secret detail"))
    requests: list[ChatRequest] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)
    go: threading.Event | None = None

    def chat(self, request: ChatRequest) -> list[Reply]:
        text = "".join(piece.text for piece in self.stream(request))
        reply = Reply(text=text, finish_reason="stop", prompt_tokens=7, completion_tokens=len(text.split()))
        return [reply] * request.n

    def stream(self, request: ChatRequest) -> Iterator[Piece]:
        self.requests.append(request)
        if self.go:
            self.go.wait(20)
        if request.model == "unknown":
            raise ModelNotFound("The model 'unknown' does not exist")
        words = request.messages[-1]["content"].split()
        try:
            for count, word in enumerate(words):
                if count == self.fail_after:
                    raise self.failure
                yield Piece(text=word if count == 0 else f" {word}")
        except GeneratorExit:
            self.closed.set()
            raise
        yield Piece(finish_reason="stop", prompt_tokens=7, completion_tokens=len(words))


@dataclass(frozen=True, kw_only=True)
class Live:
    """A running server and what it stands on."""

    url: str
    client: openai.OpenAI
    db: Db
    blobs: FileBlobs
    settings: Settings
    chat: ChatService

    def upload(self, content: bytes = b"{}\n", name: str = "train.jsonl", **options: Any) -> Any:
        return self.client.files.create(file=(name, content), **{"purpose": "fine-tune", **options})

    def create_job(self, **options: Any) -> Any:
        asked = {"model": "gpt-4o-mini-2024-07-18", **options}
        if "training_file" not in asked:
            asked["training_file"] = self.upload().id
        return self.client.fine_tuning.jobs.create(**asked)


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app on a free port of this machine, until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def serving_app() -> Iterator[Callable[[FastAPI], str]]:
    """Serve an app and give its URL; it stops when the test ends."""
    with contextlib.ExitStack() as running:
        yield lambda app: running.enter_context(serving(app))


@pytest.fixture
def start(
    tmp_path: Path, echo: Echo, serving_app: Callable[[FastAPI], str], request: pytest.FixtureRequest
) -> Callable[..., Live]:
    """Start a server with these settings; it stops when the test ends. `uploads`: options of who looks at them."""

    def start(chat: ChatService = echo, uploads: dict[str, float] | None = None, **options: Any) -> Live:
        settings = Settings(data_dir=tmp_path, **options)
        db, blobs = open_db(settings.database), FileBlobs(tmp_path / "blobs")
        look = None if uploads is None else Uploads(settings, db, **uploads)
        if look:
            request.addfinalizer(look.close)
        url = serving_app(create_app(settings=settings, db=db, blobs=blobs, chat=chat, look=look))
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=settings.api_key or "any", max_retries=2)
        return Live(url=url, client=client, db=db, blobs=blobs, settings=settings, chat=chat)

    return start


@pytest.fixture
def live(start: Callable[..., Live]) -> Live:
    return start()
