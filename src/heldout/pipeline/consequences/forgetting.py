"""Forgetting as one of the consequences: what `evaluate/forgetting.py` measured, as a light."""

from __future__ import annotations

from heldout.pipeline.consequences.base import Consequence, Subject, not_measured, status_of

NAME = "forgetting"


def measure(subject: Subject) -> Consequence:
    """It only informs, whatever its light: most tuned models are asked nothing but their task
    (docs/design/forgetting.md)."""
    found = subject.forgetting
    if found is None:
        if subject.is_encoder:
            return not_measured(NAME, "an encoder has no general skills")
        return not_measured(NAME, "the base model ended too few of its own answers to general prompts")
    said = f"; {found.advice}; this informs and does not change the outcome" if found.dropped else ""
    return Consequence(
        name=NAME,
        status=status_of(fails=1.0 if found.lost_facts else found.p_dropped, warns=found.p_dropped),
        sentence=f"{found.sentence}{said}",
        numbers=found.as_dict(),
    )
