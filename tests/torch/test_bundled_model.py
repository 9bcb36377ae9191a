"""The model that comes inside a wheel: unpacked once, answered with, and trained on exactly."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from heldout.engine.base import ModelRef, Sampling
from heldout.engine.local import LocalEngine
from heldout.engine.template import Tokens
from heldout.kernels import Kernels
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.training import CurvePoint
from heldout.pipeline.watch import Silent
from heldout.settings import DEFAULT_MODEL, Settings
from heldout.train import attention, layout, loop, sft
from heldout.train.packing import pack
from heldout.train.sft import ChatTrainee
from tests.torch.cases import tokens_of
from tests.torch.conftest import PLAN, Recording, difference, gradients, stirred
from tests.torch.plain import Curve, Plain, vector

#: 30 steps of two short examples.
SMALL = replace(
    PLAN, lora_r=4, batch_size=2, total_steps=30, n_epochs=15, learning_rate=1e-4, eval_every=30, early_stopping=False
)


FROZEN = replace(SMALL, freeze_layers=22)


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    """An engine on the machine's own cache: `make setup` has unpacked the model there."""
    return LocalEngine(cache=Settings().cache, aliases={}, precision="float32")


def test_the_bundled_model_is_unpacked_once_as_bf16_safetensors_with_its_chat_template(engine: LocalEngine) -> None:
    folder = engine.folder(DEFAULT_MODEL)
    assert engine.is_prepared(DEFAULT_MODEL)
    assert engine.folder(DEFAULT_MODEL) == folder
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        assert tensors.get_tensor("model.norm.weight").dtype == torch.bfloat16


def test_the_bundled_model_answers(engine: LocalEngine) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (reply,) = engine.chat(ModelRef(base_model=DEFAULT_MODEL), [question], Sampling(max_tokens=20))
    assert "Paris" in reply.text
    assert reply.finish_reason == "stop"


# Training, against transformers and PEFT as they come (tests/torch/plain.py)


class Maker:
    """Makes trainees of the bundled model whose adapters are the same each time."""

    def __init__(self, folder: Path, kernels: Kernels | None) -> None:
        self.folder, self.kernels = folder, kernels

    def __call__(
        self,
        plan: TrainPlan = SMALL,
        precision: torch.dtype = torch.float32,
        *,
        cache: Path | None = None,
        stir: bool = True,
    ) -> ChatTrainee:
        trainee = sft.build_model(plan, self.folder, precision, cache, self.kernels)
        assert trainee.kernels == (self.kernels is not None)
        return stirred(trainee) if stir else trainee


@pytest.fixture(scope="module", params=["torch's operations", "kernels"])
def make(request: pytest.FixtureRequest, engine: LocalEngine) -> Maker:
    kernels = request.getfixturevalue("kernels") if request.param == "kernels" else None
    return Maker(engine.folder(DEFAULT_MODEL), kernels)


@pytest.fixture(scope="module")
def trainee(make: Maker) -> ChatTrainee:
    return make()


@pytest.fixture(scope="module")
def rows(trainee: ChatTrainee) -> list[Tokens]:
    """Two groups that share their few-shot turns, and two examples that share nothing."""
    return [
        row
        for kind in ("two groups with the same few-shot turns", "nothing shared")
        for row in tokens_of(trainee.template, kind)[:3]
    ]


def of_plain(trainee: ChatTrainee, folder: Path, rows: list[Tokens]) -> tuple[float, torch.Tensor]:
    """Loss and gradients of the plain loop, with the trainee's adapter."""
    plain = Plain(folder, trainee)
    return plain.gradients(rows), gradients(plain)


@pytest.fixture(scope="module")
def wanted(make: Maker, trainee: ChatTrainee, rows: list[Tokens]) -> tuple[float, torch.Tensor]:
    """Loss and gradients of the plain loop."""
    return of_plain(trainee, make.folder, rows)


def as_it_is(_: ChatTrainee, __: pytest.MonkeyPatch) -> None: ...


def without_sharing(_: ChatTrainee, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sft, "pack", lambda rows, **options: pack(rows, share=False, **options))


def in_several_packs(trainee: ChatTrainee, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainee, "plan", replace(trainee.plan, micro_tokens=100))


def in_a_bucket_for_every_length(_: ChatTrainee, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layout, "SPARE", 0.0)
    patch.setattr(layout, "FEW", 0)


def in_one_bucket(_: ChatTrainee, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layout, "SPARE", 1.0)


def with_checkpointing(trainee: ChatTrainee, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainee.body, "checkpoint", True)


def with_scores_computed_anew(_: ChatTrainee, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "KEPT_SCORES", 0)


WAYS = [
    as_it_is,
    without_sharing,
    in_several_packs,
    in_a_bucket_for_every_length,
    in_one_bucket,
    with_checkpointing,
    with_scores_computed_anew,
]
#: What kernels do without: they attend to paths, not to buckets, and keep no scores.
OF_TORCH = [in_a_bucket_for_every_length, in_one_bucket, with_scores_computed_anew]


def skip_what_changes_nothing(trainee: ChatTrainee, way: Callable[..., None]) -> None:
    if trainee.kernels and way in OF_TORCH:
        pytest.skip("kernels know no buckets and keep no scores")


def test_the_ways_of_bucketing_are_different_ones(
    trainee: ChatTrainee, rows: list[Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for way in (as_it_is, in_a_bucket_for_every_length, in_one_bucket):
        with monkeypatch.context() as patch:
            way(trainee, patch)
            counts.append([len(pack(some).layout.groups) for some in (rows, short(trainee))])
    usual, every, one = counts
    assert every[0] > usual[0] >= one[0]
    assert every[1] > usual[1]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_step_of_the_bundled_model_is_exact(
    trainee: ChatTrainee,
    rows: list[Tokens],
    wanted: tuple[float, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    way: Callable[[ChatTrainee, pytest.MonkeyPatch], None],
) -> None:
    skip_what_changes_nothing(trainee, way)
    way(trainee, monkeypatch)
    loss = loop.gradients(trainee, rows, 1).loss
    assert loss == pytest.approx(wanted[0], rel=1e-3)
    assert difference(gradients(trainee), wanted[1]) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False], ids=["from the cache", "computed every time"])
def test_a_frozen_step_of_the_bundled_model_is_exact(
    make: Maker, rows: list[Tokens], tmp_path: Path, cached: bool
) -> None:
    frozen = make(FROZEN, cache=tmp_path if cached else None)
    frozen.prepare(rows, Silent())
    assert any(tmp_path.iterdir()) == cached
    wanted = of_plain(frozen, make.folder, rows)
    loss = loop.gradients(frozen, rows, 1).loss
    assert loss == pytest.approx(wanted[0], rel=1e-3)
    assert difference(gradients(frozen), wanted[1]) < 1e-3


@pytest.mark.slow
def test_a_step_of_the_bundled_model_in_bfloat16_is_that_in_fp32_as_far_as_bfloat16_goes(
    make: Maker, rows: list[Tokens], wanted: tuple[float, torch.Tensor]
) -> None:
    rough = make(precision=torch.bfloat16)
    loss = loop.gradients(rough, rows, 1).loss
    assert loss == pytest.approx(wanted[0], rel=2e-2)
    assert difference(gradients(rough), wanted[1]) < 0.1


@pytest.mark.slow
def test_a_training_on_two_threads_that_is_killed_ends_with_the_same_bits(
    make: Maker, rows: list[Tokens], tmp_path: Path, threads: None
) -> None:
    torch.set_num_threads(2)
    plan = replace(SMALL, lora_dropout=0.1, ema_decay=0.5, batch_size=4, n_epochs=3, total_steps=6, eval_every=1)

    def train(folder: Path, watch: Recording) -> tuple[list[CurvePoint], torch.Tensor]:
        trainee = make(plan, stir=False)
        course = loop.run(plan, trainee, rows, rows[:2], checkpoints=folder, watch=watch)
        return course.curve, vector(trainee.parameters)

    alone = train(tmp_path / "alone", Recording())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", Recording(interrupt_at=4))
    curve, weights = train(tmp_path / "killed", Recording())
    assert curve == alone[0]
    assert torch.equal(weights, alone[1])


def short(trainee: ChatTrainee) -> list[Tokens]:
    """Four examples' beginning, which they share, and their end, of two lengths."""
    return [
        Tokens(row.ids[:10] + row.ids[-end:], row.supervised[:10] + row.supervised[-end:])
        for row, end in zip(tokens_of(trainee.template, "one system prompt"), (12, 14, 12, 14), strict=False)
    ]


#: What is switched, and how: the plan, where activations are cached, the way.
CURVES = {
    "as it is": (SMALL, False, as_it_is),
    "nothing shared": (SMALL, False, without_sharing),
    "a bucket for every length": (SMALL, False, in_a_bucket_for_every_length),
    "frozen, from the cache": (FROZEN, True, as_it_is),
    "frozen, computed every time": (FROZEN, False, as_it_is),
}


@pytest.fixture(scope="module")
def curves(engine: LocalEngine) -> Callable[[int], Curve]:
    """Those of the plain loop, by the number of frozen layers."""
    folder = engine.folder(DEFAULT_MODEL)

    @functools.cache
    def curve(frozen: int) -> Curve:
        trainee = Maker(folder, None)(replace(SMALL, freeze_layers=frozen), stir=False)
        train = short(trainee)
        return Plain(folder, trainee).train(train, train[:1])

    return curve


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVES)
def test_thirty_steps_of_the_bundled_model_follow_the_plain_loop(
    make: Maker,
    curves: Callable[[int], Curve],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    plan, cached, way = CURVES[name]
    trainee = make(plan, cache=tmp_path / "activations" if cached else None, stir=False)
    train = short(trainee)
    assert len(pack(train).layout.segments) > len(train)
    skip_what_changes_nothing(trainee, way)
    way(trainee, monkeypatch)
    trainee.prepare(train, Silent())
    course = loop.run(plan, trainee, train, train[:1], checkpoints=tmp_path / "checkpoints", watch=Silent())
    curve = curves(plan.freeze_layers)
    assert [point.train_loss for point in course.curve] == pytest.approx(curve.train, rel=1e-3, abs=1e-5)
    assert course.curve[-1].valid_loss == pytest.approx(curve.valid[-1], rel=1e-3, abs=1e-5)
    assert curve.train[-1] < 0.8 * curve.train[0], "it has learned something"
