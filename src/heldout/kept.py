"""Records in a job's directory: written whole or not at all, so that a job which is taken up again can trust them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` as JSON; whoever is killed meanwhile leaves what was there."""
    write_whole(path, json.dumps(content))


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`; whoever is killed meanwhile leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    with temporary.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record, or None when there is none."""
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record
