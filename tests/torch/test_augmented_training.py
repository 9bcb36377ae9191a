"""Training with augmented copies: the same number of steps, the same bits after every kill, and valid as it is."""

from __future__ import annotations

import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heldout.pipeline.augment.copies import robust_copies
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.request import Request, Tools
from heldout.pipeline.run import run_job
from heldout.pipeline.training import Adapter
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Watch
from heldout.train import loop, sft
from heldout.train.trainer import TorchTrainer
from tests.conftest import colour_files, sources_of
from tests.torch.cases import make_family
from tests.torch.conftest import (
    LEARNING,
    NOISY,
    PLAN,
    SMALL,
    TOOLS,
    Recording,
    examples,
    parts,
    same_training,
    train,
)
from tests.torch.encoders import make_tiny_encoder
from tests.torch.jobs import Work

OFTEN = replace(NOISY, eval_every=1, augmentation="robust", n_epochs=4, total_steps=24)


def augmented(split: Split, seed: int = 0) -> Split:
    return replace(split, copies=robust_copies(split, seed=seed).copies)


@pytest.fixture(scope="module")
def deeper(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("deeper") / "model", tiny_model, "llama, 2 queries a key")


@pytest.mark.parametrize("cut", [0, 2], ids=["full", "frozen layers in a cache"])
def test_killed_whenever_it_writes_it_ends_with_the_same_bits(
    tiny_model: Path, deeper: Path, tmp_path: Path, cut: int
) -> None:
    work = Work(
        model=deeper if cut else tiny_model,
        plan=replace(OFTEN, freeze_layers=cut, early_stopping=False),
        split=augmented(SMALL),
    )
    alone = work.train(tmp_path / "alone")
    rng, folder = random.Random(cut), tmp_path / "killed"
    for moment in (1, 9, *(rng.randint(10, 90) for _ in range(6))):
        process = work.start(folder, dies_at=moment)
        process.join(120)
        assert process.exitcode in (-signal.SIGKILL, 0)
    assert same_training(work.train(folder), alone)


def test_copies_cost_no_step_and_change_what_is_learned(tiny_model: Path, tmp_path: Path) -> None:
    plan = replace(OFTEN, early_stopping=False)
    plain = train(tiny_model, tmp_path / "plain", plan, SMALL)
    copied = train(tiny_model, tmp_path / "copied", plan, augmented(SMALL))
    assert plain.last_step == copied.last_step == plan.total_steps
    assert plain.curve[0].train_loss != copied.curve[0].train_loss
    without = train(tiny_model, tmp_path / "without", plan, replace(SMALL, copies=((),) * len(SMALL.train)))
    assert same_training(without, plain), "without a copy nothing is different"


def test_every_other_epoch_a_row_is_seen_as_it_is_and_its_copies_take_turns() -> None:
    plan = replace(PLAN, batch_size=4)
    rows, copies = list(range(10)), [[f"{row}{name}" for name in "abc"[: row % 4]] for row in range(10)]
    # Of rows 0, 4 and 8 there are no copies.
    epochs = [
        [one for step in range(3 * epoch + 1, 3 * epoch + 4) for one in loop.batch(plan, rows, copies, step)]  # type: ignore[arg-type]
        for epoch in range(12)
    ]
    for seen in epochs:
        assert sorted(int(str(one)[0]) for one in seen) == rows, "each row or a copy of it, once"
    for row in rows:
        versions = [one for seen in epochs for one in seen if int(str(one)[0]) == row]
        if not copies[row]:
            assert versions == [row] * 12
        else:
            assert versions.count(row) == 6
            assert {versions.count(copy) for copy in copies[row]} == {6 // len(copies[row])}


def test_in_every_epoch_half_of_the_rows_are_copies_and_not_those_of_one_label() -> None:
    plan = replace(PLAN, batch_size=10)
    rows, copies = list(range(100)), [[f"copy of {row}"] for row in range(100)]
    for epoch in range(4):
        seen = [one for step in range(10 * epoch + 1, 10 * epoch + 11) for one in loop.batch(plan, rows, copies, step)]  # type: ignore[arg-type]
        kept = [one for one in seen if isinstance(one, int)]
        assert len(kept) == 50
        assert 10 < sum(row % 2 for row in kept) < 40


def test_a_copy_that_is_too_long_is_left_out_and_said_and_the_job_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    row = SMALL.train[0]
    long = replace(row, messages=(*row.messages[:-2], {"role": "user", "content": "red " * 900}, row.messages[-1]))
    short = replace(row, messages=(*row.messages[:-2], {"role": "user", "content": "item 0 red"}, row.messages[-1]))
    split = replace(SMALL, copies=((long, short), *(() for _ in SMALL.train[1:])))
    watch = Recording()
    train(tiny_model, tmp_path, replace(OFTEN, n_epochs=1, total_steps=6), split, watch)
    assert any(message.startswith("1 copies of training rows are left out") for message in watch.messages)
    fitted = TorchTrainer(**TOOLS).fit(OFTEN, split, base_model=str(tiny_model))
    assert fitted.predicted_memory_bytes > 0


def test_memory_is_predicted_for_the_longest_copies_too(tiny_model: Path) -> None:
    row = SMALL.train[0]
    long = replace(row, messages=(*row.messages[:-2], {"role": "user", "content": "red " * 400}, row.messages[-1]))
    plan = replace(OFTEN, max_length=512, batch_size=24, total_steps=4)
    split = replace(SMALL, copies=tuple((replace(long, line=one.line),) for one in SMALL.train))
    plain, copied = (
        TorchTrainer(**TOOLS).fit(plan, one, base_model=str(tiny_model)).predicted_memory_bytes
        for one in (SMALL, split)
    )
    assert copied > plain


def test_frozen_layers_are_computed_once_for_every_copy(deeper: Path, tmp_path: Path) -> None:
    plan = replace(OFTEN, freeze_layers=2, n_epochs=8, total_steps=48, early_stopping=False)
    split = augmented(SMALL)
    trainee = sft.build_model(plan, deeper, torch.float32, tmp_path / "activations")
    assert trainee.activations is not None
    rows = [trainee.rows(some, "") for some in split.copies]
    trainee.prepare([*trainee.rows(split.train, ""), *(one for some in rows for one in some)], Recording())
    size = trainee.activations._rows
    for step in range(1, plan.total_steps + 1):
        loop.gradients(trainee, loop.batch(plan, trainee.rows(split.train, ""), rows, step), step)
    assert trainee.activations._rows == size


def test_a_searched_rate_is_tried_on_the_copies_too(tiny_model: Path, tmp_path: Path) -> None:
    plan = replace(OFTEN, lr_search="light")
    watches = [Recording(), Recording()]
    for watch, split in zip(watches, (SMALL, augmented(SMALL)), strict=True):
        train(tiny_model, tmp_path / str(len(split.copies)), plan, split, watch)
    chosen = [next(one for one in watch.messages if one.startswith("Learning rate")) for watch in watches]
    assert chosen[0] != chosen[1]


def test_a_classifier_learns_from_copies_too(tmp_path: Path) -> None:
    encoder = make_tiny_encoder(tmp_path / "encoder")
    plan = replace(LEARNING, augmentation="robust", early_stopping=False)
    split = augmented(parts())
    plain = train(encoder, tmp_path / "plain", plan, parts())
    copied = train(encoder, tmp_path / "copied", plan, split)
    again = train(encoder, tmp_path / "again", plan, split)
    assert plain.last_step == copied.last_step
    assert plain.curve[0].train_loss != copied.curve[0].train_loss
    assert same_training(copied, again)


class NotingTrainer(TorchTrainer):
    """The trainer, with a note of what it was given."""

    def __init__(self) -> None:
        super().__init__(**TOOLS)
        self.given: list[Split] = []

    def train(
        self,
        plan,  # type: ignore[no-untyped-def]
        split: Split,
        *,
        base_model: str,
        directory: Path,
        watch: Watch,
        cache: Path | None = None,
    ) -> Adapter:
        self.given.append(split)
        return super().train(plan, split, base_model=base_model, directory=directory, watch=watch, cache=cache)


def test_in_a_whole_job_only_train_is_augmented(tiny_model: Path, engine, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    files = colour_files(tmp_path)
    sources = sources_of(files)
    trainer, watch = NotingTrainer(), Recording()
    outcome = run_job(
        Request(
            base_model=str(tiny_model),
            training=sources["train"],
            validation=sources["valid"],
            holdout=sources["holdout"],
            hyperparameters=Hyperparameters(n_epochs=2, augmentation="robust", replay_ratio=None),
            directory=tmp_path / "job",
        ),
        Tools(engine=engine, trainer=trainer, watch=watch),
    )
    (split,) = trainer.given
    assert len(split.train) == len(split.copies) == 80
    assert all(one.copy == 0 for one in (*split.train, *split.valid, *split.holdout))
    assert [one.messages for one in split.valid] == [one.messages for one in examples(range(1000, 1024))]
    assert [one.messages for one in split.holdout] == [one.messages for one in examples(range(2000, 2048))]
    copies: list[Example] = [copy for some in split.copies for copy in some]
    assert {copy.line for copy in copies} == set(range(1, 81))
    assert all(copy.copy > 0 for copy in copies)
    assert outcome.split.copies == (), "the report is about the user's rows"
    assert outcome.plan.augmentation == "robust"
    assert outcome.adapter.last_step <= outcome.plan.total_steps == 2 * 10
    assert any(message.startswith("Augmentation: ") for message in watch.messages)
