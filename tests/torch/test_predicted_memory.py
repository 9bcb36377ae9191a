"""The memory that a plan predicts is what its training takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from heldout.pipeline import memory
from heldout.train import attention, head

ROOT = Path(__file__).parents[2]


def test_memory_is_predicted_with_the_sizes_that_training_uses() -> None:
    assert (head.FEW, head.CHUNK) == memory.HEAD_ROWS
    assert attention.KEPT_SCORES == memory.KEPT_SCORES


#: Trains on 64 tickets in a process of its own, whose memory nothing else has filled.
TRAINING = """
import json, sys, tempfile
from pathlib import Path
from heldout.pipeline.dataset import read_dataset
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.plan import make_plan
from heldout.pipeline.types import Split
from heldout.pipeline.watch import Silent
from heldout.settings import DEFAULT_MODEL, read_settings
from heldout.train.trainer import TorchTrainer

def rows(part, count):
    with open(f"examples/tickets.{part}.jsonl", "rb") as file:
        return tuple(read_dataset(file, name=part)[0].examples)[:count]

use = sys.argv[1] == "kernels"
trainer = TorchTrainer(cache=read_settings().cache, aliases={}, precision="float32", use_kernels=use)
split = Split(train=rows("train", 64), valid=rows("validation", 40), holdout=(), seed=0, groups=104)
plan = make_plan(Hyperparameters(n_epochs=1), split, trainer.facts(DEFAULT_MODEL), seed=0)
with tempfile.TemporaryDirectory() as folder:
    plan = trainer.fit(plan, split, base_model=DEFAULT_MODEL, directory=Path(folder))
    adapter = trainer.train(plan, split, base_model=DEFAULT_MODEL, directory=Path(folder), watch=Silent())
print(json.dumps([plan.predicted_memory_bytes, adapter.peak_memory_bytes, adapter.kernels]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what freed memory keeps differs")
@pytest.mark.parametrize("way", ["kernels", "torch's operations"])
def test_what_a_training_of_the_bundled_model_takes_is_predicted_within_a_fifth(
    way: str, request: pytest.FixtureRequest
) -> None:
    if way == "kernels":
        request.getfixturevalue("kernels")
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, way], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    predicted, taken, kernels = json.loads(done.stdout.splitlines()[-1])
    assert kernels == (way == "kernels")
    assert predicted - memory.JOB == pytest.approx(taken, rel=0.2), "no rungs were scored before"
