"""The job process: one fine-tuning job from its row to its verdict. `python -m heldout.processes.job ID`.

It may be killed at any instant: the row, the events and the last checkpoint survive, and another process
with the same command line goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heldout import disk, machine
from heldout.engine import catalogue
from heldout.errors import JobCancelled, JobPaused, UserError
from heldout.pipeline.checks import ModelTools
from heldout.pipeline.checks.groups import fingerprint
from heldout.pipeline.consequences.base import seconds_for_probes
from heldout.pipeline.findings import on_the_wire
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.intake import check_files, refuse_errors, tell_findings
from heldout.pipeline.request import Request, Source
from heldout.pipeline.run import run_job
from heldout.pipeline.watch import InFold, in_fold
from heldout.processes.register import put_adapter, register
from heldout.records import (
    Checkpoint,
    Event,
    Job,
    JobStatus,
    Model,
    checkpoint_name,
    fine_tuned_name,
    now,
    rung_name,
)
from heldout.settings import Settings, read_settings
from heldout.store.blobs import Blobs, open_blobs
from heldout.store.db import Db, open_db

if TYPE_CHECKING:
    from heldout.pipeline.outcome import Outcome
    from heldout.pipeline.plan import TrainPlan
    from heldout.pipeline.training import CurvePoint


#: Seconds between two estimates while a fold trains; its validations are not told.
ESTIMATE_EVERY = 5.0


def main(argv: list[str] | None = None) -> int:
    """Validate a job's files, or run the job."""
    parser = argparse.ArgumentParser(prog="heldout.processes.job")
    parser.add_argument("job")
    parser.add_argument("--check", action="store_true", help="only validate the files")
    asked = parser.parse_args(argv)
    settings = read_settings()
    # A job may take all cores; whoever asks the server something goes first. Before any library starts
    # threads: on Linux each has a niceness of its own, taken over from the one that starts it.
    machine.give_way(settings.nice)
    try:
        db, blobs = open_db(settings.database), open_blobs(settings.blobs)
        _work(db.get_job(asked.job), settings, db, blobs, check=asked.check)
    except Exception as error:
        if not disk.is_full(error):
            raise
        _log_trace()
        return disk.EXIT_CODE
    return 0


def _work(job: Job, settings: Settings, db: Db, blobs: Blobs, *, check: bool) -> None:
    """Do it; whatever goes wrong ends in the job's row."""
    watch = DbWatch(job, settings, db, blobs)
    try:
        if check:
            validate(watch)
        else:
            run(watch)
    except JobCancelled:
        _log("cancelled")
    except JobPaused as pause:
        watch.rest(pause)
    except Exception as error:  # noqa: BLE001 - the last place that can tell the user
        if disk.is_full(error):
            _log_trace()
            _fail(db, job, disk.CODE, disk.sentence(error, settings, job.id), None)
        elif isinstance(error, UserError):
            _fail(db, job, error.code or "invalid_request", str(error), error.param)
        else:
            _log_trace()
            _fail(db, job, "server_error", f"{type(error).__name__}: {error}", None)


def validate(watch: DbWatch) -> None:
    """Look at the files; the job becomes `queued`, or fails with every problem named."""
    job, settings, db = watch.job, watch.settings, watch.db
    request = _request(job, settings, db, watch.blobs)
    kind = catalogue.known_kind(job.base_model, settings.model_aliases)
    _, findings = check_files(request, ModelTools(kind=kind))
    db.update_job(job.id, attempts=0)
    for file_id in filter(None, (job.training_file, job.validation_file, job.holdout_file)):
        name = _name(db, job, file_id)
        db.set_findings(file_id, [on_the_wire(one) for one in findings if one.file == name])
    if any(finding.severity == "error" for finding in findings):
        tell_findings(findings, watch)  # a job that starts tells them then
    refuse_errors(request, findings)
    moved = Event(job_id=job.id, message="Files validated, moving job to queued state")
    db.move_job(job.id, JobStatus.QUEUED, moved, handle=None, attempts=0)


def run(watch: DbWatch) -> None:
    """Run the job to its end and register what it made."""
    job, settings, db = watch.job, watch.settings, watch.db
    watch.raise_if_paused()
    # torch and transformers come in here: a job that was paused meanwhile does not wait for them.
    from heldout.processes.tools import local_tools

    goes_on = job.started_at is not None
    started = Event(job_id=job.id, message="Fine-tuning job goes on" if goes_on else "Fine-tuning job started")
    if not db.move_job(job.id, JobStatus.RUNNING, started, started_at=job.started_at or now()):
        again = "The job process ended unexpectedly; the job is taken up again"
        db.add_event(Event(job_id=job.id, level="warn", message=again))
    threads, nice = settings.job_threads, os.nice(0)
    watch.message(
        f"Computing with {threads} {'thread' if threads == 1 else 'threads'} at nice level {nice}",
        data={"threads": threads, "nice": nice},
    )
    request = _request(job, settings, db, watch.blobs)
    tools = replace(
        local_tools(settings, job.base_model, watch),
        look=lambda examples: db.look(job.id, [fingerprint(one.messages) for one in examples]),
    )
    outcome = run_job(request, tools)
    # No look at the pause any more: what is done need not be done again.
    watch.raise_if_cancelled()
    _succeed(outcome, watch)


class DbWatch:
    """Writes what happens into the job's rows, and notices that the job was cancelled or paused."""

    def __init__(self, job: Job, settings: Settings, db: Db, blobs: Blobs) -> None:
        self.job, self.settings, self.db, self.blobs = job, settings, db, blobs
        self.name = fine_tuned_name(job.model, settings.organization, job.suffix, job.id)
        self._looked = self._estimated = 0.0
        self._stage = ("", 0, 0)
        self._pace = Pace(settings.eval_budget)
        self._planned = False

    def message(self, text: str, *, level: str = "info", data: dict[str, Any] | None = None) -> None:
        """See Watch.message."""
        self.raise_if_cancelled()
        self.db.add_event(Event(job_id=self.job.id, level=level, message=text, data=data or {}))
        _log(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        """See Watch.progress. The one place where a job is paused: nothing is half done here."""
        self._stage = (stage, done, total)
        fold = in_fold(stage)
        if fold and fold.stage == "train":
            self._pace.step(done, fold)
            if time.monotonic() - self._estimated > ESTIMATE_EVERY:
                self._estimate(total)
        elif self._planned:  # what comes before the plan, the checks, is not done again after training
            self._pace.progress(stage)
        if time.monotonic() - self._looked > 0.5:
            self.raise_if_paused()

    def planned(self, plan: TrainPlan) -> None:
        """See Watch.planned."""
        self._planned = True
        self.db.update_job(self.job.id, plan=plan.as_dict())

    def metrics(self, point: CurvePoint, total_steps: int) -> None:
        """See Watch.metrics. The sentence is OpenAI's: scripts read it with regular expressions."""
        text = f"Step {point.step}/{total_steps}: training loss={point.train_loss:.2f}"
        data: dict[str, Any] = {
            "step": point.step,
            "total_steps": total_steps,
            "train_loss": _finite(point.train_loss),
            "train_mean_token_accuracy": point.train_accuracy,
        }
        if point.valid_loss is not None:
            text += f", validation loss={point.valid_loss:.2f}, full validation loss={point.valid_loss:.2f}"
            for prefix in ("", "full_"):
                data[f"{prefix}valid_loss"] = _finite(point.valid_loss)
                data[f"{prefix}valid_mean_token_accuracy"] = point.valid_accuracy
        self._pace.step(point.step)
        if point.valid_loss is not None:
            self._estimate(total_steps)
        self.db.add_event(Event(job_id=self.job.id, type="metrics", message=text, data=data))

    def _estimate(self, total_steps: int) -> None:
        """Note when the job will have ended, as far as that is known."""
        left = self._pace.seconds_left(total_steps)
        if left is not None:
            self._estimated = time.monotonic()
            self.db.update_job(self.job.id, estimated_finish=now() + round(left))

    def checkpoint(self, step: int, folder: Path, metrics: dict[str, Any], *, again: bool = False) -> None:
        """See Watch.checkpoint."""
        told = Event(job_id=self.job.id, message=f"Checkpoint created at step {step}")
        if self.publish(step, folder, metrics, told):
            self.kept()

    def kept(self) -> None:
        """See Watch.kept. The job got somewhere: being killed again is no dead end."""
        self.db.update_job(self.job.id, attempts=0)

    def publish(self, step: int, folder: Path, metrics: dict[str, Any], event: Event | None = None) -> bool:
        """Make a checkpoint callable by its name. True when it was not recorded so before; then `event` is told."""
        prefix = f"adapters/{self.job.id}/step-{step}"
        put_adapter(self.blobs, prefix, folder)
        name = checkpoint_name(self.name, step)
        known = {
            "step": step,
            "train_loss": _finite(metrics.get("train_loss")),
            "train_mean_token_accuracy": metrics.get("train_accuracy"),
            "full_valid_loss": _finite(metrics.get("valid_loss")),
            "full_valid_mean_token_accuracy": metrics.get("valid_accuracy"),
        }
        return self.db.add_checkpoint(
            Checkpoint(job_id=self.job.id, step=step, model=name, metrics=known),
            self.model(name, prefix),
            event,
        )

    def model(self, name: str, prefix: str) -> Model:
        """The record of a model made by this job."""
        return Model(
            id=name,
            job_id=self.job.id,
            base_model=self.job.base_model,
            blobs=prefix,
            owned_by=self.settings.organization,
        )

    def raise_if_cancelled(self) -> Job:
        """The row as it is now. Raises JobCancelled when it says that the job has ended."""
        self._looked = time.monotonic()
        job = self.db.get_job(self.job.id)
        if job.status.ended:
            raise JobCancelled
        return job

    def raise_if_paused(self) -> None:
        """Raise JobPaused when the row says so, or JobCancelled."""
        if self.raise_if_cancelled().paused:
            raise JobPaused

    def rest(self, pause: JobPaused) -> None:
        """Put the paused job back into the queue, and say what a resumed one goes on from."""
        stage, done, total = self._stage
        fold = in_fold(stage)
        where = f"Paused in fold {fold.number} of {fold.of}" if fold else "Paused"
        if pause.step is not None:
            text = f"{where} at step {pause.step}; resume continues from there"
        elif stage == "train" or (fold and fold.stage == "train"):
            text = f"{where} at step {done} of {total}; resume continues from the last checkpoint"
        elif stage:
            text = f"Paused at '{stage}' ({done} of {total}); resume starts this stage again"
        else:
            text = "Paused before anything was computed"
        self.db.put_back(self.job.id, Event(job_id=self.job.id, message=text))
        _log(text)


class Pace:
    """How long a job will still take, from what this process has seen of it. Times are in seconds."""

    def __init__(self, probes: float | None) -> None:
        """`probes`: the most that probes of the tuned model may take; None: what other answers leave of the time of
        its training."""
        self._probes = probes
        self._scored: tuple[str, float, float] | None = None  # the first scoring stage, its begin and end
        self._fold: InFold | None = None  # that is trained; None: the model to serve
        self._begun: tuple[int, float] | None = None  # the first step of this training, and when it was done
        self._step = 0
        self._now = 0.0
        self._folds: list[float] = []  # from the first step of a fold to the first of the next

    def progress(self, stage: str) -> None:
        """A stage got on. The first one scores the holdout, as the tuned model will be in the end."""
        now = time.monotonic()
        if self._scored is None and stage != "train":
            self._scored = (stage, now, now)
        elif self._scored is not None and self._scored[0] == stage:
            self._scored = (stage, self._scored[1], now)

    def step(self, step: int, fold: InFold | None = None) -> None:
        """A step of training was done: of a fold, or of the model to serve."""
        now = time.monotonic()
        if fold != self._fold:
            # A fold that was taken up in the middle says nothing of a whole one.
            if self._begun is not None and self._begun[0] == 1:
                self._folds.append(now - self._begun[1])
            self._fold, self._begun = fold, None
            if fold is None:
                self._scored = None  # the folds were scored; the model to serve is not
        self._step, self._now = step, now
        if self._begun is None or step <= self._begun[0]:
            self._begun = (step, now)

    def seconds_left(self, total_steps: int) -> float | None:
        """Of this training, and of all that comes after it; None until two steps were seen."""
        if self._begun is None or self._step == self._begun[0]:
            return None
        first, began = self._begun
        a_step = (self._now - began) / (self._step - first)
        scoring = self._scored[2] - self._scored[1] if self._scored else 0.0
        left = a_step * (total_steps - self._step) + scoring
        if self._fold is None and not self._folds:
            rungs = max(0.0, began - self._scored[1]) if self._scored else 0.0
            return left + self._probing(a_step * total_steps, rungs + scoring)
        a_fold = sum(self._folds) / len(self._folds) if self._folds else a_step * total_steps + scoring
        # What prompts took in five folds is not known here; it leaves probes the least they have in any case.
        if self._fold is None:
            trained = sum(self._folds) + a_step * total_steps
            return left + self._probing(trained, trained)
        trained = a_fold * (self._fold.of + 1)
        # The folds after this one, and the model to serve: it is trained for about as long as they were.
        return left + a_fold * (self._fold.of - self._fold.number + 1) + self._probing(trained, trained)

    def _probing(self, trained: float, answering: float) -> float:
        return seconds_for_probes(trained, answering) if self._probes is None else self._probes


def _succeed(outcome: Outcome, watch: DbWatch) -> None:
    """Register what the job made, then let it succeed: its last events and all results in one move."""
    job, adapter = watch.job, outcome.adapter
    best = next(point for point in adapter.curve if point.step == adapter.best_step)
    watch.publish(adapter.best_step, adapter.checkpoint, best.as_dict())
    watch.db.mark_best(job.id, adapter.best_step)
    results = register(outcome, job, watch.name, watch.settings, watch.db, watch.blobs)
    # Before the two sentences that scripts wait for at a job's end.
    for served in outcome.served_rungs:
        text = f"The rung {served.rung} can be asked too: {rung_name(watch.name, served.rung)}"
        watch.db.add_event(Event(job_id=job.id, message=text))
    watch.db.add_event(Event(job_id=job.id, message=f"New fine-tuned model created: {watch.name}"))
    done = Event(job_id=job.id, message="The job has successfully completed")
    watch.db.move_job(job.id, JobStatus.SUCCEEDED, done, estimated_finish=None, **results)


def _request(job: Job, settings: Settings, db: Db, blobs: Blobs) -> Request:
    def source(file_id: str | None) -> Source | None:
        if file_id is None:
            return None
        blob = db.get_file(file_id).blob
        return Source(name=_name(db, job, file_id), open=lambda: blobs.open(blob))

    directory = settings.work(job.id)
    directory.mkdir(parents=True, exist_ok=True)
    training = source(job.training_file)
    assert training is not None
    return Request(
        base_model=job.base_model,
        training=training,
        validation=source(job.validation_file),
        holdout=source(job.holdout_file),
        seed=job.seed,
        hyperparameters=Hyperparameters.parse(job.hyperparameters),
        directory=directory,
        suffix=job.suffix,
        environment=settings.of_jobs,
        keep_leaks=job.keep_leaks,
        grader=job.grader,
        eval_budget=settings.eval_budget,
    )


def _name(db: Db, job: Job, file_id: str) -> str:
    """How reports call a file: its name, with its id where two files of the job share a name."""
    names = {
        one: db.get_file(one).filename
        for one in (job.training_file, job.validation_file, job.holdout_file)
        if one is not None
    }
    same = list(names.values()).count(names[file_id]) > 1
    return f"{names[file_id]} ({file_id})" if same else names[file_id]


def _fail(db: Db, job: Job, code: str, message: str, param: str | None) -> None:
    _log(f"failed: {message}")
    db.move_job(
        job.id,
        JobStatus.FAILED,
        Event(job_id=job.id, level="error", message=f"The job failed: {message}"),
        error={"code": code, "message": message, "param": param},
        finished_at=now(),
        estimated_finish=None,
    )


def _finite(number: float | None) -> float | None:
    """None for what JSON has no number for."""
    return number if number is not None and math.isfinite(number) else None


def _log(text: str) -> None:
    # The log may lie on the very disk that is full; the job's rows tell the same story.
    with contextlib.suppress(OSError):
        print(text, flush=True)


def _log_trace() -> None:
    with contextlib.suppress(OSError):
        traceback.print_exc()


if __name__ == "__main__":
    code = main()
    if code:
        # Python would try to write what is left for the log, fail again, and leave with another code.
        os._exit(code)
