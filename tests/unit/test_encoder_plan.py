"""The recipe of a classifier on an encoder: numbers with reasons, and nothing a classifier has no use for."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from heldout.errors import InvalidValue
from heldout.pipeline.encoder_plan import MEANINGLESS
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.plan import TrainPlan, make_plan
from heldout.pipeline.training import ModelFacts
from tests.unit.conftest import labelled, split_of


def plan(n: int = 240, *, hidden: int = 384, layers: int = 6, **asked: Any) -> TrainPlan:
    facts = ModelFacts(hidden_size=hidden, layers=layers, context=512, parameters=1, kind="encoder")
    split = split_of(labelled("train", n), labelled("valid", 40))
    return make_plan(Hyperparameters.parse(asked), split, facts, seed=11)


@pytest.mark.parametrize("n", [10, 240, 5000])
@pytest.mark.parametrize("hidden", [32, 384, 768, 1024, 4096])
def test_every_value_has_a_reason_and_stays_within_bounds(n: int, hidden: int) -> None:
    resolved = plan(n, hidden=hidden)
    for field in fields(TrainPlan):
        if field.name != "reasons":
            assert getattr(resolved, field.name) is not None
            assert resolved.reasons[field.name].strip(), field.name
    assert 3 <= resolved.n_epochs <= 10
    assert 1e-5 <= resolved.learning_rate <= 1e-4
    assert resolved.batch_size <= n
    assert resolved.warmup_steps <= resolved.total_steps
    assert (resolved.max_length, resolved.seed) == (512, 11)


def test_wider_encoders_learn_at_the_customary_rates() -> None:
    assert plan(hidden=384).learning_rate == pytest.approx(1e-4)
    assert plan(hidden=768).learning_rate == pytest.approx(2.5e-5)
    assert plan(hidden=1024).learning_rate == pytest.approx(1.4e-5, rel=0.01)
    assert plan(hidden=768, learning_rate_multiplier=2).learning_rate == pytest.approx(5e-5)


@pytest.mark.parametrize(
    ("asked", "frozen"), [(None, 3), ("full", 0), ("fast", 3), ("turbo", 4), (2, 2), (0.5, 3), (6, 6)]
)
def test_lower_layers_are_frozen_up_to_all_of_them(asked: Any, frozen: int) -> None:
    resolved = plan(freeze_layers=asked)
    assert resolved.freeze_layers == frozen
    assert ("head alone" in resolved.reasons["freeze_layers"]) == (frozen == 6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 3),
        ("n_epochs", 2),
        ("learning_rate", 0.37),
        ("lora_dropout", 0.31),
        ("weight_decay", 0.02),
        ("warmup_ratio", 0.5),
        ("label_smoothing", 0.1),
        ("max_length", 99),
        ("early_stopping", False),
    ],
)
def test_what_was_asked_for_wins_and_says_so(name: str, value: Any) -> None:
    resolved = plan(**{name: value})
    assert getattr(resolved, name) == value
    assert resolved.reasons[name] == "set in the request"
    assert getattr(plan(), name) != value, "the default would have passed"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_r", 8),
        ("lora_alpha", 16),
        ("target_modules", ["q_proj"]),
        ("neftune_noise_alpha", 5),
        ("prompt_loss_weight", 0.1),
        ("replay_ratio", 0.5),
        ("freeze_layers", 7),
        ("max_length", 513),
    ],
)
def test_what_an_encoder_cannot_use_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=name) as raised:
        plan(**{name: value})
    assert raised.value.param == f"hyperparameters.{name}"


def test_turning_off_what_is_off_anyway_is_fine() -> None:
    off = {name: value for name, value in MEANINGLESS.items() if name.endswith(("weight", "ratio", "noise_alpha"))}
    assert len(off) == 3
    assert plan(**off) == plan()
