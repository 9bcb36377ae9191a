"""What a job hands over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from heldout.pipeline import schema
from heldout.pipeline.advise.learning_curve import MoreData
from heldout.pipeline.consequences.base import Consequence
from heldout.pipeline.crossfit import CrossFit
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.ladder import Rung
from heldout.pipeline.mistakes import Mistake
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.reproduce import Reproduction
from heldout.pipeline.served_rungs import ServedRung
from heldout.pipeline.training import RIGHT, Adapter
from heldout.pipeline.types import Finding, Split
from heldout.pipeline.verdict import Verdict

#: The metric that RIGHT is of labels.
EXACT = "exact match"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything a job found out."""

    verdict: Verdict
    rungs: tuple[Rung, ...]
    tuned: Rung
    adapter: Adapter
    plan: TrainPlan
    split: Split
    findings: tuple[Finding, ...]
    base_model: str
    kind: str  # of the base model: catalogue.CHAT or ENCODER
    asked: Hyperparameters  # the plan has the rest
    reproduction: Reproduction
    seconds: float
    crossfit: CrossFit | None = None  # where the scores come from, when there was no holdout
    mistakes: tuple[Mistake, ...] = ()  # of the tuned model, the most instructive ones
    served_rungs: tuple[ServedRung, ...] = ()  # cheaper rungs that can be asked as models
    consequences: tuple[Consequence, ...] = ()  # what training may have made worse
    more_data: MoreData | None = None  # what twice as many examples would gain; only where answers are labels

    @property
    def optimism(self) -> float | None:
        """By how much the kept checkpoint is better on the validation rows that chose it than on the holdout. None
        where the two are not of one kind: by cross-fitting, without validation rows, where another metric than the
        verdict's chose it (pipeline/candidate_answers.py), and where held-out questions are asked without a code."""
        selection, giveaways, metric = self.adapter.selection, self.split.giveaways, self.tuned.scores.metric
        on_valid = selection.chosen.score
        if self.crossfit or on_valid is None or (giveaways and giveaways.codes):
            return None
        if selection.metric != metric and (selection.metric, metric) != (RIGHT, EXACT):
            return None
        return on_valid - self.tuned.scores.mean

    def as_dict(self) -> dict[str, Any]:
        """The machine-readable report; docs/report.md and report.schema.json describe every key."""
        adapter = self.adapter
        return {
            "caveats": list(self.verdict.caveats),  # first: they are about every number below
            "$schema": schema.JOB,
            "version": 1,
            "base_model": self.base_model,
            "verdict": self.verdict.as_dict(),
            "rungs": [rung.as_dict() for rung in self.rungs],
            "tuned": self.tuned.as_dict(),
            "data": {
                "train": len(self.split.train),
                "valid": len(self.split.valid),
                "holdout": len(self.split.holdout),
                "groups": self.split.groups,
                "seed": self.split.seed,
                "sources": self.split.sources,
            },
            "crossfit": self.crossfit.as_dict() if self.crossfit else None,
            "mistakes": [one.as_dict() for one in self.mistakes],
            "served_rungs": [rung.rung for rung in self.served_rungs],
            "more_data": self.more_data.as_dict() if self.more_data else None,
            "consequences": [one.as_dict() for one in self.consequences],
            "findings": [finding.as_dict() for finding in self.findings],
            "asked": self.asked.as_dict(),
            "plan": self.plan.as_dict(),
            "training": {
                "examples_per_second": adapter.examples_per_second,
                "peak_memory_bytes": adapter.peak_memory_bytes,
                "best_step": adapter.best_step,
                "last_step": adapter.last_step,
                "stopped": adapter.stopped,
                "selection": adapter.selection.as_dict(),
                "optimism": self.optimism,
                "learning_rate": adapter.learning_rate,
                "predicted_memory_bytes": self.plan.predicted_memory_bytes,
                "precision": adapter.precision,
                "kernels": adapter.kernels,
                "trained_tokens": adapter.trained_tokens,
                "trained_parameters": adapter.trained_parameters,
                "seconds": adapter.seconds,
                "curve": [point.as_dict() for point in adapter.curve],
            },
            "adapter": str(adapter.directory),
            "reproduce": self.reproduction.as_dict(),
            "seconds": self.seconds,
        }
