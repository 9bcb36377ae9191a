"""Compiles the kernels for this processor, once, and loads them.

What is compiled depends on the sources, the compiler, its flags and the processor: all of them name the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import psutil

from heldout.errors import InvalidValue
from heldout.kept import read_record, write_record
from heldout.kernels import Kernels

SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in (
        *("numbers.h", "panels.h", "pairs.h", "tiles.h", "operations.h"),
        *("adapters.cpp", "attention.cpp", "between.cpp", "block.cpp", "head.cpp", "paired.cpp", "product.cpp"),
    )
)
COMPILERS = ("g++", "c++")
#: Results must not depend on how numbers are grouped, so nothing here lets the compiler group them anew.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    "-fno-strict-aliasing",  # two bfloat16 numbers are read as one pair
    *("-fopenmp", "-fPIC", "-Wno-psabi"),
)
#: Seconds a compiler may take for one file; it takes up to ten.
PATIENCE = 120
_CPU = Path("/proc/cpuinfo")
_log = logging.getLogger(__name__)


#: Beside a job's checkpoints: the library that it began with, or none.
NOTE = "kernels.json"


class Unavailable(Exception):
    """Why there are no kernels: a clause."""


@cache
def choose(folder: Path, *, use: bool) -> tuple[Kernels | None, str]:
    """The kernels if they are to be used, and why there are none."""
    if not use:
        return None, "HELDOUT_KERNELS is off"
    try:
        return load(folder), ""
    except Unavailable as error:
        return None, str(error)


def keep(directory: Path, folder: Path, *, use: bool) -> tuple[Kernels | None, str]:
    """What the job in `directory` began with, noted there by the first process, and why there are none: with others a
    resumed job would end with other bits.

    Raises InvalidValue where it began with kernels that are gone.
    """
    noted = read_record(directory / NOTE)
    if noted is None:
        if (directory / "checkpoints").exists():  # begun by a version that had none
            return None, "this job began without them"
        chosen, why_not = choose(folder, use=use)
        write_record(directory / NOTE, {"library": chosen.name if chosen else None})
        return chosen, why_not
    if noted["library"] is None:
        return None, "this job began without them"
    chosen, why_not = choose(folder, use=use)
    if chosen is None or chosen.name != noted["library"]:
        path = _home(folder) / Path(noted["library"]).name
        if not path.name.startswith(_of_these_sources()):
            raise InvalidValue(
                "This job began with the kernels of another version of Heldout: the rest would not fit what was "
                "trained so far. Let that version finish it, or start a new job."
            )
        if use and _is_ours(path):
            return _open(path), ""  # the compiler is another one now, or gone
        raise InvalidValue(
            "This job began with kernels compiled for this processor, but now there are others or none"
            f"{f', since {why_not}' if why_not else ''}: the rest would not fit what was trained so far. Make them "
            "available again to go on, or start a new job."
        )
    return chosen, ""


@cache
def load(folder: Path) -> Kernels:
    """The kernels, compiled below `folder` if they are not there yet. Raises Unavailable."""
    if sys.platform != "linux":
        raise Unavailable(f"they are for Linux, and this is {platform.system()}")
    chosen = compiler()
    path = _home(folder) / name_of(chosen)
    if _is_ours(path):
        try:
            return _open(path)
        except Unavailable as error:  # a file of this name that is damaged
            _log.warning("%s is compiled anew: %s", path, error)
    _log.info("Compiling the kernels for this processor into %s (some fifteen seconds, once)", path)
    _compile(chosen, path)
    if not _is_ours(path):
        raise Unavailable(f"others may write to {path.parent}")
    return _open(path)


def _home(folder: Path) -> Path:
    return folder / "kernels"


def _open(path: Path) -> Kernels:
    try:
        # torch is imported by now, so that the library finds torch's own OpenMP and shares its threads.
        return Kernels(ctypes.CDLL(str(path)), path.name)
    except OSError as error:
        raise Unavailable(f"the compiled library cannot be loaded ({error})") from error


def compiler() -> str:
    """Where the first of COMPILERS is. Raises Unavailable."""
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise Unavailable(f"there is no C++ compiler ({', '.join(COMPILERS)})")
    return found


def name_of(compiler: str) -> str:
    """The library's file: named by all that it depends on."""
    version = _run([compiler, "--version"]).stdout
    lines = _CPU.read_text().splitlines() if _CPU.exists() else []
    features = {line for line in lines if line.lower().startswith(("flags", "features", "model name"))}
    parts = [version, *FLAGS, platform.machine(), *sorted(features)]
    return f"{_of_these_sources()}{_digest(parts)}.so"


@cache
def _of_these_sources() -> str:
    """How a library's name begins: what was compiled from other sources takes other arguments."""
    return f"kernels-{_digest([path.read_text() for path in SOURCES])}-"


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _is_ours(path: Path) -> bool:
    """Code is loaded only from a file that nobody else could have written, nor put into its folder."""
    try:
        both = [path.stat(), path.parent.stat()]
    except OSError:
        return False
    return all(one.st_uid in (0, os.getuid()) and not one.st_mode & 0o022 for one in both)


def _compile(compiler: str, path: Path) -> None:
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".kernels-") as made_in:
            made = Path(made_in) / "kernels.so"
            sources = [one for one in SOURCES if one.suffix == ".cpp"]
            parts = [made.with_name(f"{one.stem}.o") for one in sources]
            commands = [
                [compiler, *FLAGS, "-c", str(one), "-o", str(to)] for one, to in zip(sources, parts, strict=True)
            ]
            done = _run_all(commands)
            if not any(one.returncode for one in done):
                done.append(_run([compiler, *FLAGS, "-shared", *map(str, parts), "-o", str(made)]))
            for one in done:
                if one.returncode:
                    raise Unavailable(f"{compiler} failed ({_last_line(one.stderr)})")
            made.chmod(0o700)
            with made.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(made, path)
    except OSError as error:
        raise Unavailable(f"they cannot be compiled ({error})") from error


def _run_all(commands: Sequence[list[str]]) -> list[subprocess.CompletedProcess[str]]:
    """As many at once as there are cores."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        return list(pool.map(_run, commands))
    except BaseException:  # one of them failed to run, or this thread was interrupted: the others end too
        pool.shutdown(wait=False, cancel_futures=True)
        for pid in tuple(_running):
            _end(pid)
        raise
    finally:
        pool.shutdown()


#: Commands that run now.
_running: set[int] = set()


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        # In this process's own group and session: what ends a job ends its compiler, and what makes a job nice too.
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as started:
            _running.add(started.pid)
            try:
                out, errors = started.communicate(timeout=PATIENCE)
            except BaseException:
                _end(started.pid)
                raise
            finally:
                _running.discard(started.pid)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run ({error})") from error
    return subprocess.CompletedProcess(command, started.returncode, out, errors)


def _end(pid: int) -> None:
    """End a process and what it started: a compiler's work is done by its children."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it does not say why")
