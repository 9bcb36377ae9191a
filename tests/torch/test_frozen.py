"""Products with weights as their file has them are those of torch, and models that multiply so answer as before."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from heldout.engine import frozen, stored, weights
from heldout.engine.base import ModelRef, Sampling
from heldout.engine.frozen import FrozenEmbedding, FrozenLinear
from heldout.engine.local import LocalEngine
from heldout.errors import InvalidValue
from heldout.kernels import Kernels
from heldout.kernels.frozen import Frozen
from heldout.train import loop
from tests.torch.cases import FAMILIES, make_family, tokens_of
from tests.torch.conftest import LLAMA, PLAN, TOOLS, build, difference
from tests.torch.test_training_is_exact import check_step, step_of

TYPES = [torch.float32, torch.bfloat16]
HELD = [name for name in FAMILIES if FAMILIES[name]["model_type"] in frozen.KINDS]


@pytest.fixture(scope="module")
def published(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of every family whose file is bfloat16, as most models are published."""
    root, found = tmp_path_factory.mktemp("published"), {}
    for number, name in enumerate(FAMILIES):
        folder = make_family(root / str(number), tiny_model, name, width=16)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        found[name] = folder
    return found


def tied_model(folder: Path, to: Path) -> Path:
    """The same model with one matrix for its embedding and its head."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(to)
    return to


# Products


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("ranks", [0, 4, 16, 48, 300])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (1, 1), (33, 7), (96, 300), (200, 576), (31, 1000)])
@pytest.mark.parametrize("n", [1, 2, 11, 12, 13, 36, 37, 100])
def test_products_in_both_directions_are_those_of_torch(
    kernels: Kernels, n: int, outputs: int, inputs: int, ranks: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, beside = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs, ranks)
    ours, theirs = Frozen.of(kernels, weight), torch.cat([weight.float(), beside], dim=1)
    # Rows that are parts of wider ones, and one that all tokens are added to.
    x, grad = torch.randn(n, inputs + ranks + 5)[:, 2:-3], torch.randn(n, outputs + 3)[:, 1:-2]
    onto, bias = torch.randn(n, outputs), torch.randn(outputs).expand(n, -1)
    assert difference(ours.product(x, beside), x @ theirs.t()) < 1e-5
    assert difference(ours.product(x, beside, onto), x @ theirs.t() + onto) < 1e-5
    assert difference(ours.product(x, beside, bias), x @ theirs.t() + bias) < 1e-5
    assert difference(ours.product_back(grad, beside), grad @ theirs) < 1e-5


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("n", "outputs", "inputs", "ranks"), [(400, 1300, 70, 20), (400, 70, 1300, 20), (900, 600, 600, 0)]
)
def test_what_does_not_fit_into_the_cache_is_taken_in_turns(
    kernels: Kernels, n: int, outputs: int, inputs: int, ranks: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, beside = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs, ranks)
    ours, theirs = Frozen.of(kernels, weight), torch.cat([weight.float(), beside], dim=1)
    x, grad, onto = torch.randn(n, inputs + ranks), torch.randn(n, outputs), torch.randn(n, outputs)
    found, back = ours.product(x, beside, onto), ours.product_back(grad, beside)
    assert difference(found, x @ theirs.t() + onto) < 1e-5
    assert difference(back, grad @ theirs) < 1e-5
    assert torch.equal(ours.product(x[5:17], beside, onto[5:17]), found[5:17])
    assert torch.equal(ours.product_back(grad[5:17], beside), back[5:17])


@pytest.mark.parametrize("dtype", TYPES)
def test_a_product_of_no_rows_is_empty(kernels: Kernels, dtype: torch.dtype) -> None:
    ours = Frozen.of(kernels, torch.randn(40, 8).to(dtype))
    assert ours.product(torch.empty(0, 8)).shape == (0, 40)
    assert ours.product_back(torch.empty(0, 40)).shape == (0, 8)


@pytest.mark.parametrize("dtype", TYPES)
def test_weights_come_back_as_they_were(kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(outputs, 24).to(dtype) for outputs in (64, 5, 33)]
    for part in parts:
        assert torch.equal(Frozen.of(kernels, part).weight, part)
    joined = Frozen.joined([Frozen.of(kernels, part) for part in parts])
    assert torch.equal(joined.weight, torch.cat(parts))
    assert joined.panels.dtype == dtype
    for outside in (-1, 102):
        with pytest.raises(IndexError, match="outside of the 102"):
            joined.rows(torch.tensor([0, outside]))
    numbers = torch.tensor([[0, 101, 17], [16, 31, 32]])
    assert torch.equal(joined.rows(numbers), torch.cat(parts)[numbers].float())


def test_a_row_has_the_same_bits_whatever_is_computed_beside_it(kernels: Kernels, threads: None) -> None:
    torch.manual_seed(0)
    ours, beside = Frozen.of(kernels, torch.randn(100, 700).bfloat16()), torch.randn(100, 16)
    x, grad = torch.randn(90, 716), torch.randn(90, 100)
    together, back = ours.product(x, beside), ours.product_back(grad, beside)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert torch.equal(ours.product(x, beside), together)
        assert torch.equal(ours.product_back(grad, beside), back)
        for rows in (slice(3, 4), slice(10, 30), slice(40, 90)):
            assert torch.equal(ours.product(x[rows], beside), together[rows])
            assert torch.equal(ours.product_back(grad[rows], beside), back[rows])


@pytest.mark.parametrize(
    ("x", "beside"),
    [
        (torch.zeros(2, 9), None),
        (torch.zeros(2, 8), torch.zeros(40, 4)),
        (torch.zeros(2, 12), torch.zeros(39, 4)),
        (torch.zeros(2, 12), torch.zeros(40, 4).bfloat16()),
        (torch.zeros(8, 2).t(), None),
    ],
)
def test_what_does_not_fit_is_refused_before_memory_is_touched(
    kernels: Kernels, x: torch.Tensor, beside: torch.Tensor | None
) -> None:
    with pytest.raises(ValueError, match=r"a product of|is expected|in one piece"):
        Frozen.of(kernels, torch.zeros(40, 8)).product(x, beside)


def test_a_gradient_or_a_sum_of_another_shape_is_refused(kernels: Kernels) -> None:
    ours = Frozen.of(kernels, torch.zeros(40, 8))
    with pytest.raises(ValueError, match="of 39 gradients with weights of 40"):
        ours.product_back(torch.zeros(2, 39))
    with pytest.raises(ValueError, match="added to"):
        ours.product(torch.zeros(2, 8), onto=torch.zeros(1, 40))


@pytest.mark.parametrize("call", [Frozen.product, Frozen.product_back])
def test_rows_of_another_type_are_refused(kernels: Kernels, call: Any) -> None:
    with pytest.raises(ValueError, match=r"where torch\.float32 is expected"):
        call(Frozen.of(kernels, torch.zeros(8, 8)), torch.zeros(2, 8).bfloat16())


# Models


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", HELD)
def test_a_model_that_multiplies_with_its_weights_as_they_are_says_the_same(
    published: dict[str, Path], kernels: Kernels, family: str, tied: bool, tmp_path: Path
) -> None:
    folder = published[family]
    if tied:
        folder = tied_model(folder, tmp_path)
    plain = weights.load_model(folder, torch.float32, "eager")
    ours = weights.load_model(folder, torch.float32, "eager", kernels)
    ids = torch.arange(60).view(2, 30) + 7
    with torch.no_grad():
        assert difference(ours(ids).logits, plain(ids).logits) < 1e-5
    panels = {module.frozen.panels.dtype for module in ours.modules() if hasattr(module, "frozen")}
    assert panels == {torch.bfloat16}
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    embedding, head = ours.get_input_embeddings(), ours.get_output_embeddings()
    assert isinstance(embedding, FrozenEmbedding)
    assert (embedding.frozen is head.frozen) == tied
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in plain.parameters())
    assert "Embedding" in repr(ours)


def test_weights_of_a_file_in_float32_stay_float32(tiny_model: Path, kernels: Kernels) -> None:
    with safe_open(next(tiny_model.glob("*.safetensors")), framework="pt") as tensors:
        stored = {str(tensors.get_tensor(name).dtype) for name in tensors.keys()}  # noqa: SIM118 - not a dict
    assert stored == {"torch.float32"}
    model = weights.load_model(tiny_model, torch.float32, "eager", kernels)
    assert {m.frozen.panels.dtype for m in model.modules() if isinstance(m, FrozenLinear)} == {torch.float32}


def test_a_gradient_that_would_be_lost_is_an_error(kernels: Kernels) -> None:
    layer = FrozenLinear(Frozen.of(kernels, torch.zeros(8, 4)), None)
    with pytest.raises(RuntimeError, match="hands no gradient on"):
        layer(torch.zeros(2, 4, requires_grad=True))
    assert layer.weight.isnan().all(), "nobody computes with what only says a shape"


def test_other_kinds_of_models_and_precisions_without_kernels_are_left_to_torch(
    published: dict[str, Path], kernels: Kernels
) -> None:
    other = next(name for name in FAMILIES if name not in HELD)
    config = weights.config_of(published[LLAMA])
    assert frozen.taking(kernels, config, torch.float32) is kernels
    pairs = kernels if kernels.multiplies(torch.bfloat16) else None
    assert frozen.taking(kernels, config, torch.bfloat16) is pairs
    assert frozen.taking(kernels, {**config, "hidden_size": 33}, torch.bfloat16) is None, "pairs of an odd number"
    assert frozen.taking(kernels, {**config, "hidden_size": 33}, torch.float32) is kernels
    assert frozen.taking(None, config, torch.float32) is None
    assert frozen.taking(kernels, weights.config_of(published[other]), torch.float32) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_training_on_a_published_model_is_that_of_transformers_and_peft(
    published: dict[str, Path], kernels: Kernels, family: str
) -> None:
    trainee = build(published[family], kernels=kernels)
    check_step(published[family], trainee, tokens_of(trainee.template, "everything"))


def test_answers_are_those_of_torch_with_an_adapter_and_without(
    published: dict[str, Path], kernels: Kernels, tmp_path: Path
) -> None:
    folder = published[LLAMA]
    build(folder, kernels=kernels).save(tmp_path)
    asked = [
        [{"role": "user", "content": text}] for text in ("red or blue", "green", "a longer question, of more words")
    ]
    for adapter in (None, str(tmp_path)):
        model = ModelRef(base_model=str(folder), adapter=adapter)
        ours, theirs = (LocalEngine(**{**TOOLS, "use_kernels": use}) for use in (True, False))
        said = [[r.text for r in one.chat(model, asked, Sampling(max_tokens=12))] for one in (ours, theirs)]
        assert said[0] == said[1]
        whole = [[*messages, {"role": "assistant", "content": "yellow"}] for messages in asked]
        assert ours.log_probs(model, whole) == pytest.approx(theirs.log_probs(model, whole), abs=1e-3)
        assert isinstance(ours._base(str(folder)).model.get_output_embeddings(), FrozenLinear)
        assert not isinstance(theirs._base(str(folder)).model.get_output_embeddings(), FrozenLinear)


def test_a_tied_model_is_trained_as_transformers_and_peft_do(
    published: dict[str, Path], kernels: Kernels, tmp_path: Path
) -> None:
    folder = tied_model(published[LLAMA], tmp_path)
    trainee = build(folder, kernels=kernels)
    assert trainee.size == build(folder).size
    check_step(folder, trainee, tokens_of(trainee.template, "everything"))


def test_a_target_that_is_no_layer_is_refused_with_kernels_too(published: dict[str, Path], kernels: Kernels) -> None:
    with pytest.raises(InvalidValue, match=r"target_modules=\['model'\] does not fit this model"):
        build(published[LLAMA], replace(PLAN, target_modules=("model",)), kernels=kernels)


def test_steps_of_other_sizes_and_a_validation_between_leave_a_step_as_it_was(
    published: dict[str, Path], kernels: Kernels
) -> None:
    """What layers need for a moment lies in memory that they share."""
    plan = replace(PLAN, lora_dropout=0.3)
    trainee = build(published[LLAMA], plan, kernels=kernels)
    rows = tokens_of(trainee.template, "everything")
    wanted = step_of(trainee, rows)
    step_of(trainee, rows[:2])
    loop.validate(trainee, rows)
    again = step_of(trainee, rows)
    assert again[0] == wanted[0]
    assert torch.equal(again[1], wanted[1])
    checkpointed = build(published[LLAMA], replace(plan, checkpointing=True), kernels=kernels)
    assert torch.equal(step_of(checkpointed, rows)[1], wanted[1])


def test_an_optimizer_begins_where_torch_begins(published: dict[str, Path]) -> None:
    plan = replace(PLAN, weight_decay=0.1, learning_rate=3e-3)
    ours, theirs = build(published[LLAMA], plan), build(published[LLAMA], plan)
    optimizers = [
        loop.optimizer_of(plan, ours),
        torch.optim.AdamW(theirs.parameters.values(), lr=3e-3, weight_decay=0.1, fused=True),
    ]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters.values(), theirs.parameters.values(), strict=True))
    assert all(p.grad is None for p in ours.parameters.values())
    for _ in range(3):
        for trainee, optimizer in zip((ours, theirs), optimizers, strict=True):
            for p in trainee.parameters.values():
                p.grad = p.detach().sin()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters.values(), theirs.parameters.values(), strict=True))


# What files say


def test_weights_are_held_in_bfloat16_only_if_all_of_them_are(published: dict[str, Path], tmp_path: Path) -> None:
    folder = published[LLAMA]
    assert stored.precision(folder) == torch.bfloat16
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    names = sorted(tensors)
    assert stored.parameters(folder) == sum(tensor.numel() for tensor in tensors.values())
    for other in (torch.float32, torch.float16):
        home = tmp_path / str(other)
        home.mkdir()
        save_file({name: tensors[name] for name in names[1:]}, home / "model-00001-of-00002.safetensors")
        save_file({names[0]: tensors[names[0]].to(other)}, home / "model-00002-of-00002.safetensors")
        assert stored.precision(home) == torch.float32
        assert stored.parameters(home) == stored.parameters(folder)
