"""What is validated and handed over is the average of the weights of many steps; training itself is not changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from heldout.pipeline.training import CurvePoint
from heldout.train import checkpoint, loop, sft
from heldout.train.averaging import Average
from tests.torch.conftest import PLAN, Recording, examples

SHORT = replace(PLAN, batch_size=4, n_epochs=2, total_steps=12, eval_every=3, early_stopping=False)


class Following(Recording):
    """Notes the weights of every step."""

    def __init__(self, trainee: Any) -> None:
        super().__init__()
        self.trainee, self.weights = trainee, [copy(trainee)]
        self.points: list[CurvePoint] = []

    def metrics(self, point: CurvePoint, total_steps: int) -> None:
        self.weights.append(copy(self.trainee))
        self.points.append(point)


def copy(trainee: Any) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in trainee.parameters.items()}


def follow(model: Path, directory: Path, decay: float) -> Following:
    trainee = sft.build_model(replace(SHORT, ema_decay=decay), model, torch.float32)
    train, valid = trainee.rows(examples(range(24)), "train"), trainee.rows(examples(range(90, 96)), "valid")
    watch = Following(trainee)
    loop.run(trainee.plan, trainee, train, valid, checkpoints=directory, watch=watch)
    return watch


def saved(directory: Path, trainee: Any, step: int) -> dict[str, torch.Tensor]:
    """The weights that the checkpoint of a step hands over."""
    folder, _ = checkpoint.read(directory, step)
    trainee.load(folder)
    return copy(trainee)


def test_a_checkpoint_holds_the_average_of_the_steps_before_it(tiny_model: Path, tmp_path: Path) -> None:
    watch = follow(tiny_model, tmp_path, decay=0.7)
    average = watch.weights[0]
    for step, weights in enumerate(watch.weights[1:], start=1):
        keep = min(0.7, (1 + step) / (10 + step))
        average = {name: keep * average[name] + (1 - keep) * weights[name] for name in average}
    found = saved(tmp_path, watch.trainee, 12)
    for name, weight in average.items():
        torch.testing.assert_close(found[name], weight)
    assert not torch.allclose(next(iter(found.values())), next(iter(watch.weights[12].values())), rtol=1e-3)


def test_the_validation_loss_is_that_of_the_average(tiny_model: Path, tmp_path: Path) -> None:
    watch = follow(tiny_model, tmp_path, decay=0.7)
    valid = watch.trainee.rows(examples(range(90, 96)), "valid")
    for point in watch.points[-4:]:
        if point.valid_loss is not None:
            saved(tmp_path, watch.trainee, point.step)
            losses = loop.validate(watch.trainee, valid).losses
            assert point.valid_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_training_itself_is_the_same_with_and_without_an_average(tiny_model: Path, tmp_path: Path) -> None:
    without, with_average = (follow(tiny_model, tmp_path / str(decay), decay) for decay in (0.0, 0.7))
    for one, other in zip(without.weights, with_average.weights, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert [one.train_loss for one in without.points] == [one.train_loss for one in with_average.points]
    assert without.points[-1].valid_loss != with_average.points[-1].valid_loss


def test_without_an_average_a_checkpoint_holds_the_weights_of_its_step(tiny_model: Path, tmp_path: Path) -> None:
    watch = follow(tiny_model, tmp_path, decay=0.0)
    found = saved(tmp_path, watch.trainee, 12)
    assert all(torch.equal(found[name], weight) for name, weight in watch.weights[12].items())
    tensors = load_file(checkpoint.read(tmp_path, 12)[0] / checkpoint.OPTIMIZER)
    assert not any(name.endswith(checkpoint.NOW) for name in tensors)


def test_weights_come_back_after_an_error_while_their_average_was_in_place() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    average = Average({"w": parameter}, 0.5)
    with torch.no_grad():
        parameter.add_(1.0)

    def fail_in_place() -> None:
        with average.in_place():
            assert parameter.tolist() == [1.0, 2.0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_in_place()
    assert parameter.tolist() == [2.0, 3.0]
