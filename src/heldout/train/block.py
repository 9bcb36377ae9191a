"""One decoder layer of the Llama family as one operation, forward and backward.

Left to autograd, a layer with LoRA is some seventy operations, each with its own temporaries, copies and
gradient sums; on two cores they cost as much as the products. Written as one, the products are the step:
q, k and v are one product and so are gate and up, what the backward pass needs is kept and nothing else,
and the adapters' gradients are computed where their inputs are at hand.

    a = rmsnorm(x);  h = x + o(attention(rope(q(a)), rope(k(a)), v(a)))
    b = rmsnorm(h);  y = h + down(silu(gate(b)) * up(b))

where each of q, k, v, o, gate, up, down is W x + bias, plus s B A (m * x) if it has an adapter; m is a
dropout mask, one for all projections of the same input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear

from heldout.train.attention import Kept, Layout, attend, attend_anew, attend_backward, keeps_scores
from heldout.train.dropout import Dropout
from heldout.train.rounding import padded

#: Numbers in a block of activations of which a processor's cache holds a handful.
CACHED = 1 << 18


class Adapter(NamedTuple):
    """One projection's adapter, and where it lies in the joint product."""

    a: torch.nn.Parameter  # [r, in]
    b: torch.nn.Parameter  # [out, r]
    scaling: float
    outputs: slice  # its rows of the joint weight
    ranks: slice  # its columns of the joint inner values


@dataclass(frozen=True)
class Projection:
    """Linear layers that take the same input, as one product.

    With inner values i = A (m * x) a layer with an adapter is W x + s B i: one product of [W | s B] with
    x and i side by side. Its backward product with [W | s B] gives the gradients of both at once. Where
    several layers are stacked, B is block-diagonal.
    """

    weight: torch.Tensor  # [out, in + R]: W frozen, then the place for s B
    bias: torch.Tensor | None
    inputs: int
    adapters: tuple[Adapter, ...]

    @staticmethod
    def of(*layers: torch.nn.Module) -> Projection:
        """Layers of PEFT, or plain ones. Their base weights become views of the joint one."""
        bases: list[Any] = [layer.base_layer if isinstance(layer, Linear) else layer for layer in layers]
        inputs = bases[0].in_features
        outputs = rank = 0
        adapters = []
        for layer, base in zip(layers, bases, strict=True):
            if isinstance(layer, Linear):
                (name,) = layer.active_adapters
                a, b = _matrices(layer, name)
                rows = slice(outputs, outputs + base.out_features)
                adapters.append(Adapter(a, b, layer.scaling[name], rows, slice(rank, rank + len(a))))
                rank += len(a)
            outputs += base.out_features
        weight = bases[0].weight.data.new_zeros(outputs, inputs + rank)
        outputs = 0
        for base in bases:
            part = weight[outputs : outputs + base.out_features, :inputs]
            part.copy_(base.weight.data)
            base.weight.data = part
            outputs += base.out_features
        bias = None if bases[0].bias is None else torch.cat([base.bias.data for base in bases])
        return Projection(weight, bias, inputs, tuple(adapters))

    @property
    def rank(self) -> int:
        """R, the sum of the adapters' ranks."""
        return self.weight.shape[1] - self.inputs

    @property
    def stacked_a(self) -> torch.Tensor:
        """All A, [R, in], in the precision of the products."""
        return torch.cat([one.a.data for one in self.adapters]).to(self.weight.dtype)

    def refresh(self) -> None:
        """Write the adapters' present s B beside W."""
        for one in self.adapters:
            ranks = slice(self.inputs + one.ranks.start, self.inputs + one.ranks.stop)
            self.weight[one.outputs, ranks] = one.b.data * one.scaling


def _matrices(layer: Any, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return layer.lora_A[name].weight, layer.lora_B[name].weight


@dataclass(frozen=True)
class Block:
    """A decoder layer's parts. H heads of d, K kv_heads."""

    index: int
    qkv: Projection
    o: Projection
    gate_up: Projection
    down: Projection
    norms: tuple[torch.Tensor, torch.Tensor]
    eps: float
    heads: int
    kv_heads: int
    width: int
    scale: float

    @staticmethod
    def of(layer: Any, index: int) -> Block:
        """Take over a layer of transformers (with PEFT's layers inside, or without)."""
        attention, mlp = layer.self_attn, layer.mlp
        width = attention.head_dim
        qkv = Projection.of(attention.q_proj, attention.k_proj, attention.v_proj)
        return Block(
            index=index,
            qkv=qkv,
            o=Projection.of(attention.o_proj),
            gate_up=Projection.of(mlp.gate_proj, mlp.up_proj),
            down=Projection.of(mlp.down_proj),
            norms=(layer.input_layernorm.weight.data, layer.post_attention_layernorm.weight.data),
            eps=layer.input_layernorm.variance_epsilon,
            heads=attention.q_proj.out_features // width,
            kv_heads=attention.k_proj.out_features // width,
            width=width,
            scale=attention.scaling,
        )

    @property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """A and B of every adapter, in a fixed order."""
        every = (*self.qkv.adapters, *self.o.adapters, *self.gate_up.adapters, *self.down.adapters)
        return tuple(parameter for one in every for parameter in (one.a, one.b))

    def __call__(
        self,
        x: torch.Tensor,
        layout: Layout,
        angles: tuple[torch.Tensor, torch.Tensor],
        dropout: Dropout,
        *,
        rows: torch.Tensor | None = None,
        checkpoint: bool = False,
    ) -> torch.Tensor:
        """[L, hidden] -> [L, hidden], or [R, hidden] when only these rows are wanted (and rows of zeros behind them,
        see train/rounding.py).

        Args:
            angles: cosines and sines of the packed positions, [L, d] each.
            rows: [R] different positions.
            checkpoint: keep the input only and compute the rest again in the backward pass.
        """
        if torch.is_grad_enabled() and (x.requires_grad or self.parameters):
            return _Block.apply(x, self, layout, angles, dropout, rows, checkpoint, *self.parameters)
        return _forward(self, x, layout, angles, dropout, rows)[0]


@dataclass
class _Kept:
    """What the backward pass needs of the forward pass. Inputs of projections that are a pass over memory away from
    something else that is kept are computed again; inner values are those of a projection's adapters."""

    r1: torch.Tensor
    a_inner: torch.Tensor  # [L, R], of q, k and v
    qkv: torch.Tensor | None  # only where scores are not kept; else they are in `scores`
    scores: list[Kept] | None
    o: torch.Tensor  # attention's result with its inner values beside it
    h: torch.Tensor
    r2: torch.Tensor
    b_inner: torch.Tensor  # [L, R], of gate and up
    gate_up: torch.Tensor  # [L, 2 F], column-major
    act_inner: torch.Tensor  # [L, r], of down


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        block: Block,
        layout: Layout,
        angles: tuple[torch.Tensor, torch.Tensor],
        dropout: Dropout,
        rows: torch.Tensor | None,
        checkpoint: bool,
        *parameters: torch.nn.Parameter,
    ) -> torch.Tensor:
        y, kept = _forward(block, x, layout, angles, dropout, rows)
        ctx.save_for_backward(x)
        ctx.kept = None if checkpoint else kept
        ctx.call = (block, layout, angles, dropout.frozen(), rows)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        block, layout, angles, dropout, rows = ctx.call
        kept = ctx.kept or _forward(block, x, layout, angles, dropout, rows)[1]
        ctx.kept = None  # what this layer kept is free for the next one
        needs_x = ctx.needs_input_grad[0]
        d_x, gradients = _backward(block, x, grad, kept, layout, angles, dropout, rows, needs_x=needs_x)
        return (d_x, None, None, None, None, None, None, *gradients)


def _forward(
    block: Block,
    x: torch.Tensor,
    layout: Layout,
    angles: tuple[torch.Tensor, torch.Tensor],
    dropout: Dropout,
    rows: torch.Tensor | None,
) -> tuple[torch.Tensor, _Kept]:
    q_width, kv_width = block.heads * block.width, block.kv_heads * block.width
    a = _room(x, len(x), block.qkv)
    r1 = _norm(x, block.norms[0], block.eps, out=a[:, : block.qkv.inputs])
    qkv = _project(block.qkv, a, _mask(dropout, block, 0, a))
    _rotate(qkv[:, : q_width + kv_width].view(len(x), -1, block.width), *angles)
    q, k, v = _heads(block, qkv)
    scores = None
    if keeps_scores(q, layout):
        attended, scores = attend(q, k, v, layout, block.scale)
    else:
        attended = attend_anew(q, k, v, layout, block.scale)
    attended = attended.reshape(len(x), -1)
    residual, attended = (one if rows is None else padded(one[rows]) for one in (x, attended))
    o = _room(x, len(residual), block.o)
    o[:, : block.o.inputs] = attended
    h = _project(block.o, o, _mask(dropout, block, 1, o), onto=residual)
    b = _room(x, len(h), block.gate_up)
    r2 = _norm(h, block.norms[1], block.eps, out=b[:, : block.gate_up.inputs])
    gate_up = _project(block.gate_up, b, _mask(dropout, block, 2, b), wide=True)
    act = _room(x, len(h), block.down, wide=True)
    _swiglu(gate_up, out=act[:, : block.down.inputs])
    y = _project(block.down, act, _mask(dropout, block, 3, act), onto=h)
    return y, _Kept(
        r1=r1,
        a_inner=a[:, block.qkv.inputs :].clone(),
        qkv=qkv if scores is None else None,
        scores=scores,
        o=o,
        h=h,
        r2=r2,
        b_inner=b[:, block.gate_up.inputs :].clone(),
        gate_up=gate_up,
        act_inner=act[:, block.down.inputs :].clone(),
    )


def _backward(
    block: Block,
    x: torch.Tensor,
    grad: torch.Tensor,
    kept: _Kept,
    layout: Layout,
    angles: tuple[torch.Tensor, torch.Tensor],
    dropout: Dropout,
    rows: torch.Tensor | None,
    *,
    needs_x: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Gradient of x (None unless `needs_x`) and those of `block.parameters`."""
    d_gate_up, of_down = _down_backward(block.down, grad, kept, _mask(dropout, block, 3, grad))
    b = _normed(kept.h, kept.r2, block.norms[1])
    d_b, of_gate_up = _project_backward(block.gate_up, d_gate_up, b, kept.b_inner, _mask(dropout, block, 2, b))
    assert d_b is not None
    d_h = _norm_backward(kept.h, kept.r2, block.norms[1], d_b, onto=grad)
    o, o_inner = kept.o[:, : block.o.inputs], kept.o[:, block.o.inputs :]
    d_o, of_o = _project_backward(block.o, d_h, o, o_inner, _mask(dropout, block, 1, o))
    assert d_o is not None
    if rows is not None:
        d_o = d_o.new_zeros(len(x), d_o.shape[1]).index_copy_(0, rows, d_o[: len(rows)])
        d_h = d_h.new_zeros(x.shape).index_copy_(0, rows, d_h[: len(rows)])
    d_qkv = _attention_backward(block, d_o, kept, layout)
    rotated = d_qkv[:, : (block.heads + block.kv_heads) * block.width]
    _rotate(rotated.view(len(x), -1, block.width), angles[0], -angles[1])
    a, mask = _normed(x, kept.r1, block.norms[0]), _mask(dropout, block, 0, x)
    d_a, of_qkv = _project_backward(block.qkv, d_qkv, a, kept.a_inner, mask, needs_x=needs_x)
    d_x = None if d_a is None else _norm_backward(x, kept.r1, block.norms[0], d_a, onto=d_h)
    return d_x, [*of_qkv, *of_o, *of_gate_up, *of_down]


def _down_backward(
    down: Projection, grad: torch.Tensor, kept: _Kept, mask: torch.Tensor | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradient of gate and up, [n, 2 F], and those of the adapter of `down`, through down(silu(gate) * up).

    By blocks of features that a processor's cache holds: each pass over all [n, F] of them would read and write memory.
    """
    width = down.inputs
    both = torch.mm(down.weight.t(), grad.t())  # features are rows here: blocks of them lie in one piece
    d_act, through = both[:width], both[width:]
    gates, ups = kept.gate_up.t().split(width)
    d_gate_up = torch.empty_like(kept.gate_up.t())
    d_gates, d_ups = d_gate_up.split(width)
    of_a = both.new_empty(width, down.rank)
    a = down.stacked_a.t() if down.adapters else None
    blocks = max(1, math.ceil(width * len(grad) / CACHED)) if grad.device.type == "cpu" else 1
    step = math.ceil(width / blocks)
    for start in range(0, width, step):
        rows = slice(start, start + step)
        gate, up, d = gates[rows], ups[rows], d_act[rows]
        silu = F.silu(gate)
        if a is not None:
            act = silu * up
            if mask is None:
                torch.mm(act, through.t(), out=of_a[rows])
                d.addmm_(a[rows], through)
            else:
                masked = mask.t()[rows]
                torch.mm(act.mul_(masked), through.t(), out=of_a[rows])
                d.addcmul_(torch.mm(a[rows], through, out=act), masked)
        torch.mul(d, silu, out=d_ups[rows])
        torch.ops.aten.silu_backward.grad_input(d.mul_(up), gate, grad_input=d_gates[rows])
    return d_gate_up.t(), _of_adapters(down, of_a.t(), grad, kept.act_inner)


def _attention_backward(block: Block, grad: torch.Tensor, kept: _Kept, layout: Layout) -> torch.Tensor:
    """Gradient of q, k and v side by side, [L, (H + 2 K) d]."""
    by_head = grad.reshape(len(grad), block.heads, -1)
    if kept.scores is not None:
        return attend_backward(by_head, kept.scores, layout, block.scale).flatten(1)
    assert kept.qkv is not None
    with torch.enable_grad():
        q, k, v = (one.detach().requires_grad_() for one in _heads(block, kept.qkv))
        parts = torch.autograd.grad(attend_anew(q, k, v, layout, block.scale), (q, k, v), by_head)
    return torch.cat(parts, dim=1).flatten(1)


def _heads(block: Block, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of q [L, H, d], k and v [L, K, d] in their joint tensor."""
    widths = [heads * block.width for heads in (block.heads, block.kv_heads, block.kv_heads)]
    q, k, v = (part.unflatten(1, (-1, block.width)) for part in qkv.split(widths, dim=1))
    return q, k, v


def _room(like: torch.Tensor, length: int, projection: Projection, *, wide: bool = False) -> torch.Tensor:
    """Room for a projection's input and its inner values side by side, [n, in + R]; column-major if `wide`."""
    width = projection.inputs + projection.rank
    return like.new_empty(width, length).t() if wide else like.new_empty(length, width)


def _project(
    projection: Projection,
    joint: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    onto: torch.Tensor | None = None,
    wide: bool = False,
) -> torch.Tensor:
    """W x + bias + adapters (+ onto) of the input in `joint`, whose inner values are written beside it.

    Args:
        wide: give the result column-major: the same numbers, and a fifth faster where the output is wider
            than the input (the product splits along the longer side).
    """
    if projection.adapters:
        x = joint[:, : projection.inputs]
        torch.mm(x if mask is None else x * mask, projection.stacked_a.t(), out=joint[:, projection.inputs :])
        projection.refresh()
    if wide:
        y = torch.mm(projection.weight, joint.t()).t()
    elif onto is None:
        y = torch.mm(joint, projection.weight.t())
    else:
        y = torch.addmm(onto, joint, projection.weight.t())
    return y if projection.bias is None else y.add_(projection.bias)


def _project_backward(
    projection: Projection,
    grad: torch.Tensor,
    x: torch.Tensor,
    inner: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    needs_x: bool = True,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Gradient of the input x, and those of every adapter's A and B."""
    inputs, weight = projection.inputs, projection.weight
    if not needs_x:
        through = grad @ weight[:, inputs:]
        d_x = None
    else:
        both = torch.mm(grad, weight)
        d_x, through = both[:, :inputs], both[:, inputs:]
    if not projection.adapters:
        return d_x, []
    of_a = through.t() @ (x if mask is None else x * mask)
    if d_x is not None:
        if mask is None:
            d_x.addmm_(through, projection.stacked_a)
        else:
            d_x.addcmul_(through @ projection.stacked_a, mask)
    return d_x, _of_adapters(projection, of_a, grad, inner)


def _of_adapters(
    projection: Projection, of_a: torch.Tensor, grad: torch.Tensor, inner: torch.Tensor
) -> list[torch.Tensor]:
    """Gradients of every adapter's A and B, given that of all A stacked, [R, in]."""
    gradients = []
    for one in projection.adapters:
        of_b = (inner[:, one.ranks].t() @ grad[:, one.outputs]).t()  # twice as fast as the product of the transposed
        gradients.append(of_a[one.ranks].to(one.a.dtype))
        gradients.append((of_b * one.scaling).to(one.b.dtype))
    return gradients


def _mask(dropout: Dropout, block: Block, place: int, like: torch.Tensor) -> torch.Tensor | None:
    """The mask of a projection's input, if an adapter takes it, in the type of `like` and for its rows."""
    projection = (block.qkv, block.o, block.gate_up, block.down)[place]
    if not projection.adapters:
        return None
    inputs = projection.inputs
    return dropout.mask(4 * block.index + place, len(like), inputs, like, column_major=place == 3)


def _swiglu(gate_up: torch.Tensor, *, out: torch.Tensor) -> None:
    width = out.shape[1]
    torch.ops.aten.silu.out(gate_up[:, :width], out=out)
    out.mul_(gate_up[:, width:])


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor) -> torch.Tensor:
    """RMSNorm into `out`; 1 / sqrt(mean(x^2) + eps) in fp32, [L, 1]."""
    r = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    _normed(x, r, weight, out=out)
    return r


def _normed(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """RMSNorm of x, given r."""
    return torch.mul((x.float() * r).to(x.dtype), weight, out=out)


def _norm_backward(
    x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, *, onto: torch.Tensor
) -> torch.Tensor:
    """`onto` + the gradient of x; dx = r g - x r^3 mean(g * x) with g = weight * grad."""
    wide, g = x.float(), (grad * weight).float()
    dot = torch.linalg.vecdot(g, wide)[:, None].mul_(r.pow(3)).div_(-x.shape[-1])
    return g.mul_(r).addcmul_(wide, dot).add_(onto).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary position embedding of [L, heads, d] in place; with -sin its inverse. cos, sin: [L, d]."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    c, s = cos[:, None, :half], sin[:, None, :half]
    turned = torch.mul(second, c).addcmul_(first, s)
    first.mul_(c).addcmul_(second, s, value=-1)
    second.copy_(turned)
