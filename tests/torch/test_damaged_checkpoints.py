"""A checkpoint that cannot be read is not handed over, and does not keep the others from being."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from heldout.errors import CheckpointDamaged
from heldout.train import checkpoint, loop, sft
from heldout.train.candidates import choose
from heldout.train.checkpoint import ADAPTER
from heldout.train.loop import Course
from heldout.train.sft import ChatTrainee
from tests.torch.conftest import TURNING, TURNS, Recording, train


class Warned(Recording):
    """Keeps warnings apart."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def message(self, text: str, *, level: str = "info", data: dict[str, Any] | None = None) -> None:
        super().message(text, level=level, data=data)
        if level == "warn":
            self.warnings.append(text)


def damage(root: Path, step: int) -> None:
    """Turn one bit over in a checkpoint's weights."""
    path = root / f"step-{step:06d}" / ADAPTER
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(bytes(raw))


def test_a_job_whose_best_checkpoint_is_damaged_hands_over_the_best_of_the_rest(
    tiny_model: Path, tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    before = train(tiny_model, tmp_path, TURNS, TURNING)
    (best,) = [one.step for one in before.selection.candidates if one.kind == "best_loss"]
    assert best < before.last_step
    damage(root, best)
    watch = Warned()
    after = train(tiny_model, tmp_path, TURNS, TURNING, watch)
    assert after.last_step == before.last_step, "nothing is trained again"
    (warning,) = [text for text in watch.warnings if "Left out" in text]
    assert f"the checkpoint of step {best} is damaged: its checksums do not hold" in warning
    left = {one.step: one for one in after.selection.candidates}
    assert best not in left
    losses = {p.step: p.valid_calibrated_loss for p in after.curve if p.valid_loss is not None and p.step != best}
    there = {step: losses[step] for step in checkpoint.steps(root) if step in losses}
    (lowest,) = [one for one in after.selection.candidates if one.kind == "best_loss"]
    assert lowest.valid_loss == min(there.values())
    assert after.selection.reason.startswith("of the checkpoints that can be read, step ")
    trainee = sft.build_model(TURNS, tiny_model, torch.float32)
    trainee.load(after.directory)
    seen = loop.validate(trainee, trainee.rows(TURNING.valid, "valid"))
    assert sum(seen.calibrated) / len(seen.calibrated) == pytest.approx(after.selection.chosen.valid_loss, rel=1e-5)


def trained(model: Path, folder: Path, *, valid: bool) -> tuple[ChatTrainee, list[Any], Course]:
    trainee = sft.build_model(TURNS, model, torch.float32)
    rows, others = trainee.rows(TURNING.train, "train"), trainee.rows(TURNING.valid, "valid") if valid else []
    return trainee, others, loop.run(TURNS, trainee, rows, others, checkpoints=folder, watch=Recording())


def test_an_average_of_a_damaged_checkpoint_is_no_candidate(tiny_model: Path, tmp_path: Path) -> None:
    trainee, valid, course = trained(tiny_model, tmp_path, valid=True)
    neighbours = course.stopping.neighbours()
    assert len(neighbours) == 3
    whole, _ = choose(trainee, valid, course, checkpoints=tmp_path)
    assert "average" in {one.kind for one in whole.candidates}
    damage(tmp_path, neighbours[0])
    watch = Warned()
    selection, _ = choose(trainee, valid, course, checkpoints=tmp_path, watch=watch)
    assert "average" not in {one.kind for one in selection.candidates}
    assert selection.candidates[0].step == course.stopping.best_step
    assert len(watch.warnings) == 1


@pytest.mark.parametrize("valid", [True, False])
def test_with_no_sound_checkpoint_left_the_job_fails_with_what_is_wrong(
    tiny_model: Path, tmp_path: Path, valid: bool
) -> None:
    trainee, rows, course = trained(tiny_model, tmp_path, valid=valid)
    steps = [step for step in checkpoint.steps(tmp_path) if step]
    *others, last = steps
    damage(tmp_path, last)
    selection, folders = choose(trainee, rows, course, checkpoints=tmp_path)
    folder = folders[selection.chosen.kind]
    assert selection.chosen.step in others
    assert folder.name == f"step-{selection.chosen.step:06d}" or selection.chosen.kind == "average"
    if not valid:
        assert selection.chosen.step == others[-1]
        assert "the last that can be read" in selection.reason
        assert math.isnan(selection.chosen.valid_loss)
    for step in others:
        damage(tmp_path, step)
    watch = Warned()
    with pytest.raises(CheckpointDamaged, match=rf"no checkpoint .* step {last} is damaged.*Start a new job"):
        choose(trainee, rows, course, checkpoints=tmp_path, watch=watch)
    assert len(watch.warnings) == len(steps), "each is told of"
