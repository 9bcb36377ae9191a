"""A decoder layer in one call, forward and backward (block.cpp): what train/block.py computes with torch's operations.

A layer is some thirty operations. Started one by one from Python they leave the other threads waiting for a tenth of a
step, since after each of them the interpreter finds the caches full of something else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from heldout.kernels import Kernels, Tree, at
from heldout.kernels.frozen import Frozen


class LowRank(Protocol):
    """One adapter among those of a joint product (train/projection.py)."""

    @property
    def a(self) -> torch.Tensor:
        """[r, in], float32."""

    @property
    def b(self) -> torch.Tensor:
        """[out, r], float32."""

    @property
    def scaling(self) -> float:
        """s in s B A x."""

    @property
    def outputs(self) -> slice:
        """Which outputs of the product are its own."""


class Product(NamedTuple):
    """W x + bias + s B A x of layers that take the same input."""

    weights: Frozen
    bias: torch.Tensor | None  # [out]
    adapters: Sequence[LowRank]
    stacked: torch.Tensor  # room for all A, [R, in]
    beside: torch.Tensor  # room for every s B, [out, R]; zeros


class Pack(NamedTuple):
    """What a call is about: n packed tokens, of which those in `rows` go on after attention."""

    tree: Tree
    angles: tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [n, d] each
    rows: torch.Tensor | None  # [m] of int64
    masks: Sequence[torch.Tensor | None]  # of what adapters of each product take, [n or m, in]


class _Adapter(ctypes.Structure):
    """`Adapter` of operations.h."""

    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_int32) for name in "rank output outputs".split()),
    ]


class _Adapters(ctypes.Structure):
    """`Adapters` of operations.h."""

    _fields_ = [("all", ctypes.c_void_p), ("count", ctypes.c_int32)]


class _Product(ctypes.Structure):
    """`Product` of block.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "panels bias stacked beside".split()),
        *((name, ctypes.c_int32) for name in "outputs inputs halves".split()),
        ("adapters", _Adapters),
    ]


class _Layer(ctypes.Structure):
    """`Layer` of block.cpp."""

    _fields_ = [
        *((name, _Product) for name in "qkv o gate_up down".split()),
        ("norms", ctypes.c_void_p * 2),
        *((name, ctypes.c_float) for name in "eps scale".split()),
        *((name, ctypes.c_int32) for name in "heads kv_heads width".split()),
    ]


class _Tokens(ctypes.Structure):
    """`Tokens` of block.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in "n chosen segments longest threads".split()),
        *((name, ctypes.c_void_p) for name in "tree rows cos sin".split()),
        ("masks", ctypes.c_void_p * 4),
    ]


class Kept(NamedTuple):
    """What the backward pass needs of the forward pass: numbers, and what the call was about."""

    memory: tuple[torch.Tensor, torch.Tensor]
    moment: int  # bytes of scratch that the backward pass needs
    tokens: _Tokens
    pack: Pack  # holds what `tokens` points to


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Of attention: H query heads, K key heads of d numbers; scores are multiplied by `scale`."""

    heads: int
    kv_heads: int
    width: int
    scale: float


class Layer:
    """A decoder layer as block.cpp knows it. Tensors are of the products' precision, rows in one piece."""

    def __init__(
        self,
        kernels: Kernels,
        products: Sequence[Product],
        norms: tuple[torch.Tensor, torch.Tensor],
        eps: float,
        attention: Heads,
    ) -> None:
        """`products`: those of q, k and v; o; gate and up; down. Raises ValueError for adapters not in float32."""
        self._kernels, self._products, self._norms = kernels, tuple(products), norms
        self._adapters = [one for product in self._products for one in product.adapters]
        for one in self._adapters:
            if {one.a.dtype, one.b.dtype} != {torch.float32} or not (one.a.is_contiguous() and one.b.is_contiguous()):
                raise ValueError("adapters that are not float32 in one piece")
        self._described = (_Adapter * len(self._adapters))()
        for to, one in zip(self._described, self._adapters, strict=True):
            to.scaling, to.rank = one.scaling, len(one.a)
            to.output, to.outputs = one.outputs.start, len(one.b)
        qkv, o, _, down = (product.weights for product in self._products)
        heads, all_heads = (
            attention.heads * attention.width,
            (attention.heads + 2 * attention.kv_heads) * attention.width,
        )
        if (qkv.outputs, o.inputs) != (all_heads, heads) or self._products[2].weights.outputs != 2 * down.inputs:
            raise ValueError("products whose sizes are not those of a layer")
        for norm in norms:
            if norm.dtype != qkv.precision or norm.shape != (qkv.inputs,) or not norm.is_contiguous():
                raise ValueError(f"a norm of {norm.dtype} and {tuple(norm.shape)} for {qkv.inputs} numbers")
        given, first = [], 0
        for product in self._products:
            place = ctypes.addressof(self._described) + first * ctypes.sizeof(_Adapter)
            first += len(product.adapters)
            given.append(_described(product, _Adapters(place, len(product.adapters))))
        self._layer = _Layer(
            *given,
            (ctypes.c_void_p * 2)(*map(at, norms)),
            *(eps, attention.scale, attention.heads, attention.kv_heads, attention.width),
        )
        # Gradients lie behind each other: of a product all A, and behind them every B.
        self._sizes: list[int] = []
        self._order: list[int] = []
        self._shapes: list[torch.Size] = []
        for product in self._products:
            count, before = len(product.adapters), len(self._sizes)
            self._sizes += [one.a.numel() for one in product.adapters] + [one.b.numel() for one in product.adapters]
            self._order += [before + i // 2 + i % 2 * count for i in range(2 * count)]
            self._shapes += [shape for one in product.adapters for shape in (one.a.shape, one.b.shape)]

    def forward(
        self, x: torch.Tensor, pack: Pack, scratch: Scratch, *, keep: bool = True
    ) -> tuple[torch.Tensor, Kept | None]:
        """The layer's result, [n or m, h], and what the backward pass needs to know of it: None unless `keep`."""
        tokens = self._tokens(x, pack)
        given, sizes = self._given(tokens), (ctypes.c_int64 * 4)()
        self._kernels.call("block_memory", x, *given, ctypes.addressof(sizes))
        byte = torch.empty(0, dtype=torch.uint8)
        memory = (
            byte.new_empty(sizes[0]) if keep else scratch.take("kept", byte, sizes[0]),
            byte.new_empty(sizes[1]) if keep else scratch.take("kept wide", byte, sizes[1]),
        )
        moment, y = scratch.take("layer", byte, sizes[2]), x.new_empty(tokens.chosen, x.shape[1])
        self._kernels.call("block_forward", x, *given, at(x), at(y), *map(at, memory), at(moment))
        return y, Kept(memory, sizes[3], tokens, pack) if keep else None

    def backward(
        self, x: torch.Tensor, grad: torch.Tensor, kept: Kept, scratch: Scratch, *, needs_x: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """The gradient of x (None unless `needs_x`), and those of every adapter's A and B, in the products' order."""
        count = kept.tokens.chosen
        if grad.shape != (count, x.shape[1]) or not grad.is_contiguous():
            raise ValueError(f"a gradient of {tuple(grad.shape)} for {count} tokens of {x.shape[1]} numbers")
        d_x = torch.empty_like(x) if needs_x else None
        found = torch.empty(sum(self._sizes))
        moment = scratch.take("layer", kept.memory[0], kept.moment)
        given = (*self._given(kept.tokens), at(x), at(grad, like=x), *map(at, kept.memory), at(moment))
        self._kernels.call("block_backward", x, *given, at(d_x), at(found))
        parts = found.split(self._sizes)
        return d_x, [parts[place].view(shape) for place, shape in zip(self._order, self._shapes, strict=True)]

    def _given(self, tokens: _Tokens) -> tuple[int, int]:
        """The layer and the tokens, for as long as this object and `tokens` are there."""
        for to, one in zip(self._described, self._adapters, strict=True):
            to.a, to.b = one.a.data_ptr(), one.b.data_ptr()
        return ctypes.addressof(self._layer), ctypes.addressof(tokens)

    def _tokens(self, x: torch.Tensor, pack: Pack) -> _Tokens:
        count, (cos, sin) = len(x), pack.angles
        chosen = count if pack.rows is None else len(pack.rows)
        inputs = [product.weights.inputs for product in self._products]
        if not x.is_contiguous() or x.shape[1] != inputs[0] or x.dtype != self._products[0].weights.precision:
            raise ValueError(f"{x.dtype} of {tuple(x.shape)} where the layer takes {inputs[0]} numbers in one piece")
        for one, rows, width in zip(pack.masks, (count, chosen, chosen, chosen), inputs, strict=True):
            if one is not None and (one.shape != (rows, width) or not one.is_contiguous()):
                raise ValueError(f"a mask of {tuple(one.shape)} where {rows} by {width} are expected")
        for one in (cos, sin):
            if one.shape != (count, self._layer.width) or not one.is_contiguous():
                raise ValueError(f"angles of {tuple(one.shape)} for {count} tokens of {self._layer.width} numbers")
        if pack.rows is not None and (pack.rows.dtype != torch.int64 or not pack.rows.is_contiguous()):
            raise ValueError("rows that are not int64 in one piece")
        if chosen and pack.rows is not None and not (int(pack.rows.min()) >= 0 and int(pack.rows.max()) < count):
            raise IndexError(f"a row outside of the {count} tokens")
        tree = pack.tree
        if len(tree.until) != count or not chosen:
            raise ValueError(f"a tree of {len(tree.until)} tokens where there are {count}, of which {chosen} go on")
        return _Tokens(
            *(count, chosen, len(tree.segments), tree.longest, torch.get_num_threads()),
            *(at(tree.tree), at(pack.rows), at(cos, like=x), at(sin, like=x)),
            (ctypes.c_void_p * 4)(*(at(one, like=x) for one in pack.masks)),
        )


class Scratch(Protocol):
    """Memory for what a layer needs for a moment only (train/projection.py)."""

    def take(self, use: str, like: torch.Tensor, count: int) -> torch.Tensor:
        """[count], of the type of `like`; what was taken for this use before is overwritten."""


def _described(product: Product, adapters: _Adapters) -> _Product:
    weights, ranks = product.weights, sum(len(one.a) for one in product.adapters)
    for room, shape in ((product.stacked, (ranks, weights.inputs)), (product.beside, (weights.outputs, ranks))):
        if room.shape != shape or room.dtype != weights.precision or not room.is_contiguous():
            raise ValueError(f"{room.dtype} of {tuple(room.shape)} where {weights.precision} of {shape} is expected")
    if weights.precision == torch.bfloat16 and weights.inputs % 2:
        raise ValueError(f"products of pairs with weights of {weights.inputs} inputs")
    bias = product.bias
    if bias is not None and (bias.dtype != weights.precision or bias.shape != (weights.outputs,)):
        raise ValueError(f"a bias of {bias.dtype} and {tuple(bias.shape)} for {weights.outputs} outputs")
    return _Product(
        *(at(weights.panels), at(bias), at(product.stacked), at(product.beside)),
        *(weights.outputs, weights.inputs, weights.panels.dtype == torch.bfloat16),
        adapters,
    )
