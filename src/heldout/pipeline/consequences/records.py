"""What was measured, on disk: a job that is taken up again asks nothing twice, and needs no model that is gone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from heldout.pipeline.consequences.base import Consequence
from heldout.pipeline.kept import read_record, write_record

RECORD = "consequences.json"


def write_consequences(directory: Path, found: Sequence[Consequence]) -> None:
    """Keep what a job measured."""
    write_record(directory / RECORD, {"consequences": [one.as_dict() for one in found]})


def read_consequences(directory: Path) -> tuple[Consequence, ...] | None:
    """What this job measured before, or None."""
    record = read_record(directory / RECORD)
    if record is None:
        return None
    return tuple(Consequence(**(one | {"examples": tuple(one["examples"])})) for one in record["consequences"])
