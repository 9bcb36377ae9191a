"""`heldout check` and `heldout.check`: the checks of a job, without a job and without a server."""

from __future__ import annotations

import time
from pathlib import Path

from heldout.pipeline import checks
from heldout.pipeline.checks import ModelTools
from heldout.pipeline.findings import Report, make_report
from heldout.pipeline.intake import read_files
from heldout.pipeline.request import Request
from heldout.pipeline.watch import Silent, Watch
from heldout.processes.foreground import source
from heldout.settings import Settings, read_settings


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
        training=source(path),
        validation=source(validation) if validation else None,
        holdout=source(holdout) if holdout else None,
        directory=Path(),
    )
    models = _check_tools(model, settings or read_settings()) if model else ModelTools()
    parts, seen = read_files(request, models, watch)
    found = () if quick else checks.check(parts, lambda done, total: watch.progress("checks", done, total))
    return make_report(parts, seen, found, seconds=time.monotonic() - started, quick=quick, model=model)


def _check_tools(model: str, settings: Settings) -> ModelTools:
    # torch and transformers come in here.
    from heldout.processes.tools import check_tools

    return check_tools(settings, model)
