"""Packing, the supervised-token head and the fused LoRA change the time a step takes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import Linear

from heldout.engine.template import Tokens
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.types import Example
from heldout.train import sft
from heldout.train.lora import Dropout
from heldout.train.packing import micro_batches, pack
from heldout.train.sft import Trainee
from tests.torch.conftest import difference, examples, gradients, plain_loss, stirred


def tokens_of(trainee: Trainee, rows: tuple[Example, ...]) -> list[Tokens]:
    return sft.tokenize(trainee.template, rows, 512, "train")


def check_against_plain(trainee: Trainee, rows: list[Tokens]) -> None:
    losses = sft.loss(trainee, sft.collate(trainee, rows))
    packed = losses.nll.sum()
    packed.backward()
    packed_gradients = gradients(trainee)
    plain = sum(plain_loss(trainee, row) for row in rows)
    assert isinstance(plain, torch.Tensor)
    plain.backward()
    assert float(packed) == pytest.approx(float(plain), rel=1e-4)
    assert difference(packed_gradients, gradients(trainee)) < 1e-3


def test_a_pack_with_a_shared_prefix_has_the_loss_and_gradients_of_its_examples_alone(trainee: Trainee) -> None:
    rows = tokens_of(trainee, examples(range(7)))
    assert pack(rows).layout.prefix > 10
    check_against_plain(trainee, rows)


def test_a_pack_of_examples_that_share_nothing_is_exact_too(trainee: Trainee) -> None:
    rows = tokens_of(trainee, examples(range(4)))
    cut = [Tokens(row.ids[i:], row.supervised[i:]) for i, row in enumerate(rows)]
    assert pack(cut).layout.prefix == 0
    check_against_plain(trainee, cut)


def test_a_single_example_and_identical_examples_are_exact(trainee: Trainee) -> None:
    (row,) = tokens_of(trainee, examples(range(1)))
    check_against_plain(trainee, [row])
    check_against_plain(trainee, [row, row, row])


def test_an_example_that_is_a_prefix_of_another_is_exact(trainee: Trainee) -> None:
    (row,) = tokens_of(trainee, examples(range(1)))
    longer = Tokens((*row.ids, *row.ids[5:15]), (*row.supervised, *([True] * 10)))
    check_against_plain(trainee, [row, longer])


def test_earlier_answers_with_weight_0_are_not_learned(trainee: Trainee) -> None:
    (one,) = examples(range(1))
    two_turns = (*one.messages, {"role": "user", "content": "again"}, {"role": "assistant", "content": "red"})
    both = replace(one, messages=two_turns, weights=(0, 0, 1, 0, 1))
    last = replace(one, messages=two_turns, weights=(0, 0, 0, 0, 1))
    (tokens_both, tokens_last) = tokens_of(trainee, (both, last))
    assert trainee.template.decode([i for i, s in zip(*_pair(tokens_last), strict=True) if s]) == "red"
    assert sum(tokens_both.supervised) > sum(tokens_last.supervised)
    check_against_plain(trainee, [tokens_both, tokens_last])


def _pair(tokens: Tokens) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    return tokens.ids, tokens.supervised


def test_how_a_batch_is_cut_into_packs_does_not_change_its_gradient(trainee: Trainee) -> None:
    rows = tokens_of(trainee, examples(range(8)))
    results = []
    for limit in (10_000, 120, 1):
        for chosen in micro_batches(rows, range(8), limit=limit):
            sft.loss(trainee, sft.collate(trainee, [rows[i] for i in chosen])).nll.sum().backward()
        results.append(gradients(trainee))
    assert len(micro_batches(rows, range(8), limit=1)) == 8
    assert difference(results[1], results[0]) < 1e-4
    assert difference(results[2], results[0]) < 1e-4


def test_our_lora_layer_computes_what_pefts_does(tiny_model: Path, plan: Callable[..., TrainPlan]) -> None:
    trainee = stirred(sft.build_model(plan(), tiny_model, torch.float32))
    rows = tokens_of(trainee, examples(range(5)))
    ours = sft.loss(trainee, sft.collate(trainee, rows)).nll.sum()
    ours.backward()
    our_gradients = gradients(trainee)
    for module in trainee.peft.modules():
        if isinstance(module, Linear):
            del module.__dict__["forward"]  # PEFT's own again
    theirs = sft.loss(trainee, sft.collate(trainee, rows)).nll.sum()
    theirs.backward()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    assert difference(our_gradients, gradients(trainee)) < 1e-4


def test_bfloat16_products_stay_close_to_float32_and_keep_fp32_masters(
    tiny_model: Path, plan: Callable[..., TrainPlan]
) -> None:
    losses = {}
    for precision in (torch.float32, torch.bfloat16):
        trainee = stirred(sft.build_model(plan(), tiny_model, precision))
        assert all(p.dtype == torch.float32 for p in trainee.parameters.values())
        rows = tokens_of(trainee, examples(range(6)))
        losses[precision] = float(sft.loss(trainee, sft.collate(trainee, rows)).nll.mean())
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.02)


def test_dropout_masks_depend_on_seed_and_step_alone() -> None:
    x = torch.ones(100, 300)

    def masks(seed: int, step: int) -> torch.Tensor:
        dropout = Dropout(0.1, seed)
        dropout.start(step)
        found = [dropout.mask(x) for _ in range(2)]
        return torch.stack([mask for mask in found if mask is not None])

    assert torch.equal(masks(1, 5), masks(1, 5))
    assert not torch.equal(masks(1, 5), masks(1, 6))
    assert not torch.equal(masks(1, 5), masks(2, 5))
    assert float((masks(1, 5) == 0).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert float(masks(1, 5).mean()) == pytest.approx(1.0, abs=0.02)


def test_dropout_is_off_in_validation(trainee: Trainee) -> None:
    trainee.dropout.p = 0.5
    rows = tokens_of(trainee, examples(range(3)))

    def loss() -> float:
        return float(sft.loss(trainee, sft.collate(trainee, rows)).nll.sum())

    trainee.dropout.start(1)
    noisy = loss()
    trainee.dropout.stop()
    assert loss() == loss()
    assert noisy != loss()
