"""The model that comes inside a wheel: unpacked once, answered with, and trained on exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from heldout.engine.base import ModelRef, Sampling
from heldout.engine.local import LocalEngine
from heldout.engine.template import Tokens
from heldout.pipeline.watch import Silent
from heldout.settings import DEFAULT_MODEL, Settings
from heldout.train import attention, loop, sft
from heldout.train.packing import pack
from heldout.train.sft import ChatTrainee
from tests.torch.cases import tokens_of
from tests.torch.conftest import PLAN, difference, gradients, stirred
from tests.torch.plain import Plain

#: 30 steps of two short examples.
SMALL = replace(
    PLAN, lora_r=4, batch_size=2, total_steps=30, n_epochs=15, learning_rate=1e-4, eval_every=30, early_stopping=False
)


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    """An engine on the machine's own cache: `make setup` has unpacked the model there."""
    return LocalEngine(cache=Settings().cache, aliases={}, precision="float32")


def test_the_bundled_model_is_unpacked_once_as_bf16_safetensors_with_its_chat_template(engine: LocalEngine) -> None:
    folder = engine.folder(DEFAULT_MODEL)
    assert engine.is_prepared(DEFAULT_MODEL)
    assert engine.folder(DEFAULT_MODEL) == folder
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        assert tensors.get_tensor("model.norm.weight").dtype == torch.bfloat16


def test_the_bundled_model_answers(engine: LocalEngine) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (reply,) = engine.chat(ModelRef(base_model=DEFAULT_MODEL), [question], Sampling(max_tokens=20))
    assert "Paris" in reply.text
    assert reply.finish_reason == "stop"


# Training, against transformers and PEFT as they come (tests/torch/plain.py)


@pytest.fixture(scope="module")
def trainee(engine: LocalEngine) -> ChatTrainee:
    return stirred(sft.build_model(SMALL, engine.folder(DEFAULT_MODEL), torch.float32))


@pytest.fixture(scope="module")
def plain(engine: LocalEngine, trainee: ChatTrainee) -> Plain:
    return Plain(engine.folder(DEFAULT_MODEL), trainee)


@pytest.fixture(scope="module")
def rows(trainee: ChatTrainee) -> list[Tokens]:
    """Two groups that share their few-shot turns, and two examples that share nothing."""
    return [
        row
        for kind in ("two groups with the same few-shot turns", "nothing shared")
        for row in tokens_of(trainee.template, kind)[:3]
    ]


@pytest.fixture(scope="module")
def wanted(plain: Plain, rows: list[Tokens]) -> tuple[float, torch.Tensor]:
    """Loss and gradients of the plain loop."""
    loss = plain.gradients(rows)
    found = torch.cat([p.grad.flatten() for p in plain.parameters.values() if p.grad is not None])
    for parameter in plain.parameters.values():
        parameter.grad = None
    return loss, found


def as_it_is(_: ChatTrainee, __: pytest.MonkeyPatch) -> None: ...


def without_sharing(_: ChatTrainee, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sft, "pack", lambda rows, **options: pack(rows, share=False, **options))


def in_several_packs(trainee: ChatTrainee, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainee, "plan", replace(trainee.plan, micro_tokens=100))


def with_checkpointing(trainee: ChatTrainee, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainee.body, "checkpoint", True)


def with_scores_computed_anew(_: ChatTrainee, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "KEPT_SCORES", 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [as_it_is, without_sharing, in_several_packs, with_checkpointing, with_scores_computed_anew]
)
def test_a_step_of_the_bundled_model_is_exact(
    trainee: ChatTrainee,
    rows: list[Tokens],
    wanted: tuple[float, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    way: Callable[[ChatTrainee, pytest.MonkeyPatch], None],
) -> None:
    way(trainee, monkeypatch)
    loss = loop.gradients(trainee, rows, 1).loss
    assert loss == pytest.approx(wanted[0], rel=1e-3)
    assert difference(gradients(trainee), wanted[1]) < 1e-3


@pytest.mark.slow
def test_a_frozen_step_of_the_bundled_model_is_exact_from_the_cache(
    engine: LocalEngine, rows: list[Tokens], tmp_path: Path
) -> None:
    folder = engine.folder(DEFAULT_MODEL)
    frozen = stirred(sft.build_model(replace(SMALL, freeze_layers=22), folder, torch.float32, tmp_path))
    frozen.prepare(rows, Silent())
    plain = Plain(folder, frozen)
    loss = loop.gradients(frozen, rows, 1).loss
    assert loss == pytest.approx(plain.gradients(rows), rel=1e-3)
    assert difference(gradients(frozen), gradients(plain)) < 1e-3


@pytest.mark.slow
def test_thirty_steps_of_the_bundled_model_follow_the_plain_loop(
    trainee: ChatTrainee, plain: Plain, tmp_path: Path
) -> None:
    # Their beginning, which they share, and their end.
    train = [
        Tokens(row.ids[:10] + row.ids[-12:], row.supervised[:10] + row.supervised[-12:])
        for row in tokens_of(trainee.template, "one system prompt")[:4]
    ]
    assert len(pack(train).layout.segments) > len(train)
    course = loop.run(SMALL, trainee, train, train[:1], checkpoints=tmp_path, watch=Silent())
    curve = plain.train(train, train[:1])
    assert [point.train_loss for point in course.curve] == pytest.approx(curve.train, rel=1e-3, abs=1e-5)
    assert course.curve[-1].valid_loss == pytest.approx(curve.valid[-1], rel=1e-3, abs=1e-5)
    assert curve.train[-1] < 0.8 * curve.train[0], "it has learned something"
