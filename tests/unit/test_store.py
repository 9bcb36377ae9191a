"""The database's conditional moves and the blobs' all-or-nothing files."""

from __future__ import annotations

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from heldout.errors import InvalidValue, NotFound
from heldout.records import Checkpoint, Event, File, Job, JobStatus, Model
from heldout.store.blobs import FileBlobs, fetch_folder, open_blobs, put_files
from heldout.store.db import Db, migrate, open_db


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database that is not there yet, or is empty."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new' / 'heldout.db'}"
    return str(request.getfixturevalue("new_postgres")())


@pytest.fixture
def db(url: str) -> Db:
    return open_db(url)


@pytest.fixture
def blobs(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "blobs")


def added(db: Db, **values: Any) -> Job:
    """A job in the database."""
    job = Job(**{"model": "m", "base_model": "m", "training_file": "file-a", **values})
    db.add_job(job)
    return job


def messages(db: Db, job: Job) -> list[str]:
    """A job's story, oldest first."""
    events, _ = db.list_events(job.id, after=None, limit=1000)
    return [one.message for one in reversed(events)]


def test_a_job_comes_back_as_it_was_added(db: Db) -> None:
    job = added(db, hyperparameters={"n_epochs": 3}, metadata={"a": "b"}, seed=7, suffix="x")
    assert db.get_job(job.id) == job
    with pytest.raises(NotFound, match="Could not find fine tune: ftjob-none"):
        db.get_job("ftjob-none")


def test_a_move_happens_once(db: Db) -> None:
    job = added(db)
    event = [Event(job_id=job.id, message=f"queued {i}") for i in range(2)]
    assert db.move_job(job.id, JobStatus.QUEUED, event[0]) is True
    assert db.move_job(job.id, JobStatus.QUEUED, event[1]) is False
    assert db.get_job(job.id).status is JobStatus.QUEUED
    assert messages(db, job) == ["queued 0"], "a move that was lost leaves no trace"


def test_a_move_takes_its_values_along_or_changes_nothing(db: Db) -> None:
    job = added(db, status=JobStatus.QUEUED)
    assert db.move_job(job.id, JobStatus.RUNNING, started_at=5)
    assert not db.move_job(job.id, JobStatus.RUNNING, started_at=9)
    assert db.get_job(job.id).started_at == 5
    assert not db.move_job("ftjob-none", JobStatus.RUNNING)


@pytest.mark.parametrize("end", [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED])
def test_an_ended_job_never_moves_again(db: Db, end: JobStatus) -> None:
    job = added(db, status=JobStatus.RUNNING)
    assert db.move_job(job.id, end)
    assert not any(db.move_job(job.id, to) for to in JobStatus if to is not JobStatus.VALIDATING_FILES)
    assert db.get_job(job.id).status is end


def test_of_two_claims_one_wins(db: Db) -> None:
    job = added(db)
    assert db.claim_job(job, "worker 1") is True
    assert db.claim_job(job, "worker 2") is False, "it saw the job before the first claim"
    claimed = db.get_job(job.id)
    assert (claimed.handle, claimed.attempts) == ("worker 1", 1)
    assert db.claim_job(claimed, "worker 3") is True, "whoever has seen the dead handle may replace it"
    assert db.get_job(job.id).attempts == 2


def test_of_many_claims_at_the_same_time_one_wins(db: Db) -> None:
    job = added(db)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: db.claim_job(job, f"worker {n}"), range(8)))
    assert won.count(True) == 1
    assert db.get_job(job.id).handle == f"worker {won.index(True)}"


def test_an_ended_job_is_not_claimed(db: Db) -> None:
    job = added(db, status=JobStatus.CANCELLED)
    assert db.claim_job(job, "worker") is False


def test_a_job_is_paused_once_and_resumed_once_and_ended_ones_never(db: Db) -> None:
    job, ended = added(db, status=JobStatus.RUNNING, attempts=2), added(db, status=JobStatus.FAILED)
    for paused in (True, False):
        asked = [Event(job_id=job.id, message=f"{paused} {i}") for i in range(2)]
        assert [db.pause_job(job.id, paused, one) for one in asked] == [True, False]
        assert (db.get_job(job.id).paused, db.get_job(job.id).attempts) == (paused, 0)
        assert not db.pause_job(ended.id, paused, Event(job_id=ended.id, message="no"))
    assert messages(db, job) == ["True 0", "False 0"]
    assert messages(db, ended) == []


def test_a_job_that_rests_is_queued_and_keeps_its_leaving_process(db: Db) -> None:
    job = added(db, status=JobStatus.RUNNING, handle="process", attempts=1, estimated_finish=9, started_at=5)
    assert db.put_back(job.id, Event(job_id=job.id, message="rests"))
    assert not db.put_back(job.id, Event(job_id=job.id, message="again"))
    rests = db.get_job(job.id)
    assert (rests.status, rests.handle, rests.attempts) == (JobStatus.QUEUED, "process", 0)
    assert (rests.estimated_finish, rests.started_at) == (None, 5)
    assert messages(db, job) == ["rests"]


def test_a_job_that_was_paused_a_moment_ago_is_not_claimed(db: Db) -> None:
    job = added(db, status=JobStatus.QUEUED)
    db.pause_job(job.id, True, Event(job_id=job.id, message="wait"))
    assert db.claim_job(job, "worker") is False, "the worker saw it before"


def test_a_job_is_released_once_with_its_event_and_its_files(db: Db) -> None:
    job = added(db, status=JobStatus.SUCCEEDED, verdict={"outcome": "dont_ship"})
    reports = [File(filename="report.json", purpose="fine-tune-results", bytes=i) for i in range(2)]
    events = [Event(job_id=job.id, message=f"released {i}") for i in range(2)]
    done = [
        db.release_job(job.id, one, [report], release={"reason": report.id}, result_files=[report.id])
        for one, report in zip(events, reports, strict=True)
    ]
    assert done == [True, False]
    assert (db.get_job(job.id).release, db.get_job(job.id).result_files) == ({"reason": reports[0].id}, [reports[0].id])
    assert messages(db, job) == ["released 0"]
    assert [file.id for file in db.list_files(after=None, limit=9)[0]] == [reports[0].id]


def test_a_models_job_is_found_by_the_models_name_and_a_model_without_one_is_left_out(db: Db) -> None:
    job = added(db, verdict={"outcome": "ship"})
    for name, job_id in (("ft:a", job.id), ("ft:a:ckpt-step-5", job.id), ("ft:b", "ftjob-none")):
        db.add_model(Model(id=name, job_id=job_id, base_model="m", blobs="x", owned_by="o"))
    assert db.jobs_of_models() == {"ft:a": job, "ft:a:ckpt-step-5": job}
    assert db.jobs_of_models("ft:a", "ft:b") == {"ft:a": job}


def open_together(url: str, then: str) -> list[str]:
    """What five processes print that open the database at the same moment, and then do something with `db`."""
    program = "from heldout.store.db import open_db; print(end='.', flush=True); input(); "
    program += f"db = open_db({url!r}); {then}"
    command = [sys.executable, "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    opening = [subprocess.Popen(command, text=True, **pipes) for _ in range(5)]
    for process in opening:
        assert process.stdout is not None
        assert process.stdout.read(1) == ".", "imports take longer than the moment that matters"
    for process in opening:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate()[0].strip() for process in opening]


def test_a_new_database_gets_its_tables_from_one_of_many_that_open_it_at_once(url: str) -> None:
    assert open_together(url, "print(db.list_models())") == ["[]"] * 5


def test_a_database_of_an_earlier_version_is_brought_up_to_date_by_many_at_once(url: str, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    engine = create_engine(url)
    migrate(engine, "0001")
    with engine.begin() as connection:
        job = {"id": "ftjob-old", "created_at": 1, "status": "queued", "model": "m", "base_model": "m"}
        job |= {"training_file": "f", "seed": 1, "method": "supervised", "attempts": 0}
        job |= dict.fromkeys(("hyperparameters", "metadata"), "{}") | dict.fromkeys(
            ("integrations", "result_files"), "[]"
        )
        columns, places = ", ".join(job), ", ".join(f":{name}" for name in job)
        connection.execute(text(f"INSERT INTO jobs ({columns}) VALUES ({places})"), job)
    engine.dispose()
    assert open_together(url, "print(db.get_job('ftjob-old').paused)") == ["False"] * 5
    assert open_db(url).get_job("ftjob-old").status is JobStatus.QUEUED


def test_a_handle_replaces_its_own_claim_only(db: Db) -> None:
    job = added(db)
    db.claim_job(job, "claim")
    db.note_handle(job.id, "another claim", "process 1")
    assert db.get_job(job.id).handle == "claim"
    db.note_handle(job.id, "claim", "process 2")
    assert db.get_job(job.id).handle == "process 2"
    db.note_handle(job.id, "process 2", None)
    assert db.get_job(job.id).handle is None


def test_events_of_one_second_keep_their_order_and_their_pages(db: Db) -> None:
    job = added(db)
    for i in range(7):
        db.add_event(Event(job_id=job.id, message=f"event {i}", created_at=1_700_000_000))
    assert messages(db, job) == [f"event {i}" for i in range(7)]
    seen: list[str] = []
    after, more = None, True
    while more:
        page, more = db.list_events(job.id, after=after, limit=3)
        seen += [one.message for one in page]
        after = page[-1].id
    assert seen == [f"event {i}" for i in reversed(range(7))]
    with pytest.raises(InvalidValue, match="no such object in this list"):
        db.list_events(job.id, after="ftevent-none", limit=3)


def test_a_cursor_of_another_job_is_refused(db: Db) -> None:
    one, other = added(db), added(db)
    event = Event(job_id=other.id, message="x")
    db.add_event(event)
    with pytest.raises(InvalidValue):
        db.list_events(one.id, after=event.id, limit=3)


def test_a_checkpoint_that_is_passed_twice_is_recorded_once(db: Db) -> None:
    job = added(db)
    for _ in range(2):
        model = Model(id="ft:m:o::x:ckpt-step-5", job_id=job.id, base_model="m", blobs="adapters/x", owned_by="o")
        db.add_checkpoint(Checkpoint(job_id=job.id, step=5, model=model.id, metrics={"a": 1}), model)
        db.add_model(model)
    checkpoints, more = db.list_checkpoints(job.id, after=None, limit=10)
    assert [(one.step, one.best, one.metrics) for one in checkpoints] == [(5, False, {"a": 1})]
    assert not more
    assert [one.id for one in db.list_models()] == ["ft:m:o::x:ckpt-step-5"]


def test_a_checkpoint_is_told_of_once_and_again_when_it_has_become_another(db: Db) -> None:
    job = added(db)
    model = Model(id="ft:m:o::x:ckpt-step-5", job_id=job.id, base_model="m", blobs="adapters/x", owned_by="o")
    for loss in (0.5, 0.5, 0.4):
        told = Event(job_id=job.id, message=f"loss {loss}")
        db.add_checkpoint(Checkpoint(job_id=job.id, step=5, model=model.id, metrics={"loss": loss}), model, told)
    checkpoints, _ = db.list_checkpoints(job.id, after=None, limit=10)
    assert [one.metrics for one in checkpoints] == [{"loss": 0.4}], "its weights are those of the second time"
    events, _ = db.list_events(job.id, after=None, limit=10)
    assert [event.message for event in reversed(events) if event.message.startswith("loss")] == ["loss 0.5", "loss 0.4"]


def test_one_checkpoint_is_the_best(db: Db) -> None:
    job = added(db)
    for step in (5, 10, 15):
        model = Model(id=f"ft:{step}", job_id=job.id, base_model="m", blobs="b", owned_by="o")
        db.add_checkpoint(Checkpoint(job_id=job.id, step=step, model=model.id), model)
    for best in (15, 10):
        db.mark_best(job.id, best)
    checkpoints, _ = db.list_checkpoints(job.id, after=None, limit=10)
    assert [(one.step, one.best) for one in checkpoints] == [(15, False), (10, True), (5, False)]


def test_checkpoints_come_by_step_however_late_one_is_recorded(db: Db) -> None:
    job = added(db)
    for step in (5, 15, 30, 28):  # the kept one is recorded after the last
        model = Model(id=f"ft:{step}", job_id=job.id, base_model="m", blobs="b", owned_by="o")
        db.add_checkpoint(Checkpoint(job_id=job.id, step=step, model=model.id), model)
    first, more = db.list_checkpoints(job.id, after=None, limit=2)
    assert more
    rest, more = db.list_checkpoints(job.id, after=first[-1].id, limit=10)
    assert not more
    assert [one.step for one in (*first, *rest)] == [30, 28, 15, 5]


def test_jobs_are_found_by_metadata_and_status(db: Db) -> None:
    plain, tagged = added(db), added(db, metadata={"it's": 'a "key"', "b": "c"}, status=JobStatus.RUNNING)
    assert [one.id for one in db.list_jobs(after=None, limit=9, metadata={"it's": 'a "key"'})[0]] == [tagged.id]
    assert [one.id for one in db.list_jobs(after=None, limit=9, metadata={})[0]] == [plain.id]
    assert [one.id for one in db.list_jobs(after=None, limit=9)[0]] == [tagged.id, plain.id]
    assert [one.id for one in db.jobs_in(JobStatus.RUNNING)] == [tagged.id]
    assert db.jobs_with_handle(JobStatus.RUNNING) == []


def test_a_deleted_file_is_gone(db: Db) -> None:
    file = File(filename="a.jsonl", purpose="fine-tune", bytes=3)
    db.add_file(file)
    db.set_findings(file.id, [{"code": "odd"}])
    assert db.get_file(file.id).findings == [{"code": "odd"}]
    db.delete_file(file.id)
    for _ in range(2):
        with pytest.raises(NotFound, match=f"No such File object: {file.id}"):
            db.delete_file(file.id)


def test_a_database_is_opened_again_with_its_rows(url: str) -> None:
    job = added(open_db(url))
    assert open_db(url).get_job(job.id) == job


def test_a_blob_is_read_back_and_replaced_whole(blobs: FileBlobs) -> None:
    assert blobs.put("files/file-1", io.BytesIO(b"x" * 3_000_000)) == 3_000_000
    assert blobs.put("files/file-1", io.BytesIO(b"short")) == 5
    with blobs.open("files/file-1") as content:
        assert content.read() == b"short"
    assert list(blobs.keys("files")) == ["files/file-1"]


def test_a_put_stores_what_is_left_to_read(blobs: FileBlobs) -> None:
    stream = io.BytesIO(b"headbody")
    stream.seek(4)
    assert blobs.put("a", stream) == 4


def test_a_missing_key_is_named(blobs: FileBlobs) -> None:
    with pytest.raises(NotFound, match="adapters/none"):
        blobs.open("adapters/none")


@pytest.mark.parametrize("key", ["adapters", "adapters/a/b"])
def test_a_key_above_or_below_a_blob_is_missing_too(blobs: FileBlobs, key: str) -> None:
    blobs.put("adapters/a", io.BytesIO(b"x"))
    with pytest.raises(NotFound, match=key):
        blobs.open(key)


@pytest.mark.parametrize(
    "key",
    ["../outside", "a/../../outside", "/etc/passwd", "a//b", "a/", "", ".", "..", ".hidden", "a/.put-x", "a\n", "a\0b"],
)
def test_keys_that_are_none_are_refused_everywhere(blobs: FileBlobs, key: str) -> None:
    uses = (
        lambda: blobs.put(key, io.BytesIO(b"x")),
        lambda: blobs.open(key),
        lambda: list(blobs.keys(key)),
        lambda: blobs.delete(key),
    )
    for use in uses:
        with pytest.raises(InvalidValue, match="is not a blob key"):
            use()
    assert not (blobs.root.parent / "outside").exists()


class Failing(io.RawIOBase):
    """A stream that breaks off in the middle, as an upload does."""

    def __init__(self) -> None:
        self.left = 2

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ConnectionResetError("gone")
        return b"half"


def test_a_put_that_fails_leaves_nothing(blobs: FileBlobs) -> None:
    with pytest.raises(ConnectionResetError):
        blobs.put("files/new", Failing())  # type: ignore[arg-type]
    assert list(blobs.keys("files")) == []
    assert [path for path in blobs.root.rglob("*") if path.is_file()] == []


def test_a_put_that_fails_keeps_the_old_blob(blobs: FileBlobs) -> None:
    blobs.put("files/old", io.BytesIO(b"before"))
    with pytest.raises(ConnectionResetError):
        blobs.put("files/old", Failing())  # type: ignore[arg-type]
    with blobs.open("files/old") as content:
        assert content.read() == b"before"


def test_a_reader_of_half_a_put_sees_no_blob(blobs: FileBlobs) -> None:
    class Looking(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert list(blobs.keys("files")) == []
            with pytest.raises(NotFound):
                blobs.open("files/a")
            return super().read(size)

    blobs.put("files/a", Looking(b"x"))
    assert list(blobs.keys("files")) == ["files/a"]


def test_deleting_twice_is_fine(blobs: FileBlobs) -> None:
    blobs.put("a/b", io.BytesIO(b"x"))
    for _ in range(2):
        blobs.delete("a/b")
    assert list(blobs.keys("a")) == []


def test_a_folder_travels_through_the_blobs(blobs: FileBlobs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "a.json").write_text("1")
    (source / "b.bin").write_bytes(b"\0\1")
    (source / "below" / "c").write_text("not this")
    put_files(blobs, "adapters/x", source, ["a.json", "b.bin"])
    copy = fetch_folder(blobs, "adapters/x", tmp_path / "cache" / "x")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {"a.json": b"1", "b.bin": b"\0\1"}
    blobs.delete("adapters/x/a.json")
    assert (fetch_folder(blobs, "adapters/x", copy) / "a.json").exists(), "made once"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["x"], "nothing temporary stays"


def test_a_folder_without_blobs_is_named_and_not_made(blobs: FileBlobs, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="adapters/none"):
        fetch_folder(blobs, "adapters/none", tmp_path / "cache" / "none")
    assert list((tmp_path / "cache").iterdir()) == []


def test_many_fetch_the_same_folder_at_once(blobs: FileBlobs, tmp_path: Path) -> None:
    blobs.put("adapters/x/a", io.BytesIO(b"x" * 100_000))
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: fetch_folder(blobs, "adapters/x", tmp_path / "cache" / "x"), range(8)))
    assert folders == {tmp_path / "cache" / "x"}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["x"]


def test_a_url_says_where_blobs_are(tmp_path: Path) -> None:
    for url in (f"file:{tmp_path}", f"file://{tmp_path}"):
        store = open_blobs(url)
        assert isinstance(store, FileBlobs)
        assert store.root == tmp_path
    with pytest.raises(InvalidValue, match="ftp://x"):
        open_blobs("ftp://x")


def test_looks_at_nearly_the_same_examples_are_counted_and_a_resumed_one_is_not_counted_again(db: Db) -> None:
    rows = [f"row {i}" for i in range(10)]
    assert db.look("a", rows) == 1
    assert db.look("a", rows) == 1, "the job was taken up again"
    assert db.look("b", [*rows[:5], *(f"new {i}" for i in range(5))]) == 2, "half of them were seen"
    assert db.look("c", [*rows[:4], *(f"other {i}" for i in range(6))]) == 1
    assert db.look("d", rows) == 3
    assert db.look("a", rows) == 1, "later looks change nothing"
    assert db.look("e", [*rows, *rows]) == 4, "a repeated row is one"
