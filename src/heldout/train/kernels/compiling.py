"""Compiles the kernels for this processor, once, and loads them.

What is compiled depends on the sources, the compiler, its flags and the processor: all of them name the file.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from heldout.errors import InvalidValue
from heldout.pipeline.kept import read_record, write_record
from heldout.train.kernels import Kernels

SOURCES = tuple(Path(__file__).with_name(name) for name in ("numbers.h", "attention.cpp", "layer.cpp"))
COMPILERS = ("g++", "c++", "clang++")
#: Results must not depend on how numbers are grouped, so nothing here lets the compiler group them anew.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-fPIC", "-shared", "-Wno-psabi"),
)
#: Seconds a compiler may take; it takes three.
PATIENCE = 120
_CPU = Path("/proc/cpuinfo")
_log = logging.getLogger(__name__)


#: Beside a job's checkpoints: whether it began with kernels.
NOTE = "kernels.json"


class Unavailable(Exception):
    """Why there are no kernels: a clause."""


def choose(folder: Path, *, use: bool) -> tuple[Kernels | None, str]:
    """The kernels if they are to be used, and why there are none."""
    if not use:
        return None, "HELDOUT_KERNELS is off"
    try:
        return load(folder), ""
    except Unavailable as error:
        return None, str(error)


def keep(directory: Path, chosen: Kernels | None, why_not: str) -> Kernels | None:
    """What the job in `directory` began with, noted there by the first process: with the other a resumed job would end
    with other bits. Raises InvalidValue where it began with kernels and there are none."""
    noted = read_record(directory / NOTE)
    if noted is None:
        write_record(directory / NOTE, {"kernels": chosen is not None})
        return chosen
    if not noted["kernels"]:
        return None
    if chosen is None:
        raise InvalidValue(
            f"This job began with kernels compiled for this processor, but now there are none, since {why_not}: the "
            "rest would not fit what was trained so far. Make them available again to go on, or start a new job."
        )
    return chosen


@cache
def load(folder: Path) -> Kernels:
    """The kernels, compiled into `folder` if they are not there yet. Raises Unavailable."""
    if sys.platform != "linux":
        raise Unavailable(f"they are for Linux, and this is {platform.system()}")
    chosen = compiler()
    path = folder / name_of(chosen)
    # torch is imported by now, so that the library finds torch's own OpenMP and shares its threads.
    if _is_ours(path):
        try:
            return Kernels(ctypes.CDLL(str(path)))
        except OSError as error:  # a machine that went down may have left half a file
            _log.warning("%s cannot be loaded and is compiled anew: %s", path, error)
    _compile(chosen, path)
    try:
        return Kernels(ctypes.CDLL(str(path)))
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
    parts = [version, *FLAGS, platform.machine(), *sorted(features), *(path.read_text() for path in SOURCES)]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return f"kernels-{digest[:16]}.so"


def _is_ours(path: Path) -> bool:
    """Code is loaded only from a file that nobody else could have written."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid in (0, os.getuid()) and not found.st_mode & 0o022


def _compile(compiler: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".kernels-") as made_in:
            made = Path(made_in) / "kernels.so"
            found = _run([compiler, *FLAGS, *(str(one) for one in SOURCES if one.suffix == ".cpp"), "-o", str(made)])
            if found.returncode:
                raise Unavailable(f"{compiler} failed ({_last_line(found.stderr)})")
            made.chmod(0o755)
            os.replace(made, path)
    except OSError as error:
        raise Unavailable(f"they cannot be compiled ({error})") from error


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run ({error})") from error


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it does not say why")
