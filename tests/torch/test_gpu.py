"""On a GPU: what it computes is what a processor computes, and a resumed job ends where an uninterrupted one does.

Machines without a GPU skip this file; everything else in these tests runs on the processor, wherever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heldout.engine import device
from heldout.engine.base import ModelRef, Sampling
from heldout.engine.local import LocalEngine
from heldout.engine.template import Tokens
from heldout.pipeline.training import Adapter
from heldout.pipeline.watch import Silent
from heldout.train import loop
from heldout.train.sft import ChatTrainee
from heldout.train.trainer import TorchTrainer
from tests.torch.cases import FAMILIES, KINDS, tokens_of
from tests.torch.conftest import PLAN, SMALL, TOOLS, build, difference, examples, gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

#: Sums in another order, in fp32.
CLOSE = 1e-3


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests leave it alone."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "is_gpu", torch.cuda.is_available)


@pytest.fixture
def on_processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on models are loaded where there is no GPU."""
    return lambda: monkeypatch.setattr(device, "is_gpu", lambda: False)


def step_of(trainee: ChatTrainee, rows: list[Tokens], step: int) -> tuple[float, torch.Tensor]:
    """Loss and gradients of a step."""
    with device.repeatable():
        found = loop.gradients(trainee, rows, step)
    return found.loss, gradients(trainee).cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpus_step_is_a_processors(families: dict[str, Path], kind: str, on_processor: Callable[[], None]) -> None:
    folder = families["llama, 2 queries a key"]
    there = build(folder)
    assert there.device.type == "cuda"
    rows = tokens_of(there.template, kind)
    found = [step_of(there, rows, step) for step in (1, 2, 3)]  # as it is, recorded, replayed
    on_processor()
    loss, wanted = step_of(build(folder), rows, 1)
    for its_loss, its_gradients in found:
        assert its_loss == pytest.approx(loss, rel=CLOSE)
        assert difference(its_gradients, wanted) < CLOSE
    assert torch.equal(found[1][1], found[2][1])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trained_on_a_gpu_as_on_a_processor(
    families: dict[str, Path], family: str, on_processor: Callable[[], None]
) -> None:
    there = build(families[family], replace(PLAN, micro_tokens=200))
    rows = tokens_of(there.template, "everything")
    found = [step_of(there, rows, step) for step in (1, 2)]
    seen = loop.validate(there, rows)
    on_processor()
    here = build(families[family])
    loss, wanted = step_of(here, rows, 1)
    for its_loss, its_gradients in found:
        assert its_loss == pytest.approx(loss, rel=CLOSE)
        assert difference(its_gradients, wanted) < CLOSE
    assert seen.losses == pytest.approx(loop.validate(here, rows).losses, rel=CLOSE)


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.3}, {"lora_dropout": 0.3, "checkpointing": True}])
def test_a_recorded_step_has_the_dropout_of_its_own_number(
    families: dict[str, Path], changes: dict[str, object]
) -> None:
    folder = families["llama, 2 queries a key"]
    rows = tokens_of(build(folder).template, "everything")
    # The second of two trainees comes to step 5 as its first, and records nothing before it.
    one, other = (build(folder, replace(PLAN, **changes)) for _ in range(2))  # type: ignore[arg-type]
    found = {step: step_of(one, rows, step) for step in (1, 2, 3, 5)}
    loss, wanted = step_of(other, rows, 5)
    assert loss == found[5][0]
    assert torch.equal(found[5][1], wanted)
    assert difference(found[3][1], found[5][1]) > 0.01, "another step drops other values"


def test_a_job_that_is_taken_up_on_a_gpu_ends_with_the_same_bits(tiny_model: Path, tmp_path: Path) -> None:
    plan = replace(PLAN, lora_dropout=0.1, ema_decay=0.5, n_epochs=2, total_steps=20, eval_every=3)

    class Killed(Silent):
        at = 0

        def progress(self, stage: str, done: int, total: int) -> None:
            if stage == "train" and done == self.at:
                raise KeyboardInterrupt

    def run(directory: Path, at: int = 0) -> Adapter:
        watch = Killed()
        watch.at = at
        return TorchTrainer(**TOOLS).train(plan, SMALL, base_model=str(tiny_model), directory=directory, watch=watch)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", at=8)
    again = run(tmp_path / "killed")
    name = "adapter_model.safetensors"
    assert (again.directory / name).read_bytes() == (whole.directory / name).read_bytes()
    assert [point.train_loss for point in again.curve] == [point.train_loss for point in whole.curve]
    assert whole.peak_memory_bytes > 0


def test_a_gpu_answers_as_a_processor_does(tiny_model: Path, tmp_path: Path, on_processor: Callable[[], None]) -> None:
    adapter = TorchTrainer(**TOOLS).train(PLAN, SMALL, base_model=str(tiny_model), directory=tmp_path, watch=Silent())
    model = ModelRef(base_model=str(tiny_model), adapter=str(adapter.directory))
    prompts = [one.prompt for one in examples(range(500, 560))]
    whole = [one.messages for one in examples(range(500, 520))]
    sampling = Sampling(max_tokens=12)
    engine = LocalEngine(**TOOLS)
    there = engine.chat(model, prompts, sampling), engine.log_probs(model, whole)
    on_processor()
    engine = LocalEngine(**TOOLS)
    assert [one.text for one in engine.chat(model, prompts, sampling)] == [one.text for one in there[0]]
    assert engine.log_probs(model, whole) == pytest.approx(there[1], rel=CLOSE, abs=CLOSE)
    for example, proof in zip(SMALL.valid, adapter.proofs, strict=False):
        assert engine.log_probs(model, [example.messages])[0] == pytest.approx(proof.log_prob, rel=CLOSE, abs=CLOSE)


def test_what_fits_is_what_is_free_on_the_gpu_or_held_by_this_process() -> None:
    before = device.memory_bytes()
    held = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    assert device.memory_bytes() == pytest.approx(before, abs=1 << 27), "what is held may be used again"
    del held
    assert device.memory_bytes() <= torch.cuda.mem_get_info()[1]


def test_a_second_training_in_this_process_is_the_first_again(tiny_model: Path, tmp_path: Path) -> None:
    plan = replace(PLAN, lora_dropout=0.1, lr_search="light")
    found = [
        TorchTrainer(**TOOLS).train(plan, SMALL, base_model=str(tiny_model), directory=tmp_path / name, watch=Silent())
        for name in ("one", "two")
    ]
    one, two = ([point.train_loss for point in adapter.curve] for adapter in found)
    assert one == two


def test_bfloat16_learns_what_float32_does(families: dict[str, Path]) -> None:
    folder = families["llama, 2 queries a key"]
    found = {}
    for precision in (torch.float32, torch.bfloat16):
        trainee = build(folder, precision=precision)
        rows = tokens_of(trainee.template, "everything")
        found[precision] = [step_of(trainee, rows, step) for step in (1, 2)]
    for one, other in zip(*found.values(), strict=True):
        assert one[0] == pytest.approx(other[0], rel=0.02)
        assert difference(other[1], one[1]) < 0.1
