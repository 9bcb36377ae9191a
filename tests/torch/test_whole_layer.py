"""A decoder layer in one call of the kernels computes what its operations do one by one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from heldout.engine.template import Tokens
from heldout.kernels import Kernels
from heldout.train import block as layers
from heldout.train import body
from heldout.train.block import Block
from heldout.train.packing import pack
from heldout.train.rounding import STEP
from heldout.train.sft import ChatTrainee
from tests.torch.cases import FAMILIES, make_family, tokens_of
from tests.torch.conftest import LLAMA, PLAN, build, difference

HELD = [name for name in FAMILIES if FAMILIES[name]["model_type"] in body.FUSED]
TYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def published(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, torch.dtype], Path]:
    """A tiny model of every family that kernels multiply for, in files of either precision."""
    root, found = tmp_path_factory.mktemp("published"), {}
    for number, name in enumerate(HELD):
        for dtype in TYPES:
            folder = make_family(root / f"{number}-{dtype.itemsize}", tiny_model, name, width=16)
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
            found[name, dtype] = folder
    return found


class Passes:
    """A layer's forward and backward pass on a pack of examples, in one call and by its operations."""

    def __init__(self, trainee: ChatTrainee, dtype: torch.dtype, *, some: bool) -> None:
        rows = tokens_of(trainee.template, "everything")
        self.trainee, self.layout = trainee, pack(rows).layout
        count = len(self.layout.until)
        assert count // 3 >= STEP
        trainee.start(1, rows)
        torch.manual_seed(7)
        width = trainee.head.in_features
        # Of a whole number of torch's rows in bfloat16 (train/rounding.py): dropout drops the same then.
        self.rows = torch.randperm(count)[: count // 3 // STEP * STEP].sort().values if some else None
        self.x = torch.randn(count, width).to(dtype)
        self.grad = torch.randn(count if self.rows is None else len(self.rows), width).to(dtype)
        cos, sin = trainee.body._inner.rotary_emb(self.x[None], self.layout.position_ids)
        self.angles = (cos[0], sin[0])

    def of(self, one: Block, *, needs_x: bool = True) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        given = (self.layout, self.angles, self.trainee.dropout, self.rows)
        with torch.no_grad():
            y, kept = layers._forward(one, self.x, *given)
            count = len(self.grad)
            behind = torch.zeros(len(y) - count, y.shape[1], dtype=y.dtype)  # torch's rows may be filled up
            d_x, found = layers._backward(one, self.x, torch.cat([self.grad, behind]), kept, *given, needs_x=needs_x)
        return y[:count], self.x.new_zeros(0) if d_x is None else d_x, found


@pytest.mark.parametrize("some", [False, True], ids=["all tokens", "chosen tokens"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_dropout": 0.3},
        {"lora_r": 3, "lora_dropout": 0.3},
        {"lora_r": 400, "lora_dropout": 0.3},  # more than sums begin with
        {"target_modules": ("v_proj", "o_proj", "down_proj"), "lora_dropout": 0.3},
        {"target_modules": ("gate_proj",)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("family", HELD)
def test_one_call_is_its_operations(
    published: dict[tuple[str, torch.dtype], Path],
    kernels: Kernels,
    family: str,
    dtype: torch.dtype,
    changes: dict[str, Any],
    some: bool,
) -> None:
    if not kernels.multiplies(dtype):
        pytest.skip(f"there are no products of {dtype} on this processor")
    plan, low = replace(PLAN, **changes), dtype == torch.bfloat16
    trainee = build(published[family, dtype], plan, dtype, kernels=kernels)
    passes, one = Passes(trainee, dtype, some=some), trainee.body._blocks[1]
    assert one.whole
    ours, theirs = passes.of(one), passes.of(replace(one, whole=None))
    wide = build(published[family, dtype], plan, kernels=kernels) if low else trainee
    exact = Passes(wide, torch.float32, some=some)
    exact.x, exact.grad = passes.x.float(), passes.grad.float()
    wanted = exact.of(replace(wide.body._blocks[1], whole=None))
    for found, other, right in zip(*((one[0], one[1], *one[2]) for one in (ours, theirs, wanted)), strict=True):
        assert found.shape == right.shape
        off = difference(found.float(), right)
        assert off < (min(0.2, 1.3 * difference(other.float(), right) + 5e-3) if low else 1e-5)
    without = passes.of(one, needs_x=False)
    assert not without[1].numel()
    for found, same in zip(without[2], ours[2], strict=True):
        assert difference(found, same) < (1e-2 if low else 1e-6)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_number_of_threads_changes_rounding_at_most(
    published: dict[tuple[str, torch.dtype], Path], kernels: Kernels, dtype: torch.dtype, threads: None
) -> None:
    if not kernels.multiplies(dtype):
        pytest.skip(f"there are no products of {dtype} on this processor")
    trainee = build(published[LLAMA, dtype], replace(PLAN, lora_dropout=0.3), dtype, kernels=kernels)
    passes, one = Passes(trainee, dtype, some=True), trainee.body._blocks[1]
    several = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        several.append(passes.of(one))
        again = passes.of(one)
        assert all(torch.equal(*both) for both in zip(several[-1][2], again[2], strict=True)), "the same to the bit"
    assert all(torch.equal(other[0], several[0][0]) for other in several), "the result is the same, however many"
    for other in several[1:]:
        for found, wanted in zip(other[2], several[0][2], strict=True):
            assert difference(found, wanted) < (1e-5 if dtype == torch.float32 else 1e-2)


FEWER_THREADS = """
import sys
from pathlib import Path
import torch
from heldout.kernels import compiling
from heldout.settings import read_settings
from heldout.train.projection import Scratch
from tests.torch.conftest import build, difference
from tests.torch.test_whole_layer import Passes

trainee = build(Path(sys.argv[1]), kernels=compiling.load(read_settings().cache))
passes, one = Passes(trainee, torch.float32, some=True), trainee.body._blocks[1]
torch.set_num_threads(1)
wanted = passes.of(one)
torch.set_num_threads(4)
take, new_empty = Scratch.take, torch.Tensor.new_empty
Scratch.take = lambda *given: take(*given).fill_(255)  # of bytes: no numbers
nothing = lambda x: x.fill_(torch.nan if x.is_floating_point() else 255)
torch.Tensor.new_empty = lambda self, *shape: nothing(new_empty(self, *shape))
found = passes.of(one)
for ours, theirs in zip((*found[:2], *found[2]), (*wanted[:2], *wanted[2])):
    assert difference(ours, theirs) < 1e-5, (ours, theirs)
"""


def test_fewer_threads_than_asked_for_give_the_same_gradients(
    published: dict[tuple[str, torch.dtype], Path], kernels: Kernels
) -> None:
    limited = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    command = [sys.executable, "-c", FEWER_THREADS, str(published[LLAMA, torch.float32])]
    done = subprocess.run(command, env=limited, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_backward_pass_has_the_threads_of_its_forward_pass(
    published: dict[tuple[str, torch.dtype], Path], kernels: Kernels, dtype: torch.dtype, threads: None
) -> None:
    if not kernels.multiplies(dtype):
        pytest.skip(f"there are no products of {dtype} on this processor")
    trainee = build(published[LLAMA, dtype], PLAN, dtype, kernels=kernels)
    passes, one = Passes(trainee, dtype, some=False), trainee.body._blocks[1]
    given = (passes.layout, passes.angles, trainee.dropout, None)
    torch.set_num_threads(1)
    wanted = passes.of(one)
    _, kept = layers._forward(one, passes.x, *given)
    torch.set_num_threads(64)  # whose work would take more memory than was measured
    d_x, found = layers._backward(one, passes.x, passes.grad, kept, *given, needs_x=True)
    assert d_x is not None
    assert torch.equal(d_x, wanted[1])
    assert all(map(torch.equal, found, wanted[2]))


def test_one_token_is_a_pack(published: dict[tuple[str, torch.dtype], Path], kernels: Kernels) -> None:
    trainee = build(published[LLAMA, torch.float32], kernels=kernels)
    passes, one = Passes(trainee, torch.float32, some=False), trainee.body._blocks[1]
    alone = pack([Tokens((5, 6), (False, True))])  # what the last token would predict is nobody's
    assert len(alone.ids) == 1
    passes.layout, passes.x, passes.grad = alone.layout, passes.x[:1], passes.grad[:1]
    passes.angles = (passes.angles[0][:1], passes.angles[1][:1])
    ours, theirs = passes.of(one), passes.of(replace(one, whole=None))
    for found, wanted in zip((*ours[:2], *ours[2]), (*theirs[:2], *theirs[2]), strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm(), "which is 0 for what its only key has no choice of"


def test_what_does_not_fit_a_layer_is_refused(published: dict[tuple[str, torch.dtype], Path], kernels: Kernels) -> None:
    trainee = build(published[LLAMA, torch.float32], kernels=kernels)
    passes, one = Passes(trainee, torch.float32, some=False), trainee.body._blocks[0]
    x, angles, grad = passes.x, passes.angles, passes.grad
    passes.x = x.bfloat16()
    with pytest.raises(ValueError, match=r"torch\.bfloat16 of .* where the layer takes"):
        passes.of(one)
    passes.x = x[:, :-1].contiguous()
    with pytest.raises(ValueError, match="where the layer takes"):
        passes.of(one)
    passes.x, passes.angles = x, (angles[0][1:], angles[1])
    with pytest.raises(ValueError, match="angles of"):
        passes.of(one)
    passes.angles = angles
    _, kept = layers._forward(one, x, passes.layout, angles, trainee.dropout, None)
    assert one.whole
    assert isinstance(kept, layers.WholeKept)
    with pytest.raises(ValueError, match="a gradient of"):
        one.whole.backward(x, grad[1:], kept, one.scratch, needs_x=True)
    passes.grad, passes.rows = grad[:0], torch.tensor([], dtype=torch.int64)
    with pytest.raises(ValueError, match="of which 0 go on"):
        passes.of(one)
    passes.grad, passes.rows = grad[:2], torch.tensor([1, len(x)])
    with pytest.raises(IndexError, match=f"outside of the {len(x)} tokens"):
        passes.of(one)


def test_a_layer_whose_adapters_are_not_float32_is_refused(
    published: dict[tuple[str, torch.dtype], Path], kernels: Kernels
) -> None:
    trainee = build(published[LLAMA, torch.float32], kernels=kernels)
    one = trainee.body._blocks[0]
    adapter = one.qkv.adapters[0]
    low = adapter._replace(a=torch.nn.Parameter(adapter.a.data.bfloat16()))
    changed = replace(one, qkv=replace(one.qkv, adapters=(low, *one.qkv.adapters[1:])))
    with pytest.raises(ValueError, match="adapters that are not float32"):
        changed._in_one_call()
