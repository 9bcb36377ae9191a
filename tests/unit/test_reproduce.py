"""The command that a report prints is the job again: read by a shell, and by the command line's own parser."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from heldout import cli
from heldout.engine.catalogue import ENCODER
from heldout.errors import UserError
from heldout.pipeline.evaluate.graders.read import grader_json
from heldout.pipeline.hyperparameters import KNOBS, Hyperparameters
from heldout.pipeline.plan import make_plan
from heldout.pipeline.reproduce import quoted, reproduction_of
from heldout.pipeline.request import Request, Source
from heldout.pipeline.run import as_computed
from heldout.pipeline.training import ModelFacts
from heldout.processes import foreground
from heldout.processes.foreground import source
from heldout.settings import Settings
from tests.unit.conftest import labelled, split_of
from tests.unit.outcomes import make_outcome

FACTS = ModelFacts(hidden_size=64, layers=4, context=512, parameters=1)
GRADER = {
    "type": "string_check",
    "name": 'x"; rm -rf /',
    "operation": "eq",
    "input": "{{ sample.output_text }}",
    "reference": "é'$(b)",
}

#: Values of each hyperparameter that are easily read as something else.
ODD: dict[str, list[Any]] = {
    "freeze_layers": [1, 0.5, "turbo"],
    "target_modules": ["all-linear", ["q_proj", "v_proj"], ["0"], ["true"]],
    "early_stopping": [False, {"patience": 3, "min_delta": 0.25}, {"enabled": False, "min_delta": 1e-9}],
    "learning_rate": [1e-5, 0.1 + 0.2],
    "n_epochs": [3],
    "metric": ["token_f1"],
    "augmentation": ["robust"],
}


def files(name: str = "train.jsonl") -> Source:
    return Source(name=name, open=lambda: io.BytesIO(b"{}\n"))


def request(**changes: Any) -> Request:
    return Request(**{"base_model": "tiny", "training": files(), "directory": Path("out"), **changes})


def parsed(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `heldout` with these arguments asks the pipeline for."""
    asked: dict[str, Any] = {}

    def tune(train: Path, validation: Path | None, holdout: Path | None, **options: Any) -> None:
        asked.update(options, train=train, validation=validation, holdout=holdout)
        raise UserError("far enough")

    monkeypatch.setattr(foreground, "tune", tune)
    with pytest.raises(SystemExit):
        typer.main.get_command(cli.app).main(list(arguments), standalone_mode=False)
    del asked["watch"]
    return asked


def hyperparameters(asked: dict[str, Any]) -> Hyperparameters:
    return Hyperparameters.parse({name: value for name, value in asked.items() if name in KNOBS})


@pytest.mark.parametrize(
    "raw", [{name: value} for name, values in ODD.items() for value in values], ids=lambda raw: json.dumps(raw)
)
def test_each_hyperparameter_comes_through_the_parser_as_it_was_asked_for(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Hyperparameters.parse(raw)
    found = hyperparameters(parsed(reproduction_of(request(hyperparameters=asked)).arguments, monkeypatch))
    assert found == asked
    assert [type(value) for value in found.as_dict().values()] == [type(value) for value in asked.as_dict().values()]


def test_all_hyperparameters_at_once_give_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    split = split_of(labelled("train", 80), labelled("valid", 20), labelled("holdout", 60))
    plan = make_plan(Hyperparameters(), split, FACTS, seed=5)
    raw = {name: getattr(plan, name) for name in KNOBS if name in plan.as_dict()} | {
        "metric": "label_accuracy",
        "tuned_encoder": True,
        "target_modules": ["q_proj"],
        "early_stopping": {"enabled": True, "patience": 9, "min_delta": 0.125},
    }
    for name in ("patience", "min_delta", "learning_rate_multiplier"):
        del raw[name]
    asked = Hyperparameters.parse(raw)
    left_out = {name for name in KNOBS if getattr(asked, name) is None}
    assert left_out == {"learning_rate_multiplier"}, "it and learning_rate exclude each other"
    again = hyperparameters(parsed(reproduction_of(request(hyperparameters=asked)).arguments, monkeypatch))
    assert make_plan(again, split, FACTS, seed=5) == make_plan(asked, split, FACTS, seed=5)


def test_everything_else_that_was_asked_for_comes_through_whatever_it_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suffix = "-x --seed=9; $(touch gone) `id` \"' \\ \n\u202e é"
    job = request(
        training=files("--seed=7.jsonl"),
        validation=files("-v 'a'.jsonl"),
        holdout=files("$HOME/h.jsonl"),
        base_model="a b/c",
        suffix=suffix,
        seed=123,
        grader=GRADER,
        keep_leaks=True,
        directory=Path("/somewhere/private/ftjob-1"),
    )
    found = reproduction_of(job)
    asked = parsed(found.arguments, monkeypatch)
    assert (asked["train"], asked["validation"]) == (Path("./--seed=7.jsonl"), Path("-v 'a'.jsonl"))
    assert asked["holdout"] == Path("$HOME/h.jsonl")
    assert (asked["model"], asked["suffix"], asked["seed"]) == ("a b/c", suffix, 123)
    assert asked["keep_leaks"] is True
    assert grader_json(asked["grader"]) == GRADER
    assert asked["out"] == Path("ftjob-1-again"), "its own folder holds a finished job; others' folders are nobody's"
    assert hyperparameters(asked) == Hyperparameters()


@pytest.mark.parametrize("several_lines", [False, True])
def test_a_shell_reads_the_command_as_the_arguments_it_shows(several_lines: bool) -> None:
    job = request(
        training=files("it's $HOME.jsonl"),
        suffix="`id` \n```\n$(id) \u202etxt\udcff \\ ! é",
        grader=GRADER,
        environment={"HELDOUT_EVAL_BUDGET": "1 2'"},
        hyperparameters=Hyperparameters.parse({"target_modules": ["q_proj", "v_proj"]}),
    )
    found = reproduction_of(job)
    shown = found.shown if several_lines else found.command
    assert "\u202e" not in shown
    assert shown.startswith("HELDOUT_EVAL_BUDGET='1 2'\"'\"'' heldout tune 'it'\"'\"'s $HOME.jsonl'")
    script = f'heldout() {{ printf "%s\\0" "$HELDOUT_EVAL_BUDGET" "$@"; }}\n{shown}'
    done = subprocess.run(["bash", "-c", script.encode()], capture_output=True, check=True)
    words = done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]
    assert words == ["1 2'", *found.arguments]


def test_plain_values_are_not_quoted() -> None:
    assert [quoted(text) for text in ("train.jsonl", "--seed=1", "", "a b")] == [
        "train.jsonl",
        "--seed=1",
        "''",
        "'a b'",
    ]


def test_the_files_are_told_by_their_checksums(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b"x" * 3_000_000)
    (tmp_path / "holdout.jsonl").write_bytes(b"")
    training, holdout = (source(tmp_path / f"{part}.jsonl") for part in ("train", "holdout"))
    found = reproduction_of(request(training=training, holdout=holdout)).files
    assert [(one.part, one.bytes, one.sha256) for one in found] == [
        ("train", 3_000_000, hashlib.sha256(b"x" * 3_000_000).hexdigest()),
        ("holdout", 0, hashlib.sha256(b"").hexdigest()),
    ]


def test_settings_that_decide_what_is_computed_are_told_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert Settings(api_key="secret", organization="us").of_jobs == {"HELDOUT_THREADS": "1"}
    told = Settings(threads=3, precision="bfloat16", eval_budget=0, memory_limit="8GB").of_jobs  # type: ignore[arg-type]
    assert told == {
        "HELDOUT_THREADS": "3",
        "HELDOUT_PRECISION": "bfloat16",
        "HELDOUT_EVAL_BUDGET": "0.0",
        "HELDOUT_MEMORY_LIMIT": "8000000000",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert Settings().of_jobs == told


def test_what_was_found_out_about_the_machine_is_told(tmp_path: Path) -> None:
    adapter, asked = make_outcome(tmp_path).adapter, reproduction_of(request())
    told = as_computed(asked, replace(adapter, precision="bfloat16"), FACTS).environment
    assert told == asked.environment | {"HELDOUT_PRECISION": "bfloat16"}
    without = as_computed(asked, replace(adapter, kernels=False), FACTS).environment
    assert without == told | {"HELDOUT_PRECISION": "float32", "HELDOUT_KERNELS": "off"}
    assert as_computed(asked, adapter, replace(FACTS, kind=ENCODER)) == asked
