"""Whether a JSON document is what its schema says, to the last key."""

from __future__ import annotations

from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from heldout.pipeline.schema import read_schema


def faults(document: dict[str, Any]) -> list[str]:
    """What is wrong with a report, and where; nothing when it is as its `$schema` documents it."""
    schema = read_schema()
    known: Registry[Any] = Registry().with_resource(schema["$id"], DRAFT202012.create_resource(schema))
    validator = Draft202012Validator({"$ref": document["$schema"]}, registry=known)
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(document)]
