"""A disk that is really full: the data directory, or the blobs, on a file system of a few megabytes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.client.conftest import Live
from tests.client.test_a_job_end_to_end import NO_CHAT, Served, has_reached, long_job

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("mount"), reason="mounts a tmpfs")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """Mount an empty file system of so many bytes below the test's folder; its folder."""
    mounted: list[Path] = []

    def mount(name: str, size: int) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        asked = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def serve(tmp_path: Path, tiny_model: Path) -> Iterator[Callable[..., Served]]:
    """Start servers on a data directory; they end with the test."""
    with contextlib.ExitStack() as stack:

        def start(data_dir: Path, **settings: str) -> Served:
            served = Served(data_dir, tiny_model, **settings)
            stack.callback(lambda: served.process.poll() is None and served.close())
            return served

        yield start


def fill(folder: Path, leave: int = 0) -> Path:
    """A file that takes all room on the disk but the last `leave` bytes."""
    path = folder / "somebody-elses-file"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as out:
        while shutil.disk_usage(folder).free > leave:
            out.write(b"x" * 4096)
    return path


def what_a_full_disk_says(job: Any, place: Path) -> None:
    assert job.status == "failed"
    assert job.error.code == "disk_full"
    assert job.error.message.startswith(f"The disk is full: the job could not write to {place}")
    assert "are free there" in job.error.message
    assert "Free some space" in job.error.message


def test_checkpoints_that_do_not_fit_fail_the_job_and_nothing_else(
    tmp_path: Path, disk: Callable[[str, int], Path], serve: Callable[..., Served], colours: dict[str, Path]
) -> None:
    small = disk("data/jobs", 8_000_000)
    served = serve(tmp_path / "data")
    job_id = long_job(served, colours)
    served.wait(job_id, has_reached(served, "Checkpoint created at step 20"))
    filler = fill(small)
    job = served.wait(job_id)
    what_a_full_disk_says(job, small)
    story = served.story(job_id)
    assert story[-1] == f"The job failed: {job.error.message}"
    assert served.process.poll() is None

    kept = served.client.fine_tuning.jobs.checkpoints.list(job_id).data
    asked = [{"role": "user", "content": "item 3 of the list is red"}]
    answer = served.client.chat.completions.create(
        model=kept[0].fine_tuned_model_checkpoint, messages=asked, max_tokens=3
    )
    assert answer.choices
    folders = {path.name for path in (small / job_id / "checkpoints").iterdir()}
    assert folders, "earlier checkpoints stay"
    assert all(name.startswith("step-") for name in folders), "and nothing half-written"

    filler.unlink()
    other = long_job(served, colours, n_epochs=1)
    assert served.wait(other).status == "succeeded", served.story(other)


def test_adapters_that_do_not_fit_into_the_blobs_leave_none_behind(
    tmp_path: Path, disk: Callable[[str, int], Path], serve: Callable[..., Served], colours: dict[str, Path]
) -> None:
    small = disk("blobs", 4_000_000)
    served = serve(tmp_path / "data", HELDOUT_BLOBS_URL=f"file:{small}", **NO_CHAT)
    job_id = long_job(served, colours)
    fill(small, leave=200_000)  # one of its adapters fits, two do not
    job = served.wait(job_id)
    what_a_full_disk_says(job, small)
    steps = {model.step_number for model in served.client.fine_tuning.jobs.checkpoints.list(job_id)}
    left = {path.parent.name for path in small.rglob("*") if path.is_file() and "adapters" in path.parts}
    assert left == {f"step-{step}" for step in steps}, "the adapters of its checkpoints, each callable"
    assert not list(small.rglob(".put-*"))
    for file in served.client.files.list(purpose="fine-tune"):
        assert served.client.files.content(file.id).content.startswith(b'{"messages"')


def test_a_database_on_a_full_disk_notes_the_failure_once_there_is_room(
    tmp_path: Path, disk: Callable[[str, int], Path], serve: Callable[..., Served], colours: dict[str, Path]
) -> None:
    small = disk("database", 8_000_000)
    served = serve(tmp_path / "data", HELDOUT_DATABASE_URL=f"sqlite:///{small / 'heldout.db'}", **NO_CHAT)
    job_id = long_job(served, colours)
    served.wait(job_id, has_reached(served, "Step 12/"))
    before = served.story(job_id)
    filler = fill(small)
    deadline = time.monotonic() + 60
    while served.job_processes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not served.job_processes(), "it could go on without room for an event"
    assert served.process.poll() is None
    assert served.client.fine_tuning.jobs.retrieve(job_id).status == "running", "nobody could write otherwise yet"
    filler.unlink()
    job = served.wait(job_id, seconds=30)
    what_a_full_disk_says(job, small)
    story = served.story(job_id)
    assert story[: len(before)] == before
    assert not any("unexpectedly" in text for text in story)
    other = long_job(served, colours, n_epochs=1)
    assert served.wait(other).status == "succeeded", served.story(other)


def test_a_job_that_cannot_even_have_a_log_fails_with_the_same_sentence(
    tmp_path: Path, disk: Callable[[str, int], Path], serve: Callable[..., Served], colours: dict[str, Path]
) -> None:
    small = disk("data/jobs", 1_000_000)
    served = serve(tmp_path / "data", **NO_CHAT)
    subprocess.run(["mount", "-o", "remount,nr_inodes=2", str(small)], check=True)  # room for its folder only
    job = served.wait(long_job(served, colours))
    what_a_full_disk_says(job, small)


def refused_upload(live: Live, place: Path, content: bytes) -> None:
    """Upload until it is refused; it is, with the sentence, and at once."""

    def uploads() -> None:
        for _ in range(1000):  # the database's log reuses the room that it has
            live.upload(content)

    with pytest.raises(openai.InternalServerError) as caught:
        uploads()
    refused = caught.value
    assert (refused.status_code, refused.type, refused.code) == (507, "server_error", "disk_full")
    assert refused.body["message"].startswith(f"The disk is full: the server could not write to {place}. ")
    assert "Free some space" in refused.body["message"]
    assert refused.response.headers["x-should-retry"] == "false", "the client sends nothing twice"


@pytest.mark.parametrize("full", ["blobs", "tmp", "database"])
def test_an_upload_that_does_not_fit_is_refused_with_the_sentence_and_leaves_nothing(
    full: str,
    disk: Callable[[str, int], Path],
    start: Callable[..., Live],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = disk(full, 2_000_000)
    if full == "tmp":
        monkeypatch.setattr(tempfile, "tempdir", str(small))  # where an upload waits until all of it is there
    live = start(database_url=f"sqlite:///{small / 'heldout.db'}" if full == "database" else "")
    before = live.upload()
    filler = fill(small, leave=100_000 if full != "database" else 0)
    # Below a megabyte an upload waits in memory.
    refused_upload(live, small, b"{}\n" if full == "database" else b"x" * (1 << 20 | 1))
    kept = {file.id for file in live.client.files.list()}
    assert before.id in kept
    assert {path.name for path in (tmp_path / "blobs").rglob("*") if path.is_file() and path != filler} == kept
    if full == "tmp":
        assert list(small.iterdir()) == [filler]
    filler.unlink()
    assert live.client.files.content(live.upload(b"y" * (1 << 20 | 1)).id).content.startswith(b"yy")


def test_a_command_without_room_for_its_temporary_files_says_so(
    disk: Callable[[str, int], Path], tmp_path: Path
) -> None:
    small = disk("tmp", 2_000_000)
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as out:
        for number in range(1_100):
            turns = [{"role": "user", "content": f"{number} {'x' * 65_000}"}, {"role": "assistant", "content": "yes"}]
            out.write(json.dumps({"messages": turns}) + "\n")
    asked = [sys.executable, "-m", "heldout", "check", str(rows)]
    done = subprocess.run(asked, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(small)})
    assert done.returncode == 1
    assert f"failed: The disk is full: this command could not write to {small}. " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(small.iterdir()) == []
