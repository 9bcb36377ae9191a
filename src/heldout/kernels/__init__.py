"""Operations of a decoder layer that this processor's own compiler made, for what torch has no single one for.

Attention over a prefix tree keeps its scores in the cache and pads nothing; what lies between the products is one pass
over memory each; products take frozen weights as their file has them, or pairs of bfloat16 numbers (frozen.py). They
compute what train/attention.py, train/between.py and train/products.py compute with torch, which is what happens where
there is no compiler, on a GPU, and in the tests that compare the two.

Shapes: L packed tokens, H heads of d, K key heads; F features of the gated activation. Tensors are float32 or bfloat16,
arithmetic is float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sized
from typing import Any, Protocol

import torch

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class _Shape(ctypes.Structure):
    """`Shape` of attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in "heads kv_heads width length segments longest threads".split()),
        ("scale", ctypes.c_float),
    ]


class Tree(Protocol):
    """What attention must know of a packed sequence (train/layout.py)."""

    @property
    def until(self) -> torch.Tensor:
        """[L]: where the tokens end that may look at this one."""

    @property
    def segments(self) -> Sized:
        """Stretches whose tokens have the same examples below them."""

    @property
    def longest(self) -> int:
        """Tokens of the longest path."""

    @property
    def tree(self) -> torch.Tensor:
        """The segments as attention.cpp reads them."""


class Kernels:
    """A compiled library's operations."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        """`name`: the library's file."""
        self.name = name
        self._library = library
        library.attention_memory.restype = library.gated_memory.restype = ctypes.c_int64
        self._widest, self.panel = library.attention_widest(), library.product_panel()
        self._pairs = bool(library.paired_products())

    def attends(self, width: int) -> bool:
        """Whether heads of this width can be attended with."""
        return width % 16 == 0 and width <= self._widest

    def multiplies(self, precision: torch.dtype) -> bool:
        """Whether there are products of this precision: in bfloat16 only where the processor multiplies pairs. Where it
        multiplies tiles torch's are faster, and where it has units for neither so is float32."""
        return precision == torch.float32 or (precision == torch.bfloat16 and self._pairs)

    def attend(
        self,
        qkv: torch.Tensor,
        heads: tuple[int, int],
        layout: Tree,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        scale: float,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of every token with its path into `out`, [L, H d]; rows behind the layout's last token are 0.

        Args:
            qkv: [L, (H + 2 K) d]: queries, keys and values side by side, before rotation.
            heads: H and K.
            angles: cosines and sines, [L, d] each; None where queries and keys are turned already.

        Returns:
            The logarithm of the sum of each row's exponentials, [H, L], for the backward pass.
        """
        shape, given = self._given(qkv, heads, layout, angles, scale)
        log_sums = torch.empty(shape.heads, shape.length)
        self._call(
            "attention_forward",
            qkv,
            *given,
            _at(out, like=qkv),
            _row(out),
            _at(log_sums),
            _at(self._memory(shape, backward=False)),
        )
        out[shape.length :] = 0
        return log_sums

    def attend_backward(
        self,
        qkv: torch.Tensor,
        heads: tuple[int, int],
        layout: Tree,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        scale: float,
        grad: torch.Tensor,
        log_sums: torch.Tensor,
    ) -> torch.Tensor:
        """The gradient of `qkv`, given that of `attend`'s result, [L, H d]."""
        shape, given = self._given(qkv, heads, layout, angles, scale)
        found = torch.empty_like(qkv)
        found[shape.length :] = 0
        self._call(
            "attention_backward",
            qkv,
            *given,
            _at(grad, like=qkv),
            _row(grad),
            _at(log_sums),
            *_parts(found, shape),
            _row(found),
            _at(self._memory(shape, backward=True)),
        )
        return found

    def norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        mask: torch.Tensor | None,
        *,
        out: torch.Tensor,
        masked: torch.Tensor,
    ) -> torch.Tensor:
        """See between.norm."""
        x, r = x.contiguous(), torch.empty(len(x), 1)
        self._call(
            "norm_forward",
            x,
            *x.shape,
            _at(x),
            _at(weight, like=x),
            _at(mask, like=x),
            _at(out, like=x),
            _row(out),
            _at(masked, like=x),
            _at(r),
            ctypes.c_float(eps),
            torch.get_num_threads(),
        )
        return r

    def norm_again(
        self, x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """See between.norm_again."""
        x = x.contiguous()
        out = torch.empty_like(x)
        self._call(
            "norm_again",
            x,
            *x.shape,
            _at(x),
            _at(weight, like=x),
            _at(mask, like=x),
            _at(out),
            _at(r),
            torch.get_num_threads(),
        )
        return out

    def norm_backward(
        self,
        x: torch.Tensor,
        r: torch.Tensor,
        weight: torch.Tensor,
        grad: torch.Tensor,
        more: torch.Tensor | None,
        mask: torch.Tensor | None,
        *,
        onto: torch.Tensor,
    ) -> torch.Tensor:
        """See between.norm_backward."""
        x, onto = x.contiguous(), onto.contiguous()
        out = torch.empty_like(x)
        self._call(
            "norm_backward",
            x,
            *x.shape,
            _at(x),
            _at(weight, like=x),
            _at(r),
            _at(grad, like=x),
            _row(grad),
            _at(more, like=x),
            _at(mask, like=x),
            _at(onto, like=x),
            _at(out),
            torch.get_num_threads(),
        )
        return out

    def gated(
        self, gate_up: torch.Tensor, mask: torch.Tensor | None, *, out: torch.Tensor, masked: torch.Tensor
    ) -> None:
        """See between.gated."""
        n, width = out.shape
        self._call(
            "gated_forward",
            gate_up,
            *(n, width),
            _at(gate_up),
            _row(gate_up),
            _at(mask, like=out),
            _at(out, like=gate_up),
            _row(out),
            _at(masked, like=gate_up),
            torch.get_num_threads(),
        )

    def gated_backward(
        self, gate_up: torch.Tensor, both: torch.Tensor, a: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See between.gated_backward."""
        n, width = len(gate_up), gate_up.shape[1] // 2
        ranks = both.shape[1] - width
        found, of_a = torch.empty_like(gate_up), both.new_empty(ranks, width)
        threads = torch.get_num_threads()
        self._call(
            "gated_backward",
            gate_up,
            *(n, width, ranks),
            _at(gate_up),
            _row(gate_up),
            _at(both, like=gate_up),
            _row(both),
            _at(a.contiguous(), like=gate_up),
            _at(mask, like=gate_up),
            _at(found),
            _at(of_a),
            _at(torch.empty(self._library.gated_memory(width, ranks, threads))),
            threads,
        )
        return found, of_a

    def product(
        self,
        panels: torch.Tensor,
        outputs: int,
        x: torch.Tensor,
        beside: torch.Tensor | None,
        onto: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [W | beside]' (+ onto), [n, out], in the precision of `x`, which `multiplies`; sums are float32.

        Args:
            panels: W, [out, in], see frozen.py.
            x: [n, in + R]; beside: [out, R].
        """
        y = x.new_empty(len(x), outputs)
        if onto is not None and onto.shape != y.shape:
            raise ValueError(f"a product of {tuple(y.shape)} added to {tuple(onto.shape)}")
        weights = self._weights(panels, outputs, beside, x.shape[1], like=x)
        rows = (_at(x), _row(x), _at(onto, like=y), ctypes.c_int64(0 if onto is None else onto.stride(0)))
        self._multiply("forward", panels, x, len(x), *weights, *rows, _at(y), _row(y), torch.get_num_threads())
        return y

    def product_back(
        self, panels: torch.Tensor, outputs: int, grad: torch.Tensor, beside: torch.Tensor | None
    ) -> torch.Tensor:
        """grad [W | beside], [n, in + R], of grad [n, out], in the precision of `grad`."""
        width = panels.shape[1] + (0 if beside is None else beside.shape[1])
        found = grad.new_empty(len(grad), width)
        if grad.shape[1] != outputs:
            raise ValueError(f"a product of {grad.shape[1]} gradients with weights of {outputs} outputs")
        weights = self._weights(panels, outputs, beside, width, like=grad)
        rows = (_at(grad), _row(grad), _at(found), _row(found))
        self._multiply("backward", panels, grad, len(grad), *weights, *rows, torch.get_num_threads())
        return found

    def _weights(
        self, panels: torch.Tensor, outputs: int, beside: torch.Tensor | None, width: int, *, like: torch.Tensor
    ) -> list[Any]:
        inputs = panels.shape[1]
        ranks = 0 if beside is None else beside.shape[1]
        if inputs + ranks != width or (beside is not None and len(beside) != outputs):
            raise ValueError(f"a product of {width} inputs with weights of {inputs} and {ranks} beside them")
        row = ctypes.c_int64(0 if beside is None else beside.stride(0))
        return [outputs, inputs, ranks, _at(panels), _at(beside, like=like), row]

    def _multiply(self, way: str, panels: torch.Tensor, x: torch.Tensor, *arguments: Any) -> None:
        if not self.multiplies(x.dtype):
            raise ValueError(f"there are no products of {x.dtype} on this processor")
        if x.dtype == torch.float32:
            self._call(f"product_{way}", panels, *arguments)
            return
        if panels.dtype != torch.bfloat16 or panels.shape[1] % 2:
            raise ValueError(f"products of pairs with weights of {panels.dtype} and {panels.shape[1]} inputs")
        getattr(self._library, f"paired_{way}")(*arguments)

    def _call(self, name: str, like: torch.Tensor, *arguments: Any) -> None:
        getattr(self._library, f"{name}_{_NAMES[like.dtype]}")(*arguments)

    def _given(
        self,
        qkv: torch.Tensor,
        heads: tuple[int, int],
        layout: Tree,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        scale: float,
    ) -> tuple[_Shape, list[Any]]:
        """The shape, and the arguments that both passes of attention begin with."""
        count, kv_heads = heads
        width = qkv.shape[1] // (count + 2 * kv_heads)
        length, threads = len(layout.until), torch.get_num_threads()
        shape = _Shape(count, kv_heads, width, length, len(layout.segments), layout.longest, threads, scale)
        cos, sin = (None, None) if angles is None else (one.contiguous() for one in angles)
        stride = _row(qkv)
        turned = (_at(cos, like=qkv), _at(sin, like=qkv))
        return shape, [ctypes.byref(shape), _at(layout.tree), *_parts(qkv, shape), stride, *turned]

    def _memory(self, shape: _Shape, *, backward: bool) -> torch.Tensor:
        return torch.empty(self._library.attention_memory(ctypes.byref(shape), int(backward)), dtype=torch.uint8)


class _Pointer(ctypes.c_void_p):
    """Where a tensor's numbers are. It keeps the tensor: what nobody holds would be free before it is used."""

    def __init__(self, tensor: torch.Tensor | None = None) -> None:
        super().__init__(None if tensor is None else tensor.data_ptr())
        self.tensor = tensor


def _at(x: torch.Tensor | None, *, like: torch.Tensor | None = None) -> _Pointer:
    """A tensor whose rows lie in one piece each. Raises ValueError for others, and for another type than `like`'s."""
    if x is None:
        return _Pointer()
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"rows of {tuple(x.shape)} with strides {x.stride()} do not lie in one piece")
    if like is not None and x.dtype != like.dtype:
        raise ValueError(f"{x.dtype} where {like.dtype} is expected")
    return _Pointer(x)


def _row(x: torch.Tensor) -> ctypes.c_int64:
    """How far its rows are apart."""
    return ctypes.c_int64(x.stride(0))


def _parts(qkv: torch.Tensor, shape: _Shape) -> list[_Pointer]:
    """Where queries, keys and values begin in their joint tensor."""
    widths = [count * shape.width for count in (shape.heads, shape.kv_heads, shape.kv_heads)]
    return [_at(part) for part in qkv.split(widths, dim=1)]
