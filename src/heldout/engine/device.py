"""Where models compute: this machine's GPU where torch sees one, else its processor.

`CUDA_VISIBLE_DEVICES` decides which GPU a process sees, and the first it sees is used; empty, it hides them all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from heldout import machine
from heldout.engine.portions import GPU, PROCESSOR, Portions

# Read when torch first multiplies on a GPU: without it the order of its sums is not fixed (see `repeatable`).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Products in bfloat16 on a processor that oneDNN has compiled and keeps, half a megabyte each: it would keep 1,024, of
# all the shapes that prompts and answers come in. Read when torch first multiplies so.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

#: What torch hands to MKL's vector functions, of what models, training and evaluation compute.
VECTOR_FUNCTIONS = (
    *(torch.cos, torch.sin, torch.tan, torch.tanh, torch.exp, torch.expm1, torch.log, torch.log1p, torch.log2),
    *(torch.sqrt, torch.erf, torch.erfc, torch.lgamma, torch.trunc),
)


def _settle_vector_functions() -> None:
    """Call each of them once, by one thread. Where several threads are the first to call one of them, MKL may give what
    one of them computes with an error of 1e-4 (pytorch issue 188792): another model, in one process of a few."""
    for function in VECTOR_FUNCTIONS:
        function(torch.ones(1))


_settle_vector_functions()


def is_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


def chosen() -> torch.device:
    """Where this process loads its models."""
    return torch.device("cuda" if is_gpu() else "cpu")


def portions() -> Portions:
    """Those of the device that this process computes on."""
    return GPU if is_gpu() else PROCESSOR


def memory_bytes() -> int:
    """Bytes that this process may fill where it computes: what is free on the GPU or held by this process already;
    on a processor what the machine, or the container, has."""
    if not is_gpu():
        return machine.memory_bytes()
    free, _ = torch.cuda.mem_get_info()
    return int(free) + torch.cuda.memory_reserved()


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Within, the same operations give the same bits on a GPU too, as they do on a processor: a resumed job ends where
    an uninterrupted one does. An operation that cannot raises RuntimeError."""
    before = torch.are_deterministic_algorithms_enabled()
    if is_gpu():
        torch.use_deterministic_algorithms(True)
        # Filling what is allocated is for finding errors and costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
