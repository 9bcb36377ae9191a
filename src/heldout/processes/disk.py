"""A full disk: how it is recognised, whoever met it, and what the user is told."""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path

from sqlalchemy.engine import make_url

from heldout.errors import UserError
from heldout.settings import Settings

CODE = "disk_full"
#: How a job process ends that could not even write its failure into its row: the worker does when it can.
EXIT_CODE = errno.ENOSPC

#: What libraries say whose errors carry no errno: safetensors, SQLite, Postgres.
_WORDS = ("no space left on device", "disk quota exceeded", "database or disk is full")


def is_full(error: BaseException | None) -> bool:
    """True when a full disk, or a used-up quota, is what the error comes from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # A user's error may quote such words from a training file.
        if not isinstance(error, UserError) and any(words in str(error).lower() for words in _WORDS):
            return True
        error = error.__cause__
    return False


def sentence(error: BaseException | None, settings: Settings, job_id: str) -> str:
    """What was full, where, and what to do. Where the error does not say: the fullest of a job's places."""
    place = _place(error) or _fullest(settings, job_id)
    usage = shutil.disk_usage(place)
    return (
        f"The disk is full: the job could not write to {place}. Now that its unfinished files are removed, "
        f"{_size(usage.free)} of {_size(usage.total)} are free there. Uploaded files, checkpoints and other jobs "
        "are as they were. Free some space or give the data directory a larger disk, then create the job again."
    )


def _place(error: BaseException | None) -> Path | None:
    """The folder the error names, as far as it still exists."""
    name = getattr(error, "filename", None)
    return _existing(Path(name)) if isinstance(name, str) and Path(name).is_absolute() else None


def _fullest(settings: Settings, job_id: str) -> Path:
    places = [settings.work(job_id), settings.cache, Path(tempfile.gettempdir())]
    if (database := make_url(settings.database).database) and settings.database.startswith("sqlite:"):
        places.append(Path(database).absolute())
    if settings.blobs.startswith("file:"):
        places.append(Path(settings.blobs.removeprefix("file:").removeprefix("//")).absolute())
    return min((_existing(place) for place in places), key=lambda place: shutil.disk_usage(place).free)


def _existing(path: Path) -> Path:
    """The path, if a folder, or the nearest folder above it that there is."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _size(count: int) -> str:
    """Bytes as a person reads them: `3.1 MB`."""
    amount, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
