"""`lr_search: light` takes the rate of lowest validation loss, and leaves the model as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import heldout
from heldout.errors import InvalidTrainingFile, InvalidValue, JobPaused
from heldout.pipeline import report
from heldout.pipeline.plan import TrainPlan
from heldout.settings import Settings
from heldout.store.db import open_db
from heldout.train import search, sft
from heldout.train.search import RECORD
from heldout.train.sft import ChatTrainee
from tests.conftest import colour_files
from tests.torch.conftest import PLAN, SMALL, Recording, train
from tests.torch.plain import vector

LIGHT = replace(PLAN, batch_size=4, lr_search="light", n_epochs=2, total_steps=12, eval_every=3, lora_dropout=0.1)


def trainee_of(model: Path) -> ChatTrainee:
    return sft.build_model(LIGHT, model, torch.float32)


def found(trainee: ChatTrainee, folder: Path, rate: float, watch: Recording | None = None) -> TrainPlan:
    """Search around `rate`."""
    train_rows, valid = trainee.rows(SMALL.train, "train"), trainee.rows(SMALL.valid, "valid")
    plan = replace(LIGHT, learning_rate=rate)
    return search.learning_rate(plan, trainee, train_rows, valid, directory=folder, watch=watch or Recording())


@pytest.mark.parametrize(("middle", "wanted"), [(1e-5, 3e-5), (0.1, 0.1 / 3)], ids=["all too low", "all too high"])
def test_of_rates_on_one_side_the_sane_one_wins(tiny_model: Path, tmp_path: Path, middle: float, wanted: float) -> None:
    watch = Recording()
    plan = found(trainee_of(tiny_model), tmp_path, middle, watch)
    assert plan.learning_rate == pytest.approx(wanted)
    assert "lowest validation loss of three rates after 20 steps" in plan.reasons["learning_rate"]
    assert watch.messages[-1].startswith(f"Learning rate {wanted:.2g}")


def test_a_rate_that_breaks_down_never_wins(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "MULTIPLES", (1e25, 1.0, 1e20))
    assert found(trainee_of(tiny_model), tmp_path, 1e-2).learning_rate == pytest.approx(1e-2)
    monkeypatch.setattr(search, "MULTIPLES", (1e20, 1e22, 1e25))
    with pytest.raises(InvalidTrainingFile, match=r"no learning rate from 1e\+18 to 1e\+23 leads to a validation loss"):
        found(trainee_of(tiny_model), tmp_path / "other", 1e-2)


def test_the_model_and_what_comes_after_are_as_without_a_search(tiny_model: Path, tmp_path: Path) -> None:
    trainee = trainee_of(tiny_model)
    before = vector(trainee.parameters)
    found(trainee, tmp_path, 1e-2)
    assert torch.equal(vector(trainee.parameters), before)
    assert all(p.grad is None for p in trainee.parameters.values())
    searched = train(tiny_model, tmp_path / "searched", LIGHT, SMALL)
    given = train(
        tiny_model, tmp_path / "given", replace(LIGHT, lr_search="off", learning_rate=searched.learning_rate), SMALL
    )
    assert searched.learning_rate != LIGHT.learning_rate
    assert searched.curve == given.curve


def test_a_search_is_not_done_twice(tiny_model: Path, tmp_path: Path) -> None:
    trainee = trainee_of(tiny_model)
    first = found(trainee, tmp_path, 1e-2)
    path = tmp_path / RECORD
    assert json.loads(path.read_text())["rate"] == first.learning_rate
    watch = Recording()
    assert found(trainee, tmp_path, 1e-2, watch) == first
    path.write_text(json.dumps({"rate": 0.125, "reason": "known"}))
    assert found(trainee, tmp_path, 1e-2).learning_rate == 0.125


class Paused(Recording):
    """Notes every step it is told of, and pauses the job at one of them."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at = at
        self.done: list[tuple[int, int]] = []

    def progress(self, stage: str, done: int, total: int) -> None:
        self.done.append((done, total))
        if done == self.at:
            raise JobPaused


def test_a_job_can_be_stopped_at_every_step_of_a_search(tiny_model: Path, tmp_path: Path) -> None:
    watch = Paused()
    found(trainee_of(tiny_model), tmp_path / "whole", 1e-2, watch)
    assert watch.done == [(step, 50) for step in range(1, 51)]
    with pytest.raises(JobPaused):
        found(trainee_of(tiny_model), tmp_path / "paused", 1e-2, Paused(at=3))
    assert not (tmp_path / "paused" / RECORD).exists(), "it begins again"


def test_a_search_needs_something_to_compare_by(tiny_model: Path, tmp_path: Path) -> None:
    trainee = trainee_of(tiny_model)
    with pytest.raises(InvalidValue, match="lr_search needs validation examples"):
        search.learning_rate(LIGHT, trainee, trainee.rows(SMALL.train, "x"), [], directory=tmp_path, watch=Recording())


def test_job_and_report_show_the_rate_that_was_found_and_why(tiny_model: Path, tmp_path: Path) -> None:
    files = colour_files(tmp_path)
    settings = Settings(data_dir=tmp_path / "data", precision="float32")
    out = {"model": str(tiny_model), "out": tmp_path / "out", "settings": settings}
    result = heldout.tune(*files.values(), **out, seed=0, n_epochs=1, lr_search="light")
    found = json.loads((tmp_path / "out" / RECORD).read_text())
    ((job,), _) = open_db(settings.database).list_jobs(after=None, limit=9)
    written = json.loads((tmp_path / "out" / report.JSON).read_text())
    for plan in (result.outcome.plan.as_dict(), written["plan"], job.plan):
        assert plan["learning_rate"] == {"value": found["rate"], "reason": found["reason"]}
    assert result.outcome.adapter.learning_rate == found["rate"]
    assert "the middle one of three" not in (tmp_path / "out" / report.MARKDOWN).read_text()
