"""`/v1/files`: upload, list, look at, download, delete."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, BinaryIO

from fastapi import APIRouter, Form, Query, Response, UploadFile

from heldout.api import wire
from heldout.api.deps import BlobsDep, DbDep, LookDep, SettingsDep
from heldout.api.streaming import ClosingStream
from heldout.errors import InvalidValue, TooLarge
from heldout.records import File
from heldout.store.db import Order

router = APIRouter()


@router.post("/v1/files")
def create_file(
    file: UploadFile,
    purpose: Annotated[wire.Purpose, Form()],
    settings: SettingsDep,
    db: DbDep,
    blobs: BlobsDep,
    look: LookDep,
) -> wire.FileObject:
    """Take the bytes as they are, whatever is wrong with them: `x_findings` says what that is, if it can be said
    in a moment, and the job that uses the file says it in any case.

    `expires_after` is accepted and has no effect; `expires_at` says so.
    """
    record = File(filename=wire.base_name(file.filename), purpose=purpose, bytes=file.size or 0)
    _check(record, settings.max_file_bytes)
    blobs.put(record.blob, file.file)
    try:
        db.add_file(record)
    except BaseException:
        blobs.delete(record.blob)  # without its row nobody could ask for it, nor delete it
        raise
    if look and record.purpose == "fine-tune":
        record = look(record)
    return wire.FileObject.of(record)


@router.get("/v1/files")
def list_files(
    db: DbDep,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Order = "desc",
    after: str | None = None,
) -> wire.Page[wire.FileObject]:
    files, more = db.list_files(after=after, limit=limit, order=order, purpose=purpose)
    return wire.Page.of([wire.FileObject.of(file) for file in files], more)


@router.get("/v1/files/{file_id}")
def get_file(file_id: str, db: DbDep) -> wire.FileObject:
    return wire.FileObject.of(db.get_file(file_id))


@router.get("/v1/files/{file_id}/content")
def get_content(file_id: str, db: DbDep, blobs: BlobsDep) -> Response:
    """The bytes, whatever the client says it accepts: one client asks for `application/json` here."""
    file = db.get_file(file_id)
    content = blobs.open(file.blob)
    headers = {"content-length": str(file.bytes)}
    return ClosingStream(_blocks(content), source=content, media_type="application/octet-stream", headers=headers)


@router.delete("/v1/files/{file_id}")
def delete_file(file_id: str, db: DbDep, blobs: BlobsDep) -> wire.Deleted:
    # The row first: a crash in between leaves bytes nobody can ask for, not a file without bytes.
    file = db.get_file(file_id)
    db.delete_file(file_id)
    blobs.delete(file.blob)
    return wire.Deleted(id=file_id, object="file")


def _check(file: File, max_bytes: int) -> None:
    if file.purpose == "fine-tune" and not file.filename.lower().endswith(".jsonl"):
        raise InvalidValue("Invalid file format for Fine-Tuning API. Must be .jsonl", param="file")
    if file.bytes > max_bytes:
        raise TooLarge(
            f"{file.filename} has {file.bytes} bytes; this server takes up to {max_bytes} (HELDOUT_MAX_FILE_BYTES).",
            param="file",
        )


def _blocks(content: BinaryIO) -> Iterator[bytes]:
    while block := content.read(1 << 20):
        yield block
