"""A full disk: how it is recognised, whoever met it, and what the user is told."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy.engine import make_url

from heldout.errors import UserError
from heldout.pipeline.spool import roomy_folder
from heldout.settings import Settings

CODE = "disk_full"
#: How a job process ends that could not even write its failure into its row: the worker does when it can.
EXIT_CODE = errno.ENOSPC

#: What libraries say whose errors carry no errno: safetensors, SQLite, Postgres.
_WORDS = ("no space left on device", "disk quota exceeded", "database or disk is full")


def is_full(error: BaseException | None) -> bool:
    """True when a full disk, or a used-up quota, is what the error comes from."""
    for one in _causes(error):
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # A user's error may quote such words from a training file.
        if not isinstance(one, UserError) and any(words in str(one).lower() for words in _WORDS):
            return True
    return False


def sentence(error: BaseException | None, settings: Settings, job_id: str) -> str:
    """What a job says: what was full, where, and what to do. Where the error does not say: the fullest of a
    job's places."""
    place = _place(error) or _fullest([settings.work(job_id), settings.cache, *_places(settings)])
    return (
        f"The disk is full: the job could not write to {place}. Now that its unfinished files are removed, "
        f"{_free(place)} there. Uploaded files, checkpoints and other jobs are as they were. Free some space or give "
        "the data directory a larger disk, then create the job again."
    )


def refusal(error: BaseException, settings: Settings) -> str:
    """What a request is told that could not be stored."""
    place = _place(error) or _fullest(_places(settings))
    return (
        f"The disk is full: the server could not write to {place}. {_free(place)} there. Nothing of this request was "
        "kept; what was there before is as it was. Free some space or give the data directory a larger disk, then send "
        "the request again."
    )


def failure(error: BaseException, settings: Settings) -> str:
    """What a command says that could not write. Where the error does not say: the fullest of its places."""
    big = Path(roomy_folder() or tempfile.gettempdir())
    place = _place(error) or _fullest([Path(tempfile.gettempdir()), big, settings.cache, Path.cwd()])
    return (
        f"The disk is full: this command could not write to {place}. {_free(place)} there. Free some space, "
        "or let TMPDIR (for temporary files) or --out name a folder on a larger disk, then run it again."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it comes from, what that comes from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _place(error: BaseException | None) -> Path | None:
    """The folder the error names, as far as it still exists."""
    names = [getattr(one, "filename", None) for one in _causes(error)]
    return next((_existing(Path(name)) for name in names if isinstance(name, str) and Path(name).is_absolute()), None)


def _places(settings: Settings) -> list[Path]:
    """Where every process writes, as far as it is a disk of this machine: uploads pass through the first."""
    places = [Path(tempfile.gettempdir())]
    if (database := make_url(settings.database).database) and settings.database.startswith("sqlite:"):
        places.append(Path(database).absolute())
    if settings.blobs.startswith("file:"):
        places.append(Path(settings.blobs.removeprefix("file:").removeprefix("//")).absolute())
    return places


def _fullest(places: list[Path]) -> Path:
    return min((_existing(place) for place in places), key=lambda place: shutil.disk_usage(place).free)


def _existing(path: Path) -> Path:
    """The path, if a folder, or the nearest folder above it that there is."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _free(place: Path) -> str:
    usage = shutil.disk_usage(place)
    return f"{_size(usage.free)} of {_size(usage.total)} are free"


def _size(count: int) -> str:
    """Bytes as a person reads them: `3.1 MB`."""
    amount, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
