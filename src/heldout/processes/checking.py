"""`heldout check` and `heldout.check`: the checks of a job, without a job and without a server."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from heldout.pipeline import checks
from heldout.pipeline.checks import ModelTools
from heldout.pipeline.findings import Report, make_report
from heldout.pipeline.run import Request, Source, read_files
from heldout.pipeline.watch import Silent, Watch
from heldout.processes.foreground import source
from heldout.settings import Settings, read_settings

#: Reading a smaller file is not worth a bar.
TOLD_FROM = 16 << 20  # bytes
MEGABYTE = 1 << 20


def check(
    path: str | Path,
    validation: str | Path | None = None,
    holdout: str | Path | None = None,
    *,
    model: str | None = None,
    quick: bool = False,
    watch: Watch | None = None,
    settings: Settings | None = None,
) -> Report:
    """Look for everything that is wrong with training data, before anything is trained. No file is changed.

    Args:
        path, validation, holdout: JSONL files in OpenAI's chat format, looked at together.
        model: a bundled name, an alias, a directory or a hub id: lengths are then counted in its tokens, and
            checks may use the bundled encoder. Without it torch is not loaded.
        quick: look at each row by itself; do not compare rows.

    Raises UserError (no such file, unknown model).
    """
    watch = watch or Silent()
    started = time.monotonic()
    request = Request(
        base_model=model or "",
        training=_told(path, watch),
        validation=_told(validation, watch) if validation else None,
        holdout=_told(holdout, watch) if holdout else None,
        directory=Path(),
    )
    parts, seen = read_files(request, _model_tools(model, settings or read_settings()) if model else ModelTools())
    found = () if quick else checks.check(parts, lambda done, total: watch.progress("checks", done, total))
    return make_report(parts, seen, found, seconds=time.monotonic() - started, quick=quick, model=model)


def _model_tools(model: str, settings: Settings) -> ModelTools:
    # torch and transformers come in here.
    from heldout.processes.tools import model_tools

    return model_tools(settings, model)


def _told(path: str | Path, watch: Watch) -> Source:
    """A file that tells how much of it has been read, if it is a large one."""
    plain = source(path)
    size = Path(path).stat().st_size
    if size < TOLD_FROM:
        return plain

    def tell(read: int) -> None:
        watch.progress(f"reading {Path(path).name}, MB", read // MEGABYTE, size // MEGABYTE)

    # A BufferedReader has all that BinaryIO promises and is none to mypy.
    return Source(
        name=plain.name, open=lambda: cast(BinaryIO, io.BufferedReader(_Counted(path, tell), buffer_size=MEGABYTE))
    )


class _Counted(io.FileIO):
    """Says after each read how far it is."""

    def __init__(self, path: str | Path, tell: Callable[[int], None]) -> None:
        super().__init__(path)
        self._tell = tell

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        count = super().readinto(buffer) or 0
        self._tell(self.tell())
        return count
