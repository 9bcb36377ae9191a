"""The schema of the JSON reports is valid, strict, and documented; tests with real models hold theirs against it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from heldout.pipeline import released
from heldout.pipeline.advise.learning_curve import draw_curve, predict
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.schema import COMPARISON, EVALUATION, JOB, read_schema
from tests.documents import faults
from tests.unit.outcomes import make_outcome

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    return json.loads(json.dumps(make_outcome(tmp_path).as_dict()))


def properties(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object that lists its keys, with where it stands."""
    if isinstance(schema, list):
        for i, one in enumerate(schema):
            yield from properties(one, f"{path}/{i}")
    elif isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict) and not path.endswith(("/if", "/then")):
            yield path, schema
        for key, one in schema.items():
            yield from properties(one, f"{path}/{key}")


def test_the_schema_is_one_and_allows_no_key_that_it_does_not_name() -> None:
    schema = read_schema()
    Draft202012Validator.check_schema(schema)
    assert JOB.partition("#")[0] == schema["$id"]
    anchors = {one.get("$anchor") for one in schema["$defs"].values()} - {None}
    assert anchors == {name.partition("#")[2] for name in (JOB, EVALUATION, COMPARISON)}
    objects = list(properties(schema))
    assert len(objects) > 30
    assert [path for path, one in objects if one.get("additionalProperties") is not False] == []


def test_a_job_as_it_is_written_fits(document: dict[str, Any]) -> None:
    assert document["$schema"] == JOB
    assert faults(document) == []


def test_a_report_with_a_release_and_with_more_data_fits(tmp_path: Path, document: dict[str, Any]) -> None:
    told = released.to_json(json.dumps(document), {"reason": "so", "released_at": 1})
    curve = draw_curve(["a", "b"] * 50, lambda taught, asked: ["a"] * len(asked))
    more = predict(curve, 100, rung="a rung")
    assert more is not None
    assert faults(json.loads(told) | {"more_data": json.loads(json.dumps(more.as_dict()))}) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.update(new=1),
        lambda one: one["verdict"].update(new=1),
        lambda one: one["verdict"]["numbers"]["against"]["zero-shot"].update(new=1),
        lambda one: one["rungs"][0].update(new=1),
        lambda one: one["plan"].update(new={"value": 1, "reason": ""}),
        lambda one: one["training"]["curve"][0].update(new=1),
        lambda one: one["reproduce"]["files"][0].update(new=1),
        lambda one: one["reproduce"]["files"][0].update(sha256="?"),
        lambda one: one["findings"][0].update(severity="bad"),
        lambda one: one.pop("plan"),
        lambda one: one.update(consequences=[light("format", new=1)]),
        lambda one: one.update(consequences=[light("bias", shift={"label": "a", "new": 1})]),
    ],
)
def test_a_key_that_is_not_documented_is_a_fault(document: dict[str, Any], change: Any) -> None:
    change(document)
    assert len(faults(document)) == 1


def light(name: str, **numbers: Any) -> dict[str, Any]:
    return {"name": name, "status": "ok", "sentence": "", "numbers": numbers, "examples": []}


def test_every_number_of_the_plan_is_in_the_schema() -> None:
    plan = read_schema()["$defs"]["plan"]["properties"]
    assert plan.keys() == {name for name in TrainPlan.__dataclass_fields__ if name != "reasons"}


def test_every_key_of_the_schema_is_explained_in_the_docs() -> None:
    text = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("report.md", "evaluate.md"))
    explained = set(re.findall(r"`([$\w]+)`", text))
    named = {key for _, one in properties(read_schema()) for key in one["properties"]}
    assert sorted(named - explained) == []
