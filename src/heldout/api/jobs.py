"""`/v1/fine_tuning/jobs`: ask for a job, follow it, stop it. The work itself happens elsewhere."""

from __future__ import annotations

from typing import Annotated, NoReturn

from fastapi import APIRouter, Query, Request

from heldout.api import wire_jobs as wire
from heldout.api.deps import DbDep, SettingsDep
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
        # 400, not 409: the client would repeat a 409 by itself.
        raise InvalidState(f"Job {job_id} has status '{job.status.value}' and can no longer be cancelled.")
    return wire.FineTuningJob.of(job, settings.organization)


@router.post("/{job_id}/pause")
def pause_job(job_id: str, db: DbDep) -> None:
    _refuse(db.get_job(job_id), "paused")


@router.post("/{job_id}/resume")
def resume_job(job_id: str, db: DbDep) -> None:
    _refuse(db.get_job(job_id), "resumed")


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


def _refuse(job: Job, action: str) -> NoReturn:
    raise InvalidState(
        f"Job {job.id} has status '{job.status.value}'. This version has no pause: a job cannot be {action}. "
        "Cancel it, or let it run.",
        code="unsupported_value",
    )
