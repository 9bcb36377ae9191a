"""Products of bfloat16 pairs are those of torch, and models that multiply so say and learn the same. On processors that
have units for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from heldout.engine import frozen, weights
from heldout.engine.base import Message, ModelRef
from heldout.engine.frozen import FrozenLinear
from heldout.engine.local import LocalEngine
from heldout.kernels import Kernels
from heldout.kernels.frozen import Frozen
from heldout.train import loop, sft
from tests.torch.cases import FAMILIES, make_family, tokens_of
from tests.torch.conftest import LLAMA, PLAN, TOOLS, difference, stirred

LOW = torch.bfloat16
HELD = [name for name in FAMILIES if FAMILIES[name]["model_type"] in frozen.KINDS]


@pytest.fixture(scope="module")
def pairs(kernels: Kernels) -> Kernels:
    """The kernels where they multiply pairs."""
    if not kernels.multiplies(LOW):
        pytest.skip("this processor does not multiply pairs of bfloat16 numbers")
    return kernels


def some(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(LOW)


@pytest.mark.parametrize("ranks", [0, 1, 4, 16, 33, 48])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(64, 64), (1, 2), (33, 8), (96, 300), (200, 576), (31, 2050), (2050, 62), (77, 1024)]
)
@pytest.mark.parametrize("n", [1, 2, 11, 12, 13, 37, 100])
def test_products_in_both_directions_are_those_of_torch(
    pairs: Kernels, n: int, outputs: int, inputs: int, ranks: int
) -> None:
    torch.manual_seed(0)
    weight, beside = some(outputs, inputs), some(outputs, ranks)
    ours, theirs = Frozen.of(pairs, weight, LOW), torch.cat([weight, beside], dim=1).float()
    # Rows that are parts of wider ones, and one that all tokens are added to.
    x, grad = some(n, inputs + ranks + 5)[:, 2:-3], some(n, outputs + 3)[:, 1:-2]
    onto, bias = some(n, outputs), some(outputs).expand(n, -1)
    # Rounded once, from sums in float32: off by half of a bfloat16's last place.
    product = x.float() @ theirs.t()
    for found, wanted in [
        (ours.product(x, beside), product),
        (ours.product(x, beside, onto), product + onto.float()),
        (ours.product(x, beside, bias), product + bias.float()),
        (ours.product_back(grad, beside), grad.float() @ theirs),
    ]:
        assert found.dtype == LOW
        assert ((found.float() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5 * wanted.abs().max()).all()


@pytest.mark.parametrize(
    ("n", "outputs", "inputs", "ranks"),
    [(900, 96, 1300, 20), (900, 1300, 96, 20), (40, 200, 576, 768), (700, 33, 2400, 1)],
)
def test_what_does_not_fit_into_the_cache_is_taken_in_turns(
    pairs: Kernels, n: int, outputs: int, inputs: int, ranks: int
) -> None:
    torch.manual_seed(0)
    weight, beside = some(outputs, inputs), some(outputs, ranks)
    ours, theirs = Frozen.of(pairs, weight, LOW), torch.cat([weight, beside], dim=1).float()
    x, grad, onto = some(n, inputs + ranks), some(n, outputs), some(n, outputs)
    found, back = ours.product(x, beside, onto), ours.product_back(grad, beside)
    for one, wanted in ((found, x.float() @ theirs.t() + onto.float()), (back, grad.float() @ theirs)):
        assert ((one.float() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5 * wanted.abs().max()).all()
    assert torch.equal(ours.product(x[5:17], beside, onto[5:17]), found[5:17])
    assert torch.equal(ours.product_back(grad[5:17], beside), back[5:17])


def test_what_lies_beside_a_row_is_never_read(pairs: Kernels) -> None:
    # Of an odd number of ranks the last has no partner: what lies behind it is another tensor's, and no number.
    room = torch.full((3, 80), torch.nan, dtype=LOW)
    x, weight, beside = room[:, 3:72], some(40, 64), torch.full((40, 9), torch.nan, dtype=LOW)
    x.copy_(some(3, 69))
    beside[:, :5] = some(40, 5)
    assert Frozen.of(pairs, weight, LOW).product(x, beside[:, :5]).isfinite().all()
    grad = torch.full((3, 50), torch.nan, dtype=LOW)
    grad[:, :33] = some(3, 33)
    assert Frozen.of(pairs, weight[:33], LOW).product_back(grad[:, :33], beside[:33, :5]).isfinite().all()


def test_a_row_has_the_same_bits_whatever_is_computed_beside_it(pairs: Kernels, threads: None) -> None:
    torch.manual_seed(0)
    ours, beside = Frozen.of(pairs, some(1300, 700), LOW), some(1300, 17)
    x, grad = some(900, 717), some(900, 1300)
    together, back = ours.product(x, beside), ours.product_back(grad, beside)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        for rows in (slice(0, 900), slice(3, 4), slice(10, 30), slice(40, 590)):
            assert torch.equal(ours.product(x[rows], beside), together[rows])
            assert torch.equal(ours.product_back(grad[rows], beside), back[rows])


def test_a_product_of_no_rows_is_empty(pairs: Kernels) -> None:
    ours = Frozen.of(pairs, some(40, 8), LOW)
    assert ours.product(some(0, 8)).shape == (0, 40)
    assert ours.product_back(some(0, 40)).shape == (0, 8)


def test_weights_come_back_as_they_were(pairs: Kernels) -> None:
    parts = [some(outputs, 24) for outputs in (64, 5, 33)]
    joined = Frozen.joined([Frozen.of(pairs, part, LOW) for part in parts])
    assert torch.equal(joined.weight, torch.cat(parts))
    numbers = torch.tensor([[0, 101, 17], [16, 31, 32]])
    assert torch.equal(joined.rows(numbers), torch.cat(parts)[numbers])
    assert torch.equal(Frozen.of(pairs, parts[0].float(), LOW).weight, parts[0]), "of a file in float32: rounded"


def test_numbers_of_the_other_precision_are_refused(pairs: Kernels) -> None:
    low, high = Frozen.of(pairs, some(40, 8), LOW), Frozen.of(pairs, some(40, 8))
    with pytest.raises(ValueError, match=r"torch\.float32 where torch\.bfloat16 is expected"):
        low.product(torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"torch\.bfloat16 where torch\.float32 is expected"):
        high.product_back(torch.zeros(2, 40, dtype=LOW))
    with pytest.raises(ValueError, match=r"torch\.float32 where torch\.bfloat16 is expected"):
        low.product(some(2, 12), torch.zeros(40, 4))
    with pytest.raises(ValueError, match="and 7 inputs"):
        Frozen.of(pairs, some(40, 7), LOW).product(some(2, 7))


# Models


@pytest.fixture(scope="module")
def published(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of every family that kernels multiply for, whose file is bfloat16."""
    root, found = tmp_path_factory.mktemp("paired"), {}
    for number, name in enumerate(HELD):
        folder = make_family(root / str(number), tiny_model, name, width=16)
        AutoModelForCausalLM.from_pretrained(folder, dtype=LOW).save_pretrained(folder)
        found[name] = folder
    return found


@pytest.mark.parametrize("family", HELD)
def test_a_model_says_what_it_says_with_torchs_products(
    published: dict[str, Path], pairs: Kernels, family: str
) -> None:
    plain, ours = (weights.load_model(published[family], LOW, "eager", one) for one in (None, pairs))
    exact = weights.load_model(published[family], torch.float32, "eager")
    ids = torch.arange(60).view(2, 30) + 7
    with torch.no_grad():
        wanted = exact(ids).logits
        off = [difference(model(ids).logits.float(), wanted) for model in (ours, plain)]
    assert off[0] < 1.5 * off[1] + 1e-3, "as far from float32 as torch's bfloat16 is"
    assert any(isinstance(module, FrozenLinear) for module in ours.modules())
    assert {parameter.dtype for parameter in ours.parameters()} == {LOW}
    for name, parameter in ours.named_parameters():  # a view of the model's file would keep all of it in memory
        assert parameter.untyped_storage().nbytes() <= parameter.numel() * 2, name


@pytest.mark.parametrize("family", HELD)
def test_a_step_is_as_near_to_float32_as_with_torchs_products(
    published: dict[str, Path], pairs: Kernels, family: str
) -> None:
    losses, gradients = [], []
    for precision, kernels in ((torch.float32, None), (LOW, pairs), (LOW, None)):
        trainee = stirred(sft.build_model(PLAN, published[family], precision, kernels=kernels))
        rows = tokens_of(trainee.template, "everything")
        losses.append(loop.gradients(trainee, rows, 1).loss)
        gradients.append(torch.cat([p.grad.flatten() for p in trainee.parameters.values() if p.grad is not None]))
    wanted = gradients[0]
    ours, theirs = (float((found - wanted).norm() / wanted.norm()) for found in gradients[1:])
    assert ours < 1.3 * theirs + 1e-3
    assert abs(losses[1] - losses[0]) < 0.02 * losses[0]


def test_answers_are_as_likely_as_with_torchs_products(published: dict[str, Path], pairs: Kernels) -> None:
    model = ModelRef(base_model=str(published[LLAMA]))
    whole: list[list[Message]] = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "yellow"}]
        for text in ("red or blue", "green", "a longer question, of more words")
    ]
    low = {**TOOLS, "precision": "bfloat16"}
    ours, theirs = LocalEngine(**low), LocalEngine(**low, use_kernels=False)
    assert ours.log_probs(model, whole) == pytest.approx(theirs.log_probs(model, whole), rel=0.01)
    assert isinstance(ours._base(str(published[LLAMA])).model.get_output_embeddings(), FrozenLinear)
    assert not isinstance(theirs._base(str(published[LLAMA])).model.get_output_embeddings(), FrozenLinear)
