"""A chat model as the loop trains it: which layers get an adapter, and the same bits every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from heldout.engine.template import Tokens
from heldout.errors import InvalidValue
from heldout.pipeline.plan import TrainPlan
from heldout.train import sft
from heldout.train.layout import Layout
from heldout.train.packing import pack
from heldout.train.sft import ChatTrainee


@pytest.mark.parametrize(
    ("targets", "freeze", "useless"),
    [
        (("q_proj", "nope"), 0, "'nope' names no linear layer of this model"),
        (("q_proj", "lm_head"), 0, "'lm_head' names no linear layer of this model"),
        (("embed_tokens",), 0, "'embed_tokens' names no linear layer of this model"),
        (("v_proj", "layers.0.self_attn.q_proj"), 1, "'layers.0.self_attn.q_proj' names no linear layer above layer 1"),
    ],
)
def test_a_target_that_would_train_nothing_is_refused(
    tiny_model: Path, plan: Callable[..., TrainPlan], targets: tuple[str, ...], freeze: int, useless: str
) -> None:
    with pytest.raises(InvalidValue, match=useless) as raised:
        sft.build_model(plan(target_modules=targets, freeze_layers=freeze), tiny_model, torch.float32)
    assert "down_proj" in str(raised.value)
    assert raised.value.param == "hyperparameters.target_modules"


def test_a_target_may_name_one_layer(tiny_model: Path, plan: Callable[..., TrainPlan]) -> None:
    trainee = sft.build_model(plan(target_modules=("layers.1.self_attn.q_proj", "up_proj")), tiny_model, torch.float32)
    assert sum("q_proj.lora_A" in name for name in trainee.parameters) == 1
    assert sum("up_proj.lora_A" in name for name in trainee.parameters) == 2


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_gradients_of_many_answers_to_one_prompt_are_the_same_bits_every_time(
    trainee: ChatTrainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One position predicts them all; threads that add to its gradient as they come would differ in the last bit."""
    rows = [
        Tokens((5, 6, prompt, answer, 2), (False, False, False, True, True))
        for prompt in (7, 8, 9)
        for answer in range(10, 200)
    ]
    one = pack(rows)
    assert len(one.targets) * 64 > 1 << 16, "enough numbers for torch to share them out"
    hidden = torch.randn(len(one.rows), 64, requires_grad=True)
    monkeypatch.setattr(trainee.body, "above", lambda x, layout, rows: hidden)

    def once() -> torch.Tensor:
        (gradient,) = torch.autograd.grad(trainee.losses(rows).loss.sum(), hidden)
        return gradient

    first = once()
    assert all(torch.equal(once(), first) for _ in range(10))


def test_a_layouts_bias_is_made_once_for_all_layers() -> None:
    layout: Layout = pack([Tokens((1, 2, 3, 4), (False, False, True, True))]).layout
    bias = layout.bias(torch.float32)
    assert layout.bias(torch.float32) is bias
    assert bias.stride(2) % 8 == 0, "torch would copy it in every layer"
    assert (bias[0, 0] == 0).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
