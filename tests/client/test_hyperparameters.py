"""The values themselves; that a wrong one is a 400 on the wire is in test_api_jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heldout.errors import InvalidValue
from heldout.pipeline.hyperparameters import KNOBS, SUPPORTED, Hyperparameters


def test_auto_null_and_absence_all_mean_not_set():
    nothing = dict(zip(SUPPORTED, ["auto", None] * len(SUPPORTED), strict=False))
    assert nothing.keys() == set(SUPPORTED)
    assert Hyperparameters.parse(nothing) == Hyperparameters()
    assert Hyperparameters().as_dict() == {}


@pytest.mark.parametrize(
    "asked",
    [
        {"early_stopping": True},
        {"early_stopping": False},
        {"early_stopping": {"enabled": True, "patience": 3, "min_delta": 0.01}},
        {"early_stopping": {"enabled": False}},
        {"early_stopping": {"patience": 2}},
        {"early_stopping": {"enabled": "auto", "min_delta": 0}},
        {"target_modules": "q_proj,v_proj"},
        {"target_modules": ["q_proj", "layers.3.mlp.up_proj"]},
        {"freeze_layers": 1},
        {"freeze_layers": 1.0},
        {"freeze_layers": "turbo"},
        {"metric": "chrf"},
        {"lr_search": "light", "learning_rate": 1e-4, "n_epochs": 3},
    ],
)
def test_what_was_set_survives_storing_and_parsing_again(asked):
    parsed = Hyperparameters.parse(asked)
    stored = json.loads(json.dumps(parsed.as_dict()))
    assert stored == parsed.as_dict() != {}
    again = Hyperparameters.parse(stored)
    assert repr(again) == repr(parsed), "1 and 1.0 are equal, but they are not the same"


@pytest.mark.parametrize("said", [None, "auto", "nothing"])
def test_patience_alone_means_stopping_early(said):
    enabled = {} if said == "nothing" else {"enabled": said}
    asked = Hyperparameters.parse({"early_stopping": {"patience": 2, "min_delta": "auto", **enabled}})
    assert (asked.early_stopping, asked.patience, asked.min_delta) == (True, 2, None)


def test_early_stopping_is_one_key_with_three_parts():
    asked = Hyperparameters.parse({"early_stopping": {"enabled": False, "patience": 2, "min_delta": 0.25}})
    assert (asked.early_stopping, asked.patience, asked.min_delta) == (False, 2, 0.25)


ENDS = [
    {
        "n_epochs": 1,
        "batch_size": 1,
        "lr_search": "off",
        "warmup_ratio": 0,
        "max_length": 16,
        "lora_r": 1,
        "target_modules": ["a"],
        "freeze_layers": 0,
        "lora_dropout": 0,
        "weight_decay": 0,
        "label_smoothing": 0,
        "neftune_noise_alpha": 0,
        "prompt_loss_weight": 0,
        "replay_ratio": 0,
        "augmentation": "none",
        "early_stopping": {"enabled": False, "patience": 1, "min_delta": 0},
    },
    {
        "n_epochs": 50,
        "batch_size": 256,
        "lr_search": "light",
        "warmup_ratio": 1,
        "lora_r": 256,
        "target_modules": [f"module_{i}.x-y" for i in range(64)],
        "freeze_layers": 0.999,
        "lora_dropout": 0.99,
        "label_smoothing": 0.99,
        "prompt_loss_weight": 1,
        "replay_ratio": 1,
        "augmentation": "paraphrase",
    },
]


@pytest.mark.parametrize("asked", ENDS)
def test_the_ends_of_a_range_belong_to_it(asked):
    assert Hyperparameters.parse(asked).as_dict() == asked


NO_VALUES = (float("nan"), float("inf"), -1, 10**400, "?", "", [], {"a": 1})


@pytest.mark.parametrize("value", NO_VALUES)
@pytest.mark.parametrize("name", SUPPORTED)
def test_what_is_no_value_of_a_hyperparameter_is_refused_by_name(name, value):
    with pytest.raises(InvalidValue, match=name) as raised:
        Hyperparameters.parse({name: value})
    assert raised.value.param == f"hyperparameters.{name}"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("n_epochs", 51, "a whole number from 1 to 50"),
        ("n_epochs", 2.5, "a whole number"),
        ("n_epochs", True, "a whole number"),
        ("batch_size", 257, "from 1 to 256"),
        ("learning_rate", 0, "above 0"),
        ("lora_r", 0, "from 1 to 256"),
        ("lora_dropout", 1, "from 0 to below 1"),
        ("label_smoothing", 1, "from 0 to below 1"),
        ("warmup_ratio", 1.1, "from 0 to 1"),
        ("prompt_loss_weight", 1.1, "from 0 to 1"),
        ("replay_ratio", 1.1, "from 0 to 1"),
        ("max_length", 15, "at least 16"),
        ("augmentation", "Robust", '"none", "robust" or "paraphrase"'),
        ("augmentation", True, '"none", "robust" or "paraphrase"'),
        ("lr_search", "Light", '"off" or "light"'),
        ("metric", "accuracy", '"exact_match", "label_accuracy", "number", "sql", "field_f1"'),
        ("lr_search", True, '"off" or "light"'),
        ("freeze_layers", 1.5, "a share of them above 0 and below 1"),
        ("freeze_layers", True, "a whole number of layers"),
        ("freeze_layers", "slow", '"full", "fast" or "turbo"'),
        ("target_modules", [f"m{i}" for i in range(65)], "1 to 64 names"),
        ("target_modules", ["q_proj", 3], "names of modules"),
        ("target_modules", "q_proj,", "names of modules"),
        ("target_modules", r".*\.q_proj", "names of modules"),
        ("target_modules", "q_proj\n", "names of modules"),
        ("target_modules", ["all-linear", "q_proj"], '"all-linear", or'),
    ],
)
def test_the_first_value_outside_is_refused_and_the_values_are_named(name, value, expected):
    with pytest.raises(InvalidValue, match=name) as raised:
        Hyperparameters.parse({name: value})
    assert expected in str(raised.value)
    assert 'or "auto"' in str(raised.value)


@pytest.mark.parametrize(
    ("value", "param", "expected"),
    [
        (3, "early_stopping", '{"enabled": …, "patience": …, "min_delta": …}'),
        ({"delta": 1}, "early_stopping", '{"enabled": …, "patience": …, "min_delta": …}'),
        ({"enabled": 1}, "early_stopping.enabled", "true or false"),
        ({"patience": 0}, "early_stopping.patience", "a whole number of at least 1"),
        ({"min_delta": -0.1}, "early_stopping.min_delta", "a number of at least 0"),
    ],
)
def test_a_part_of_early_stopping_is_refused_by_its_own_name(value, param, expected):
    with pytest.raises(InvalidValue) as raised:
        Hyperparameters.parse({"early_stopping": value})
    assert raised.value.param == f"hyperparameters.{param}"
    assert expected in str(raised.value)


@pytest.mark.parametrize("name", ["lora_rank", "patience", "min_delta"])
def test_an_unknown_key_is_answered_with_the_known_ones(name):
    with pytest.raises(InvalidValue, match=r"lora_r, .*early_stopping") as raised:
        Hyperparameters.parse({name: 8})
    assert (raised.value.code, raised.value.param) == ("unknown_parameter", f"hyperparameters.{name}")


def test_an_absolute_rate_and_a_multiplier_exclude_each_other():
    with pytest.raises(InvalidValue, match="one of them"):
        Hyperparameters.parse({"learning_rate": 1e-4, "learning_rate_multiplier": 2})


def test_every_hyperparameter_is_in_the_table_of_the_settings():
    table = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    for name in KNOBS:
        key = f"early_stopping.{name}" if name not in SUPPORTED else name
        assert f"\n| `{key}` |" in table, key


@pytest.mark.parametrize("place", ["method", "hyperparameters"])
def test_what_was_asked_for_comes_back_over_the_wire(live, place):
    asked = {
        "lr_search": "light",
        "target_modules": ["q_proj", "v_proj"],
        "freeze_layers": 0.5,
        "early_stopping": {"enabled": True, "patience": 2, "min_delta": 0.01},
    }
    given = asked if place == "hyperparameters" else {"type": "supervised", "supervised": {"hyperparameters": asked}}
    job = live.client.fine_tuning.jobs.retrieve(live.create_job(**{place: given}).id)
    shown = job.method.supervised.hyperparameters.to_dict()
    assert {name: shown[name] for name in asked} == asked
