"""JSON objects, compared field by field."""

from __future__ import annotations

import json
from typing import Any

from heldout.pipeline.evaluate.metrics.exact import exact_match, json_value


def field_f1(answer: str, target: str) -> float:
    """F1 over the (key, value) pairs of two JSON objects; 0 when the answer is not an object."""
    value, record = json_value(answer), json_value(target)
    if not isinstance(record, dict):  # a holdout may hold what train did not
        return exact_match(answer, target)
    if not isinstance(value, dict):
        return 0.0
    got, wanted = _pairs(value), _pairs(record)
    if not got and not wanted:
        return 1.0
    return 2 * len(got & wanted) / (len(got) + len(wanted))


def _pairs(value: dict[str, Any]) -> set[tuple[str, str]]:
    return {(key, json.dumps(one, sort_keys=True)) for key, one in value.items()}
