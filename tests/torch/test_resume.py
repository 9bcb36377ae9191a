"""A training that is killed or paused at any moment ends with the same bits as one that is left alone."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heldout.errors import CheckpointDamaged, JobPaused
from heldout.pipeline.training import Adapter, CurvePoint
from heldout.train import checkpoint, loop, sft
from heldout.train.averaging import Average
from heldout.train.checkpoint import ADAPTER, CONFIG, OPTIMIZER, STATE
from tests.torch.cases import make_family
from tests.torch.conftest import NOISY, PLAN, SMALL, Recording, examples, same_training
from tests.torch.jobs import Work

#: Of every process that is killed by the clock, how long it may have trained (seconds).
LIVES = 1.5

VARIANTS = ("dropout and early stopping", "frozen layers in a cache", "started again at a ninth of the rate")


@pytest.fixture(scope="module")
def works(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Work]:
    deeper = make_family(tmp_path_factory.mktemp("deeper") / "model", tiny_model, "llama, 2 queries a key")
    often = replace(NOISY, eval_every=1)
    return {
        # Two validations without progress end it before its last step.
        VARIANTS[0]: Work(
            model=tiny_model, plan=replace(often, learning_rate=0.06, patience=2, n_epochs=4, total_steps=24)
        ),
        VARIANTS[1]: Work(model=deeper, plan=replace(often, freeze_layers=2, neftune_noise_alpha=0.0)),
        # Not a number at step 9, and once more: it goes on from step 7 and then from step 6.
        VARIANTS[2]: Work(
            model=tiny_model, plan=replace(often, learning_rate=0.03, warmup_steps=0, early_stopping=False), reach=9.0
        ),
    }


@pytest.fixture(scope="module")
def alone(works: dict[str, Work], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """What every variant ends with when nothing disturbs it."""
    return {name: work.train(tmp_path_factory.mktemp("alone")) for name, work in works.items()}


def test_the_variants_do_what_their_names_say(works: dict[str, Work], alone: dict[str, Adapter]) -> None:
    assert alone[VARIANTS[0]].last_step < 24
    assert "validation loss" in alone[VARIANTS[0]].stopped
    assert alone[VARIANTS[1]].stopped.startswith("all 12 steps")
    assert alone[VARIANTS[2]].learning_rate == pytest.approx(0.03 / 9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_whenever_it_writes_it_ends_with_the_same_bits(
    works: dict[str, Work], alone: dict[str, Adapter], tmp_path: Path, variant: str
) -> None:
    work, rng = works[variant], random.Random(variant)
    # A checkpoint is some twenty writes: within the first, between any two, and in the deleting of old ones.
    for moment in (1, 4, 9, *(rng.randint(10, 90) for _ in range(9))):
        process = work.start(tmp_path, dies_at=moment)
        process.join(120)
        assert process.exitcode in (-signal.SIGKILL, 0), "it was killed, or had nothing left to write"
    assert same_training(work.train(tmp_path), alone[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_by_the_clock_it_ends_with_the_same_bits(
    works: dict[str, Work], alone: dict[str, Adapter], tmp_path: Path, variant: str
) -> None:
    work, rng = works[variant], random.Random(variant)
    for _ in range(3):
        process = work.start(tmp_path)
        until = time.monotonic() + 60
        while not (tmp_path / "checkpoints").is_dir() and process.is_alive() and time.monotonic() < until:
            time.sleep(0.005)
        process.join(rng.random() * LIVES)
        process.kill()
        process.join()
    assert same_training(work.train(tmp_path), alone[variant])


class Pausing(Recording):
    """Asks for a pause at one step, as the user's click does."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def progress(self, stage: str, done: int, total: int) -> None:
        if stage == "train" and done == self.at:
            raise JobPaused


@pytest.mark.parametrize("variant", VARIANTS)
def test_paused_at_many_steps_it_goes_on_from_each_and_ends_with_the_same_bits(
    works: dict[str, Work], alone: dict[str, Adapter], tmp_path: Path, variant: str
) -> None:
    work = replace(works[variant], plan=replace(works[variant].plan, eval_every=3))
    undisturbed = work.train(tmp_path / "alone")
    told: list[Any] = []
    before = 0
    for at in (1, 2, 3, 5, 6, 8, 11):
        if at > undisturbed.last_step:
            break
        watch = Pausing(at)
        with pytest.raises(JobPaused) as paused:
            work.train(tmp_path / "paused", watch)
        assert paused.value.step == at
        checkpoint.read(tmp_path / "paused" / "checkpoints", at)
        steps = [what for kind, what in watch.story if kind == "metrics"]
        if variant != VARIANTS[2]:  # that one goes back on its way
            assert steps == list(range(before + 1, at + 1)), "no step is taken again"
        assert (f"Training continues from the checkpoint of step {before}" in watch.messages) == (before > 0)
        told, before = [*told, *watch.story], at
    last = Recording()
    adapter = work.train(tmp_path / "paused", last)
    assert same_training(adapter, undisturbed)
    assert adapter.seconds > 0
    story = [*told, *last.story]
    epochs = set(range(6, undisturbed.last_step + 1, 6))
    assert {what for kind, what in story if kind == "checkpoint"} == epochs, "every epoch's checkpoint is told of"


def test_paused_at_the_step_that_ends_training_its_checkpoint_is_told_of(tiny_model: Path, tmp_path: Path) -> None:
    still = replace(NOISY, learning_rate=1e-12, n_epochs=3, total_steps=18, eval_every=6, patience=1)
    work, watch, last = Work(model=tiny_model, plan=still, split=SMALL), Pausing(12), Recording()
    with pytest.raises(JobPaused):
        work.train(tmp_path, watch)
    adapter = work.train(tmp_path, last)
    assert (adapter.last_step, "has not improved" in adapter.stopped) == (12, True)
    assert [what for kind, what in [*watch.story, *last.story] if kind == "checkpoint"] == [6, 12]


def test_killed_right_after_it_has_started_again_it_ends_with_the_same_bits(
    works: dict[str, Work], alone: dict[str, Adapter], tmp_path: Path
) -> None:
    class Killed(Recording):
        """Dies at the first step after the restart."""

        def metrics(self, point: CurvePoint, total_steps: int) -> None:
            if any("starting again" in text for text in self.messages):
                raise KeyboardInterrupt
            super().metrics(point, total_steps)

    work, watch = works[VARIANTS[2]], Killed()
    with pytest.raises(KeyboardInterrupt):
        work.train(tmp_path, watch)
    again = Recording()
    assert same_training(work.train(tmp_path, again), alone[VARIANTS[2]])
    restarts = [text for text in again.messages if "starting again from" in text]
    assert ["a ninth" in text for text in restarts] == [True], "it remembers the first"


# What a checkpoint is


@pytest.fixture(scope="module")
def two_checkpoints(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of steps 1 and 2 of a training."""
    trainee = sft.build_model(PLAN, tiny_model, torch.float32)
    rows = trainee.rows(examples(range(8)), "train")
    root = tmp_path_factory.mktemp("checkpoints")
    optimizer = torch.optim.AdamW(trainee.parameters.values(), fused=True)
    average = Average(trainee.parameters, 0.6)
    course = loop.Course.of(PLAN, len(rows))
    for step in (1, 2):
        found = loop.gradients(trainee, rows, step)
        loop.update(PLAN, trainee, optimizer, 1e-3, found.norm)
        average.update(step)
        course.step = step
        checkpoint.save(root, step, trainee, optimizer, average, course.state())
    return root


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 2 // 3] ^= 1
    path.write_bytes(bytes(raw))


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" x")


@pytest.mark.parametrize("file", [ADAPTER, CONFIG, OPTIMIZER, STATE])
@pytest.mark.parametrize("damage", [half, emptied, flipped, longer, Path.unlink])
def test_a_checkpoint_with_a_damaged_file_is_passed_over(
    two_checkpoints: Path, tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    root = Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))
    sound = checkpoint.latest(root)
    assert sound is not None
    assert sound[1]["step"] == 2
    damage(root / "step-000002" / file)
    found = checkpoint.latest(root)
    assert found is not None
    assert (found[0].name, found[1]["step"]) == ("step-000001", 1)
    with pytest.raises(CheckpointDamaged, match="checkpoint of step 2"):
        checkpoint.read(root, 2)


@pytest.mark.parametrize(
    "edit",
    [
        lambda stored: stored["state"].update(step=3),
        lambda stored: stored["state"]["guard"].update(restarts=1),
        lambda stored: stored["sha256"].update({ADAPTER: "0" * 64}),
        lambda stored: stored["sha256"].update({"missing": "0" * 64}),
        lambda stored: stored.pop("sha256"),
        lambda stored: stored.pop("state"),
        lambda stored: stored.update(sha256=[]),
        lambda stored: stored.update(state=None),
    ],
)
def test_a_state_that_was_edited_is_passed_over(
    two_checkpoints: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any]
) -> None:
    root = Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))
    path = root / "step-000002" / STATE
    stored = json.loads(path.read_text())
    edit(stored)
    path.write_text(json.dumps(stored))
    found = checkpoint.latest(root)
    assert found is not None
    assert found[1]["step"] == 1


@pytest.mark.parametrize("content", ["null", "[]", "7", '"x"', "{}"])
def test_a_state_of_another_kind_is_passed_over(two_checkpoints: Path, tmp_path: Path, content: str) -> None:
    root = Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))
    (root / "step-000002" / STATE).write_text(content)
    found = checkpoint.latest(root)
    assert found is not None
    assert found[1]["step"] == 1


def test_without_a_sound_checkpoint_training_begins_anew(tiny_model: Path, tmp_path: Path) -> None:
    work = Work(model=tiny_model, plan=replace(NOISY, eval_every=3), split=SMALL)
    undisturbed = work.train(tmp_path / "alone")
    with pytest.raises(KeyboardInterrupt):
        work.train(tmp_path / "damaged", Recording(interrupt_at=8))
    for state in (tmp_path / "damaged").rglob(STATE):
        emptied(state)
    watch = Recording()
    assert same_training(work.train(tmp_path / "damaged", watch), undisturbed)
    assert [what for kind, what in watch.story if kind == "metrics"] == list(range(1, 13))


def test_restoring_gives_back_every_number_of_adapter_average_and_optimizer(
    two_checkpoints: Path, tiny_model: Path
) -> None:
    trainee = sft.build_model(replace(PLAN, seed=5), tiny_model, torch.float32)
    rows = trainee.rows(examples(range(8)), "train")
    results = []
    for _ in range(2):
        optimizer = torch.optim.AdamW(trainee.parameters.values(), fused=True)
        average = Average(trainee.parameters, 0.6)
        folder, _state = checkpoint.read(two_checkpoints, 2)
        checkpoint.restore(folder, trainee, optimizer, average)
        found = loop.gradients(trainee, rows, 3)
        loop.update(PLAN, trainee, optimizer, 1e-2, found.norm)
        average.update(3)
        weights = (*trainee.parameters.values(), *average.weights.values())
        results.append(torch.cat([one.detach().flatten() for one in weights]))
        steps = {float(state["step"]) for state in optimizer.state.values()}
        assert steps == {3.0}
    assert torch.equal(*results)


def test_an_average_is_the_mean_of_every_tensor(two_checkpoints: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folders = [two_checkpoints / f"step-00000{step}" for step in (1, 2, 2)]
    mean = load_file(checkpoint.average(folders, tmp_path / "average") / ADAPTER)
    one, two = (load_file(folder / ADAPTER) for folder in folders[:2])
    assert mean.keys() == one.keys()
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (one[name] + 2 * two[name]) / 3)
