"""Which examples of a holdout belong together: ten questions about one document are not ten pieces of evidence."""

from __future__ import annotations

from collections.abc import Sequence

from heldout.pipeline.checks.groups import prompt_fingerprint
from heldout.pipeline.checks.near import find_near
from heldout.pipeline.checks.rows import Rows
from heldout.pipeline.types import Dataset, Example
from heldout.pipeline.units import find_units


def find_clusters(examples: Sequence[Example]) -> tuple[int, ...]:
    """The number of each example's cluster. Examples are in one cluster when they would be held out together:
    the same prompt or nearly, one long passage, one declared group, one conversation (pipeline/units.py)."""
    dataset = Dataset(name="holdout", examples=tuple(examples))
    found = find_units(dataset, find_near(Rows.read([dataset])), most=len(examples))
    number = {prompt: i for i, unit in enumerate(found.units) for prompt in unit}
    # What is like too many others is in no unit: by itself it says as much as any.
    return tuple(number.setdefault(prompt_fingerprint(one.prompt), len(number)) for one in examples)
