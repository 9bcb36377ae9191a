"""Bytes by key: uploaded files, adapters, reports. A key is ours, never a client's string."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from heldout.errors import InvalidValue, NotFound

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


class Blobs(Protocol):
    """Where bytes live. A put is all or nothing: a reader sees the whole blob or none."""

    def put(self, key: str, content: BinaryIO) -> int:
        """Store what `content` has left to read; the number of bytes."""
        ...

    def open(self, key: str) -> BinaryIO:
        """A readable stream of the blob. Raises NotFound, naming the key."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys below `prefix/`, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Remove the blob; deleting twice is fine."""
        ...


class FileBlobs:
    """Blobs as files below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise InvalidValue(f"{key!r} is not a blob key: letters, digits, '.', '_', '-' between slashes")
        return self.root / key

    def put(self, key: str, content: BinaryIO) -> int:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".put-")
        try:
            with os.fdopen(handle, "wb") as out:
                shutil.copyfileobj(content, out, 1 << 20)
                # On disk before its row is: a power cut after "accepted" must not lose the bytes.
                out.flush()
                os.fsync(out.fileno())
                size = out.tell()
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return size

    def open(self, key: str) -> BinaryIO:
        try:
            return self._path(key).open("rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise NotFound(f"No blob at {key}") from None

    def keys(self, prefix: str) -> Iterator[str]:
        root = self._path(prefix)
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.name.startswith(".put-"):
                yield path.relative_to(self.root).as_posix()

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)


def open_blobs(url: str) -> Blobs:
    """The blob store behind `url`. Only `file:` exists so far."""
    if url.startswith("file:"):
        return FileBlobs(Path(url.removeprefix("file:").removeprefix("//")))
    raise InvalidValue(f"HELDOUT_BLOBS_URL={url!r}: only file:<directory> is supported by this version")


def put_files(blobs: Blobs, prefix: str, folder: Path, names: Sequence[str]) -> None:
    """Store these files of `folder` below `prefix`: all, or none that is new."""
    before = set(blobs.keys(prefix))
    put: list[str] = []
    try:
        for name in names:
            with (folder / name).open("rb") as content:
                blobs.put(f"{prefix}/{name}", content)
            put.append(f"{prefix}/{name}")
    except BaseException:
        for key in set(put) - before:
            blobs.delete(key)
        raise


def fetch_folder(blobs: Blobs, prefix: str, folder: Path) -> Path:
    """A local copy of the blobs below `prefix`, made once. Raises NotFound when there are none."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        found = False
        for key in blobs.keys(prefix):
            found = True
            with blobs.open(key) as content, (Path(temporary) / key.rsplit("/", 1)[-1]).open("wb") as out:
                shutil.copyfileobj(content, out, 1 << 20)
        if not found:
            raise NotFound(f"No blobs below {prefix}")
        # Whoever unpacks first wins; a second process finds the folder and keeps it.
        try:
            Path(temporary).rename(folder)
            Path(temporary).mkdir()
        except OSError:
            if not folder.is_dir():
                raise
    return folder
