"""A finished job made by hand: all that a report and a model card are written from."""

from __future__ import annotations

from pathlib import Path

from heldout.engine.catalogue import CHAT
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.plan import make_plan
from heldout.pipeline.reproduce import Reproduction, UsedFile
from heldout.pipeline.selection import Candidate, select
from heldout.pipeline.training import Adapter, CurvePoint, ModelFacts
from heldout.pipeline.types import Finding
from heldout.pipeline.verdict import decide
from tests.unit.conftest import labelled, right, rung, split_of

FACTS = ModelFacts(hidden_size=64, layers=2, context=512, parameters=1)

ATTACK = "<script>alert(1)</script> | a"

CURVE = (
    CurvePoint(step=1, train_loss=2.5, train_accuracy=0.25),
    CurvePoint(
        step=2, train_loss=1.5, train_accuracy=0.5, valid_loss=1.25, valid_calibrated_loss=1.125, valid_accuracy=0.625
    ),
    CurvePoint(
        step=3, train_loss=0.5, train_accuracy=1.0, valid_loss=1.75, valid_calibrated_loss=1.5, valid_accuracy=0.5
    ),
)


def make_outcome(folder: Path) -> Outcome:
    """A job whose names and texts would be markup if anybody let them; its adapter is in `folder`."""
    split = split_of(labelled("train", 80), labelled("valid", 20), labelled("holdout", 100))
    rungs = (
        rung("constant", right(100, 30), kind="constant", description=f"always {ATTACK}"),
        rung("zero-shot", right(100, 60), description="the prompt"),
    )
    tuned = rung("tuned", right(100, 90), kind="tuned", description="with the adapter")
    plan = make_plan(Hyperparameters(lora_r=8, min_delta=0.5), split, FACTS, seed=5)
    return Outcome(
        verdict=decide(rungs, tuned),
        rungs=rungs,
        tuned=tuned,
        adapter=Adapter(
            plan=plan,
            directory=folder / "adapter",
            checkpoint=folder / "checkpoints",
            best_step=2,
            last_step=3,
            curve=CURVE,
            trained_tokens=12_345,
            trained_parameters=678,
            examples_per_second=9.5,
            seconds=4.0,
            peak_memory_bytes=3 * 2**29,
            precision="float32",
            kernels=True,
            learning_rate=1e-3,
            stopped="all 3 steps taken",
            selection=select(
                [Candidate(kind="best_loss", step=2, valid_loss=0.5, scores=(1.0,) * 19 + (0.0,))], metric="exact match"
            ),
            proofs=(),
            contenders=(),
        ),
        plan=plan,
        split=split,
        findings=(Finding(code="odd", severity="warning", message=ATTACK, file="<b>.jsonl", lines=(3,)),),
        base_model="tiny<i>",
        kind=CHAT,
        asked=Hyperparameters(lora_r=8, min_delta=0.5),
        reproduction=Reproduction(
            arguments=("tune", "<b>.jsonl", f"--suffix={ATTACK}", "--seed=5"),
            environment={"HELDOUT_PRECISION": "float32"},
            files=(UsedFile(part="train", name="<b>.jsonl", bytes=1234, sha256="5f" * 32),),
            versions={"heldout": "0.1.0", "python": "3.12.1"},
        ),
        seconds=7.5,
    )
