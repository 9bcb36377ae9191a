"""The JSON Schema of what we report as JSON: report.schema.json, beside this file. Every document names it."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

#: What a document's `$schema` says. The part behind the # is an anchor in the schema.
JOB, EVALUATION, COMPARISON = (f"urn:heldout:report:1#{name}" for name in ("job", "evaluation", "comparison"))


def read_schema() -> dict[str, Any]:
    """The schema, as a document of JSON Schema 2020-12."""
    schema: dict[str, Any] = json.loads((files(__package__) / "report.schema.json").read_text(encoding="utf-8"))
    return schema
