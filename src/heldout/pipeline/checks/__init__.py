"""Datasets -> Findings, before any compute is spent. The tuple of checks is the registry.

A new check is a function `Parts -> Iterable[Finding]` in the file of its family, and a line in CHECKS.
"""

from __future__ import annotations

from heldout.engine.base import Progress
from heldout.engine.catalogue import ENCODER
from heldout.pipeline.checks.classes import find_no_labels
from heldout.pipeline.checks.duplicates import (
    find_conflicting_answers,
    find_exact_duplicates,
    find_near_conflicts,
    find_near_duplicates,
)
from heldout.pipeline.checks.labels import find_class_imbalance, find_unknown_labels
from heldout.pipeline.checks.leakage import find_exact_leaks, find_near_leaks
from heldout.pipeline.checks.parts import Check, ModelTools, Parts
from heldout.pipeline.checks.shift import find_label_shift, find_shift
from heldout.pipeline.checks.shortcuts import find_answers_in_prompts, find_shortcut_tokens
from heldout.pipeline.checks.size import find_too_few_examples
from heldout.pipeline.checks.templates import find_templates
from heldout.pipeline.types import Finding

__all__ = ["CHECKS", "ENCODER_CHECKS", "Check", "ModelTools", "Parts", "check"]

CHECKS: tuple[Check, ...] = (
    find_too_few_examples,
    # duplicates
    find_exact_duplicates,
    find_near_duplicates,
    find_conflicting_answers,
    find_near_conflicts,
    find_templates,
    # leakage
    find_exact_leaks,
    find_near_leaks,
    find_answers_in_prompts,
    find_shortcut_tokens,
    # shift
    find_shift,
    find_label_shift,
    # labels
    find_unknown_labels,
    find_class_imbalance,
)

#: For base models that are encoders, after the others.
ENCODER_CHECKS: tuple[Check, ...] = (find_no_labels,)


def check(parts: Parts, progress: Progress | None = None) -> tuple[Finding, ...]:
    """Everything the checks see, in their order. An "error" means that the job must not start.

    `progress` is told how many checks are done, and of how many.
    """
    checks = CHECKS + ENCODER_CHECKS if parts.model.kind == ENCODER else CHECKS
    findings: list[Finding] = []
    for done, one in enumerate(checks):
        if progress:
            progress(done, len(checks))
        findings += one(parts)
    return tuple(findings)
