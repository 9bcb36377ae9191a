"""A training that breaks down starts again slower or gives up with a sentence; what is handed over is chosen by
evidence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heldout.errors import InvalidTrainingFile
from heldout.pipeline.selection import Candidate, Selection
from heldout.pipeline.training import CurvePoint
from heldout.train import candidates, checkpoint, loop, sft
from heldout.train.checkpoint import ADAPTER
from tests.torch.conftest import NOISY, TURNING, TURNS, Recording, train
from tests.torch.jobs import Work

OFTEN = replace(NOISY, eval_every=1, learning_rate=0.03, warmup_steps=0, early_stopping=False)


class Looking(Recording):
    """Notes which checkpoints there are at every step."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root, self.there = root, list[tuple[int, list[int]]]()

    def metrics(self, point: CurvePoint, total_steps: int) -> None:
        super().metrics(point, total_steps)
        self.there.append((point.step, checkpoint.steps(self.root)))


def test_a_broken_training_starts_again_from_before_at_a_third_of_the_rate(tiny_model: Path, tmp_path: Path) -> None:
    watch = Looking(tmp_path / "checkpoints")
    adapter = Work(model=tiny_model, plan=OFTEN, reach=9.0).train(tmp_path, watch)
    alarms = [text for text in watch.messages if "starting again" in text]
    assert alarms == [
        "training loss is not a number at step 9: starting again from the checkpoint of step 7 "
        "at learning rate 1e-2, a third",
        "training loss is not a number at step 9: starting again from the checkpoint of step 6 "
        "at learning rate 3.3e-3, a ninth of the planned one",
    ]
    steps = [step for step, _ in watch.there]
    assert steps == [*range(1, 9), 8, *range(7, 13)]
    for step, there in watch.there:
        assert max(there) < step, "what came after the place it went back to is gone"
    assert adapter.learning_rate == pytest.approx(OFTEN.learning_rate / 9)
    assert [point.step for point in adapter.curve] == list(range(1, 13)), "as if it had never been"
    assert all(tensor.isfinite().all() for tensor in load_file(adapter.directory / ADAPTER).values())


def test_a_damaged_checkpoint_is_not_gone_back_to(tiny_model: Path, tmp_path: Path) -> None:
    class Damaging(Looking):
        def metrics(self, point: CurvePoint, total_steps: int) -> None:
            super().metrics(point, total_steps)
            if point.step == 8 and len(self.there) == 8:
                (self.root / "step-000007" / ADAPTER).write_bytes(b"cut short")

    watch = Damaging(tmp_path / "checkpoints")
    Work(model=tiny_model, plan=OFTEN, reach=9.0).train(tmp_path, watch)
    first, *_ = [text for text in watch.messages if "starting again" in text]
    assert "starting again from the checkpoint of step 6 " in first, "the one before is used"


def test_a_training_that_breaks_down_at_every_rate_gives_up_with_a_sentence(tiny_model: Path, tmp_path: Path) -> None:
    watch = Recording()
    with pytest.raises(InvalidTrainingFile, match=r"2 times, has not helped. Set learning_rate below 3.3e-3") as failed:
        Work(model=tiny_model, plan=OFTEN, reach=1e-9).train(tmp_path, watch)
    assert failed.value.param == "hyperparameters.learning_rate"
    assert sum("starting again from the beginning" in text for text in watch.messages) == 2
    assert not (tmp_path / "adapter").exists()


# What is handed over


def test_the_candidates_of_a_selection_are_what_they_say(tiny_model: Path, tmp_path: Path) -> None:
    adapter = train(tiny_model, tmp_path, TURNS, TURNING)
    losses = {point.step: point.valid_calibrated_loss for point in adapter.curve}
    by_kind = {one.kind: one for one in adapter.selection.candidates}
    best = by_kind["best_loss"]
    assert set(by_kind) == {"best_loss", "best_metric", "last", "average"}
    assert best.valid_loss == losses[best.step] == min(loss for loss in losses.values() if loss is not None)
    assert TURNS.eval_every < best.step < 72, "it has neighbours"
    assert by_kind["last"].step == 72
    assert by_kind["last"].valid_loss == losses[72]
    assert (by_kind["best_metric"].score or 0) >= max(one.score or 0 for one in (best, by_kind["last"]))
    assert all(len(one.scores) == len(TURNING.valid) for one in by_kind.values())
    assert adapter.best_step == adapter.selection.chosen.step
    # The average, made and measured here once more.
    trainee = sft.build_model(TURNS, tiny_model, torch.float32)
    steps = [best.step + i * TURNS.eval_every for i in (-1, 0, 1)]
    several = [load_file(tmp_path / "checkpoints" / f"step-{step:06d}" / ADAPTER) for step in steps]
    with torch.no_grad():
        for name, parameter in trainee.parameters.items():
            parameter.copy_(sum(one[name.replace(".default.", ".")] for one in several) / 3)
    seen = loop.validate(trainee, trainee.rows(TURNING.valid, "valid"))
    assert by_kind["average"].valid_loss == pytest.approx(sum(seen.calibrated) / len(seen.calibrated), rel=1e-4)
    assert by_kind["average"].scores == tuple(map(float, seen.right))


@pytest.mark.parametrize("kind", ["best_loss", "best_metric", "last", "average"])
def test_what_is_chosen_is_what_is_handed_over(
    tiny_model: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(several: list[Candidate], *, metric: str, complete: bool) -> Selection:
        (chosen,) = [one for one in several if one.kind == kind]
        return Selection(chosen=chosen, reason=f"{kind} it is", candidates=tuple(several))

    monkeypatch.setattr(candidates, "select", choose)
    monkeypatch.setattr(candidates, "in_question", list)  # any of them may be chosen here
    adapter = train(tiny_model, tmp_path, TURNS, TURNING)
    assert adapter.selection.chosen.kind == kind
    trainee = sft.build_model(TURNS, tiny_model, torch.float32)
    trainee.load(adapter.directory)
    seen = loop.validate(trainee, trainee.rows(TURNING.valid, "valid"))
    assert sum(seen.calibrated) / len(seen.calibrated) == pytest.approx(adapter.selection.chosen.valid_loss, rel=1e-5)
    assert adapter.proofs[0].log_prob == pytest.approx(trainee.log_prob(TURNING.valid[0]), rel=1e-5)


def test_without_validation_examples_the_last_step_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    adapter = train(tiny_model, tmp_path, replace(OFTEN, learning_rate=5e-3), replace(TURNING, valid=()))
    assert adapter.best_step == adapter.last_step == 12
    assert "no validation examples" in adapter.stopped
    assert [one.kind for one in adapter.selection.candidates] == ["last"]
