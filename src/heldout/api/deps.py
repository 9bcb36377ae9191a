"""What handlers work with. `create_app` puts it on the app; a handler names the part it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Request

from heldout.engine.base import ChatService
from heldout.records import File
from heldout.settings import Settings
from heldout.store.blobs import Blobs
from heldout.store.db import Db

#: Has an uploaded file looked at; the file with its findings, or with a note that they are to come.
Look = Callable[[File], File]

#: Lets a question to a model pass, or raises; the outcome of its verdict, if its asker is to be warned of it.
Gate = Callable[[str], "str | None"]


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _db(request: Request) -> Db:
    db: Db = request.app.state.db
    return db


def _blobs(request: Request) -> Blobs:
    blobs: Blobs = request.app.state.blobs
    return blobs


def _chat(request: Request) -> ChatService:
    chat: ChatService = request.app.state.chat
    return chat


def _look(request: Request) -> Look | None:
    look: Look | None = request.app.state.look
    return look


def _gate(request: Request) -> Gate | None:
    gate: Gate | None = request.app.state.gate
    return gate


SettingsDep = Annotated[Settings, Depends(_settings)]
DbDep = Annotated[Db, Depends(_db)]
BlobsDep = Annotated[Blobs, Depends(_blobs)]
ChatDep = Annotated[ChatService, Depends(_chat)]
GateDep = Annotated[Gate | None, Depends(_gate)]
LookDep = Annotated[Look | None, Depends(_look)]
