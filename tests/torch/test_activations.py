"""Frozen layers are computed once for an example; what is kept of them is what they would give again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heldout.engine.template import Tokens
from heldout.errors import InvalidValue, JobPaused
from heldout.pipeline.plan import TrainPlan
from heldout.train import loop, sft
from heldout.train.activations import DATA, INDEX, Activations
from heldout.train.packing import pack
from heldout.train.sft import ChatTrainee
from tests.torch.cases import make_family, tokens_of
from tests.torch.conftest import PLAN, Recording, difference, gradients, stirred
from tests.torch.plain import Plain

FAMILIES = ("llama, 2 queries a key", "qwen3, walked layer by layer")
CUT = replace(PLAN, freeze_layers=2)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("family") / "model", tiny_model, request.param)


@pytest.fixture(scope="module")
def llama(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("llama") / "model", tiny_model, FAMILIES[0])


def build(
    model: Path, cache: Path | None, plan: TrainPlan = CUT, precision: torch.dtype = torch.float32
) -> ChatTrainee:
    return stirred(sft.build_model(plan, model, precision, cache))


def step_of(trainee: ChatTrainee, rows: list[Tokens]) -> tuple[float, torch.Tensor]:
    loss = loop.gradients(trainee, rows, 1).loss
    return loss, gradients(trainee)


def data_of(root: Path) -> Path:
    """The one data file below a cache."""
    (found,) = root.rglob(DATA)
    return found


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_training_above_a_cut_is_exact_with_and_without_the_cache(
    model: Path, tmp_path: Path, cut: int, cached: bool
) -> None:
    trainee = build(model, tmp_path if cached else None, replace(PLAN, freeze_layers=cut))
    rows = tokens_of(trainee.template, "everything")
    trainee.prepare(rows[:20], Recording())  # the rest is found missing on the way
    plain = Plain(model, trainee)
    loss, ours = step_of(trainee, rows)
    assert loss == pytest.approx(plain.gradients(rows), rel=1e-4)
    wanted = torch.cat([p.grad.flatten() for p in plain.parameters.values() if p.grad is not None])
    assert difference(ours, wanted) < 1e-3
    assert all(int(name.split("layers.")[1].split(".")[0]) >= cut for name in trainee.parameters)


def test_activations_in_bfloat16_stay_close_to_those_in_float32(model: Path, tmp_path: Path) -> None:
    exact, stored = build(model, None), build(model, tmp_path, precision=torch.bfloat16)
    rows = tokens_of(exact.template, "everything")
    stored.prepare(rows, Recording())
    (loss, found), (wanted_loss, wanted) = step_of(stored, rows), step_of(exact, rows)
    assert loss == pytest.approx(wanted_loss, rel=0.02)
    assert difference(found, wanted) < 0.1
    floats = build(model, tmp_path / "floats")
    floats.prepare(rows, Recording())
    assert data_of(tmp_path / "floats").stat().st_size == 2 * sum(
        file.stat().st_size for file in tmp_path.rglob(DATA) if "floats" not in file.parts
    )


def test_an_example_is_computed_once_for_all_trainings(llama: Path, tmp_path: Path) -> None:
    first, watch = build(llama, tmp_path), Recording()
    rows = tokens_of(first.template, "everything")
    distinct = len({row.ids[:-1] for row in rows})
    first.prepare(rows, watch)
    assert f"computed once: for {distinct} examples now" in watch.messages[-1]
    before = data_of(tmp_path).read_bytes()
    step_of(first, rows)
    loop.validate(first, rows)
    second, watch = build(llama, tmp_path, replace(CUT, lora_r=2, seed=9)), Recording()
    second.prepare(rows, watch)
    assert f"for 0 examples now, {len(rows)} were known" in watch.messages[-1]
    assert data_of(tmp_path).read_bytes() == before
    known = len(before) // (4 * first.body.model.config.hidden_size)
    assert known == len(pack(list({row.ids[:-1]: row for row in rows}.values())).ids), "what is shared is stored once"


def test_cached_steps_are_cheaper_because_frozen_layers_do_not_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainee = build(llama, tmp_path)
    rows = tokens_of(trainee.template, "one system prompt")
    trainee.prepare(rows, Recording())

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("a frozen layer runs")

    monkeypatch.setattr(trainee.body, "below", refuse)
    step_of(trainee, rows)
    loop.validate(trainee, rows)


@pytest.mark.parametrize("change", ["cut", "precision", "model"])
def test_another_cut_precision_or_model_has_activations_of_its_own(llama: Path, tmp_path: Path, change: str) -> None:
    trainee = build(llama, tmp_path)
    rows = tokens_of(trainee.template, "one system prompt")
    trainee.prepare(rows, Recording())
    if change == "model":
        weights = llama / "model.safetensors"
        other_model = llama.parent / "other"
        other_model.mkdir(exist_ok=True)
        for file in llama.iterdir():
            (other_model / file.name).write_bytes(file.read_bytes())
        assert (other_model / weights.name).exists()
        other = build(other_model, tmp_path)
    else:
        plan = replace(CUT, freeze_layers=1) if change == "cut" else CUT
        other = build(llama, tmp_path, plan, torch.bfloat16 if change == "precision" else torch.float32)
    watch = Recording()
    other.prepare(rows, watch)
    assert f"for {len({row.ids[:-1] for row in rows})} examples now" in watch.messages[-1]
    assert len(list(tmp_path.rglob(DATA))) == 2


class Pausing(Recording):
    """Asks for a pause when so many examples are done, and notes how far each stage got."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at, self.done = at, [(0, 0)]

    def progress(self, stage: str, done: int, total: int) -> None:
        self.done.append((done, total))
        if 0 < self.at <= done:
            raise JobPaused


def test_a_pause_loses_nothing_that_was_computed_and_changes_no_bit(llama: Path, tmp_path: Path) -> None:
    plan = replace(CUT, micro_tokens=64)
    alone, watch = build(llama, tmp_path / "alone", plan), Pausing()
    rows = tokens_of(alone.template, "everything")
    alone.prepare(rows, watch)
    ends = [done for done, _ in watch.done[1:]]
    assert len(ends) > 3, "several packs"
    for at in ends[:3]:
        watch = Pausing(at - (ends[ends.index(at) - 1] if at != ends[0] else 0))  # one pack further
        with pytest.raises(JobPaused):
            build(llama, tmp_path / "paused", plan).prepare(rows, watch)
    last = build(llama, tmp_path / "paused", plan)
    watch = Pausing()
    last.prepare(rows, watch)
    assert watch.done[-1] == (ends[-1] - ends[2],) * 2, "three packs were kept"
    assert data_of(tmp_path / "paused").read_bytes() == data_of(tmp_path / "alone").read_bytes()
    (loss, found), (wanted_loss, wanted) = step_of(last, rows), step_of(alone, rows)
    assert loss == wanted_loss
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("damage", ["more", "less", "no index", "half an index"])
def test_what_a_killed_process_left_is_not_taken_for_activations(llama: Path, tmp_path: Path, damage: str) -> None:
    first = build(llama, tmp_path)
    rows = tokens_of(first.template, "everything")
    wanted = step_of(build(llama, None), rows)
    first.prepare(rows[:9], Recording())
    first.prepare(rows[9:], Recording())
    data = data_of(tmp_path)
    index = data.with_name(INDEX)
    if damage == "more":  # written after the index: killed before the next one
        data.write_bytes(data.read_bytes() + b"\x7f" * 1001)
    elif damage == "less":
        data.write_bytes(data.read_bytes()[:-1000])
    elif damage == "no index":
        index.unlink()
    else:
        index.write_text(index.read_text()[: index.stat().st_size // 2])
    again, watch = build(llama, tmp_path), Recording()
    again.prepare(rows, watch)
    found = step_of(again, rows)
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert difference(found[1], wanted[1]) < 1e-4
    assert ("for 0 examples now" in watch.messages[-1]) == (damage == "more")
    kept = json.loads(index.read_text())["rows"]
    assert data.stat().st_size == kept * 4 * again.body.model.config.hidden_size


def test_activations_give_every_example_its_own_numbers(llama: Path, tmp_path: Path) -> None:
    trainee = build(llama, None)
    rows = tokens_of(trainee.template, "everything")
    width = int(trainee.body.model.config.hidden_size)
    kept = Activations(tmp_path, trainee.body, torch.float32, width)
    kept.prepare(rows)
    for chosen in (rows, rows[::-1], rows[3:5], rows[-1:]):
        one = pack(chosen)
        torch.testing.assert_close(kept.of(one, chosen), trainee.body.below(one), rtol=1e-3, atol=1e-4)


def test_a_model_that_cannot_be_cut_says_so(tiny_model: Path, tmp_path: Path) -> None:
    whole = make_family(tmp_path / "olmo2", tiny_model, "olmo2, run as a whole")
    with pytest.raises(InvalidValue, match="freeze_layers=1 is not supported for models of type 'olmo2'"):
        build(whole, None, replace(PLAN, freeze_layers=1))
    with pytest.raises(InvalidValue, match="checkpointing is not supported"):
        build(whole, None, replace(PLAN, checkpointing=True))
