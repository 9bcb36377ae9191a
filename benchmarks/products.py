"""Products with base weights: torch's, and ours: in float32 with weights as their file has them, or in bfloat16.

    .venv/bin/python benchmarks/products.py [--rows 1 4 8 12 16 32 64 363 504] [--model DIRECTORY] [--rounds 5]
        [--precision bfloat16]

All products of the bundled model's layers (or of another one's), adapters of rank 16 beside them, forward and backward,
in milliseconds; then one pass of the engine that reads one more token of each of so many rows, without an adapter.
Medians over the rounds, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from benchmarks.common import MODEL, base_folder

from heldout.engine import cache, weights
from heldout.engine.cache import Rows
from heldout.kernels import Kernels, compiling
from heldout.kernels.frozen import Frozen
from heldout.settings import read_settings
from heldout.train.memory import keep_freed_memory
from heldout.train.products import Dense, Held, Weights

RANK, PAST = 16, 100


def stacked(model: Any) -> list[tuple[torch.Tensor, int]]:
    """The weights of every layer's four products, and the ranks beside them."""
    found = []
    for layer in model.base_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for parts in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        ):
            found.append((torch.cat([part.weight.data for part in parts]), RANK * len(parts)))
    return found


def both(
    kernels: Kernels, products: list[tuple[torch.Tensor, int]], precision: torch.dtype
) -> list[tuple[Weights, Weights]]:
    """Every product's weights, torch's and ours."""
    found: list[tuple[Weights, Weights]] = []
    for weight, ranks in products:
        beside = torch.randn(len(weight), ranks, dtype=precision)
        held = Held.of([Frozen.of(kernels, weight, precision)], ranks)
        held.beside.copy_(beside)
        found.append((Dense(torch.cat([weight.to(precision), beside], dim=1), weight.shape[1]), held))
    return found


def products(kernels: Kernels, layers: list[tuple[Weights, Weights]], n: int, rounds: int) -> str:
    """A line of the first table."""
    spent: dict[tuple[str, bool], float] = {("forward", False): 0, ("forward", True): 0}
    spent |= {("backward", False): 0, ("backward", True): 0}
    shapes = {tuple(dense.weight.shape) for dense, _ in layers if isinstance(dense, Dense)}
    for shape in sorted(shapes):
        same = [pair for pair in layers if isinstance(pair[0], Dense) and tuple(pair[0].weight.shape) == shape]
        outputs, width = shape
        x, grad = (torch.randn(n, size, dtype=same[0][1].beside.dtype) for size in (width, outputs))
        # Torch is given what suits it best: column-major where the output is wider than the input, or was.
        by_columns, wide = x.t().contiguous().t(), outputs > width
        took: dict[tuple[str, bool], list[float]] = {key: [] for key in spent}
        for _ in range(rounds):
            took["forward", False].append(
                min(
                    _timed(lambda: [dense.product(one, wide=turned) for dense, _ in same])  # noqa: B023
                    for one in (x, by_columns)
                    for turned in {wide, False}
                )
            )
            took["forward", True].append(_timed(lambda: [held.product(x) for _, held in same]))  # noqa: B023
            took["backward", False].append(
                min(
                    _timed(lambda: [dense.product_back(grad, wide=turned) for dense, _ in same])  # noqa: B023
                    for turned in (True, False)
                )
            )
            took["backward", True].append(_timed(lambda: [held.product_back(grad) for _, held in same]))  # noqa: B023
        for key, times in took.items():
            spent[key] += statistics.median(times)
    cells = (f"{1e3 * spent[way, ours]:.1f}" for way in ("forward", "backward") for ours in (False, True))
    return f"| {n} | {' | '.join(cells)} |"


def reading(model: Any, n: int) -> Callable[[], Any]:
    """Read one more token of each of n rows, and predict the next."""
    rows = Rows(model, n, PAST + 1, {})
    cache.read(model, rows, [list(range(5, 5 + PAST))] * n)
    rows.count([PAST] * n)

    def read() -> torch.Tensor:
        states = cache.read(model, rows, [[7]] * n)
        found: torch.Tensor = model.get_output_embeddings()(torch.cat(states)).argmax(dim=-1)
        return found

    return read


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 12, 16, 32, 64, 363, 504])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    asked = parser.parse_args()
    precision: torch.dtype = getattr(torch, asked.precision)
    keep_freed_memory()  # as training does
    kernels, folder = compiling.load(read_settings().cache), base_folder(asked.model)
    if not kernels.multiplies(precision):
        sys.exit(f"there are no kernels for products in {asked.precision} on this processor")
    plain = weights.load_model(folder, precision, cache.IMPLEMENTATION)
    print(f"{torch.get_num_threads()} threads\n")
    print("| rows | forward, torch | ours | backward, torch | ours |\n|--:|--:|--:|--:|--:|")
    with torch.no_grad():
        layers = both(kernels, [(weight.bfloat16(), ranks) for weight, ranks in stacked(plain)], precision)
        for n in asked.rows:
            print(products(kernels, layers, n, asked.rounds), flush=True)
        del layers
        ours = weights.load_model(folder, precision, cache.IMPLEMENTATION, kernels)
        print("\n| rows | a token of each, torch | ours |\n|--:|--:|--:|")
        for n in (one for one in asked.rows if one <= 64):
            calls = [reading(model, n) for model in (plain, ours)]
            took = [[_timed(call) for call in calls] for _ in range(4 * asked.rounds)]
            print(f"| {n} | {' | '.join(f'{1e3 * statistics.median(one):.1f}' for one in zip(*took, strict=True))} |")


if __name__ == "__main__":
    main()
