"""Trainees and plans small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import torch
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.types import Example
from heldout.train import sft
from heldout.train.sft import Trainee
from tests.conftest import colour_row

PLAN = TrainPlan(
    n_epochs=3,
    batch_size=8,
    learning_rate_multiplier=1.0,
    learning_rate=5e-3,
    warmup_steps=5,
    total_steps=30,
    eval_every=5,
    lora_r=8,
    lora_alpha=16.0,
    lora_dropout=0.0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    max_length=512,
    early_stopping=True,
    patience=4,
    seed=0,
    reasons={},
)


@pytest.fixture
def plan() -> Callable[..., TrainPlan]:
    """A plan with some numbers changed."""
    return lambda **changes: replace(PLAN, **changes)


def examples(numbers: range) -> tuple[Example, ...]:
    """Examples of the colour task."""
    return tuple(
        Example(messages=tuple(colour_row(i)["messages"]), weights=(0, 0, 1), line=i + 1)  # type: ignore[arg-type]
        for i in numbers
    )


@pytest.fixture
def trainee(tiny_model: Path, plan: Callable[..., TrainPlan]) -> Trainee:
    """The tiny model with an adapter whose B is not zero, so that every gradient path matters."""
    return stirred(sft.build_model(plan(), tiny_model, torch.float32))


def stirred(trainee: Trainee) -> Trainee:
    """Fill the adapter's zeros with small numbers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainee.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return trainee


def gradients(trainee: Trainee) -> torch.Tensor:
    """All adapter gradients in one vector; they are cleared."""
    flat = torch.cat([p.grad.flatten() for p in trainee.parameters.values() if p.grad is not None])
    for parameter in trainee.parameters.values():
        parameter.grad = None
    return flat


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference relative to the norm."""
    return float((a - b).norm() / b.norm())


def plain_loss(trainee: Trainee, tokens: Any) -> torch.Tensor:
    """One example the way transformers computes it: alone, causal attention, labels shifted by one;
    the sum over supervised tokens."""
    model = trainee.peft.get_base_model()
    kept = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    logits = model(input_ids=torch.tensor([tokens.ids])).logits[0, :-1]
    model.set_attn_implementation(kept)
    supervised = torch.tensor(tokens.supervised[1:])
    targets = torch.tensor(tokens.ids[1:])
    return torch.nn.functional.cross_entropy(logits[supervised], targets[supervised], reduction="sum")
