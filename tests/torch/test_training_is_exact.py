"""What makes training fast changes the time a step takes, and nothing else: losses, gradients and whole loss
curves are those of the plain loop (tests/torch/plain.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from heldout.engine.template import Tokens
from heldout.pipeline.watch import Silent
from heldout.train import attention, between, body, layout, loop, packing, sft
from heldout.train.dropout import Dropout
from heldout.train.graphs import Graphs, fill
from heldout.train.packing import pack
from heldout.train.sft import ChatTrainee
from tests.torch.cases import FAMILIES, KINDS, tokens_of
from tests.torch.conftest import LLAMA, PLAN, build, difference, gradients
from tests.torch.plain import Plain, vector

#: 30 steps that learn something: 1e-3 of a loss that does not move would prove little.
TRAINED = replace(
    PLAN, batch_size=3, n_epochs=8, total_steps=30, learning_rate=1e-2, early_stopping=False, eval_every=10
)


def step_of(trainee: ChatTrainee, rows: Sequence[Tokens], step: int = 1) -> tuple[float, torch.Tensor]:
    """Reported loss and gradients of one step, by the loop's own way."""
    found = loop.gradients(trainee, rows, step)
    return found.loss, gradients(trainee)


def check_step(folder: Path, trainee: ChatTrainee, rows: Sequence[Tokens]) -> None:
    """A step's loss and gradients are those of the plain loop."""
    plain = Plain(folder, trainee)
    loss, ours = step_of(trainee, rows)
    assert loss == pytest.approx(plain.gradients(rows), rel=1e-4)
    wanted = torch.cat([p.grad.flatten() for p in plain.parameters.values() if p.grad is not None])
    assert ours.shape == wanted.shape
    assert difference(ours, wanted) < 1e-3
    assert float((ours - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())


def check_curve(
    folder: Path, trainee: ChatTrainee, train: Sequence[Tokens], valid: Sequence[Tokens], tmp_path: Path
) -> None:
    """30 steps have the losses of the plain loop and end with its adapter."""
    plain = Plain(folder, trainee)
    before = vector(trainee.parameters)
    course = loop.run(trainee.plan, trainee, train, valid, checkpoints=tmp_path, watch=Silent())
    curve = plain.train(train, valid)
    ours = [point.train_loss for point in course.curve]
    assert len(ours) == trainee.plan.total_steps
    assert ours == pytest.approx(curve.train, rel=1e-3)
    assert course.curve[-1].valid_loss == pytest.approx(curve.valid[-1], rel=1e-3)
    # The weights themselves: their way from the start, which losses show only in part.
    assert difference(vector(trainee.parameters) - before, curve.weights - before) < 1e-2
    assert sum(curve.train[-4:]) < 0.8 * sum(curve.train[:4]), "it has learned something"


# One step, on every kind of sharing and every family


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_examples_share_a_step_is_that_of_its_examples_alone(families: dict[str, Path], kind: str) -> None:
    trainee = build(families[LLAMA])
    check_step(families[LLAMA], trainee, tokens_of(trainee.template, kind))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_models_is_trained_as_transformers_and_peft_do(families: dict[str, Path], family: str) -> None:
    trainee = build(families[family])
    assert bool(trainee.body._blocks) == (FAMILIES[family]["model_type"] in body.FUSED)
    check_step(families[family], trainee, tokens_of(trainee.template, "everything"))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_that_are_too_large_to_keep_are_computed_anew(
    families: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "KEPT_SCORES", 0)
    trainee = build(families[family])
    check_step(families[family], trainee, tokens_of(trainee.template, "everything"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [LLAMA, "qwen2, 3 queries a key"])
def test_a_pack_that_is_filled_up_for_a_gpu_says_the_same(families: dict[str, Path], family: str, kind: str) -> None:
    trainee = build(families[family], replace(PLAN, micro_tokens=200))
    trainee.graphs = Graphs(trainee.run_filled, trainee.parameters.values())
    rows = tokens_of(trainee.template, kind)
    one = pack(rows)
    filled = fill(one, torch.zeros(len(one.ids), 2), 1.0)
    assert len(filled.x) + len(filled.rows) > len(one.ids) + len(one.rows), "something is filled up"
    assert len(filled.rows) == len(filled.rows.unique()), "gradients are written to their places"
    check_step(families[family], trainee, rows)


def test_smoothing_and_prompt_loss_are_the_same_in_a_pack_that_is_filled_up(families: dict[str, Path]) -> None:
    plan = replace(PLAN, label_smoothing=0.1, prompt_loss_weight=0.3, micro_tokens=200)
    plain, trainee = (build(families[LLAMA], plan) for _ in range(2))
    trainee.graphs = Graphs(trainee.run_filled, trainee.parameters.values())
    rows = tokens_of(plain.template, "everything")
    (loss, found), (wanted_loss, wanted) = step_of(trainee, rows), step_of(plain, rows)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert difference(found, wanted) < 1e-4


@pytest.mark.parametrize("targets", [("q_proj",), ("v_proj", "down_proj"), ("k_proj", "o_proj", "up_proj")])
@pytest.mark.parametrize("family", [LLAMA, "qwen2, 3 queries a key"])
def test_an_adapter_on_some_of_the_layers_is_exact(
    families: dict[str, Path], family: str, targets: tuple[str, ...]
) -> None:
    trainee = build(families[family], replace(PLAN, target_modules=targets))
    check_step(families[family], trainee, tokens_of(trainee.template, "two groups with the same few-shot turns"))


@pytest.mark.parametrize("family", [LLAMA, "qwen3, walked layer by layer", "olmo2, run as a whole"])
def test_what_is_shared_and_what_is_not_give_the_same(
    families: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainee = build(families[family])
    rows = tokens_of(trainee.template, "everything")
    shared = step_of(trainee, rows)
    monkeypatch.setattr(sft, "pack", lambda rows, **options: pack(rows, share=False, **options))
    assert len(sft.pack(rows).ids) == sum(len(row) - 1 for row in rows) > len(pack(rows).ids)
    alone = step_of(trainee, rows)
    assert shared[0] == pytest.approx(alone[0], rel=1e-5)
    assert difference(shared[1], alone[1]) < 1e-4


def test_how_many_features_the_cache_holds_does_not_change_a_step(
    families: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainee = build(families[LLAMA])
    rows = tokens_of(trainee.template, "everything")
    whole = step_of(trainee, rows)
    for numbers in (1, 5000):
        monkeypatch.setattr(between, "CACHED", numbers)
        loss, found = step_of(trainee, rows)
        assert loss == pytest.approx(whole[0], rel=1e-6)
        assert difference(found, whole[1]) < 1e-5


def test_how_a_step_is_cut_into_packs_does_not_change_it(families: dict[str, Path]) -> None:
    trainee = build(families[LLAMA])
    rows = tokens_of(trainee.template, "everything")
    results, packs = [], []
    for limit in (10_000, 200, 1):
        trainee.plan = replace(trainee.plan, micro_tokens=limit)
        results.append(step_of(trainee, rows))
        packs.append(len(trainee.micro_batches(rows, training=True)))
    assert packs[0] == 1 < packs[1] < packs[2] == len(rows)
    for loss, found in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert difference(found, results[0][1]) < 1e-4


@pytest.mark.parametrize(
    "limits",
    [{"SPARE": 0.0, "FEW": 0}, {"SPARE": 1.0}, {"KEYS": 1}],
    ids=["a bucket for every length", "one bucket", "a bucket for every row"],
)
def test_how_lengths_are_bucketed_does_not_change_a_step(
    families: dict[str, Path], monkeypatch: pytest.MonkeyPatch, limits: dict[str, float]
) -> None:
    trainee = build(families[LLAMA])
    rows = tokens_of(trainee.template, "everything")
    ours, count = step_of(trainee, rows), len(pack(rows).layout.groups)
    for name, limit in limits.items():
        monkeypatch.setattr(layout, name, limit)
    assert len(pack(rows).layout.groups) != count
    other = step_of(trainee, rows)
    assert ours[0] == pytest.approx(other[0], rel=1e-5)
    assert difference(ours[1], other[1]) < 1e-4


# What is not shared costs nothing


class Products(TorchDispatchMode):
    """Notes how many tokens every product with a weight goes through, and its share of the work."""

    def __init__(self, weights: set[tuple[int, int]]) -> None:
        super().__init__()
        self.weights, self.tokens = weights, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            for x, weight in ((a, b.t()), (b.t(), a)):
                if tuple(weight.shape) in self.weights:
                    self.tokens.append(len(x))
                    break
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["nothing shared", "everything"])
def test_rows_that_share_nothing_are_computed_once_and_nothing_is_padded(families: dict[str, Path], kind: str) -> None:
    trainee = build(families[LLAMA])
    rows = tokens_of(trainee.template, kind)
    one = pack(rows)
    if kind == "nothing shared":
        assert len(one.ids) == sum(len(row) - 1 for row in rows)
    projections = [p for block in trainee.body._blocks for p in (block.qkv, block.o, block.gate_up, block.down)]
    with Products({tuple(p.weights.weight.shape) for p in projections}) as products:
        loop.validate(trainee, rows)
    # The last layer's attention looks at all tokens; after it only those that predict something are left.
    assert products.tokens == [len(one.ids)] * 9 + [len(one.rows)] * 3
    assert len(one.rows) < len(one.ids)


def test_rows_that_share_nothing_lose_nothing_among_rows_that_do(families: dict[str, Path]) -> None:
    template = build(families[LLAMA]).template
    together, apart = (tokens_of(template, kind) for kind in ("one system prompt", "nothing shared"))
    # They share the first tokens of the template, which is too little to be a part of its own.
    both = len(pack([*together, *apart]).ids)
    assert both <= len(pack(together).ids) + sum(len(row) - 1 for row in apart)


# Knobs


@pytest.mark.parametrize("family", [LLAMA, "qwen3, walked layer by layer"])
@pytest.mark.parametrize(
    "changes",
    [{"prompt_loss_weight": 0.3}, {"prompt_loss_weight": 1.0}, {"label_smoothing": 0.2}, {"lora_alpha": 5.0}],
    ids=str,
)
def test_knobs_of_the_loss_are_those_of_the_plain_loop(
    families: dict[str, Path], family: str, changes: dict[str, Any]
) -> None:
    trainee = build(families[family], replace(PLAN, **changes))
    rows = tokens_of(trainee.template, "everything")
    plain, off = Plain(families[family], trainee), build(families[family])
    plain.gradients(rows)
    wanted = torch.cat([p.grad.flatten() for p in plain.parameters.values() if p.grad is not None])
    found = step_of(trainee, rows)[1]
    assert difference(found, wanted) < 1e-3
    assert difference(found, step_of(off, rows)[1]) > 1e-2, "the knob does something"


def test_knobs_of_the_loss_do_not_change_what_is_reported(families: dict[str, Path]) -> None:
    knobs = {"prompt_loss_weight": 0.3, "label_smoothing": 0.2}
    plain, turned = build(families[LLAMA]), build(families[LLAMA], replace(PLAN, **knobs))
    rows = tokens_of(plain.template, "several turns")
    assert step_of(turned, rows)[0] == pytest.approx(step_of(plain, rows)[0], rel=1e-6)
    assert loop.validate(turned, rows) == loop.validate(plain, rows)


def test_noise_on_embeddings_depends_on_seed_and_step_alone(families: dict[str, Path]) -> None:
    noisy = replace(PLAN, neftune_noise_alpha=5.0)
    plain, one, other = build(families[LLAMA]), build(families[LLAMA], noisy), build(families[LLAMA], noisy)
    rows = tokens_of(plain.template, "one system prompt")
    step_of(other, rows, step=9)  # what came before makes no difference
    first = step_of(one, rows, step=3)
    assert torch.equal(first[1], step_of(other, rows, step=3)[1])
    assert difference(first[1], step_of(plain, rows, step=3)[1]) > 1e-2
    assert difference(first[1], step_of(one, rows, step=4)[1]) > 1e-2
    one.plan = replace(noisy, seed=1)
    assert difference(first[1], step_of(one, rows, step=3)[1]) > 1e-2
    assert loop.validate(one, rows) == loop.validate(plain, rows)


def test_noise_on_embeddings_has_the_size_of_the_paper(families: dict[str, Path]) -> None:
    trainee = build(families[LLAMA])
    rows = tokens_of(trainee.template, "nothing shared")
    one = pack(rows)
    noise = trainee.body.embed(one, 5.0, seed=1) - trainee.body.embed(one, 0.0, seed=1)
    mean = sum(len(row) - 1 for row in rows) / len(rows)
    bound = 5.0 / (mean * noise.shape[1]) ** 0.5
    assert 0.99 * bound < float(noise.abs().max()) <= 1.0001 * bound
    assert abs(float(noise.mean())) < 0.02 * bound
    assert float(noise.std()) == pytest.approx(bound / 3**0.5, rel=0.02)


# Dropout and checkpointing


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name]["model_type"] in body.FUSED])
def test_layers_that_are_computed_again_give_the_same_gradient_bit_for_bit(
    families: dict[str, Path], family: str, p: float
) -> None:
    kept, again = (
        build(families[family], replace(PLAN, lora_dropout=p, checkpointing=one, micro_tokens=200))
        for one in (False, True)
    )
    rows = tokens_of(kept.template, "everything")
    assert len(kept.micro_batches(rows, training=True)) > 1
    wanted, found = step_of(kept, rows, step=5), step_of(again, rows, step=5)
    assert found[0] == wanted[0]
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(wanted[1], step_of(kept, rows, step=5)[1])
    assert torch.equal(wanted[1], step_of(kept, rows, step=6)[1]) == (p == 0)


class Masked(torch.nn.Module):
    """PEFT's dropout, with given masks."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask


@pytest.mark.parametrize("family", [LLAMA, "qwen2, 3 queries a key", "qwen3, walked layer by layer"])
def test_dropout_is_pefts_with_masks_of_our_own(families: dict[str, Path], family: str) -> None:
    trainee = build(families[family], replace(PLAN, lora_dropout=0.4))
    (row,) = tokens_of(trainee.template, "a single example")
    one, plain = pack([row]), Plain(families[family], trainee)
    loss, ours = step_of(trainee, [row], step=2)
    trainee.start(2, [row])
    fused = bool(trainee.body._blocks)
    order = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    inputs = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
    for i, layer in enumerate(plain.peft.get_base_model().base_model.layers):
        for module in (layer.self_attn, layer.mlp):
            for name, linear in module.named_children():
                if name not in order:
                    continue
                # After the last attention our layers go on with the predicting positions only.
                few = fused and i == 2 and inputs[name] > 0
                place = 4 * i + inputs[name] if fused else 7 * i + order.index(name)
                rows, width = len(one.rows) if few else len(one.ids), linear.in_features
                mask = trainee.dropout.mask(
                    place, rows, width, torch.zeros(1), column_major=fused and inputs[name] == 3
                )
                assert mask is not None
                assert 0.2 < float((mask == 0).float().mean()) < 0.6
                whole = torch.ones(len(row.ids), width)
                whole[one.rows if few else torch.arange(rows)] = mask
                linear.lora_dropout["default"] = Masked(whole)
    assert loss == pytest.approx(plain.gradients([row]), rel=1e-4)
    wanted = torch.cat([p.grad.flatten() for p in plain.parameters.values() if p.grad is not None])
    assert difference(ours, wanted) < 1e-3


@pytest.mark.parametrize("targets", [("q_proj",), ("all-linear",)])
def test_there_are_masks_for_the_widest_layer(
    families: dict[str, Path], targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dropout, "POOL", 0)
    trainee = build(families[LLAMA], replace(PLAN, lora_dropout=0.1, target_modules=targets))
    rows = tokens_of(trainee.template, "nothing shared")
    assert difference(step_of(trainee, rows)[1], step_of(build(families[LLAMA], trainee.plan), rows, 2)[1]) > 1e-3


def test_dropout_is_off_in_validation(families: dict[str, Path]) -> None:
    noisy, plain = build(families[LLAMA], replace(PLAN, lora_dropout=0.5)), build(families[LLAMA])
    rows = tokens_of(plain.template, "one system prompt")
    assert step_of(noisy, rows)[0] != step_of(plain, rows)[0]
    assert loop.validate(noisy, rows) == loop.validate(plain, rows)


# Precision


def test_bfloat16_products_stay_close_to_float32_and_keep_fp32_masters(families: dict[str, Path]) -> None:
    found = {}
    for precision in (torch.float32, torch.bfloat16):
        trainee = build(families[LLAMA], precision=precision)
        assert all(p.dtype == torch.float32 for p in trainee.parameters.values())
        found[precision] = step_of(trainee, tokens_of(trainee.template, "everything"))
    wanted, close = found[torch.float32], found[torch.bfloat16]
    assert close[0] == pytest.approx(wanted[0], rel=0.02)
    assert close[1].dtype == torch.float32
    assert 1e-4 < difference(close[1], wanted[1]) < 0.1


# Whole loss curves


CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "the recipe": (LLAMA, {}),
    "checkpointing, small packs": (LLAMA, {"checkpointing": True, "micro_tokens": 150}),
    "weight decay, smoothing, prompts": (
        LLAMA,
        {"weight_decay": 0.1, "label_smoothing": 0.1, "prompt_loss_weight": 0.2, "max_grad_norm": 0.3},
    ),
    "biases": ("qwen2, 3 queries a key", {}),
    "layer by layer": ("qwen3, walked layer by layer", {}),
    "frozen layers": (LLAMA, {"freeze_layers": 2}),
    "frozen layers, walked": ("qwen3, walked layer by layer", {"freeze_layers": 1}),
}


@pytest.mark.parametrize("name", CURVES)
def test_thirty_steps_follow_the_plain_loop(families: dict[str, Path], tmp_path: Path, name: str) -> None:
    family, changes = CURVES[name]
    options = {"activations": tmp_path / "activations"} if "freeze_layers" in changes else {}
    trainee = sft.build_model(replace(TRAINED, **changes), families[family], torch.float32, **options)
    rows = tokens_of(trainee.template, "everything")
    check_curve(families[family], trainee, rows[:12], rows[12:15], tmp_path / "checkpoints")


def test_thirty_steps_with_and_without_sharing_end_with_the_same_adapter(
    families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves, weights = [], []
    for share in (True, False):
        trainee = sft.build_model(TRAINED, families[LLAMA], torch.float32)
        rows = tokens_of(trainee.template, "everything")
        monkeypatch.setattr(
            sft, "pack", lambda rows, share=share, **options: packing.pack(rows, share=share, **options)
        )
        course = loop.run(TRAINED, trainee, rows[:12], rows[:4], checkpoints=tmp_path / str(share), watch=Silent())
        curves.append([point.train_loss for point in course.curve])
        weights.append(vector(trainee.parameters))
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert difference(weights[0], weights[1]) < 1e-3
