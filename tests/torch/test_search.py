"""`lr_search: light` on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heldout.errors import InvalidTrainingFile, JobPaused
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.watch import Silent
from heldout.train import search
from heldout.train.search import RECORD
from heldout.train.sft import ChatTrainee
from tests.torch.conftest import examples


class Steps(Silent):
    """Counts the steps it is told of; stops at one of them if asked to."""

    def __init__(self, pause_at: int = 0) -> None:
        self.done: list[int] = []
        self.total = 0
        self.pause_at = pause_at

    def progress(self, stage: str, done: int, total: int) -> None:
        self.done.append(done)
        self.total = total
        if done == self.pause_at:
            raise JobPaused


def searched(trainee: ChatTrainee, plan: TrainPlan, directory: Path, watch: Steps) -> TrainPlan:
    train = trainee.rows(examples(range(24)), "train")
    valid = trainee.rows(examples(range(1000, 1008)), "valid")
    return search.learning_rate(plan, trainee, train, valid, directory=directory, watch=watch)


def test_the_best_of_three_rates_is_taken_once_and_nothing_stays_trained(
    trainee: ChatTrainee, plan: Callable[..., TrainPlan], tmp_path: Path
) -> None:
    before = {name: one.detach().clone() for name, one in trainee.parameters.items()}
    asked = plan(lr_search="light", learning_rate=1e-6, warmup_steps=0)  # far too low: the highest must win
    watch = Steps()
    found = searched(trainee, asked, tmp_path, watch)
    assert found.learning_rate == pytest.approx(3e-6)
    assert "lowest validation loss of three rates" in found.reasons["learning_rate"]
    assert watch.done == list(range(1, 51)), "every step is told of: a job can be cancelled at each"
    assert watch.total == 50
    assert all(torch.equal(one, before[name]) for name, one in trainee.parameters.items())
    again = Steps()
    assert searched(trainee, asked, tmp_path, again) == found
    assert not again.done


def test_a_pause_in_the_search_begins_it_again(
    trainee: ChatTrainee, plan: Callable[..., TrainPlan], tmp_path: Path
) -> None:
    with pytest.raises(JobPaused):
        searched(trainee, plan(lr_search="light"), tmp_path, Steps(pause_at=3))
    assert not (tmp_path / RECORD).exists()


def test_rates_that_all_break_down_end_the_job(
    trainee: ChatTrainee, plan: Callable[..., TrainPlan], tmp_path: Path
) -> None:
    broken = replace(plan(), lr_search="light", learning_rate=1e30, warmup_steps=0, max_grad_norm=1e30)
    with pytest.raises(InvalidTrainingFile, match=r"no learning rate from .* leads to a validation loss"):
        searched(trainee, broken, tmp_path, Steps())
