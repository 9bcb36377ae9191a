"""Prompt, retrieval, classifier or fine-tune: rules with their numbers, in the order in which they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from heldout.pipeline.advise.rungs import CheapRung
from heldout.pipeline.advise.task import FACTS, Task
from heldout.pipeline.evaluate.statistics import smallest_detectable_difference

Tool = Literal["prompt", "retrieval", "classifier", "fine-tune", "none"]

#: Gains usually show from 50 to 100 examples (SCIENCE §1).
ENOUGH = 50
#: A prompt that answers so well leaves a tuned model little.
GOOD_PROMPT = 0.95
#: Disagreements of two models at which "what can be shown" is told.
DISAGREEMENTS = (0.1, 0.2, 0.3)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the rows that are answered once can show."""

    rows: int
    crossfit: bool
    detectable: tuple[tuple[float, float | None], ...]  # (share of disagreements, smallest difference found)

    @property
    def sentence(self) -> str:
        """In words, to be read behind "can be shown"."""
        how = "rows, out of fold" if self.crossfit else "rows of the holdout"
        told = [
            f"{100 * found:.1f} points if they disagree on {share:.0%}"
            if found is not None
            else f"none if on {share:.0%}"
            for share, found in self.detectable
        ]
        return f"with {self.rows} {how}, these differences of two models or larger ones: {'; '.join(told)}"

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the JSON document."""
        return {
            "rows": self.rows,
            "crossfit": self.crossfit,
            "detectable": [{"disagreement": share, "smallest_difference": found} for share, found in self.detectable],
        }


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """How the base model answers a few rows when it is prompted."""

    name: str
    score: float
    interval: tuple[float, float]
    rows: int
    metric: str

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the JSON document."""
        return {
            "name": self.name,
            "score": self.score,
            "interval": list(self.interval),
            "rows": self.rows,
            "metric": self.metric,
        }


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The tool to try first, and why: one sentence for each rule that spoke."""

    tool: Tool
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the JSON document."""
        return {"tool": self.tool, "reasons": list(self.reasons)}


def what_it_proves(rows: int, *, crossfit: bool) -> Proof:
    """The smallest differences that so many answered rows find in 80 of 100 cases."""
    detectable = tuple((share, smallest_detectable_difference(rows, share)) for share in DISAGREEMENTS)
    return Proof(rows=rows, crossfit=crossfit, detectable=detectable)


def recommend(
    task: Task, n: int, proof: Proof, cheap: Sequence[CheapRung], prompted: Sequence[Prompted]
) -> Recommendation:
    """What to try first. `n` is the number of training examples; `cheap` is empty for answers that are no labels."""
    if task.kind in ("preference", "tools"):
        return _no_method(task)
    if task.kind == "facts":
        return _retrieval(task)
    if good := _good_prompt(prompted):
        return good
    if task.kind == "labels" and cheap:
        return _label_tool(n, proof, cheap)
    return _generation(task, n)


def _no_method(task: Task) -> Recommendation:
    what = "Preference pairs" if task.kind == "preference" else "Tool calls"
    reason = (
        f"{what} are recognised, but this version has no method that trains on them; write the wanted answers as "
        "messages to train on those."
    )
    return Recommendation(tool="none", reasons=(reason,))


def _retrieval(task: Task) -> Recommendation:
    return Recommendation(
        tool="retrieval",
        reasons=(
            f"{task.closed_book:.0%} of the answers hold facts that their prompts do not (the rule: {FACTS:.0%}). A "
            "model trained on them repeats those and invents others.",
            "Put the facts into the prompt by search, and train, if at all, on prompts that contain them.",
        ),
    )


def _good_prompt(prompted: Sequence[Prompted]) -> Recommendation | None:
    best = max(prompted, key=lambda one: one.score, default=None)
    if best is None or best.interval[0] < GOOD_PROMPT:
        return None
    reason = (
        f"The base model with a {best.name} prompt has {best.score:.0%} {best.metric} on {best.rows} rows (95 % "
        f"interval from {best.interval[0]:.0%}; the rule: {GOOD_PROMPT:.0%}). Training has little to add but "
        "shorter prompts."
    )
    return Recommendation(tool="prompt", reasons=(reason,))


def _label_tool(n: int, proof: Proof, cheap: Sequence[CheapRung]) -> Recommendation:
    best = max(cheap, key=lambda one: one.score)
    constant = cheap[0].score
    if n >= ENOUGH and best.interval[0] <= constant:
        return Recommendation(
            tool="none",
            reasons=(
                f"{best.name} has {best.score:.1%} out of fold, always the commonest answer {constant:.1%}: what the "
                "texts say of the labels is too little to be seen. Look at the labels (heldout check) before training.",
            ),
        )
    left = 1 - best.score
    found = f"{best.name} has {best.score:.1%} out of fold, in seconds"
    # A tuned model that halved the errors would disagree on about all of them.
    needed = smallest_detectable_difference(proof.rows, max(left, 1 / proof.rows)) if left else None
    if needed is None or left / 2 < needed:
        could = "nothing so small" if needed is None else f"differences from {100 * needed:.1f} points on"
        return Recommendation(
            tool="classifier",
            reasons=(
                f"{found}. A fine-tune that halved its errors would gain {50 * left:.1f} points; {proof.rows} rows "
                f"show {could}.",
            ),
        )
    if n < ENOUGH:
        return Recommendation(
            tool="classifier", reasons=(f"{found}; gains of fine-tuning usually show from {ENOUGH} examples on.",)
        )
    return Recommendation(
        tool="fine-tune",
        reasons=(
            f"{found}: it leaves {100 * left:.1f} points, and half of them could be shown ({proof.rows} rows show "
            f"{100 * needed:.1f}).",
            "Answers are labels: train an encoder first (--model all-minilm-l6-v2), it is the cheaper fine-tune.",
        ),
    )


def _generation(task: Task, n: int) -> Recommendation:
    why = {
        "extraction": "the form of the records is what training teaches well",
        "rewriting": "the input holds the answer; what training teaches is the manner",
        "text": "training teaches manner and form, not new knowledge",
    }.get(task.kind, "no cheaper rung was measured")
    if n < ENOUGH:
        return Recommendation(
            tool="prompt",
            reasons=(
                f"{n} examples are few: gains of fine-tuning usually show from {ENOUGH} on. Use the best of them as "
                "solved examples in the prompt.",
            ),
        )
    return Recommendation(
        tool="fine-tune", reasons=(f"{n} examples, and {why}. The job compares it with the best prompt.",)
    )
