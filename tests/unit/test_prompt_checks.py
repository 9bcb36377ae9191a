"""System prompts that differ by accident are told; prompts that vary on purpose are not."""

from __future__ import annotations

from collections.abc import Sequence

from heldout.pipeline.checks.parts import Parts
from heldout.pipeline.checks.prompts import find_system_prompt_drift
from heldout.pipeline.types import Dataset, Example, Finding

PROMPT = "You sort the mail of a hospital. Answer with one word."


def dataset(systems: Sequence[str | None], name: str = "train.jsonl") -> Dataset:
    def row(line: int, system: str | None) -> Example:
        asked = ({"role": "user", "content": f"q{line}"}, {"role": "assistant", "content": "a"})
        messages = asked if system is None else ({"role": "system", "content": system}, *asked)
        return Example(messages=messages, weights=(0,) * (len(messages) - 1) + (1,), line=line)

    return Dataset(name=name, examples=tuple(row(line, system) for line, system in enumerate(systems, start=1)))


def drift(systems: Sequence[str | None], valid: Sequence[str | None] | None = None) -> list[Finding]:
    other = dataset(valid, "valid.jsonl") if valid is not None else None
    return list(find_system_prompt_drift(Parts(train=dataset(systems), valid=other)))


def test_rows_with_another_prompt_are_named_with_the_difference():
    systems: list[str | None] = [PROMPT] * 50
    systems[3] = PROMPT + " "
    systems[9] = None
    systems[20] = PROMPT.replace("one word", "two words")
    systems[30] = "You are a pirate."
    (finding,) = drift(systems)
    assert (finding.code, finding.severity, finding.lines) == ("system_prompt_differs", "warning", (4, 10, 21, 31))
    for shown in ("line 4: a blank added", "no system message", "'two words.' for 'one word.'", "'You are a pirate.'"):
        assert shown in finding.message


def test_one_system_message_among_rows_without_is_named():
    systems: list[str | None] = [None] * 40
    systems[7] = PROMPT
    (finding,) = drift(systems)
    assert finding.lines == (8,)


def test_prompts_that_vary_on_purpose_are_fine():
    assert not drift([f"Today is day {i}. {PROMPT}" for i in range(100)])
    assert not drift([PROMPT, "You are a pirate.", None] * 20)
    assert not drift([PROMPT] * 30 + ["You are a pirate."] * 10)
    assert not drift([PROMPT] * 12 + [None] * 3)


def test_a_blank_more_is_drift_however_many_rows_have_it():
    (finding,) = drift([PROMPT] * 30 + [PROMPT + "\n"] * 20)
    assert finding.lines == tuple(range(31, 51))
    assert "20 of 50 rows" in finding.message


def test_a_validation_file_with_another_prompt_is_told():
    other = PROMPT.replace("hospital", "school")
    (finding,) = drift([PROMPT] * 30, valid=[other] * 30)
    assert (finding.file, finding.lines) == ("valid.jsonl", ())
    assert "'school.' for 'hospital.'" in finding.message
    assert not drift([PROMPT] * 30, valid=[PROMPT] * 30)
