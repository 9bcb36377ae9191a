"""Uploaded files are looked at in processes of their own: `python -m heldout.processes.uploads KEY NAME`.

Not in the server: whatever a file does to the checks, a crash, a gigabyte, a minute, it does not do to the
others who ask the server something. The child prints its findings; the server notes them on the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heldout import machine
from heldout.errors import NotFound
from heldout.pipeline.checks import Parts, check
from heldout.pipeline.findings import most_harmful_first, on_the_wire
from heldout.pipeline.intake import read_files
from heldout.pipeline.request import Request, Source
from heldout.pipeline.types import Finding
from heldout.records import File
from heldout.settings import Settings, read_settings
from heldout.store.blobs import open_blobs

if TYPE_CHECKING:  # the child needs no database
    from heldout.store.db import Db

#: Seconds an upload waits for its findings. After that the answer says that they are to come.
PATIENCE = 2.0
#: Seconds after which a check is given up.
LIMIT = 900.0
#: Files that are looked at at the same time; the others wait their turn.
AT_ONCE = 2

NOT_CHECKED = "not_checked"
_AGAIN = "The file is stored as it is. The job that uses it looks at it again before anything is trained."
_COMING = "Ask for the file again in a while; the job that uses it looks at it in any case."


class Uploads:
    """Has uploaded training files looked at, and notes what was found on their rows."""

    def __init__(self, settings: Settings, db: Db, *, patience: float = PATIENCE, limit: float = LIMIT) -> None:
        self._nice, self._db = settings.nice, db
        self._patience, self._limit = patience, limit
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="uploads")
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __call__(self, file: File) -> File:
        """The file with what was found so far, and a note where there is more to come."""
        self._db.set_findings(file.id, [_not_checked(file, f"It is being looked at. {_COMING}")])
        wait([self._pool.submit(self._look, file)], self._patience)
        return self._db.get_file(file.id)

    def close(self) -> None:
        """Stop looking. What was not finished stays marked as not checked."""
        with self._lock:
            self._closed = True
            for child in self._children:
                _kill(child)
        self._pool.shutdown(cancel_futures=True)

    def _look(self, file: File) -> None:
        try:
            why = self._failure(file)
        except Exception:  # noqa: BLE001 - the upload is stored, whatever became of the check
            traceback.print_exc()
            why = "The checks could not be run."
        if why and not self._closed:
            seen = self._db.get_file(file.id).findings
            self._note(
                file, [*(one for one in seen if one["code"] != NOT_CHECKED), _not_checked(file, f"{why} {_AGAIN}")]
            )

    def _failure(self, file: File) -> str:
        """Let a child look and note what it says, line by line; why it did not come to its end, if it did not."""
        command = [sys.executable, "-m", "heldout.processes.uploads", file.blob, file.filename, str(self._nice)]
        with self._lock:
            if self._closed:
                return ""
            # A session of its own: Ctrl-C reaches the server alone, which then ends it.
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
            self._children.add(child)
        late = threading.Event()

        def end() -> None:
            late.set()
            _kill(child)

        timer = threading.Timer(self._limit, end)
        timer.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                self._note(file, json.loads(line))
            code = child.wait()
        finally:
            timer.cancel()
            with self._lock:
                self._children.discard(child)
        if late.is_set():
            return f"The checks did not finish within {self._limit / 60:.0f} minutes."
        return f"The checks of this version failed on this file (exit code {code})." if code else ""

    def _note(self, file: File, findings: list[dict[str, Any]]) -> None:
        with contextlib.suppress(NotFound):  # deleted meanwhile
            # A job may have looked at the file meanwhile, beside its other files: it knows more.
            if any(one["code"] == NOT_CHECKED for one in self._db.get_file(file.id).findings):
                self._db.set_findings(file.id, findings)


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.killpg(child.pid, signal.SIGKILL)  # with whatever it started


def _not_checked(file: File, why: str) -> dict[str, Any]:
    return on_the_wire(Finding(code=NOT_CHECKED, severity="note", message=why, file=file.filename))


def main(argv: list[str] | None = None) -> int:
    """The child: a line of JSON with what reading shows, and one with all there is to say."""
    key, name, nice = sys.argv[1:] if argv is None else argv
    machine.give_way(int(nice))
    blobs = open_blobs(read_settings().blobs)
    training = Source(name=name, open=lambda: blobs.open(key))
    request = Request(base_model="", training=training, directory=Path())
    parts, seen = read_files(request)
    more = Finding(code=NOT_CHECKED, severity="note", message=f"Rows are being compared. {_COMING}", file=name)
    _say(parts, (*seen, more))
    _say(parts, (*seen, *check(parts)))
    return 0


def _say(parts: Parts, findings: tuple[Finding, ...]) -> None:
    ordered = most_harmful_first(findings, {one.name: len(one) for one in parts.given()})
    print(json.dumps([on_the_wire(finding) for finding in ordered]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
