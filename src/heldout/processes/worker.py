"""The worker: claims jobs, starts their processes, watches them. `python -m heldout.processes.worker`.

It keeps nothing in memory that is not in the database: another worker can go on where this one was killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

import psutil

from heldout import disk
from heldout.errors import InvalidValue
from heldout.executor.base import Executor
from heldout.executor.local import LocalExecutor
from heldout.records import Event, Job, JobStatus, now
from heldout.settings import Settings, read_settings
from heldout.store.db import Db, open_db

#: How often a job is taken up again without having reached a checkpoint in between.
ATTEMPTS = 3
#: Jobs whose files are looked at at the same time; the others wait their turn.
CHECKS = 2
SECONDS_BETWEEN_LOOKS = 0.3
CLAIM = "claimed-by-"
LOG_TAIL = 2_000  # characters


def main() -> int:
    """Work until told to stop, or until whoever started us is gone."""
    settings = read_settings()
    worker = Worker(settings, open_db(settings.database), open_executor(settings.executor_url))
    stop = stop_event()
    parent = os.getppid()
    told = False
    while not stop.wait(SECONDS_BETWEEN_LOOKS) and os.getppid() == parent:
        try:
            worker.look()
            told = False
        except Exception as error:
            if not disk.is_full(error):
                raise
            # What is to be done stands in the rows, and is done once there is room to note it.
            if not told:
                with contextlib.suppress(OSError):  # stderr may go to the same disk
                    print(f"The database cannot be written, jobs wait: {error}", file=sys.stderr, flush=True)
            told = True
    if stop.is_set():
        worker.close()
    return 0


def open_executor(url: str) -> Executor:
    """The executor behind `url`. Only `local:` exists so far."""
    if url == "local:":
        return LocalExecutor()
    raise InvalidValue(f"HELDOUT_EXECUTOR_URL={url!r}: only local: is supported by this version")


def stop_event() -> threading.Event:
    """Set by SIGTERM and SIGINT."""
    stop = threading.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda *_: stop.set())
    return stop


class Worker:
    """Moves jobs along: one look at the rows at a time."""

    def __init__(self, settings: Settings, db: Db, executor: Executor) -> None:
        self.settings, self.db, self.executor = settings, db, executor

    def look(self) -> None:
        """Do whatever the rows ask for now."""
        validating = self.db.jobs_in(JobStatus.VALIDATING_FILES)
        busy = sum(not self._idle(job) for job in validating)
        for job in validating:
            if busy < CHECKS and self._idle(job):
                busy += 1
                self._take(job, "--check")
        running = self.db.jobs_in(JobStatus.RUNNING)
        for job in running:
            if self._idle(job):
                self._rest(job) if job.paused else self._take(job)
        # A queued job with a handle was started and has not said so yet.
        queued = self.db.jobs_in(JobStatus.QUEUED)
        free = self.settings.concurrent_jobs - len(running) - sum(job.handle is not None for job in queued)
        for job in queued:
            if job.handle is not None:
                if self._idle(job):
                    self.db.note_handle(job.id, job.handle, None) if job.paused else self._take(job)
            elif not job.paused and free > 0:
                free -= 1
                self._take(job)
        for job in self.db.jobs_with_handle(JobStatus.CANCELLED, JobStatus.FAILED, JobStatus.SUCCEEDED):
            self._put_away(job)

    def close(self) -> None:
        """Stop the processes; their jobs go on when a worker starts again."""
        held = self.db.jobs_with_handle(JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.RUNNING)
        for job in held:
            self.executor.stop(str(job.handle))
        for job in held:
            # Stopped by us, not by a fault of its own: it does not count as an attempt.
            self.db.update_job(job.id, handle=None, attempts=0)

    def _idle(self, job: Job) -> bool:
        """True when nobody works on the job: it has no process, and no worker is about to start one."""
        if job.handle is None:
            return True
        if job.handle.startswith(CLAIM):
            pid = int(job.handle.removeprefix(CLAIM))
            # Our own claims become handles before we look again, unless the disk was full.
            return pid == os.getpid() or not psutil.pid_exists(pid)
        return self.executor.poll(job.handle) is not None

    def _take(self, job: Job, *options: str) -> None:
        if self._ended_by_full_disk(job):
            self._fail_by_full_disk(job, None)
            return
        if job.attempts >= ATTEMPTS:
            self._give_up(job)
            return
        log = self.settings.work(job.id) / "log.txt"
        # Claimed before it is started: of two workers one starts it.
        if not self.db.claim_job(job, claimed := f"{CLAIM}{os.getpid()}"):
            return
        command = [sys.executable, "-m", "heldout.processes.job", job.id, *options]
        try:
            handle = self.executor.start(command, log=log)
        except OSError as error:
            if not disk.is_full(error):
                raise
            self._fail_by_full_disk(job, error)
            return
        try:
            self.db.note_handle(job.id, claimed, handle)
        except BaseException:
            self.executor.stop(handle)  # nobody would know of it
            raise

    def _rest(self, job: Job) -> None:
        """The job was asked to pause, and its process ended before it could do so."""
        if self._ended_by_full_disk(job):
            self._fail_by_full_disk(job, None)
            return
        text = "Paused; the job process had ended before: resume continues from the last checkpoint"
        self.db.put_back(job.id, Event(job_id=job.id, message=text))

    def _ended_by_full_disk(self, job: Job) -> bool:
        return bool(job.handle) and self.executor.poll(str(job.handle)) == disk.EXIT_CODE

    def _fail_by_full_disk(self, job: Job, error: OSError | None) -> None:
        self._fail(job, disk.CODE, disk.sentence(error, self.settings, job.id))

    def _give_up(self, job: Job) -> None:
        self._fail(
            job,
            "server_error",
            f"The job process ended {job.attempts} times without reaching a checkpoint. "
            f"The end of its log:\n{_tail(self.settings.work(job.id) / 'log.txt')}",
        )

    def _fail(self, job: Job, code: str, message: str) -> None:
        self.db.move_job(
            job.id,
            JobStatus.FAILED,
            Event(job_id=job.id, level="error", message=f"The job failed: {message}"),
            error={"code": code, "message": message, "param": None},
            finished_at=now(),
            estimated_finish=None,
        )

    def _put_away(self, job: Job) -> None:
        """The job has ended; make sure that its process has too."""
        assert job.handle is not None
        # A job that ended by itself is just leaving; a cancelled one may be in the middle of a step.
        if job.status is JobStatus.CANCELLED and self.executor.poll(job.handle) is None:
            self.executor.stop(job.handle)
        if self.executor.poll(job.handle) is not None:
            self.db.update_job(job.id, handle=None)


def _tail(log: Path) -> str:
    try:
        return log.read_text(errors="replace")[-LOG_TAIL:].strip() or "(empty)"
    except FileNotFoundError:
        return "(no log)"


if __name__ == "__main__":
    sys.exit(main())
