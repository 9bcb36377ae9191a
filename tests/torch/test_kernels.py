"""Kernels compute what torch's operations do, whatever the shapes; and where there are none, training says so."""

from __future__ import annotations

import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from heldout.engine.template import Tokens
from heldout.errors import InvalidValue
from heldout.kept import write_record
from heldout.kernels import Kernels, compiling
from heldout.kernels.frozen import Frozen
from heldout.settings import read_settings
from heldout.train import between, head
from heldout.train.attention import Attention
from heldout.train.dropout import Dropout
from heldout.train.packing import Pack, pack
from heldout.train.products import Dense, Held
from heldout.train.trainer import TorchTrainer
from tests.torch.cases import FAMILIES, KINDS, make_family, tokens_of
from tests.torch.conftest import LLAMA, NOISY, PLAN, SMALL, TOOLS, Recording, build, difference, same_training
from tests.torch.test_training_is_exact import check_curve, check_step, step_of

TYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def wide(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of every family, with heads that kernels attend with."""
    root = tmp_path_factory.mktemp("wide")
    return {name: make_family(root / str(i), tiny_model, name, width=16) for i, name in enumerate(FAMILIES)}


def close(ours: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Equal but for the rounding of this type."""
    assert ours.shape == wanted.shape
    assert ours.dtype == wanted.dtype
    assert difference(ours.float(), wanted.float()) < (1e-5 if dtype == torch.float32 else 1e-2)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def mask_of(shape: tuple[int, int], dtype: torch.dtype, *, on: bool) -> torch.Tensor | None:
    return ((torch.rand(shape) > 0.3) / 0.7).to(dtype) if on else None


# Attention


def trees() -> dict[str, Pack]:
    """Packs of all kinds: short and long, deep and flat, with a prompt that fills several blocks, and one token."""
    generator = torch.Generator().manual_seed(0)

    def row(prefix: list[int], own: int) -> Tokens:
        ids = [*prefix, *torch.randint(50, 90, (own,), generator=generator).tolist(), 7]
        return Tokens(tuple(ids), (False,) * (len(ids) - 1) + (True,))

    system, shots = list(range(10, 43)), list(range(200, 260))
    return {
        "one": pack([row([], 1)]),
        "flat": pack([row([], n) for n in (3, 90, 17)]),
        "shared": pack([row(system, n) for n in (1, 5, 40, 41)]),
        "deep": pack([row([*system, *shots[:k]], n) for k, n in ((0, 3), (20, 4), (20, 9), (60, 2), (60, 70))]),
        "long": pack([row(list(range(300)), n) for n in (2, 130)]),
    }


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 4, 16), (3, 1, 80), (64, 1, 32), (2, 2, 256)])
@pytest.mark.parametrize("tree", trees())
def test_attention_over_any_tree_is_that_of_torch(
    kernels: Kernels, tree: str, heads: int, kv_heads: int, width: int, turned: bool, dtype: torch.dtype
) -> None:
    layout, (ours, theirs) = (
        trees()[tree].layout,
        (
            Attention(heads=heads, kv_heads=kv_heads, width=width, scale=width**-0.5, kernels=one)
            for one in (kernels, None)
        ),
    )
    torch.manual_seed(1)
    length = len(layout.until) + 3  # rows behind the last token
    qkv, grad = random(length, (heads + 2 * kv_heads) * width, dtype=dtype), random(length, heads * width, dtype=dtype)
    grad[-3:] = 0
    half = torch.randn(length, width // 2).repeat(1, 2)
    angles = (half.cos().to(dtype), half.sin().to(dtype)) if turned else None
    out, kept = ours.forward(qkv.clone(), layout, angles)
    wanted, theirs_kept = theirs.forward(qkv.clone(), layout, angles)
    close(out, wanted, dtype)
    assert not out[-3:].any()
    found = ours.backward(grad, kept, layout, angles)
    gradient = theirs.backward(grad, theirs_kept, layout, angles)
    close(found, gradient, dtype)
    if tree != "one":  # a token that sees itself alone has no gradient but that of its value
        widths = [heads * width, kv_heads * width, kv_heads * width]
        for part, other in zip(found.split(widths, dim=1), gradient.split(widths, dim=1), strict=True):
            close(part, other, dtype)


def test_heads_of_other_widths_are_left_to_torch(kernels: Kernels) -> None:
    assert [kernels.attends(width) for width in (12, 16, 64, 80, 256, 272)] == [False, True, True, True, True, False]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_any_number_of_threads_gives_the_same_numbers_and_always_the_same_bits(
    kernels: Kernels, count: int, threads: None
) -> None:
    layout = trees()["deep"].layout
    attention = Attention(heads=6, kv_heads=3, width=32, scale=0.2, kernels=kernels)
    torch.manual_seed(1)
    qkv, grad = random(len(layout.until), 12 * 32), random(len(layout.until), 6 * 32)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        out, kept = attention.forward(qkv, layout, None)
        return out, attention.backward(grad, kept, layout, None)

    torch.set_num_threads(1)
    wanted = both()
    torch.set_num_threads(count)
    found = both()
    for ours, theirs in zip(found, wanted, strict=True):
        close(ours, theirs)
    assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(both(), found, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
def test_memory_that_nothing_was_written_to_is_not_read(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(255))
    monkeypatch.setattr(torch, "empty_like", lambda x: empty(x.shape, dtype=x.dtype).fill_(torch.nan))
    assert torch.empty(4, dtype=torch.uint8).view(torch.float32).isnan().all()
    for name, one in trees().items():
        attention = Attention(heads=6, kv_heads=2, width=16, scale=0.2, kernels=kernels)
        qkv, grad = random(len(one.ids), 10 * 16, dtype=dtype), random(len(one.ids), 6 * 16, dtype=dtype)
        out, kept = attention.forward(qkv, one.layout, None)
        assert out.isfinite().all(), name
        assert attention.backward(grad, kept, one.layout, None).isfinite().all(), name


def test_what_is_no_number_stays_none(kernels: Kernels) -> None:
    layout = trees()["shared"].layout
    attention = Attention(heads=2, kv_heads=2, width=16, scale=0.2, kernels=kernels)
    qkv = random(len(layout.until), 6 * 16)
    qkv[20, 0] = torch.nan  # of a query that all later tokens are below, but do not look at
    out, kept = attention.forward(qkv, layout, None)
    assert out.isnan().any(dim=1).nonzero().flatten().tolist() == [20]
    assert attention.backward(torch.ones_like(out), kept, layout, None)[20].isnan().any()
    x = random(3, 40)
    x[1, 3] = torch.inf
    out = torch.empty(3, 40)
    r = between.norm(kernels, x, torch.ones(40), 1e-5, None, out=out, masked=out)
    assert r[1] == 0
    gate = torch.zeros(2, 8)
    between.gated(kernels, torch.full((2, 16), torch.nan), None, out=gate, masked=gate)
    assert gate.isnan().all()


# What lies between the products


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("n", "width"), [(1, 16), (5, 576), (37, 72), (3, 7), (70, 600)])
def test_norms_are_those_of_torch(kernels: Kernels, n: int, width: int, masked: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x, weight, grad, onto = (random(*shape, dtype=dtype) for shape in ((n, width), (width,), *2 * [(n, width)]))
    mask = mask_of((n, width), dtype, on=masked)
    found = []
    for one in (kernels, None):
        room = torch.zeros(n, width + 8, dtype=dtype)
        behind = torch.empty(n, width, dtype=dtype) if masked else room[:, :width]
        r = between.norm(one, x, weight, 1e-5, mask, out=room[:, :width], masked=behind)
        assert not room[:, width:].any()
        again = between.norm_again(one, x, r, weight, mask)
        wide = torch.cat([grad, grad], dim=1)[:, :width]
        through = between.norm_backward(one, x, r, weight, wide, onto=onto)
        found.append((r, room, behind, again, through))
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs, dtype)
    close(found[0][2], found[0][3], dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("n", "width"), [(1, 16), (33, 48), (50, 5), (300, 168)])
def test_the_gated_activation_is_that_of_torch(
    kernels: Kernels, n: int, width: int, masked: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    gate_up, grad = random(n, 2 * width, dtype=dtype).mul_(3), random(n, width + 3, dtype=dtype)[:, 2:-1]
    mask = mask_of((n, width), dtype, on=masked)
    found = []
    for one in (kernels, None):

        def given(x: torch.Tensor, one: Kernels | None = one) -> torch.Tensor:
            return x.clone() if one else x.t().contiguous().t()  # column-major where torch computes

        room = given(torch.zeros(n, width + 8, dtype=dtype))
        masks = None if mask is None else given(mask)
        behind = given(torch.zeros(n, width, dtype=dtype)) if masked else room[:, :width]
        between.gated(one, given(gate_up), masks, out=room[:, :width], masked=behind)
        assert not room[:, width:].any()
        again = given(torch.zeros(n, width, dtype=dtype))
        through = between.gated_backward(one, given(gate_up), grad if one else given(grad), masks, masked=again)
        found.append((room, behind, again, through))
        close(again, behind, dtype)
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs, dtype)


# The head


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("n", "size"), [(1, 16), (5, 60), (3, 5), (70, 1003)])
def test_cross_entropy_and_its_gradient_are_those_of_torch(
    kernels: Kernels, n: int, size: int, smoothing: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(4)
    logits, targets = random(n, size, dtype=dtype).mul_(4), torch.randint(size, (n,))
    targets[0] = logits[0].argmax()
    wide = logits.float().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(wide, targets, reduction="none", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(wanted.sum(), wide)
    untouched = logits.clone()
    looked = kernels.cross_entropy(untouched, targets, smoothing, gradient=False)
    assert torch.equal(untouched, logits)
    ours = logits.clone()
    losses, plain, right = kernels.cross_entropy(ours, targets, smoothing, gradient=True)
    torch.testing.assert_close(losses, wanted.detach())
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none"))
    assert right.tolist() == (logits.argmax(dim=-1) == targets).tolist()
    assert right[0]
    close(ours, gradient.to(dtype), dtype)
    for one, other in zip(looked, (losses, plain, right), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [1, 96, 97, 400])
def test_the_heads_loss_and_gradient_are_those_of_torch(kernels: Kernels, count: int, dtype: torch.dtype) -> None:
    if not kernels.multiplies(dtype):
        pytest.skip(f"there are no products of {dtype} on this processor")
    torch.manual_seed(5)
    weight, hidden, targets = random(500, 64, dtype=dtype), random(count, 64, dtype=dtype), torch.randint(500, (count,))
    outer, found = torch.rand(count), []
    for weights in (Held.of([Frozen.of(kernels, weight, dtype)]), Dense(weight, 64)):
        given = hidden.clone().requires_grad_()
        loss, nll, right, _ = head.losses(given, weights, targets, smoothing=0.1)
        (gradient,) = torch.autograd.grad((loss * outer).sum(), given)
        found.append((loss.detach(), nll, right.float(), gradient))
    assert torch.equal(found[0][2], found[1][2])
    for ours, theirs in zip(*((one[0], one[1], one[3]) for one in found), strict=True):
        close(ours, theirs, dtype)


def test_of_equal_logits_the_first_is_the_answer_and_what_is_no_number_stays_none(kernels: Kernels) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [1.0, torch.nan, 3.0], [1.0, -torch.inf, 3.0]])
    losses, _, right = kernels.cross_entropy(logits, torch.tensor([1, 2, 2, 2]), 0.0, gradient=False)
    assert right.tolist() == [True, False, False, True]
    assert losses.isnan().tolist() == [False, False, True, False]
    with pytest.raises(IndexError, match="outside of the 3 logits"):
        kernels.cross_entropy(logits, torch.tensor([0, 1, 2, 3]), 0.0, gradient=False)


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_examples_share_a_step_is_that_of_its_examples_alone(
    wide: dict[str, Path], kernels: Kernels, kind: str
) -> None:
    trainee = build(wide[LLAMA], kernels=kernels)
    check_step(wide[LLAMA], trainee, tokens_of(trainee.template, kind))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_models_is_trained_as_transformers_and_peft_do(
    wide: dict[str, Path], families: dict[str, Path], kernels: Kernels, family: str
) -> None:
    for folder in (wide[family], families[family]):  # attention with kernels, and without
        trainee = build(folder, kernels=kernels)
        check_step(folder, trainee, tokens_of(trainee.template, "everything"))


@pytest.mark.parametrize("changes", [{"checkpointing": True}, {"target_modules": ("v_proj", "down_proj")}])
def test_a_checkpointed_layer_and_one_with_some_adapters_are_exact(
    wide: dict[str, Path], kernels: Kernels, changes: dict[str, Any]
) -> None:
    trainee = build(wide[LLAMA], replace(PLAN, **changes), kernels=kernels)
    check_step(wide[LLAMA], trainee, tokens_of(trainee.template, "everything"))


def test_thirty_steps_are_those_of_the_plain_loop(wide: dict[str, Path], kernels: Kernels, tmp_path: Path) -> None:
    plan = replace(PLAN, batch_size=3, n_epochs=8, total_steps=30, learning_rate=1e-2, early_stopping=False)
    trainee = build(wide[LLAMA], replace(plan, eval_every=10), kernels=kernels)
    rows = tokens_of(trainee.template, "everything")
    check_curve(wide[LLAMA], trainee, rows[:9], rows[9:], tmp_path)


@pytest.mark.parametrize("family", [LLAMA, "qwen3, walked layer by layer", "olmo2, run as a whole"])
def test_with_dropout_kernels_drop_the_same(
    wide: dict[str, Path], kernels: Kernels, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = Dropout.mask

    def column_major(self: Dropout, place: int, *shape: Any, column_major: bool = False) -> torch.Tensor | None:
        """What is column-major without kernels gets the same numbers with them."""
        turned = family == LLAMA and place % 4 == 3
        found = mask(self, place, *shape, column_major=turned)
        return found if found is None or column_major else found.contiguous()

    monkeypatch.setattr(Dropout, "mask", column_major)
    plan = replace(PLAN, lora_dropout=0.3)
    with_them, without = (build(wide[family], plan, kernels=one) for one in (kernels, None))
    rows = tokens_of(without.template, "everything")
    (loss, found), (wanted_loss, wanted) = step_of(with_them, rows), step_of(without, rows)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert difference(found, wanted) < 1e-4


# Where there are none


def trained(model: Path, directory: Path, told: Recording, **options: Any) -> Any:
    return TorchTrainer(**{**TOOLS, **options}).train(
        NOISY, SMALL, base_model=str(model), directory=directory, watch=told
    )


def test_kernels_take_part_where_there_is_something_for_them(
    wide: dict[str, Path], families: dict[str, Path], kernels: Kernels
) -> None:
    unfused = next(name for name in FAMILIES if FAMILIES[name]["model_type"] == "qwen3")
    assert build(families[LLAMA], kernels=kernels).kernels, "its norms, at least"
    assert build(wide[unfused], kernels=kernels).kernels
    assert not build(families[unfused], kernels=kernels).kernels, "heads of 12, and layers that are left to torch"
    assert not build(wide[LLAMA]).kernels


def said(watch: Recording) -> list[str]:
    return [text for kind, text in watch.story if kind == "message"]


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is all of PATH; what was found with another PATH is forgotten, and what is found with this one."""
    (tmp_path / "bin").mkdir()
    forget()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "bin"))
        yield tmp_path / "bin"
    forget()


def forget() -> None:
    compiling.choose.cache_clear()
    compiling.load.cache_clear()


def test_without_a_compiler_a_job_trains_with_torch_and_says_so(
    tiny_model: Path, tmp_path: Path, no_compiler: Path
) -> None:
    told, off = Recording(), Recording()
    without = trained(tiny_model, tmp_path / "without", told, cache=tmp_path / "cache")
    assert any("there is no C++ compiler (g++, c++)" in line for line in said(told))
    switched_off = trained(tiny_model, tmp_path / "off", off, use_kernels=False)
    assert any("HELDOUT_KERNELS is off" in line for line in said(off))
    assert same_training(without, switched_off)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, no_compiler: Path) -> None:
    fake = no_compiler / "g++"
    fake.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'error: no such option' >&2\nexit 1\n")
    fake.chmod(0o755)
    chosen, why_not = compiling.choose(tmp_path / "cache", use=True)
    assert chosen is None
    assert why_not == f"{fake} failed (error: no such option)"
    assert not list((tmp_path / "cache" / "kernels").iterdir()), "nothing half-made is left"


def test_a_compiler_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, no_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, started = no_compiler / "g++", tmp_path / "started"
    sleep = shutil.which("sleep", path="/bin:/usr/bin")
    fake.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit 0\n{sleep} 600 &\necho $! >> {started}\nwait\n")
    fake.chmod(0o755)
    monkeypatch.setattr(compiling, "PATIENCE", 3)
    chosen, why_not = compiling.choose(tmp_path / "cache", use=True)
    assert chosen is None
    assert why_not.startswith(f"{fake} does not run")
    assert not list((tmp_path / "cache" / "kernels").iterdir()), "nothing half-made is left"
    workers = [int(line) for line in started.read_text().splitlines()]
    until = time.monotonic() + 10
    while any(map(runs, workers)):
        assert time.monotonic() < until, "it still runs"
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    chosen, why_not = compiling.choose(tmp_path / "file" / "cache", use=True)
    assert chosen is None
    assert "cannot be compiled" in why_not or "no C++ compiler" in why_not


@pytest.mark.parametrize(("mode", "reason"), [(0o777, "others could have written it"), (0o755, "it is damaged")])
def test_a_library_that_cannot_be_trusted_is_compiled_anew(
    kernels: Kernels, tmp_path: Path, mode: int, reason: str
) -> None:
    good = read_settings().cache / "kernels" / kernels.name
    library = tmp_path / "kernels" / good.name
    library.parent.mkdir(mode=0o700)
    library.write_bytes(b"not a library")
    library.chmod(mode)
    compiling.load(tmp_path)
    assert library.read_bytes() == good.read_bytes(), reason
    assert not library.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    assert [one.name for one in library.parent.iterdir()] == [library.name]


def test_kernels_in_a_folder_that_others_may_write_are_not_loaded(tmp_path: Path, kernels: Kernels) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    with pytest.raises(compiling.Unavailable, match="others may write"):
        compiling.load(tmp_path)


def test_a_job_goes_on_as_it_began(kernels: Kernels, tmp_path: Path, no_compiler: Path) -> None:
    cache, empty = read_settings().cache, tmp_path / "empty"
    assert compiling.keep(tmp_path / "without", empty, use=True)[0] is None
    assert compiling.keep(tmp_path / "without", cache, use=True) == (None, "this job began without them")
    write_record(tmp_path / "with" / compiling.NOTE, {"library": kernels.name})
    again, _ = compiling.keep(tmp_path / "with", cache, use=True)  # the library is there, its compiler is not
    assert again is not None
    assert again.name == kernels.name
    with pytest.raises(InvalidValue, match=r"began with kernels .* since HELDOUT_KERNELS is off"):
        compiling.keep(tmp_path / "with", cache, use=False)
    with pytest.raises(InvalidValue, match=r"began with kernels .* since there is no C"):
        compiling.keep(tmp_path / "with", empty, use=True)
    # What other sources gave takes other arguments.
    other = "kernels-0123456789abcdef-" + kernels.name.rsplit("-", 1)[1]
    home = tmp_path / "upgraded" / "kernels"
    home.mkdir(parents=True, mode=0o700)
    shutil.copy2(cache / "kernels" / kernels.name, home / other)
    write_record(tmp_path / "upgraded" / compiling.NOTE, {"library": other})
    with pytest.raises(InvalidValue, match=r"kernels of another version of Heldout"):
        compiling.keep(tmp_path / "upgraded", tmp_path / "upgraded", use=True)
    (tmp_path / "older" / "checkpoints").mkdir(parents=True)
    assert compiling.keep(tmp_path / "older", cache, use=True) == (None, "this job began without them")


def test_folds_compute_as_their_job_does(tiny_model: Path, tmp_path: Path, kernels: Kernels) -> None:
    write_record(tmp_path / "job" / compiling.NOTE, {"library": None})
    trainer, told = TorchTrainer(**TOOLS), Recording()
    trainer.fit(NOISY, SMALL, base_model=str(tiny_model), directory=tmp_path / "job")
    trainer.train(NOISY, SMALL, base_model=str(tiny_model), directory=tmp_path / "job" / "fold-1", watch=told)
    assert any("this job began without them" in line for line in said(told))
