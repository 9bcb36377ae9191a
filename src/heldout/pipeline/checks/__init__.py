"""Datasets -> Findings, before any compute is spent. The tuple of checks is the registry.

A new check is a function `Parts -> Iterable[Finding]` in the file of its family, and a line in CHECKS.
"""

from __future__ import annotations

from heldout.engine.base import Progress
from heldout.engine.catalogue import ENCODER
from heldout.pipeline.checks.answers import find_odd_answers
from heldout.pipeline.checks.bias import find_group_label_correlation
from heldout.pipeline.checks.classes import find_no_labels
from heldout.pipeline.checks.duplicates import (
    find_conflicting_answers,
    find_exact_duplicates,
    find_near_conflicts,
    find_near_duplicates,
)
from heldout.pipeline.checks.facts import find_facts
from heldout.pipeline.checks.labels import find_class_imbalance, find_rare_and_missing_classes, find_unknown_labels
from heldout.pipeline.checks.leakage import find_exact_leaks, find_near_leaks
from heldout.pipeline.checks.length import find_cut_answers, find_overlong_examples, find_too_long
from heldout.pipeline.checks.parts import Check, ModelTools, Parts
from heldout.pipeline.checks.personal import find_personal_data
from heldout.pipeline.checks.prompts import find_system_prompt_drift
from heldout.pipeline.checks.shift import find_label_shift, find_shift
from heldout.pipeline.checks.shortcuts import find_answers_in_prompts, find_shortcut_tokens
from heldout.pipeline.checks.size import find_few_per_label, find_smallest_difference, find_too_few_examples
from heldout.pipeline.checks.templates import find_templates
from heldout.pipeline.checks.text import find_damaged_texts
from heldout.pipeline.checks.wrong_labels import find_wrong_labels
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
    find_rare_and_missing_classes,
    find_class_imbalance,
    find_wrong_labels,
    # answer format, system prompt drift
    find_odd_answers,
    find_system_prompt_drift,
    # facts
    find_facts,
    # personal data and secrets
    find_personal_data,
    # bias
    find_group_label_correlation,
    # length
    find_too_long,
    find_overlong_examples,
    find_cut_answers,
    # size
    find_few_per_label,
    find_smallest_difference,
    # text
    find_damaged_texts,
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
