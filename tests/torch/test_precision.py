"""A job multiplies with the precision that it began with, whatever a later process would measure."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from heldout.engine import weights
from heldout.engine.local import LocalEngine
from heldout.errors import InvalidValue
from heldout.train.trainer import TorchTrainer
from tests.torch.conftest import NOISY, SMALL, TOOLS, Recording, same_training

PLAN = replace(NOISY, eval_every=3)


@pytest.fixture(autouse=True)
def processes_measure_anew() -> Iterator[None]:
    """What "auto" means is forgotten after the test."""
    before = weights._auto
    yield
    weights._auto = before


def process(precision: str, *, finds: torch.dtype | None = None) -> TorchTrainer:
    """A trainer as in a new process, whose measurement would come out so."""
    weights._auto = finds
    return TorchTrainer(**{**TOOLS, "precision": precision})


@pytest.mark.parametrize(
    ("first", "later"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=["to bf16", "to fp32"]
)
def test_a_job_that_is_taken_up_where_another_precision_is_faster_ends_with_the_same_bits(
    tiny_model: Path, tmp_path: Path, first: torch.dtype, later: torch.dtype
) -> None:
    name = str(tiny_model)
    alone = process("auto", finds=first).train(
        PLAN, SMALL, base_model=name, directory=tmp_path / "alone", watch=Recording()
    )
    with pytest.raises(KeyboardInterrupt):
        process("auto", finds=first).train(
            PLAN, SMALL, base_model=name, directory=tmp_path / "killed", watch=Recording(interrupt_at=7)
        )
    again = process("auto", finds=later).train(
        PLAN, SMALL, base_model=name, directory=tmp_path / "killed", watch=Recording()
    )
    assert again.precision == str(first).removeprefix("torch.")
    assert same_training(again, alone)


def test_memory_is_predicted_and_answers_are_given_in_the_precision_that_the_job_began_with(
    tiny_model: Path, tmp_path: Path
) -> None:
    name = str(tiny_model)
    first = process("auto", finds=torch.float32).fit(PLAN, SMALL, base_model=name, directory=tmp_path)
    assert json.loads((tmp_path / weights.PRECISION_NOTE).read_text()) == {"precision": "float32"}
    again = process("auto", finds=torch.bfloat16)
    assert again.fit(PLAN, SMALL, base_model=name, directory=tmp_path) == first
    engine = LocalEngine(**{**TOOLS, "precision": "auto"})
    assert engine._base(name).model.dtype == torch.float32


def test_a_job_is_not_continued_in_a_precision_that_it_did_not_begin_with(tiny_model: Path, tmp_path: Path) -> None:
    name = str(tiny_model)
    process("float32").fit(PLAN, SMALL, base_model=name, directory=tmp_path)
    for work in (TorchTrainer.fit, partial(TorchTrainer.train, watch=Recording())):
        with pytest.raises(
            InvalidValue, match="began with float32 products, but HELDOUT_PRECISION is bfloat16"
        ) as told:
            work(process("bfloat16"), PLAN, SMALL, base_model=name, directory=tmp_path)
        assert "Set HELDOUT_PRECISION to float32 or auto to go on" in str(told.value)
    process("float32").fit(PLAN, SMALL, base_model=name, directory=tmp_path)


CALLS = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Calls(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            print(func.overloadpacket.__name__, args[0].numel())
        return func(*args, **(kwargs or {}))

with Calls():
    from heldout.engine import device
"""


def test_what_several_threads_will_compute_one_thread_has_computed_before() -> None:
    """The accident that this is against takes many processes to be seen (docs/experiments.md)."""
    printed = subprocess.run([sys.executable, "-c", CALLS], check=True, capture_output=True, text=True).stdout
    assert {f"{name} 1" for name in ("cos", "sin", "exp", "log", "sqrt", "tanh", "erf")} <= set(printed.splitlines())
