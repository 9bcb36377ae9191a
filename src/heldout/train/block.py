"""One decoder layer of the Llama family as one operation, forward and backward.

Left to autograd, a layer with LoRA is some seventy operations, each with its own temporaries, copies and
gradient sums; on two cores they cost as much as the products. Written as one, the products are the step:
q, k and v are one product and so are gate and up, what the backward pass needs is kept and nothing else,
and the adapters' gradients are computed where their inputs are at hand.

    a = rmsnorm(x);  h = x + o(attention(rope(q(a)), rope(k(a)), v(a)))
    b = rmsnorm(h);  y = h + down(silu(gate(b)) * up(b))

where each of q, k, v, o, gate, up, down is W x + bias, plus s B A (m * x) if it has an adapter; m is a
dropout mask, one for all projections of the same input.

Where kernels multiply with the base weights, and attend with heads of this width, the whole layer is one call of
theirs (kernels/block.py). What follows here is the same by torch's operations, with kernels for those between the
products where there are some.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from heldout.kernels import Kernels
from heldout.kernels.block import Heads
from heldout.kernels.block import Kept as WholeKept
from heldout.kernels.block import Layer as WholeLayer
from heldout.kernels.block import Pack as WholePack
from heldout.kernels.block import Product as WholeProduct
from heldout.train import between
from heldout.train.attention import Angles, Attended, Attention
from heldout.train.dropout import Dropout
from heldout.train.layout import Layout
from heldout.train.products import Held
from heldout.train.projection import Projection, Scratch
from heldout.train.rounding import padded


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
    attention: Attention
    kernels: Kernels | None
    scratch: Scratch
    whole: WholeLayer | None = None  # of kernels that compute it in one call

    @staticmethod
    def of(layer: Any, index: int, kernels: Kernels | None, scratch: Scratch) -> Block:
        """Take over a layer of transformers (with PEFT's layers inside, or without). `scratch`: that of all layers."""
        attention, mlp = layer.self_attn, layer.mlp
        width = attention.head_dim
        qkv = Projection.of(attention.q_proj, attention.k_proj, attention.v_proj)
        block = Block(
            index=index,
            qkv=qkv,
            o=Projection.of(attention.o_proj),
            gate_up=Projection.of(mlp.gate_proj, mlp.up_proj),
            down=Projection.of(mlp.down_proj),
            norms=(layer.input_layernorm.weight.data, layer.post_attention_layernorm.weight.data),
            eps=layer.input_layernorm.variance_epsilon,
            attention=Attention(
                heads=attention.q_proj.out_features // width,
                kv_heads=attention.k_proj.out_features // width,
                width=width,
                scale=attention.scaling,
                kernels=kernels,
            ),
            kernels=kernels,
            scratch=scratch,
        )
        return replace(block, whole=block._in_one_call())

    @property
    def wide(self) -> bool:
        """Whether what the gated activation takes and gives is column-major: blocks of features in one piece are what
        torch's operations work on; kernels take tokens row by row."""
        return self.kernels is None

    @property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """A and B of every adapter, in a fixed order."""
        return tuple(parameter for each in self.projections for one in each.adapters for parameter in (one.a, one.b))

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Those of q, k and v; o; gate and up; down."""
        return self.qkv, self.o, self.gate_up, self.down

    def _in_one_call(self) -> WholeLayer | None:
        """The layer as kernels compute it, where they hold all of its weights."""
        products = [
            WholeProduct(one.weights.frozen, one.bias, one.adapters, one.stacked, one.weights.beside)
            for one in self.projections
            if isinstance(one.weights, Held)
        ]
        attention = self.attention
        if self.kernels is None or len(products) < len(self.projections) or not self.kernels.attends(attention.width):
            return None
        heads = Heads(heads=attention.heads, kv_heads=attention.kv_heads, width=attention.width, scale=attention.scale)
        return WholeLayer(self.kernels, products, self.norms, self.eps, heads)

    def __call__(
        self,
        x: torch.Tensor,
        layout: Layout,
        angles: Angles,
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
        return _forward(self, x, layout, angles, dropout, rows, keep=False)[0]


@dataclass
class _Kept:
    """What the backward pass needs of the forward pass. Inputs of projections that are a pass over memory away from
    something else that is kept are computed again; inner values are those of a projection's adapters."""

    r1: torch.Tensor
    a_inner: torch.Tensor  # [L, R], of q, k and v
    attention: Attended
    o: torch.Tensor  # attention's result, in the room that it was multiplied in
    o_inner: torch.Tensor
    h: torch.Tensor
    r2: torch.Tensor
    b_inner: torch.Tensor  # [L, R], of gate and up
    gate_up: torch.Tensor  # [L, 2 F], column-major if wide
    act_inner: torch.Tensor  # [L, r], of down


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        block: Block,
        layout: Layout,
        angles: Angles,
        dropout: Dropout,
        rows: torch.Tensor | None,
        checkpoint: bool,
        *parameters: torch.nn.Parameter,
    ) -> torch.Tensor:
        y, kept = _forward(block, x, layout, angles, dropout, rows, keep=not checkpoint)
        ctx.save_for_backward(x)
        ctx.kept = None if checkpoint else kept
        ctx.call = (block, layout, angles, dropout.frozen(), rows)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        block, layout, angles, dropout, rows = ctx.call
        kept = ctx.kept
        if kept is None:
            kept = _forward(block, x, layout, angles, dropout, rows)[1]
        ctx.kept = None  # what this layer kept is free for the next one
        needs_x = ctx.needs_input_grad[0]
        d_x, gradients = _backward(block, x, grad, kept, layout, angles, dropout, rows, needs_x=needs_x)
        return (d_x, None, None, None, None, None, None, *gradients)


def _forward(
    block: Block,
    x: torch.Tensor,
    layout: Layout,
    angles: Angles,
    dropout: Dropout,
    rows: torch.Tensor | None,
    *,
    keep: bool = True,
) -> tuple[torch.Tensor, _Kept | WholeKept | None]:
    """The layer's result, and what the backward pass needs to know; it may be None unless `keep`."""
    if block.whole:
        pack = _whole_pack(block, x, layout, angles, dropout, rows)
        return block.whole.forward(x, pack, block.scratch, keep=keep)
    kernels, wide, scratch = block.kernels, block.wide, block.scratch
    joint = block.qkv.room(x, len(x), scratch=scratch)
    a, mask = block.qkv.input_of(joint), _mask(dropout, block, 0, x)
    masked = _masked(a, mask, scratch)
    r1 = between.norm(kernels, x, block.norms[0], block.eps, mask, out=a, masked=masked)
    qkv, a_inner = block.qkv.forward(joint, masked)
    residual = x if rows is None else padded(x[rows])
    joint = block.o.room(x, len(residual))
    o, mask = block.o.input_of(joint), _mask(dropout, block, 1, residual)
    attended, attention = block.attention.forward(qkv, layout, angles, room=o if rows is None else None)
    if attended is not o:
        o.copy_(attended if rows is None else padded(attended[rows]))
    masked = _masked(o, mask, scratch)
    masked = masked if mask is None else torch.mul(o, mask, out=masked)
    h, o_inner = block.o.forward(joint, masked, onto=residual)
    joint = block.gate_up.room(x, len(h), scratch=scratch)
    b, mask = block.gate_up.input_of(joint), _mask(dropout, block, 2, h)
    masked = _masked(b, mask, scratch)
    r2 = between.norm(kernels, h, block.norms[1], block.eps, mask, out=b, masked=masked)
    gate_up, b_inner = block.gate_up.forward(joint, masked, wide=wide)
    joint = block.down.room(x, len(h), wide=wide, scratch=scratch)
    act, mask = block.down.input_of(joint), _mask(dropout, block, 3, h)
    masked = _masked(act, mask, scratch)
    between.gated(kernels, gate_up, mask, out=act, masked=masked)
    y, act_inner = block.down.forward(joint, masked, onto=h)
    return y, _Kept(
        r1=r1,
        a_inner=a_inner,
        attention=attention,
        o=o,
        o_inner=o_inner,
        h=h,
        r2=r2,
        b_inner=b_inner,
        gate_up=gate_up,
        act_inner=act_inner,
    )


def _backward(
    block: Block,
    x: torch.Tensor,
    grad: torch.Tensor,
    kept: _Kept | WholeKept | None,
    layout: Layout,
    angles: Angles,
    dropout: Dropout,
    rows: torch.Tensor | None,
    *,
    needs_x: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Gradient of x (None unless `needs_x`) and those of `block.parameters`."""
    if block.whole:
        assert isinstance(kept, WholeKept)
        return block.whole.backward(x, grad.contiguous(), kept, block.scratch, needs_x=needs_x)
    assert isinstance(kept, _Kept)
    kernels, scratch = block.kernels, block.scratch
    mask = _mask(dropout, block, 3, grad)
    d_act, through = block.down.backward(grad, mask, wide=block.wide)
    assert d_act is not None
    act = scratch.like("masked", d_act) if block.down.adapters else None
    d_gate_up = between.gated_backward(kernels, kept.gate_up, d_act, mask, masked=act)
    of_down = [] if act is None else block.down.gradients(act, grad, kept.act_inner, through)
    mask = _mask(dropout, block, 2, grad)
    d_b, through = block.gate_up.backward(d_gate_up, mask)
    assert d_b is not None
    b = between.norm_again(kernels, kept.h, kept.r2, block.norms[1], mask)
    of_gate_up = block.gate_up.gradients(b, d_gate_up, kept.b_inner, through)
    d_h = between.norm_backward(kernels, kept.h, kept.r2, block.norms[1], d_b, onto=grad)
    mask = _mask(dropout, block, 1, grad)
    d_o, through = block.o.backward(d_h, mask)
    assert d_o is not None
    of_o = block.o.gradients(kept.o if mask is None else kept.o * mask, d_h, kept.o_inner, through)
    if rows is not None:
        d_o = d_o.new_zeros(len(x), d_o.shape[1]).index_copy_(0, rows, d_o[: len(rows)])
        d_h = d_h.new_zeros(x.shape).index_copy_(0, rows, d_h[: len(rows)])
    d_qkv = block.attention.backward(d_o, kept.attention, layout, angles)
    mask = _mask(dropout, block, 0, x)
    d_a, through = block.qkv.backward(d_qkv, mask, needs_x=needs_x)
    a = between.norm_again(kernels, x, kept.r1, block.norms[0], mask)
    of_qkv = block.qkv.gradients(a, d_qkv, kept.a_inner, through)
    d_x = None if d_a is None else between.norm_backward(kernels, x, kept.r1, block.norms[0], d_a, onto=d_h)
    return d_x, [*of_qkv, *of_o, *of_gate_up, *of_down]


def _whole_pack(
    block: Block, x: torch.Tensor, layout: Layout, angles: Angles, dropout: Dropout, rows: torch.Tensor | None
) -> WholePack:
    after = x if rows is None else x[: len(rows)]
    masks = [_mask(dropout, block, place, like) for place, like in enumerate((x, after, after, after))]
    return WholePack(layout, angles, rows, masks)


def _masked(x: torch.Tensor, mask: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
    """Where mask * x goes: x itself without a mask."""
    return x if mask is None else scratch.like("masked", x)


def _mask(dropout: Dropout, block: Block, place: int, like: torch.Tensor) -> torch.Tensor | None:
    """The mask of a projection's input, if an adapter takes it, in the type of `like` and for its rows."""
    projection = block.projections[place]
    if not projection.adapters:
        return None
    inputs = projection.inputs
    return dropout.mask(4 * block.index + place, len(like), inputs, like, column_major=place == 3 and block.wide)
