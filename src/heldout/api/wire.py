"""The shapes of files, models and lists on the wire. The wire knows records, never the reverse."""

from __future__ import annotations

import json
import re
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, model_validator

from heldout.records import File, Job, Model

Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
Item = TypeVar("Item")


class Body(BaseModel):
    """A JSON body. All its text is Unicode: JSON can spell half of a surrogate pair, and neither the
    database nor a tokenizer can take it."""

    @model_validator(mode="before")
    @classmethod
    def _check_unicode(cls, raw: Any) -> Any:
        try:
            json.dumps(raw, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("The body holds half of a surrogate pair, which is no Unicode text.") from error
        return raw


class Page(BaseModel, Generic[Item]):
    """One page of a list. Clients follow `after=<last_id>` until `has_more` is false."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, items: list[Any], has_more: bool) -> Page[Item]:
        ids = [item.id for item in items]
        return cls(data=items, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=has_more)


class Deleted(BaseModel):
    """The answer to every DELETE."""

    id: str
    object: str
    deleted: bool = True


class FileObject(BaseModel):
    """A file. Always `processed`: some clients poll for exactly that and never look at `error`."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None  # files stay until they are deleted
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    x_findings: list[dict[str, Any]]

    @classmethod
    def of(cls, file: File) -> FileObject:
        return cls(
            id=file.id,
            bytes=file.bytes,
            created_at=file.created_at,
            filename=file.filename,
            purpose=file.purpose,
            x_findings=file.findings,
        )


class ModelObject(BaseModel):
    """A model that can be called. `x_base_model` says what a fine-tuned model or an alias stands on, `x_outcome`
    what its job's verdict says, and `x_release` that somebody overruled it, and why."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    x_base_model: str
    x_outcome: str | None = None
    x_release: dict[str, Any] | None = None

    @classmethod
    def of(cls, model: Model, job: Job | None) -> ModelObject:
        return cls(
            id=model.id,
            created=model.created_at,
            owned_by=model.owned_by,
            x_base_model=model.base_model,
            x_outcome=job.verdict["outcome"] if job and job.verdict else None,
            x_release=job.release if job else None,
        )

    @classmethod
    def of_base(cls, name: str, base_model: str) -> ModelObject:
        # A base model has no date of birth here; 0 keeps the list the same from call to call.
        return cls(id=name, created=0, owned_by="heldout", x_base_model=base_model)


def base_name(filename: str | None) -> str:
    """A client may send a whole local path as file name, of its own system; its last part is kept."""
    last = re.split(r"[\\/]", filename or "")[-1]
    return re.sub(r"[\x00-\x1f\x7f]", "", last) or "upload"
