"""What the rows of the database mean: jobs, events, checkpoints, files, models; their ids and moves."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

# Without "o" and "O": at least one client takes any "o" followed by a digit for a reasoning model.
_ALPHABET = "ABCDEFGHIJKLMNPQRSTUVWXYZabcdefghijklmnpqrstuvwxyz0123456789"


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def new_id(kind: str) -> str:
    """A fresh id in OpenAI's form: `kind` is the prefix with its separator ("file-", "ftjob-", "ftckpt_")."""
    return kind + _random(24)


def now() -> int:
    """Unix seconds, as every timestamp on the wire."""
    return int(time.time())


class JobStatus(str, Enum):
    """The six statuses clients know. Any other is a crash in some of them."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """True when the job will never move again."""
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


#: Which statuses a job may come from. A move from anywhere else is refused by the database.
COMES_BEFORE: dict[JobStatus, tuple[JobStatus, ...]] = {
    JobStatus.QUEUED: (JobStatus.VALIDATING_FILES,),
    JobStatus.RUNNING: (JobStatus.QUEUED,),
    JobStatus.SUCCEEDED: (JobStatus.RUNNING,),
    JobStatus.FAILED: (JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.RUNNING),
    JobStatus.CANCELLED: (JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.RUNNING),
}


@dataclass(frozen=True, kw_only=True)
class File:
    """An uploaded or produced file; its bytes are the blob `files/<id>`."""

    id: str = field(default_factory=lambda: new_id("file-"))
    created_at: int = field(default_factory=now)
    filename: str
    purpose: str
    bytes: int
    findings: list[dict[str, Any]] = field(default_factory=list)

    @property
    def blob(self) -> str:
        """The key of the file's bytes."""
        return f"files/{self.id}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One fine-tuning job, from request to verdict."""

    id: str = field(default_factory=lambda: new_id("ftjob-"))
    created_at: int = field(default_factory=now)
    status: JobStatus = JobStatus.VALIDATING_FILES
    model: str  # as the client asked for it; part of the fine-tuned model's name
    base_model: str  # what that name means here
    training_file: str
    validation_file: str | None = None
    holdout_file: str | None = None
    keep_leaks: bool = False  # score what gives itself away; the verdict says so
    suffix: str | None = None
    seed: int = 0
    method: str = "supervised"
    hyperparameters: dict[str, Any] = field(default_factory=dict)  # as asked; "auto" is left out
    grader: dict[str, Any] | None = None  # OpenAI's, as JSON; scores the answers instead of a metric
    metadata: dict[str, str] = field(default_factory=dict)
    integrations: list[dict[str, Any]] = field(default_factory=list)
    started_at: int | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    plan: dict[str, Any] | None = None  # resolved numbers with their reasons
    trained_tokens: int | None = None
    fine_tuned_model: str | None = None
    result_files: list[str] = field(default_factory=list)
    verdict: dict[str, Any] | None = None
    release: dict[str, Any] | None = None  # `reason` and `released_at`, once somebody overruled the verdict
    error: dict[str, Any] | None = None
    paused: bool = False  # asked to wait; a process that still works for it ends at its next safe point
    # The worker's own notes: who runs it, since when, how often it was taken up without progress.
    handle: str | None = None
    attempts: int = 0

    @property
    def pause(self) -> Literal["pausing", "paused"] | None:
        """`pausing` while something still works for a job that was asked to wait, `paused` after.

        A status of its own would be a crash in some clients. A paused job is `queued`.
        """
        if not self.paused or self.status.ended:
            return None
        return "paused" if self.status is JobStatus.QUEUED and self.handle is None else "pausing"


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of a job's story; `data` is empty for messages."""

    id: str = field(default_factory=lambda: new_id("ftevent-"))
    created_at: int = field(default_factory=now)
    job_id: str
    level: str = "info"  # info | warn | error
    type: str = "message"  # message | metrics
    message: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A saved adapter of a running or finished job, callable as `model`."""

    id: str = field(default_factory=lambda: new_id("ftckpt_"))
    created_at: int = field(default_factory=now)
    job_id: str
    step: int
    model: str
    metrics: dict[str, Any] = field(default_factory=dict)
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class Model:
    """A fine-tuned model (or checkpoint of one): a base model plus the adapter under `blobs`."""

    id: str
    created_at: int = field(default_factory=now)
    job_id: str
    base_model: str
    blobs: str  # key prefix of the adapter's files
    owned_by: str


#: In the name of a rung; a suffix holds no colon.
_RUNG = ":rung-"
_SUFFIX = re.compile(r"[^A-Za-z0-9_.-]+")


def fine_tuned_name(model: str, organization: str, suffix: str | None, job_id: str) -> str:
    """`ft:<base>:<org>:<suffix or empty>:<8 characters>`; scripts split it at the colons.

    A Hugging Face id or a path keeps its last part only: "/" and ":" have no place in the name.
    The eight characters come from the job's id, so a job that is taken up again keeps its name.
    """
    base = model.split(":")[1] if model.startswith("ft:") else model
    base = _SUFFIX.sub("-", base.rstrip("/").rsplit("/", 1)[-1]) or "model"
    middle = _SUFFIX.sub("-", suffix or "").strip("-").lower()
    return f"ft:{base}:{organization}:{middle}:{job_id.rsplit('-', 1)[-1][:8]}"


def checkpoint_name(model: str, step: int) -> str:
    """The name a checkpoint of `model` is called by."""
    return f"{model}:ckpt-step-{step}"


def rung_name(model: str, rung: str) -> str:
    """The name a cheaper rung of the job that made `model` is called by."""
    return f"{model}{_RUNG}{rung}"


def is_rung(model: str) -> bool:
    """True of a name that `rung_name` made."""
    return _RUNG in model
