"""The gate: whether a tuned model may answer, from the setting, its job's verdict and its release.

Here, and not at one door: the server asks before it passes a chat on, the inference process before it answers.
"""

from __future__ import annotations

import io
import re
from enum import Enum
from typing import Any

from heldout.errors import InvalidState, InvalidValue, NotFound, NotReleased
from heldout.pipeline import released
from heldout.records import Event, File, Job, now
from heldout.store.blobs import Blobs
from heldout.store.db import Db

#: Long enough for a sentence or two and a ticket's number; it stands in the report's first lines.
MAX_REASON = 1_000


class Decision(str, Enum):
    """What the gate does with a question to a model."""

    OPEN = "open"
    WARN = "warn"
    BLOCK = "block"


def decide(setting: str, verdict: dict[str, Any] | None, release: dict[str, Any] | None) -> Decision:
    """Any outcome but `ship` is held back: one that a later version adds must not pass unseen."""
    if setting == "off" or verdict is None or verdict["outcome"] == "ship" or release is not None:
        return Decision.OPEN
    return Decision.BLOCK if setting == "block" else Decision.WARN


def admit(setting: str, db: Db, model: str) -> str | None:
    """Let a question to this model pass; the outcome that its asker is to be warned of, if any.

    Raises NotReleased. A model that no job here made passes: the engine knows whether it exists.
    """
    if setting == "off" or not model.startswith("ft:"):
        return None
    job = db.jobs_of_models(model).get(model)
    if job is None or job.verdict is None:
        return None
    decision = decide(setting, job.verdict, job.release)
    if decision is Decision.BLOCK:
        raise _refusal(model, job)
    return str(job.verdict["outcome"]) if decision is Decision.WARN else None


def release(db: Db, blobs: Blobs, job_id: str, reason: str) -> Job:
    """Let the models of a job answer although its verdict is not `ship`; the reason goes into its row, its story
    and its report. Releasing again with the same reason changes nothing.

    Raises NotFound; InvalidValue for a reason that says nothing; InvalidState where there is nothing to release.
    """
    said = _one_line(reason)
    job = db.get_job(job_id)
    outcome = _releasable(job)
    if job.release is None:
        _record(db, blobs, job, outcome, {"reason": said, "released_at": now()})
        job = db.get_job(job_id)
    assert job.release is not None
    # The same again is no error: clients repeat a request whose answer was lost.
    if job.release["reason"] != said:
        raise InvalidState(
            f"Job {job.id} is already released, with the reason {job.release['reason']!r}. The first reason stands."
        )
    return job


def _one_line(reason: str) -> str:
    # Control characters: Postgres takes no NUL, and a terminal obeys the others.
    said = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", reason).split())
    if not said:
        raise InvalidValue(
            "A release needs a reason: say in a sentence why this model may answer although its verdict is not 'ship'.",
            param="reason",
        )
    if len(said) > MAX_REASON:
        raise InvalidValue(
            f"The reason has {len(said):,} characters; at most {MAX_REASON:,} are kept. Say it shorter.", param="reason"
        )
    return said


def _releasable(job: Job) -> str:
    """The outcome that is overruled."""
    if job.verdict is None:
        what = "made no model" if job.status.ended else "has no verdict yet: wait until it succeeded"
        raise InvalidState(f"Job {job.id} has status '{job.status.value}' and {what}. There is nothing to release.")
    outcome = str(job.verdict["outcome"])
    if outcome == "ship":
        raise InvalidState(f"The verdict of job {job.id} is 'ship': its models answer without a release.")
    return outcome


def _record(db: Db, blobs: Blobs, job: Job, outcome: str, release: dict[str, Any]) -> None:
    """Row, event and report, all or none. The report of the verdict's day stays a file under its own id."""
    event = Event(
        job_id=job.id,
        level="warn",
        message=f"Released although the verdict is {outcome}: {release['reason']}",
        data={"release": release},
    )
    new: dict[str, File] = {}
    recorded = False
    try:
        for file_id in job.result_files:
            if file := _released_report(db, blobs, file_id, release):
                new[file_id] = file
        results = [new[one].id if one in new else one for one in job.result_files]
        recorded = db.release_job(job.id, event, list(new.values()), release=release, result_files=results)
    finally:
        if not recorded:
            for file in new.values():
                blobs.delete(file.blob)


def _released_report(db: Db, blobs: Blobs, file_id: str, release: dict[str, Any]) -> File | None:
    """A result file that tells of the release, its bytes stored; None for one that does not."""
    try:
        file = db.get_file(file_id)
        add = released.ADD_TO.get(file.filename)
        if add is None:
            return None
        with blobs.open(file.blob) as stored:
            content = add(stored.read().decode(), release).encode()
    except NotFound:
        return None  # somebody deleted it; the row and the story have the release in any case
    told = File(filename=file.filename, purpose=file.purpose, bytes=len(content))
    blobs.put(told.blob, io.BytesIO(content))
    return told


def _refusal(model: str, job: Job) -> NotReleased:
    assert job.verdict is not None
    why = next(iter(job.verdict.get("reasons") or []), "")
    return NotReleased(
        f"The model '{model}' does not answer: the verdict of its job {job.id} is '{job.verdict['outcome']}'"
        f"{f' ({why})' if why else ''}. This server lets such a model answer once somebody releases it with a reason: "
        f'POST /v1/fine_tuning/jobs/{job.id}/release with {{"reason": "…"}}, '
        f'or heldout release {job.id} --reason "…".'
    )
