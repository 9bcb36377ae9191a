"""The model that comes inside a wheel: unpacked once, answered with, and trained on exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from heldout.engine.base import ModelRef, Sampling
from heldout.engine.local import LocalEngine
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.types import Example
from heldout.settings import DEFAULT_MODEL, Settings
from heldout.train import sft
from tests.torch.conftest import difference, gradients, plain_loss, stirred

TICKETS = Path(__file__).parents[2] / "examples" / "tickets.train.jsonl"


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


def test_packed_training_is_exact_on_the_bundled_model(engine: LocalEngine, plan: Callable[..., TrainPlan]) -> None:
    rows = [json.loads(line)["messages"] for line in TICKETS.read_text().splitlines()[:4]]
    examples = [Example(messages=tuple(row), weights=(0, 0, 1), line=i) for i, row in enumerate(rows)]
    trainee = stirred(sft.build_model(plan(lora_r=4), engine.folder(DEFAULT_MODEL), torch.float32))
    tokens = sft.tokenize(trainee.template, examples, 2048, "tickets")
    packed = sft.loss(trainee, sft.collate(trainee, tokens)).nll.sum()
    packed.backward()
    packed_gradients = gradients(trainee)
    plain = torch.stack([plain_loss(trainee, one) for one in tokens]).sum()
    plain.backward()
    assert float(packed.detach()) == pytest.approx(float(plain.detach()), rel=1e-4)
    assert difference(packed_gradients, gradients(trainee)) < 1e-3
