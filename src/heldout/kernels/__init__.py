"""Operations of a decoder layer that this processor's own compiler made, for what torch has no single one for.

Attention over a prefix tree keeps its scores in the cache and pads nothing; what lies between the products is one pass
over memory each; products take frozen weights as their file has them, or pairs of bfloat16 numbers (frozen.py); a
whole layer with its adapters is one call (block.py). They compute what train/attention.py, between.py, block.py,
head.py and products.py compute with torch, which is what happens where there is no compiler, on a GPU, and in the tests
that compare the two.

Shapes: L packed tokens, H heads of d, K key heads; F features of the gated activation. Tensors are float32 or bfloat16.
Arithmetic is float32, but for products of bfloat16 numbers where the processor multiplies pairs of them; sums are
float32 always.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sized
from typing import Any, Protocol

import torch

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

#: What the library's functions take, each in two precisions: i an int32, l an int64, f a float, p where a tensor's
#: numbers begin (None: there are none). Declared, a call costs a third of one whose arguments are wrapped one by one.
_TAKES = {
    "attention_memory": "p i",
    "attention_forward": "p p pppl pp pl p p",
    "attention_backward": "p p pppl pp pl p pppl p",
    "norm_forward": "ii ppp pl ppfi",
    "norm_again": "ii ppppp i",
    "norm_backward": "ii ppp pl pp i",
    "gated_forward": "ii pl p pl p i",
    "gated_backward": "ii pl pl ppp i",
    "block_memory": "pp p",
    "block_forward": "pp pp pp p",
    "block_backward": "pp pp pp p pp",
    "cross_entropy": "ii pp fi ppp i",
}
#: The same of products, named by the type of the weights; paired ones are not for every processor.
_PRODUCTS = {"forward": "iiii p pl pl pl pl i", "backward": "iiii p pl pl pl i"}
_OF_WEIGHTS = ("product_float32", "product_bfloat16", "paired_bfloat16")
_C = {"i": ctypes.c_int32, "l": ctypes.c_int64, "f": ctypes.c_float, "p": ctypes.c_void_p}


class _Shape(ctypes.Structure):
    """`Shape` of operations.h."""

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
        takes = {f"{name}_{dtype}": given for name, given in _TAKES.items() for dtype in _NAMES.values()}
        takes |= {f"{name}_{way}": given for name in _OF_WEIGHTS for way, given in _PRODUCTS.items()}
        self._functions: dict[str, Any] = {}
        for name_, given in takes.items():
            if found := getattr(library, name_, None):
                found.argtypes, found.restype = [_C[one] for one in given if one != " "], None
                self._functions[name_] = found
        for dtype in _NAMES.values():
            self._functions[f"attention_memory_{dtype}"].restype = ctypes.c_int64
        self._widest, self.panel = library.attention_widest(), library.product_panel()
        self._pairs = "paired_bfloat16_forward" in self._functions

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
        log_sums, memory = torch.empty(shape.heads, shape.length), self._memory(shape, qkv, backward=False)
        self.call(
            "attention_forward",
            qkv,
            *given,
            at(out, like=qkv),
            _row(out),
            at(log_sums),
            at(memory),
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
        found, memory = torch.empty_like(qkv), self._memory(shape, qkv, backward=True)
        found[shape.length :] = 0
        self.call(
            "attention_backward",
            qkv,
            *given,
            at(grad, like=qkv),
            _row(grad),
            at(log_sums),
            *_parts(found, shape),
            _row(found),
            at(memory),
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
        self.call(
            "norm_forward",
            x,
            *x.shape,
            at(x),
            at(weight, like=x),
            at(mask, like=x),
            at(out, like=x),
            _row(out),
            at(masked, like=x),
            at(r),
            eps,
            torch.get_num_threads(),
        )
        return r

    def norm_again(
        self, x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """See between.norm_again."""
        x = x.contiguous()
        out = torch.empty_like(x)
        self.call(
            "norm_again",
            x,
            *x.shape,
            at(x),
            at(weight, like=x),
            at(mask, like=x),
            at(out),
            at(r),
            torch.get_num_threads(),
        )
        return out

    def norm_backward(
        self,
        x: torch.Tensor,
        r: torch.Tensor,
        weight: torch.Tensor,
        grad: torch.Tensor,
        *,
        onto: torch.Tensor,
    ) -> torch.Tensor:
        """See between.norm_backward."""
        x, onto = x.contiguous(), onto.contiguous()
        out = torch.empty_like(x)
        self.call(
            "norm_backward",
            x,
            *x.shape,
            at(x),
            at(weight, like=x),
            at(r),
            at(grad, like=x),
            _row(grad),
            at(onto, like=x),
            at(out),
            torch.get_num_threads(),
        )
        return out

    def gated(
        self, gate_up: torch.Tensor, mask: torch.Tensor | None, *, out: torch.Tensor, masked: torch.Tensor
    ) -> None:
        """See between.gated."""
        n, width = out.shape
        self.call(
            "gated_forward",
            gate_up,
            *(n, width),
            at(gate_up),
            _row(gate_up),
            at(mask, like=out),
            at(out, like=gate_up),
            _row(out),
            at(masked, like=gate_up),
            torch.get_num_threads(),
        )

    def gated_backward(
        self, gate_up: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor | None, *, masked: torch.Tensor | None
    ) -> torch.Tensor:
        """See between.gated_backward."""
        found = torch.empty_like(gate_up)
        self.call(
            "gated_backward",
            gate_up,
            *grad.shape,
            at(gate_up),
            _row(gate_up),
            at(grad, like=gate_up),
            _row(grad),
            at(mask, like=gate_up),
            at(found),
            at(masked, like=gate_up),
            torch.get_num_threads(),
        )
        return found

    def cross_entropy(
        self, logits: torch.Tensor, targets: torch.Tensor, smoothing: float, *, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses with smoothing and without, and whether the target is the argmax, [n] each, of logits [n, V]. Those
        become the gradient of the first if `gradient`. Raises IndexError where a target is none of the logits."""
        count, size = logits.shape
        if (
            len(targets) != count
            or targets.dtype != torch.int64
            or not logits.is_contiguous()
            or not targets.is_contiguous()
        ):
            raise ValueError(f"{tuple(targets.shape)} targets of {targets.dtype} for logits of {tuple(logits.shape)}")
        if count and not (int(targets.min()) >= 0 and int(targets.max()) < size):
            raise IndexError(f"a target outside of the {size} logits")
        losses, plain = torch.empty(count), torch.empty(count)
        right = torch.empty(count, dtype=torch.bool)
        self.call(
            "cross_entropy",
            logits,
            *(count, size),
            at(logits),
            at(targets),
            smoothing,
            int(gradient),
            at(losses),
            at(plain),
            at(right),
            torch.get_num_threads(),
        )
        return losses, plain, right

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
        rows = (at(x), _row(x), at(onto, like=y), 0 if onto is None else onto.stride(0))
        self._multiply("forward", panels, x, len(x), *weights, *rows, at(y), _row(y), torch.get_num_threads())
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
        rows = (at(grad), _row(grad), at(found), _row(found))
        self._multiply("backward", panels, grad, len(grad), *weights, *rows, torch.get_num_threads())
        return found

    def _weights(
        self, panels: torch.Tensor, outputs: int, beside: torch.Tensor | None, width: int, *, like: torch.Tensor
    ) -> list[Any]:
        inputs = panels.shape[1]
        ranks = 0 if beside is None else beside.shape[1]
        if inputs + ranks != width or (beside is not None and len(beside) != outputs):
            raise ValueError(f"a product of {width} inputs with weights of {inputs} and {ranks} beside them")
        row = 0 if beside is None else beside.stride(0)
        return [outputs, inputs, ranks, at(panels), at(beside, like=like), row]

    def _multiply(self, way: str, panels: torch.Tensor, x: torch.Tensor, *arguments: Any) -> None:
        if not self.multiplies(x.dtype):
            raise ValueError(f"there are no products of {x.dtype} on this processor")
        if x.dtype == torch.float32:
            self._functions[f"product_{_NAMES[panels.dtype]}_{way}"](*arguments)
            return
        if panels.dtype != torch.bfloat16 or panels.shape[1] % 2:
            raise ValueError(f"products of pairs with weights of {panels.dtype} and {panels.shape[1]} inputs")
        self._functions[f"paired_bfloat16_{way}"](*arguments)

    def call(self, name: str, like: torch.Tensor, *arguments: Any) -> Any:
        """The library's function of this name for numbers like these."""
        return self._functions[f"{name}_{_NAMES[like.dtype]}"](*arguments)

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
        if angles is not None and not (angles[0].is_contiguous() and angles[1].is_contiguous()):
            raise ValueError("angles that do not lie in one piece")
        cos, sin = (None, None) if angles is None else angles
        turned = (at(cos, like=qkv), at(sin, like=qkv))
        return shape, [ctypes.addressof(shape), at(layout.tree), *_parts(qkv, shape), _row(qkv), *turned]

    def _memory(self, shape: _Shape, like: torch.Tensor, *, backward: bool) -> torch.Tensor:
        size = self.call("attention_memory", like, ctypes.addressof(shape), int(backward))
        return torch.empty(size, dtype=torch.uint8)


def at(x: torch.Tensor | None, *, like: torch.Tensor | None = None) -> int | None:
    """Where the numbers are of a tensor whose rows lie in one piece each. Who asks holds the tensor until the call is
    over: what nobody holds is free before it is used. Raises ValueError for other rows, and another type than `like`'s.
    """
    if x is None:
        return None
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"rows of {tuple(x.shape)} with strides {x.stride()} do not lie in one piece")
    if like is not None and x.dtype != like.dtype:
        raise ValueError(f"{x.dtype} where {like.dtype} is expected")
    return x.data_ptr()


def _row(x: torch.Tensor) -> int:
    """How far its rows are apart."""
    return x.stride(0)


def _parts(qkv: torch.Tensor, shape: _Shape) -> list[int]:
    """Where queries, keys and values begin in their joint tensor."""
    first, number = at(qkv), qkv.itemsize * shape.width
    assert first is not None
    return [first, first + number * shape.heads, first + number * (shape.heads + shape.kv_heads)]
