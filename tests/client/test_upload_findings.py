"""What is wrong with a training file stands on its file object, soon, and whatever becomes of the check."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tests.conftest import colour_row

from heldout.processes import uploads

GOOD = b"".join(json.dumps(colour_row(i)).encode() + b"\n" for i in range(60))
BAD = GOOD + b"\n" + GOOD[: GOOD.index(b"\n") - 3] + b"\n"


@pytest.fixture(autouse=True)
def settings_of_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import sys

    monkeypatch.setenv("HELDOUT_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def codes(file):
    return [one["code"] for one in file.x_findings]


def later(live, file, seconds=60):
    deadline = time.monotonic() + seconds
    while "not_checked" in codes(file):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        file = live.client.files.retrieve(file.id)
    return file


def test_the_answer_to_an_upload_says_what_is_wrong_with_the_file(start):
    live = start(uploads={"patience": 60})
    file = live.upload(BAD)
    assert codes(file)[0] == "truncated_json", "the most harmful first"
    seen = {one["code"]: (one["lines"], one["n_lines"], one["file"]) for one in file.x_findings}
    assert seen["truncated_json"] == ([62], 1, "train.jsonl")
    assert seen["blank_line"] == ([61], 1, "train.jsonl")
    assert (file.status, file.status_details) == ("processed", None), "some clients know no other status"
    assert live.client.files.retrieve(file.id).x_findings == file.x_findings
    assert live.client.files.content(file.id).read() == BAD
    good = live.upload(GOOD)
    assert not {"truncated_json", "blank_line", "not_checked"} & set(codes(good))


def test_a_check_that_takes_long_keeps_nobody_waiting(start):
    live = start(uploads={"patience": 0})
    file = live.upload(BAD)
    assert codes(file) == ["not_checked"]
    assert "being looked at" in file.x_findings[0]["message"]
    assert {"truncated_json", "blank_line"} <= set(codes(later(live, file)))


@pytest.mark.parametrize(
    ("program", "words"), [("exit 7", "exit code 7"), ("kill -9 $$", "exit code -9"), ("sleep 60", "did not finish")]
)
def test_a_check_that_fails_loses_no_upload_and_says_so(start, tmp_path, monkeypatch, program, words):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    monkeypatch.setattr(uploads.sys, "executable", str(python))
    live = start(uploads={"patience": 60, "limit": 1.0})
    file = live.upload(BAD)
    assert codes(file) == ["not_checked"]
    assert words in file.x_findings[0]["message"]
    assert "The job that uses it looks at it again" in file.x_findings[0]["message"]
    assert live.client.files.content(file.id).read() == BAD


def test_what_reading_shows_is_there_before_rows_are_compared(start, tmp_path, monkeypatch):
    slow = "from heldout.pipeline import checks\nchecks.CHECKS = (lambda parts: 1 / 0,)\n"
    slow += "import sys\nfrom heldout.processes import uploads\nsys.exit(uploads.main(sys.argv[3:]))"
    (tmp_path / "slow.py").write_text(slow)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {uploads.sys.executable} {tmp_path / "slow.py"} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(uploads.sys, "executable", str(python))
    file = start(uploads={"patience": 60}).upload(BAD)
    assert codes(file) == ["truncated_json", "blank_line", "not_checked"]
    assert "exit code 1" in file.x_findings[-1]["message"]


def test_what_a_job_found_is_not_overwritten(start, monkeypatch):
    live = start(uploads={"patience": 0})
    file = live.upload(BAD)
    live.db.set_findings(file.id, [{"code": "leak_exact"}])
    time.sleep(0.1)
    while uploads_of(live):
        time.sleep(0.1)
    assert live.db.get_file(file.id).findings == [{"code": "leak_exact"}]


def uploads_of(live):
    """Children that still look."""
    import psutil

    return [one for one in psutil.Process().children() if "heldout.processes.uploads" in one.cmdline()]


def test_a_file_that_is_deleted_meanwhile_stays_deleted(start):
    live = start(uploads={"patience": 0})
    file = live.upload(BAD)
    live.client.files.delete(file.id)
    while uploads_of(live):
        time.sleep(0.1)
    assert live.client.files.list().data == []


def test_only_training_files_are_looked_at(start):
    live = start(uploads={"patience": 60})
    assert live.upload(b"\x00\xff", "picture.png", purpose="user_data").x_findings == []
