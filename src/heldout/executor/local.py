"""Child processes on this machine, each the leader of its own group."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

#: Seconds a process has to end by itself before it is killed.
GRACE = 3.0


class LocalExecutor:
    """Handles are `<pid>:<start time>`: a pid that was given to another process is not mistaken for ours."""

    def __init__(self) -> None:
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, command: Sequence[str], *, log: Path) -> str:
        """See Executor.start."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        handle = f"{child.pid}:{psutil.Process(child.pid).create_time():.2f}"
        self._children[handle] = child
        return handle

    def poll(self, handle: str) -> int | None:
        """See Executor.poll."""
        if handle in self._children:
            return self._children[handle].poll()
        process = _process(handle)
        return None if process and process.status() != psutil.STATUS_ZOMBIE else -1

    def stop(self, handle: str) -> None:
        """See Executor.stop."""
        process = _process(handle)
        if process is None:
            return
        for signal_ in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal_)
            if handle in self._children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._children[handle].wait(GRACE)
                    return
            else:
                with contextlib.suppress(psutil.TimeoutExpired):
                    process.wait(GRACE)
                    return


def _process(handle: str) -> psutil.Process | None:
    pid, _, started = handle.partition(":")
    try:
        process = psutil.Process(int(pid))
        return process if abs(process.create_time() - float(started)) < 1 else None
    except (ValueError, psutil.NoSuchProcess):
        return None
