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
from heldout.pipeline.findings import on_the_wire
from heldout.pipeline.run import Request, Source, check_files
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
        """The file with its findings; if they take long, with a note that says so."""
        self._db.set_findings(file.id, [on_the_wire(_not_checked(file, f"It is being looked at. {_COMING}"))])
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
            found = self._found(file)
        except Exception:  # noqa: BLE001 - the upload is stored, whatever became of the check
            traceback.print_exc()
            found = [on_the_wire(_not_checked(file, f"The checks could not be run. {_AGAIN}"))]
        with contextlib.suppress(NotFound):  # deleted meanwhile
            # A job may have looked at the file meanwhile, beside its other files: it knows more.
            if found is not None and [one["code"] for one in self._db.get_file(file.id).findings] == [NOT_CHECKED]:
                self._db.set_findings(file.id, found)

    def _found(self, file: File) -> list[dict[str, Any]] | None:
        """What the child says; one finding when it says nothing; None when we are to stop."""
        command = [sys.executable, "-m", "heldout.processes.uploads", file.blob, file.filename, str(self._nice)]
        with self._lock:
            if self._closed:
                return None
            # A session of its own: Ctrl-C reaches the server alone, which then ends it.
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
            self._children.add(child)
        try:
            out, _ = child.communicate(timeout=self._limit)
        except subprocess.TimeoutExpired:
            _kill(child)
            child.communicate()
            why = f"The checks did not finish within {self._limit / 60:.0f} minutes. {_AGAIN}"
            return [on_the_wire(_not_checked(file, why))]
        finally:
            with self._lock:
                self._children.discard(child)
        if child.returncode == 0:
            return list(json.loads(out))
        if self._closed:
            return None
        why = f"The checks of this version failed on this file (exit code {child.returncode}). {_AGAIN}"
        return [on_the_wire(_not_checked(file, why))]


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.killpg(child.pid, signal.SIGKILL)  # with whatever it started


def _not_checked(file: File, why: str) -> Finding:
    return Finding(code=NOT_CHECKED, severity="note", message=why, file=file.filename)


def main(argv: list[str] | None = None) -> int:
    """The child: print the findings of one blob as JSON."""
    key, name, nice = sys.argv[1:] if argv is None else argv
    settings = read_settings()
    machine.give_way(int(nice))
    blobs = open_blobs(settings.blobs)
    training = Source(name=name, open=lambda: blobs.open(key))
    _, findings = check_files(Request(base_model="", training=training, directory=Path()))
    json.dump([on_the_wire(finding) for finding in findings], sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
