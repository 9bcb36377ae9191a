"""The ranges themselves; that they reach the wire as a 400 is in test_api_jobs."""

from __future__ import annotations

import pytest

from heldout.errors import InvalidValue
from heldout.pipeline.hyperparameters import SUPPORTED, Hyperparameters


def test_auto_null_and_absence_all_mean_not_set():
    assert Hyperparameters.parse({"n_epochs": "auto", "lora_r": None}) == Hyperparameters()
    assert Hyperparameters().as_dict() == {}


@pytest.mark.parametrize("stopping", [True, False, {"enabled": True, "patience": 3}, {"enabled": False}])
def test_what_was_set_survives_storing_and_parsing_again(stopping):
    asked = Hyperparameters.parse({"n_epochs": 3, "learning_rate": 1e-4, "early_stopping": stopping})
    assert Hyperparameters.parse(asked.as_dict()) == asked
    assert (asked.n_epochs, asked.learning_rate) == (3, 1e-4)


def test_patience_alone_means_stopping_early():
    asked = Hyperparameters.parse({"early_stopping": {"patience": 2}})
    assert (asked.early_stopping, asked.patience) == (True, 2)


@pytest.mark.parametrize(
    "asked",
    [
        {"n_epochs": 1, "batch_size": 1, "lora_r": 1, "lora_dropout": 0, "warmup_ratio": 0, "max_length": 16},
        {"n_epochs": 50, "batch_size": 256, "lora_r": 256, "lora_dropout": 0.99, "warmup_ratio": 1},
    ],
)
def test_the_ends_of_a_range_belong_to_it(asked):
    assert Hyperparameters.parse(asked).as_dict() == asked


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**400, "3", []])
@pytest.mark.parametrize("name", SUPPORTED)
def test_what_is_no_number_in_range_is_refused_by_name(name, value):
    with pytest.raises(InvalidValue, match=name) as raised:
        Hyperparameters.parse({name: value})
    assert raised.value.param == f"hyperparameters.{name}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_epochs", 51),
        ("n_epochs", 2.5),
        ("n_epochs", True),
        ("batch_size", 257),
        ("learning_rate", 0),
        ("lora_r", 0),
        ("lora_dropout", 1),
        ("warmup_ratio", 1.1),
        ("max_length", 15),
        ("early_stopping", {"patience": 0}),
        ("early_stopping", {"min_delta": 1}),
    ],
)
def test_the_first_value_outside_a_range_is_refused(name, value):
    with pytest.raises(InvalidValue, match=name):
        Hyperparameters.parse({name: value})


def test_an_unknown_key_is_answered_with_the_known_ones():
    with pytest.raises(InvalidValue, match="lora_r") as raised:
        Hyperparameters.parse({"lora_rank": 8})
    assert (raised.value.code, raised.value.param) == ("unknown_parameter", "hyperparameters.lora_rank")


def test_an_absolute_rate_and_a_multiplier_exclude_each_other():
    with pytest.raises(InvalidValue, match="one of them"):
        Hyperparameters.parse({"learning_rate": 1e-4, "learning_rate_multiplier": 2})
