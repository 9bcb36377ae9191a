"""Operations of a decoder layer that this processor's own compiler made, for what torch has no single one for.

Attention over a prefix tree keeps its scores in the cache and pads nothing; what lies between the products is one pass
over memory each. They compute what train/attention.py and train/between.py compute with torch, which is what happens
where there is no compiler, on a GPU, and in the tests that compare the two.

Shapes: L packed tokens, H heads of d, K key heads; F features of the gated activation. Tensors are float32 or bfloat16,
arithmetic is float32.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from heldout.train.layout import Layout

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class _Shape(ctypes.Structure):
    """`Shape` of attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in "heads kv_heads width length segments longest threads".split()),
        ("scale", ctypes.c_float),
    ]


class Kernels:
    """A compiled library's operations."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        """`name`: the library's file."""
        self.name = name
        self._library = library
        library.attention_memory.restype = ctypes.c_int64
        self._widest, self._most_ranks = library.attention_widest(), library.gated_most_ranks()

    def attends(self, width: int) -> bool:
        """Whether heads of this width can be attended with."""
        return width % 16 == 0 and width <= self._widest

    def attend(
        self,
        qkv: torch.Tensor,
        heads: tuple[int, int],
        layout: Layout,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of every token with its path, [L, H d]; rows behind the layout's last token are 0.

        Args:
            qkv: [L, (H + 2 K) d]: queries, keys and values side by side, before rotation.
            heads: H and K.
            angles: cosines and sines, [L, d] each; None where queries and keys are turned already.

        Returns:
            Besides the result the logarithm of the sum of each row's exponentials, [H, L], for the backward pass.
        """
        shape, given = self._given(qkv, heads, layout, angles, scale)
        log_sums = torch.empty(shape.heads, shape.length)
        out = qkv.new_empty(len(qkv), shape.heads * shape.width)
        self._call(
            "attention_forward",
            qkv,
            *given,
            _at(out, like=qkv),
            ctypes.c_int64(out.stride(0)),
            _at(log_sums),
            _at(self._memory(shape, backward=False)),
        )
        out[shape.length :] = 0
        return out, log_sums

    def attend_backward(
        self,
        qkv: torch.Tensor,
        heads: tuple[int, int],
        layout: Layout,
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
            ctypes.c_int64(grad.stride(0)),
            _at(log_sums),
            *_parts(found, shape),
            ctypes.c_int64(found.stride(0)),
            _at(self._memory(shape, backward=True)),
        )
        return found

    def norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, mask: torch.Tensor | None, *, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See between.norm."""
        x, r = x.contiguous(), torch.empty(len(x), 1)
        masked = out if mask is None else torch.empty_like(x)
        self._call(
            "norm_forward",
            x,
            *x.shape,
            _at(x),
            _at(weight, like=x),
            _at(mask, like=x),
            _at(out, like=x),
            ctypes.c_int64(out.stride(0)),
            _at(masked, like=x),
            _at(r),
            ctypes.c_float(eps),
            torch.get_num_threads(),
        )
        return r, masked

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
            ctypes.c_int64(grad.stride(0)),
            _at(more, like=x),
            _at(mask, like=x),
            _at(onto, like=x),
            _at(out),
            torch.get_num_threads(),
        )
        return out

    def gated(self, gate_up: torch.Tensor, mask: torch.Tensor | None, *, out: torch.Tensor) -> torch.Tensor:
        """See between.gated; features are rows here, [2 F, n] and [F, n]."""
        width, n = out.shape
        masked = out if mask is None else torch.empty_like(out)
        self._call(
            "gated_forward",
            gate_up,
            *(width, n),
            _at(gate_up),
            _at(gate_up[width:]),
            _at(mask, like=out),
            _at(out, like=gate_up),
            _at(masked, like=gate_up),
            torch.get_num_threads(),
        )
        return masked

    def gated_backward(
        self, gate_up: torch.Tensor, both: torch.Tensor, a: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See between.gated_backward; features are rows here."""
        width, n = len(gate_up) // 2, gate_up.shape[1]
        ranks = len(both) - width
        found, of_a = torch.empty_like(gate_up), both.new_empty(width, ranks)
        self._call(
            "gated_backward",
            gate_up,
            *(width, n, ranks),
            _at(gate_up),
            _at(gate_up[width:]),
            _at(both, like=gate_up),
            _at(both[width:]),
            _at(a.contiguous(), like=gate_up),
            _at(mask, like=gate_up),
            _at(found),
            _at(found[width:]),
            _at(of_a),
            torch.get_num_threads(),
        )
        return found, of_a

    def gates(self, ranks: int) -> bool:
        """Whether an adapter of this rank may lie behind a gated activation."""
        return ranks <= self._most_ranks

    def _call(self, name: str, like: torch.Tensor, *arguments: Any) -> None:
        getattr(self._library, f"{name}_{_NAMES[like.dtype]}")(*arguments)

    def _given(
        self,
        qkv: torch.Tensor,
        heads: tuple[int, int],
        layout: Layout,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        scale: float,
    ) -> tuple[_Shape, list[Any]]:
        """The shape, and the arguments that both passes of attention begin with."""
        count, kv_heads = heads
        width = qkv.shape[1] // (count + 2 * kv_heads)
        length, threads = len(layout.until), torch.get_num_threads()
        shape = _Shape(count, kv_heads, width, length, len(layout.segments), layout.longest, threads, scale)
        cos, sin = (None, None) if angles is None else (one.contiguous() for one in angles)
        stride = ctypes.c_int64(qkv.stride(0))
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


def _parts(qkv: torch.Tensor, shape: _Shape) -> list[_Pointer]:
    """Where queries, keys and values begin in their joint tensor."""
    widths = [count * shape.width for count in (shape.heads, shape.kv_heads, shape.kv_heads)]
    return [_at(part) for part in qkv.split(widths, dim=1)]
