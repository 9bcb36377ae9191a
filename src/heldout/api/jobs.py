"""`/v1/fine_tuning/jobs`: ask for a job, follow it, stop it. The work itself happens elsewhere."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from heldout import gate
from heldout.api import wire_jobs as wire
from heldout.api.deps import BlobsDep, DbDep, SettingsDep
from heldout.api.wire import Page
from heldout.engine.catalogue import resolve
from heldout.errors import (
    InvalidHoldoutFile,
    InvalidState,
    InvalidTrainingFile,
    InvalidValidationFile,
    InvalidValue,
    NotFound,
    UserError,
)
from heldout.records import Event, Job, JobStatus, now
from heldout.settings import Settings
from heldout.store.db import Db

router = APIRouter(prefix="/v1/fine_tuning/jobs")

Limit = Annotated[int, Query(ge=1, le=100)]


@router.post("")
def create_job(body: wire.CreateJob, settings: SettingsDep, db: DbDep) -> wire.FineTuningJob:
    job = body.to_job(_base_model(body.model, settings))
    _check_file(db, job.training_file, InvalidTrainingFile)
    _check_file(db, job.validation_file, InvalidValidationFile)
    _check_file(db, job.holdout_file, InvalidHoldoutFile)
    db.add_job(job, *_first_events(job, body.ignored_integrations()))
    return wire.FineTuningJob.of(job, settings.organization)


@router.get("")
def list_jobs(
    request: Request, settings: SettingsDep, db: DbDep, after: str | None = None, limit: Limit = 20
) -> Page[wire.FineTuningJob]:
    metadata = wire.metadata_filter(request.query_params.multi_items())
    jobs, more = db.list_jobs(after=after, limit=limit, metadata=metadata)
    return Page.of([wire.FineTuningJob.of(job, settings.organization) for job in jobs], more)


@router.get("/{job_id}")
def get_job(job_id: str, settings: SettingsDep, db: DbDep) -> wire.FineTuningJob:
    return wire.FineTuningJob.of(db.get_job(job_id), settings.organization)


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, settings: SettingsDep, db: DbDep) -> wire.FineTuningJob:
    """The row moves at once; a job process that is running finds out at its next safe point."""
    db.get_job(job_id)
    event = Event(job_id=job_id, message="Fine-tuning job cancelled")
    moved = db.move_job(job_id, JobStatus.CANCELLED, event, finished_at=now(), estimated_finish=None)
    job = db.get_job(job_id)
    if not moved:
        raise _refused(job, "cancelled")
    return wire.FineTuningJob.of(job, settings.organization)


@router.post("/{job_id}/pause")
def pause_job(job_id: str, settings: SettingsDep, db: DbDep) -> wire.FineTuningJob:
    """The row is marked at once; a job process that is running writes a checkpoint at its next safe point."""
    event = Event(job_id=job_id, message=_PAUSING[db.get_job(job_id).status])
    asked = db.pause_job(job_id, True, event)
    job = db.get_job(job_id)
    if not asked:
        raise _refused(job, "paused", f"is already {job.pause}")
    return wire.FineTuningJob.of(job, settings.organization)


@router.post("/{job_id}/resume")
def resume_job(job_id: str, settings: SettingsDep, db: DbDep) -> wire.FineTuningJob:
    """The job takes its old place in the queue; the worker takes it up when there is a slot."""
    db.get_job(job_id)
    asked = db.pause_job(job_id, False, Event(job_id=job_id, message="Fine-tuning job resumed"))
    job = db.get_job(job_id)
    if not asked:
        raise _refused(job, "resumed", "is not paused")
    return wire.FineTuningJob.of(job, settings.organization)


@router.post("/{job_id}/release")
def release_job(
    job_id: str, body: wire.ReleaseJob, settings: SettingsDep, db: DbDep, blobs: BlobsDep
) -> wire.FineTuningJob:
    return wire.FineTuningJob.of(gate.release(db, blobs, job_id, body.reason), settings.organization)


@router.get("/{job_id}/events")
def list_events(job_id: str, db: DbDep, after: str | None = None, limit: Limit = 20) -> Page[wire.JobEvent]:
    db.get_job(job_id)
    events, more = db.list_events(job_id, after=after, limit=limit)
    return Page.of([wire.JobEvent.of(event) for event in events], more)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(job_id: str, db: DbDep, after: str | None = None, limit: Limit = 10) -> Page[wire.JobCheckpoint]:
    db.get_job(job_id)
    checkpoints, more = db.list_checkpoints(job_id, after=after, limit=limit)
    return Page.of([wire.JobCheckpoint.of(checkpoint) for checkpoint in checkpoints], more)


def _base_model(model: str, settings: Settings) -> str:
    if model.startswith("ft:"):
        raise InvalidValue(
            f"'{model}' is a fine-tuned model; this version trains base models only. "
            "Name its base model and put the earlier examples into the training file.",
            code="unsupported_value",
            param="model",
        )
    return resolve(model, settings.model_aliases).name


def _check_file(db: Db, file_id: str | None, error: type[UserError]) -> None:
    """The file is there and is meant for training. What is in it, the job will say: some clients create
    the job in the second of the upload and take a 400 for "not ready yet"."""
    if file_id is None:
        return
    try:
        file = db.get_file(file_id)
    except NotFound as missing:
        # 400, not 404: the job's path exists, one of its parameters is wrong.
        raise error(f"{missing}. Upload it first, with purpose 'fine-tune'.") from None
    if file.purpose != "fine-tune":
        raise error(f"{file_id} has purpose '{file.purpose}'; a job needs files with purpose 'fine-tune'.")


def _first_events(job: Job, ignored: list[str]) -> list[Event]:
    also = f" and validation file: {job.validation_file}" if job.validation_file else ""
    said = [("info", f"Created fine-tuning job: {job.id}")]
    if job.base_model != job.model:
        said.append(("info", f"'{job.model}' is an alias on this server: the job trains {job.base_model}"))
    said += [("warn", f"Integration '{name}' is not supported by this version: ignored") for name in ignored]
    said.append(("info", f"Validating training file: {job.training_file}{also}"))
    return [Event(job_id=job.id, level=level, message=message) for level, message in said]


#: What a job's story says when it is asked to pause; a running one adds where it stopped when it has.
_PAUSING = dict.fromkeys(JobStatus, "Fine-tuning job pausing: it stops at its next safe point") | {
    JobStatus.VALIDATING_FILES: "Fine-tuning job paused: its files are still validated, then it waits",
    JobStatus.QUEUED: "Fine-tuning job paused: it keeps its place in the queue and waits",
}


def _refused(job: Job, action: str, otherwise: str = "") -> InvalidState:
    """400, not 409: the client would repeat a 409 by itself."""
    reason = f"can no longer be {action}" if job.status.ended else otherwise
    return InvalidState(f"Job {job.id} has status '{job.status.value}' and {reason}.")
