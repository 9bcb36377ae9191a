"""The output head's loss and gradient are those of full logits, which it does not keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from heldout.train import head
from heldout.train.method import TEMPERATURES
from heldout.train.products import Dense


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("chunk", [256, 7, 1])
def test_the_head_gives_the_cross_entropy_of_full_logits(smoothing: float, chunk: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(25, 16, requires_grad=True), torch.randn(60, 16)
    targets, outer = torch.randint(60, (25,)), torch.rand(25)
    logits = hidden @ weight.t()
    targets[:5] = logits[:5].argmax(dim=-1)
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    (wanted_gradient,) = torch.autograd.grad((wanted * outer).sum(), hidden)
    loss, nll, right, tempered = head.losses(
        hidden, Dense(weight, 16), targets, smoothing=smoothing, temperatures=(3.0, *TEMPERATURES), chunk=chunk
    )
    (gradient,) = torch.autograd.grad((loss * outer).sum(), hidden)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(nll, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(gradient, wanted_gradient)
    for row, temperature in zip(tempered, (3.0, *TEMPERATURES), strict=True):
        torch.testing.assert_close(row, F.cross_entropy(logits / temperature, targets, reduction="none"))
    assert right.tolist() == (logits.argmax(dim=-1) == targets).tolist()
    assert 5 <= right.sum() < 25


def test_the_head_keeps_no_logits_and_needs_no_gradient_in_validation() -> None:
    hidden, weight, targets = torch.randn(300, 8), torch.randn(50, 8), torch.randint(50, (300,))
    biggest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (50,):
                biggest = max(biggest, len(out))
            return out

    with Sizes():
        loss, *_ = head.losses(hidden, Dense(weight, 8), targets, temperatures=(0.5, 2.0), chunk=64)
    assert biggest == 60, "five of one length"
    assert not loss.requires_grad
