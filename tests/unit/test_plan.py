"""Every "auto" becomes a number with a reason; what was asked for stays as it is."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest

from heldout.errors import InvalidValue
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.plan import TrainPlan, make_plan
from heldout.pipeline.training import ModelFacts
from tests.unit.conftest import labelled, split_of

SIZES = [(7, 2), (10, 3), (50, 10), (80, 24), (240, 40), (1000, 100), (3000, 200), (20_000, 200)]
NAMES = [field.name for field in fields(TrainPlan) if field.name != "reasons"]


def plan(
    n: int = 240, n_valid: int = 40, *, hidden: int = 576, layers: int = 30, context: int = 2048, **asked: Any
) -> TrainPlan:
    facts = ModelFacts(hidden_size=hidden, layers=layers, context=context, parameters=1)
    split = split_of(labelled("train", n), labelled("valid", n_valid))
    return make_plan(Hyperparameters.parse(asked), split, facts, seed=11)


@pytest.mark.parametrize(("n", "n_valid"), SIZES)
def test_every_auto_becomes_a_number_with_a_reason(n: int, n_valid: int) -> None:
    resolved = plan(n, n_valid, n_epochs="auto", batch_size="auto", learning_rate_multiplier="auto")
    for name in NAMES:
        assert getattr(resolved, name) not in (None, "auto"), name
        assert resolved.reasons[name].strip(), name
    assert resolved.as_dict().keys() == set(NAMES)
    for name, choice in resolved.as_dict().items():
        value = getattr(resolved, name)
        assert choice == {
            "value": list(value) if isinstance(value, tuple) else value,
            "reason": resolved.reasons[name],
        }


def test_a_gpu_computes_more_tokens_at_once() -> None:
    split = split_of(labelled("train", 240), labelled("valid", 40))
    here = ModelFacts(hidden_size=576, layers=30, context=2048, parameters=1)
    one, other = (make_plan(Hyperparameters(), split, replace(here, gpu=gpu), seed=1) for gpu in (False, True))
    assert one.micro_tokens < other.micro_tokens
    assert replace(other, micro_tokens=one.micro_tokens) == one


@pytest.mark.parametrize(("n", "n_valid"), SIZES)
@pytest.mark.parametrize("hidden", [64, 576, 4096, 16_384])
def test_automatic_numbers_stay_within_bounds(n: int, n_valid: int, hidden: int) -> None:
    resolved = plan(n, n_valid, hidden=hidden)
    steps_per_epoch = math.ceil(n / resolved.batch_size)
    assert 3 <= resolved.n_epochs <= 12
    assert 1 <= resolved.batch_size <= min(n, 32)
    assert resolved.total_steps == resolved.n_epochs * steps_per_epoch
    assert 1e-4 <= resolved.learning_rate <= 2e-3
    assert 1 <= resolved.warmup_steps <= resolved.total_steps
    assert 1 <= resolved.eval_every <= steps_per_epoch
    assert math.ceil(steps_per_epoch / resolved.eval_every) <= 4, "validation must not eat the training time"
    assert 16 <= resolved.max_length <= 2048
    assert 0 <= resolved.lora_dropout < 1
    assert resolved.early_stopping is True
    assert resolved.patience >= 1
    assert resolved.seed == 11


def test_more_examples_mean_fewer_epochs_larger_batches_and_no_dropout() -> None:
    small, middle, large = plan(50), plan(240), plan(20_000, 200)
    assert small.n_epochs > middle.n_epochs >= large.n_epochs == 3
    assert small.batch_size == middle.batch_size == 8 < large.batch_size
    assert small.lora_dropout > 0 == large.lora_dropout


def test_wider_models_learn_at_a_lower_rate() -> None:
    assert plan(hidden=576).learning_rate == pytest.approx(2e-3)
    assert plan(hidden=4096).learning_rate == pytest.approx(2e-3 * 576 / 4096)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 3),
        ("learning_rate_multiplier", 0.25),
        ("learning_rate", 0.37),
        ("lora_r", 5),
        ("lora_alpha", 7.5),
        ("lora_dropout", 0.31),
        ("weight_decay", 0.02),
        ("warmup_ratio", 0.5),
        ("max_grad_norm", 3.5),
        ("lr_search", "light"),
        ("target_modules", ("q_proj", "v_proj")),
        ("label_smoothing", 0.1),
        ("neftune_noise_alpha", 5.0),
        ("prompt_loss_weight", 0.1),
        ("replay_ratio", 0.25),
        ("ema_decay", 0.75),
        ("max_length", 99),
        ("early_stopping", False),
    ],
)
def test_what_was_asked_for_wins_and_says_so(name: str, value: Any) -> None:
    resolved = plan(**{name: list(value) if isinstance(value, tuple) else value})
    assert getattr(resolved, name) == value
    assert resolved.reasons[name] == "set in the request"
    assert getattr(plan(), name) != value, "the default would have passed"


def test_patience_is_asked_for_together_with_early_stopping() -> None:
    resolved = plan(early_stopping={"enabled": True, "patience": 9})
    assert (resolved.early_stopping, resolved.patience) == (True, 9)
    assert resolved.reasons["patience"] == "set in the request"


def test_weights_are_averaged_over_half_an_epoch_and_at_most_a_twentieth_of_all_steps() -> None:
    long, short, tiny = plan(240, n_epochs=20), plan(240, n_epochs=4), plan(30, n_epochs=3)
    assert long.ema_decay == pytest.approx(1 - 1 / 15, abs=1e-4), "30 steps an epoch"
    assert short.ema_decay == pytest.approx(1 - 1 / 6, abs=1e-4), "120 steps"
    assert tiny.ema_decay == 0.0, "12 steps: an average of less than one is none"


def test_what_knobs_do_by_default_is_nothing() -> None:
    resolved = plan()
    off = ("freeze_layers", "label_smoothing", "neftune_noise_alpha", "prompt_loss_weight", "replay_ratio")
    assert [getattr(resolved, name) for name in off] == [0] * len(off)
    assert (resolved.lr_search, resolved.target_modules) == ("off", ("all-linear",))


def test_epochs_that_were_asked_for_are_the_most_unless_early_stopping_is_off() -> None:
    most, all_of_them = plan(n_epochs=29), plan(n_epochs=29, early_stopping=False)
    assert most.n_epochs == all_of_them.n_epochs == 29
    assert most.reasons["n_epochs"] == "set in the request, as the most; early stopping may end sooner"
    assert all_of_them.reasons["n_epochs"] == "set in the request; all of them, as early stopping is off"


def test_a_smallest_improvement_that_was_asked_for_replaces_the_noise_of_validation() -> None:
    auto, asked = plan(), plan(early_stopping={"min_delta": 0.02})
    assert (auto.min_delta, auto.min_delta_errors) == (0.0, 0.5)
    assert (asked.min_delta, asked.min_delta_errors) == (0.02, 0.0)
    assert plan(early_stopping={"min_delta": 0}).min_delta_errors == 0.0
    assert asked.reasons["min_delta"] == "set in the request"


@pytest.mark.parametrize(
    ("asked", "layers", "frozen"),
    [
        (0, 30, 0),
        (1, 30, 1),
        (29, 30, 29),
        (0.0, 30, 0),
        (0.5, 30, 15),
        (0.34, 30, 10),
        ("full", 30, 0),
        ("fast", 30, 15),
        ("turbo", 30, 22),
        ("fast", 2, 1),
        ("turbo", 2, 1),
        ("auto", 30, 0),
    ],
)
def test_frozen_layers_are_counted_given_as_a_share_or_by_profile(asked: Any, layers: int, frozen: int) -> None:
    resolved = plan(layers=layers, freeze_layers=asked)
    assert resolved.freeze_layers == frozen
    assert isinstance(resolved.freeze_layers, int)
    if asked != "auto":
        assert resolved.reasons["freeze_layers"] == f"set in the request: {asked}, of {layers} layers"


@pytest.mark.parametrize(("asked", "layers"), [(30, 30), (31, 30), (1.0, 30), (0.99, 30), (1, 1), ("turbo", 1)])
def test_freezing_every_layer_is_refused_with_the_models_number(asked: Any, layers: int) -> None:
    with pytest.raises(InvalidValue, match=f"the model has {layers}. Freeze at most {layers - 1}") as refused:
        plan(layers=layers, freeze_layers=asked)
    assert refused.value.param == "hyperparameters.freeze_layers"
    assert repr(asked) in str(refused.value)


@pytest.mark.parametrize("asked", [{}, {"learning_rate": 0.01}, {"learning_rate_multiplier": 3}])
def test_a_search_of_rates_has_the_plans_rate_in_its_middle(asked: dict[str, float]) -> None:
    searched, fixed = plan(**asked, lr_search="light"), plan(**asked)
    assert searched.learning_rate == fixed.learning_rate
    assert (
        searched.reasons["learning_rate"] == f"{fixed.reasons['learning_rate']}; the middle one of three that are tried"
    )


def test_the_multiplier_multiplies_the_rate() -> None:
    for factor in (0.1, 2.0, 30.0):
        assert plan(learning_rate_multiplier=factor).learning_rate == pytest.approx(factor * plan().learning_rate)


def test_the_warm_up_is_a_share_of_the_steps() -> None:
    total = plan(n_epochs=40).total_steps
    assert plan(n_epochs=40, warmup_ratio=0.5).warmup_steps == total // 2
    assert plan(warmup_ratio=0).warmup_steps == 0
    assert plan(7, n_epochs=1).warmup_steps <= plan(7, n_epochs=1).total_steps


def test_derived_numbers_follow_what_was_asked() -> None:
    resolved = plan(100, 20, n_epochs=5, batch_size=30, lora_r=4)
    assert resolved.total_steps == 5 * 4
    assert resolved.lora_alpha == 8
    assert plan(20, 5, batch_size=64).batch_size == 20, "a batch holds each example once"


def test_no_example_may_be_longer_than_the_model_reads() -> None:
    assert plan(context=512).max_length == 512
    assert plan(context=131_072).max_length == 4096
