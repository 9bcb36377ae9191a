"""One look of the worker at rows whose processes are real, but no jobs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from heldout import disk
from heldout.executor.local import LocalExecutor
from heldout.processes.worker import ATTEMPTS, CLAIM, Worker
from heldout.records import Job, JobStatus
from heldout.settings import Settings
from heldout.store.db import open_db

DEAD = "4194305:1.00"  # above the largest pid there can be


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    settings = Settings(data_dir=tmp_path)
    return Worker(settings, open_db(settings.database), LocalExecutor())


def added(worker: Worker, **values: Any) -> Job:
    job = Job(model="m", base_model="m", training_file="file-a", **values)
    worker.db.add_job(job)
    return job


def last_message(worker: Worker, job: Job) -> str:
    return worker.db.list_events(job.id, after=None, limit=1)[0][0].message


def ended(worker: Worker, tmp_path: Path, code: int) -> str:
    """The handle of a process that has ended with this code."""
    handle = worker.executor.start([sys.executable, "-c", f"raise SystemExit({code})"], log=tmp_path / "log.txt")
    while worker.executor.poll(handle) is None:
        time.sleep(0.02)
    return handle


def test_a_job_whose_process_died_while_pausing_rests_and_nothing_is_started(worker: Worker) -> None:
    job = added(worker, status=JobStatus.RUNNING, paused=True, handle=DEAD, attempts=ATTEMPTS)
    worker.look()
    assert worker.db.get_job(job.id).pause == "paused"
    assert last_message(worker, job).startswith("Paused; the job process had ended before")
    for _ in range(2):
        worker.look()
    rests = worker.db.get_job(job.id)
    assert (rests.status, rests.handle, rests.attempts) == (JobStatus.QUEUED, None, 0)


def test_a_paused_job_holds_its_slot_until_its_process_is_gone(worker: Worker, tmp_path: Path) -> None:
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    handle = worker.executor.start(sleeping, log=tmp_path / "log.txt")
    try:
        leaving = added(worker, status=JobStatus.QUEUED, paused=True, handle=handle)
        waiting = added(worker, status=JobStatus.QUEUED, attempts=ATTEMPTS)  # would be given up if it were taken
        worker.look()
        assert worker.db.get_job(leaving.id).pause == "pausing"
        assert worker.db.get_job(waiting.id).status is JobStatus.QUEUED
    finally:
        worker.executor.stop(handle)
    for _ in range(2):
        worker.look()
    assert worker.db.get_job(leaving.id).pause == "paused"
    assert worker.db.get_job(waiting.id).status is JobStatus.FAILED


@pytest.mark.parametrize(
    ("status", "paused"),
    [
        (JobStatus.VALIDATING_FILES, False),
        (JobStatus.VALIDATING_FILES, True),
        (JobStatus.QUEUED, False),
        (JobStatus.RUNNING, False),
        (JobStatus.RUNNING, True),
    ],
)
def test_a_process_that_could_not_note_the_full_disk_left_its_code(
    worker: Worker, tmp_path: Path, status: JobStatus, paused: bool
) -> None:
    job = added(worker, status=status, handle=ended(worker, tmp_path, disk.EXIT_CODE), paused=paused)
    worker.look()
    failed = worker.db.get_job(job.id)
    assert failed.status is JobStatus.FAILED
    assert failed.error is not None
    assert failed.error["code"] == "disk_full"
    assert last_message(worker, job) == f"The job failed: {failed.error['message']}"


def test_a_claim_that_never_became_a_process_is_void(worker: Worker) -> None:
    own = added(worker, status=JobStatus.RUNNING, handle=f"{CLAIM}{os.getpid()}", attempts=ATTEMPTS)
    other = added(worker, status=JobStatus.RUNNING, handle=f"{CLAIM}{os.getppid()}", attempts=ATTEMPTS)
    worker.look()
    assert worker.db.get_job(own.id).status is JobStatus.FAILED, "it was taken, and given up"
    assert worker.db.get_job(other.id).status is JobStatus.RUNNING, "another worker is about to start it"
