"""What was measured, on disk: a job that is taken up again when all was measured asks nothing again, and needs no model
that is gone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heldout.kept import read_record, write_record
from heldout.pipeline.consequences.base import Consequence
from heldout.pipeline.types import Example

RECORD = "consequences.json"
#: Changes when what is measured, or its numbers, do: then it is measured anew.
VERSION = 2


def write_consequences(
    directory: Path, answered: Sequence[Example], best_step: int, found: Sequence[Consequence]
) -> None:
    """Keep what a job measured of the model of this step, which answered these rows."""
    write_record(directory / RECORD, {**_about(answered, best_step), "consequences": [one.as_dict() for one in found]})


def read_consequences(directory: Path, answered: Sequence[Example], best_step: int) -> tuple[Consequence, ...] | None:
    """What this job measured before, or None: nothing, or of another model or by another version."""
    record = read_record(directory / RECORD)
    about = _about(answered, best_step)
    if record is None or {name: record.get(name) for name in about} != about:
        return None
    return tuple(Consequence(**(one | {"examples": tuple(one["examples"])})) for one in record["consequences"])


def _about(answered: Sequence[Example], best_step: int) -> dict[str, Any]:
    return {"version": VERSION, "lines": [row.line for row in answered], "best_step": best_step}
