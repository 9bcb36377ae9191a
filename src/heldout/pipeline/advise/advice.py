"""What `heldout advise` answers: everything that is known of a file before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heldout.pipeline.advise.costs import Costs, Tokens
from heldout.pipeline.advise.duration import Duration
from heldout.pipeline.advise.learning_curve import FEWEST_ROWS, MoreData
from heldout.pipeline.advise.recommend import Prompted, Proof, Recommendation
from heldout.pipeline.advise.rungs import CheapRung
from heldout.pipeline.advise.task import Task
from heldout.pipeline.types import Finding


@dataclass(frozen=True, kw_only=True)
class Unmeasured:
    """Why something has no number."""

    why: str

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the JSON document."""
        return {"not_measured": self.why}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a job on this machine would take."""

    base_model: str
    duration: Duration
    memory_bytes: int  # of its process at its highest; 0: not predicted
    tokens: Tokens
    costs: Costs | None  # None without prices
    steps_measured: int

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the JSON document."""
        return {
            "base_model": self.base_model,
            "duration": self.duration.as_dict(),
            "memory_bytes": self.memory_bytes,
            "tokens": self.tokens.as_dict(),
            "costs": self.costs.as_dict() if self.costs else None,
            "steps_measured": self.steps_measured,
        }


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One screen before any training."""

    file: str
    examples: int
    prompts: int  # distinct ones
    task: Task
    recommendation: Recommendation
    cheap: tuple[CheapRung, ...]  # empty for answers that are no labels
    prompted: tuple[Prompted, ...]  # empty where the base model was not asked
    proof: Proof
    more_data: MoreData | Unmeasured
    job: Job | Unmeasured
    errors: int
    warnings: int

    def as_dict(self) -> dict[str, Any]:
        """The JSON document; docs/advise.md describes every key."""
        return {
            "version": 1,
            "file": self.file,
            "examples": self.examples,
            "prompts": self.prompts,
            "task": self.task.as_dict(),
            "recommendation": self.recommendation.as_dict(),
            "cheap_rungs": [rung.as_dict() for rung in self.cheap],
            "prompted": [one.as_dict() for one in self.prompted],
            "proof": self.proof.as_dict(),
            "more_data": self.more_data.as_dict(),
            "job": self.job.as_dict(),
            "findings": {"errors": self.errors, "warnings": self.warnings},
        }


def why_no_curve(task: Task, prompts: int) -> Unmeasured:
    """Why it is not said whether more examples would pay."""
    if task.kind != "labels":
        return Unmeasured(why="a learning curve needs a cheap rung, and for answers that are no labels there is none")
    return Unmeasured(why=f"{prompts} different prompts are too few for a learning curve (the rule: {FEWEST_ROWS})")


def count_findings(findings: Sequence[Finding]) -> tuple[int, int]:
    """Errors and warnings."""
    severities = [finding.severity for finding in findings]
    return severities.count("error"), severities.count("warning")
