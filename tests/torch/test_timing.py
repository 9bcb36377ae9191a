"""Timing a training takes real steps of it, and counts what a job would do."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from heldout.engine.base import ModelRef, Sampling
from heldout.engine.local import LocalEngine
from heldout.pipeline.advise.duration import training_of
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.plan import TrainPlan
from heldout.processes.advising import advise
from heldout.settings import Settings
from heldout.train import checkpoint, loop, timing
from heldout.train.trainer import TorchTrainer
from tests.conftest import colour_files
from tests.torch.conftest import PLAN, TOOLS, parts


def test_timing_takes_steps_that_move_the_adapter(tiny_model: Path, tmp_path: Path) -> None:
    timings = TorchTrainer(**TOOLS).time_steps(
        PLAN, parts(), base_model=str(tiny_model), directory=tmp_path, seconds=0.0
    )
    assert timings.steps == timing.LEAST_STEPS
    tensors = load_file(timings.adapter / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_B" in name), "B starts at zero"
    assert min(timings.build, timings.step, timings.validation, timings.save) > 0
    assert checkpoint.steps(tmp_path / "checkpoints") == [1]


def test_timing_stops_after_an_epoch_however_much_time_there_is(tiny_model: Path, tmp_path: Path) -> None:
    timings = TorchTrainer(**TOOLS).time_steps(
        PLAN, parts(), base_model=str(tiny_model), directory=tmp_path, seconds=1e6
    )
    assert timings.steps == math.ceil(80 / PLAN.batch_size)


def test_timing_counts_the_tokens_that_training_bills(tiny_model: Path, tmp_path: Path) -> None:
    trainer, split = TorchTrainer(**TOOLS), parts()
    timings = trainer.time_steps(PLAN, split, base_model=str(tiny_model), directory=tmp_path, seconds=0.0)
    rows = trainer.build(PLAN, split, str(tiny_model), None).rows(split.train, "train")
    assert timings.tokens == sum(map(len, rows))
    assert timings.supervised == sum(sum(row.supervised[1:]) for row in rows)


def test_what_a_few_steps_made_can_be_asked(tiny_model: Path, tmp_path: Path, engine: LocalEngine) -> None:
    split = parts()
    timings = TorchTrainer(**TOOLS).time_steps(PLAN, split, base_model=str(tiny_model), directory=tmp_path, seconds=0.0)
    model = ModelRef(base_model=str(tiny_model), adapter=str(timings.adapter))
    (reply,) = engine.chat(model, [split.valid[0].prompt], Sampling(max_tokens=3))
    assert reply.completion_tokens <= 3


def test_steps_of_mean_length_are_taken_first() -> None:
    lengths = [10] * 40 + [100] * 8
    order = timing.typical_steps(PLAN, lengths)
    tokens = [sum(lengths[row] for row in loop.batch_rows(PLAN, len(lengths), step)) for step in order]
    mean = sum(lengths) / len(order)
    assert sorted(order) == list(range(1, 7))
    assert abs(tokens[0] - mean) == min(abs(one - mean) for one in tokens)


@pytest.mark.parametrize(
    ("rows", "eval_every", "steps"), [(80, 5, 30), (80, 3, 30), (77, 4, 27), (80, 10, 7), (9, 1, 2)]
)
def test_validations_are_counted_as_the_loop_takes_them(rows: int, eval_every: int, steps: int) -> None:
    from dataclasses import replace

    plan: TrainPlan = replace(PLAN, eval_every=eval_every, total_steps=steps, early_stopping=False)
    split = parts(rows)
    due = sum(loop.is_due(plan, rows, step) for step in range(1, steps + 1))
    assert training_of(plan, split, choose_metric(["red", "blue"] * 3)).validations == due


@pytest.mark.parametrize("crossfit", [True, False])
def test_advice_measures_the_job_that_would_be_run(tiny_model: Path, tmp_path: Path, crossfit: bool) -> None:
    files = colour_files(tmp_path)
    holdout = None if crossfit else files["holdout"]
    advice = advise(
        files["train"],
        files["valid"],
        holdout,
        model=str(tiny_model),
        settings=Settings(data_dir=tmp_path / "data", precision="float32"),
        n_epochs=2,
    )
    job = advice.as_dict()["job"]
    assert job["steps_measured"] >= timing.LEAST_STEPS
    assert job["duration"]["trainings"] == (6 if crossfit else 1)
    assert 0 < job["duration"]["typical"] <= job["duration"]["at_most"]
    assert job["tokens"]["prompt"]["without_system"] < job["tokens"]["prompt"]["plain"]
    assert [one.name for one in advice.prompted] == ["zero-shot", "4-shot", "8-shot"]
    assert job["memory_bytes"] > 0
