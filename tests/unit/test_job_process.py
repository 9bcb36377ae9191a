"""What a job process writes into its row: on a real database, without a model."""

from __future__ import annotations

import errno
import io
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from heldout import disk
from heldout.errors import InvalidTrainingFile, JobPaused, ModelNotFound
from heldout.pipeline.consequences.base import SECONDS
from heldout.pipeline.crossfit import FoldWatch
from heldout.pipeline.training import CurvePoint
from heldout.pipeline.watch import InFold
from heldout.processes.job import DbWatch, Pace, validate
from heldout.processes.register import put_adapter
from heldout.records import Event, File, Job, JobStatus, now
from heldout.settings import Settings
from heldout.store.blobs import FileBlobs
from heldout.store.db import open_db
from tests.conftest import colour_row


@pytest.fixture
def watch(tmp_path: Path) -> DbWatch:
    """The watch of a running job."""
    settings = Settings(data_dir=tmp_path)
    job = Job(model="m", base_model="m", training_file="file-a", status=JobStatus.RUNNING, handle="process")
    db = open_db(settings.database)
    db.add_job(job)
    return DbWatch(job, settings, db, FileBlobs(tmp_path / "blobs"))


def ask_to_pause(watch: DbWatch) -> None:
    watch.db.pause_job(watch.job.id, True, Event(job_id=watch.job.id, message="please"))


def last_message(watch: DbWatch) -> str:
    return watch.db.list_events(watch.job.id, after=None, limit=1)[0][0].message


def test_a_pause_is_noticed_where_nothing_is_half_done_and_not_in_between(watch: DbWatch) -> None:
    watch.progress("train", 40, 100)
    ask_to_pause(watch)
    watch.message("in the middle of a step")
    time.sleep(0.6)
    with pytest.raises(JobPaused):
        watch.progress("train", 41, 100)


@pytest.mark.parametrize(
    ("stage", "pause", "told"),
    [
        ("train", JobPaused(41), "Paused at step 41; resume continues from there"),
        ("train", JobPaused(), "Paused at step 41 of 100; resume continues from the last checkpoint"),
        ("zero-shot prompt", JobPaused(), "Paused at 'zero-shot prompt' (41 of 100); resume starts this stage again"),
        ("fold 2 of 5: train", JobPaused(41), "Paused in fold 2 of 5 at step 41; resume continues from there"),
        ("fold 2 of 5: train", JobPaused(), "Paused in fold 2 of 5 at step 41 of 100; resume continues from the last"),
        ("fold 2 of 5: tuned model", JobPaused(), "Paused at 'fold 2 of 5: tuned model' (41 of 100); resume starts"),
    ],
)
def test_a_job_that_comes_to_rest_says_where_it_will_go_on(
    watch: DbWatch, stage: str, pause: JobPaused, told: str
) -> None:
    watch.progress(stage, 41, 100)
    watch.rest(pause)
    assert last_message(watch).startswith(told)
    assert watch.db.get_job(watch.job.id).status is JobStatus.QUEUED


def test_a_checkpoint_is_on_the_wire_with_its_metrics_and_told_of_once(watch: DbWatch, tmp_path: Path) -> None:
    folder = tmp_path / "step-000007"
    folder.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_bytes(b"{}")
    metrics = {
        "step": 7,
        "train_loss": 0.5,
        "train_accuracy": 0.8,
        "valid_loss": 0.6,
        "valid_calibrated_loss": 0.55,
        "valid_accuracy": 0.75,
    }
    watch.checkpoint(7, folder, metrics)
    watch.db.update_job(watch.job.id, attempts=2)
    watch.checkpoint(7, folder, metrics, again=True)  # the job was taken up from it
    assert watch.db.get_job(watch.job.id).attempts == 2, "that is no progress"
    checkpoints, _ = watch.db.list_checkpoints(watch.job.id, after=None, limit=10)
    assert [(one.step, one.model, one.metrics) for one in checkpoints] == [
        (
            7,
            f"{watch.name}:ckpt-step-7",
            {
                "step": 7,
                "train_loss": 0.5,
                "train_mean_token_accuracy": 0.8,
                "full_valid_loss": 0.6,
                "full_valid_mean_token_accuracy": 0.75,
            },
        )
    ]
    events, _ = watch.db.list_events(watch.job.id, after=None, limit=10)
    assert [event.message for event in events].count("Checkpoint created at step 7") == 1


def test_the_time_before_training_does_not_count_as_steps(watch: DbWatch) -> None:
    watch.progress("zero-shot prompt", 1, 2)
    time.sleep(0.4)
    watch.progress("zero-shot prompt", 2, 2)
    time.sleep(1.6)
    for step in range(1, 12):
        valid_loss = 1.0 if step == 11 else None
        watch.metrics(CurvePoint(step=step, train_loss=1.0, train_accuracy=0.5, valid_loss=valid_loss), 111)
        time.sleep(0.02)
    left = watch.db.get_job(watch.job.id).estimated_finish - now()
    left -= SECONDS  # that probes have in any case
    assert 1 <= left <= 8, "100 steps of 0.02 s and a bit, and the evaluation; not (2 s + 0.2 s) / 11 a step"


def test_a_resumed_job_is_estimated_by_the_steps_it_took_itself() -> None:
    pace = Pace(probes=0.0)
    for step in (501, 502, 503):
        pace.step(step)
        time.sleep(0.05)
    left = pace.seconds_left(600)
    assert left is not None
    assert 97 * 0.05 <= left <= 97 * 0.1
    pace.step(1)
    assert pace.seconds_left(600) is None, "training began anew"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds; a test moves it on."""
    seconds = [1000.0]
    monkeypatch.setattr("heldout.processes.job.time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


def test_with_folds_the_time_left_counts_the_folds_the_model_to_serve_and_the_probes(clock: list[float]) -> None:
    pace = Pace(probes=9.0)

    def train(fold: InFold | None, steps: range) -> None:
        for step in steps:
            clock[0] += 1
            pace.step(step, fold)

    first, second, last = (InFold(number, 5, "train") for number in (1, 2, 5))
    pace.progress("fold 1 of 5: zero-shot prompt")
    clock[0] += 7
    pace.progress("fold 1 of 5: zero-shot prompt")
    train(first, range(1, 2))
    assert pace.seconds_left(100) is None, "one step says nothing"
    train(first, range(2, 52))
    assert pace.seconds_left(100) == (49 + 7) + 5 * (100 + 7) + 9
    train(first, range(52, 61))  # it stops here, and is scored
    clock[0] += 7
    train(second, range(1, 12))
    assert pace.seconds_left(100) == (89 + 7) + 4 * (60 + 7) + 9, "folds end before their last step"
    train(last, range(31, 41))  # goes on where a process before this one was
    assert pace.seconds_left(100) == (60 + 7) + (60 + 7 + 11) / 2 + 9
    train(None, range(1, 11))
    assert pace.seconds_left(125) == 115 + 9, "nothing is scored after it"


def test_with_folds_probes_have_a_quarter_of_what_all_trainings_took(clock: list[float]) -> None:
    pace = Pace(probes=None)
    for number in (1, 2, 3, 4, 5):
        for step in range(1, 41):
            clock[0] += 1
            pace.step(step, InFold(number, 5, "train"))
    assert pace.seconds_left(40) == 0 + 40 + 6 * 40 / 4
    for step in range(1, 11):
        clock[0] += 1
        pace.step(step)
    assert pace.seconds_left(40) == 30 + (5 * 40 + 40) / 4


@pytest.mark.parametrize(("probes", "seconds"), [(None, 95.0), (30.0, 30.0), (0.0, 0.0)])
def test_what_the_probes_of_the_tuned_model_may_take_counts(
    clock: list[float], probes: float | None, seconds: float
) -> None:
    pace = Pace(probes)
    for step in range(1, 41):
        clock[0] += 1
        pace.step(step)
    assert pace.seconds_left(100) == 60 + seconds


@pytest.mark.parametrize(("rungs", "probes"), [(20, 65), (300, 25)])
def test_probes_have_what_rungs_and_answers_leave_of_the_trainings_time(
    clock: list[float], rungs: int, probes: int
) -> None:
    pace = Pace(None)
    pace.progress("zero-shot prompt")
    clock[0] += 10
    pace.progress("zero-shot prompt")
    clock[0] += rungs - 11  # the other rungs, up to the first step
    for step in range(1, 41):
        clock[0] += 1
        pace.step(step)
    assert pace.seconds_left(100) == 60 + 10 + probes, "steps, answers as long as the first rung's, probes"


def test_a_job_says_when_it_will_have_ended_while_a_fold_trains(watch: DbWatch, clock: list[float]) -> None:
    fold = FoldWatch(watch, 2, 5)
    fold.progress("zero-shot prompt", 1, 1)
    for step in (1, 2, 3):
        clock[0] += 10
        fold.progress("train", step, 100)
    left = watch.db.get_job(watch.job.id).estimated_finish - now()
    assert left == pytest.approx(10 * 97 + 4 * 1000 + 6 * 1000 / 4, abs=5)
    clock[0] += 1
    fold.progress("train", 99, 100)
    assert watch.db.get_job(watch.job.id).estimated_finish - now() == pytest.approx(left, abs=5), "not every step"


def test_a_full_disk_is_recognised_whoever_met_it() -> None:
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        assert disk.is_full(error)
        wrapped = ModelNotFound("cannot be loaded")
        wrapped.__cause__ = error
        assert disk.is_full(wrapped)
    assert not disk.is_full(OSError(errno.EACCES, "Permission denied"))
    assert not disk.is_full(InvalidTrainingFile("line 3: 'No space left on device' is no label")), "a ticket's text"


def test_an_adapter_goes_to_the_blobs_whole_or_not_at_all_and_an_earlier_one_stays(tmp_path: Path) -> None:
    blobs, folder = FileBlobs(tmp_path / "blobs"), tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    with pytest.raises(FileNotFoundError):
        put_adapter(blobs, "adapters/new", folder)
    assert list(blobs.keys("adapters/new")) == []
    (folder / "adapter_config.json").write_bytes(b"{}")
    put_adapter(blobs, "adapters/old", folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError):
        put_adapter(blobs, "adapters/old", folder)
    assert len(list(blobs.keys("adapters/old"))) == 2


def test_findings_of_a_refused_job_stand_on_its_files_and_among_its_events_the_worst_first(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    settings = Settings(data_dir=tmp_path, model_aliases={"m": str(tmp_path)})
    db, blobs = open_db(settings.database), FileBlobs(tmp_path / "blobs")
    files = {part: File(filename=f"{part}.jsonl", purpose="fine-tune", bytes=1) for part in ("train", "valid")}
    rows = [json.dumps(colour_row(i)) for i in range(60)]
    content = {"train": [*rows, "", "7"], "valid": rows[:20]}
    for part, file in files.items():
        blobs.put(file.blob, io.BytesIO("\n".join(content[part]).encode()))
        db.add_file(file)
    job = Job(model="m", base_model="m", training_file=files["train"].id, validation_file=files["valid"].id)
    db.add_job(job)
    with pytest.raises(InvalidTrainingFile, match=r"Line 62"):
        validate(DbWatch(job, settings, db, blobs))
    events = db.list_events(job.id, after=None, limit=50)[0][::-1]
    told = [(event.level, event.data["code"], event.data["file"]) for event in events]
    assert told[0] == ("error", "not_an_object", "train.jsonl")
    assert ("warn", "leak_exact", "valid.jsonl") in told
    assert sorted(told, key=lambda one: ("error", "warn", "info").index(one[0])) == told
    assert db.get_file(files["train"].id).findings[0] == events[0].data
    assert {one["code"] for one in db.get_file(files["valid"].id).findings} == {"leak_exact", "no_final_newline"}
