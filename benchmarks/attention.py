"""Attention over a prefix tree on a GPU, forward and backward of one layer: torch's fused attention with a bias (what
training uses there), a compiled flex attention that passes over what is hidden, and causal attention without a tree.

    .venv/bin/python benchmarks/attention.py

Packs of rows behind a shared beginning of 900 tokens, 32 heads of 64, bfloat16.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from heldout.engine.template import Tokens
from heldout.train.packing import pack

SHARED, HEADS, WIDTH, REPEATS = 900, 32, 64, 10
#: Rows of a pack, and tokens of each of its own.
PACKS = ((32, 20), (32, 100), (64, 120), (128, 120))


def milliseconds(work: Callable[[], object]) -> float:
    """Of one call, after a first one."""
    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(REPEATS):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / REPEATS * 1e3


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("this machine has no GPU")
    flex = torch.compile(flex_attention, dynamic=False)
    print("| packed tokens | bias | flex | its first call | its block mask | causal, no tree |")
    print("|--:|--:|--:|--:|--:|--:|")
    for rows, own in PACKS:
        draw = random.Random(0)
        ids = [(*range(SHARED), *(draw.randrange(2000, 40_000) for _ in range(own))) for _ in range(rows)]
        layout = pack([Tokens(one, (False,) * (len(one) - 1) + (True,)) for one in ids]).layout.to(torch.device("cuda"))
        length = len(layout.until)
        shape = (1, HEADS, length, WIDTH)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        outer, bias, until = torch.randn_like(q), layout.bias(torch.bfloat16), layout.until

        def step(attend: Callable[[], torch.Tensor]) -> None:
            torch.autograd.grad(attend(), (q, k, v), outer)  # noqa: B023 - called before the next size

        def made() -> object:
            return create_block_mask(lambda b, h, i, j: (j <= i) & (i < until[j]), None, None, length, length)  # noqa: B023

        block_mask = made()
        began = time.perf_counter()
        step(lambda: flex(q, k, v, block_mask=block_mask))  # noqa: B023
        torch.cuda.synchronize()
        first = time.perf_counter() - began
        times = {
            "bias": milliseconds(lambda: step(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias))),  # noqa: B023
            "flex": milliseconds(lambda: step(lambda: flex(q, k, v, block_mask=block_mask))),  # noqa: B023
            "mask": milliseconds(made),
            "causal": milliseconds(lambda: step(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))),  # noqa: B023
        }
        print(
            f"| {length} | {times['bias']:.2f} ms | {times['flex']:.2f} ms | {first:.1f} s | {times['mask']:.1f} ms | "
            f"{times['causal']:.2f} ms |",
            flush=True,
        )


if __name__ == "__main__":
    main()
