"""Rows of zeros behind the packed tokens, so that a processor's bfloat16 products have few shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from heldout.train import attention, body, loop, rounding, sft
from heldout.train.packing import pack
from tests.torch.cases import FAMILIES, make_family, tokens_of
from tests.torch.conftest import PLAN, difference, gradients, stirred

FUSED = [name for name in FAMILIES if FAMILIES[name]["model_type"] in body.FUSED]


class Shapes(TorchDispatchMode):
    """Notes the sides of every product of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.sides: set[int] = set()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.out):
            factors = args[-2:]
            self.sides |= {side for one in factors for side in one.shape}
            self.types |= {one.dtype for one in factors}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kept", [True, False], ids=["scores kept", "scores computed anew"])
@pytest.mark.parametrize("family", FUSED)
def test_rows_of_zeros_change_no_loss_and_no_gradient(
    tiny_model: Path, tmp_path: Path, family: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_family(tmp_path / "model", tiny_model, family)
    if not kept:
        monkeypatch.setattr(attention, "KEPT_SCORES", 0)
    trainee = stirred(sft.build_model(PLAN, folder, torch.float32))
    rows = tokens_of(trainee.template, "everything")
    plain = loop.gradients(trainee, rows, 1)
    wanted, seen = gradients(trainee), loop.validate(trainee, rows)
    monkeypatch.setattr(rounding, "spare_rows", lambda rows, like: rounding.STEP + -rows % rounding.STEP)
    found = loop.gradients(trainee, rows, 1)
    assert found == pytest.approx(plain, rel=1e-5)
    assert difference(gradients(trainee), wanted) < 1e-5
    assert loop.validate(trainee, rows).losses == pytest.approx(seen.losses, rel=1e-5)


def test_no_bfloat16_product_of_a_step_has_the_length_of_the_pack(tiny_model: Path) -> None:
    trainee = stirred(sft.build_model(PLAN, tiny_model, torch.bfloat16))
    rows = tokens_of(trainee.template, "several turns")
    one = pack(rows)
    lengths = {len(one.ids), len(one.rows), len(one.sources)}
    assert all(length % rounding.STEP for length in lengths)
    with Shapes() as shapes:
        loop.gradients(trainee, rows, 1)
        loop.validate(trainee, rows)
    assert shapes.types == {torch.bfloat16}
    assert not shapes.sides & lengths
    assert shapes.sides >= {length + -length % rounding.STEP for length in lengths}


def test_nothing_is_added_where_shapes_cost_nothing() -> None:
    x = torch.ones(33, 4)
    assert rounding.padded(x) is x
    padded = rounding.padded(x.bfloat16())
    assert padded.shape == (64, 4)
    assert (float(padded[:33].min()), float(padded[33:].abs().max())) == (1.0, 0.0)
    assert rounding.padded(torch.ones(64, 4).bfloat16()).shape == (64, 4)
