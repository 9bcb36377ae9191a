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

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear

from heldout.train import between
from heldout.train.attention import Angles, Attended, Attention
from heldout.train.dropout import Dropout
from heldout.train.kernels import Kernels
from heldout.train.layout import Layout
from heldout.train.rounding import padded


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
        if not self.adapters:
            return self.weight.new_empty(0, self.inputs)
        return torch.cat([one.a.data for one in self.adapters]).to(self.weight.dtype)

    def input_of(self, joint: torch.Tensor) -> torch.Tensor:
        """The input in a room for it and its inner values."""
        return joint[:, : self.inputs]

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
    attention: Attention
    kernels: Kernels | None

    @staticmethod
    def of(layer: Any, index: int, kernels: Kernels | None = None) -> Block:
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
            attention=Attention(
                heads=attention.q_proj.out_features // width,
                kv_heads=attention.k_proj.out_features // width,
                width=width,
                scale=attention.scaling,
                kernels=kernels,
            ),
            kernels=kernels,
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
        return _forward(self, x, layout, angles, dropout, rows)[0]


@dataclass
class _Kept:
    """What the backward pass needs of the forward pass. Inputs of projections that are a pass over memory away from
    something else that is kept are computed again; inner values are those of a projection's adapters."""

    r1: torch.Tensor
    a_inner: torch.Tensor  # [L, R], of q, k and v
    attention: Attended
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
        angles: Angles,
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
    angles: Angles,
    dropout: Dropout,
    rows: torch.Tensor | None,
) -> tuple[torch.Tensor, _Kept]:
    kernels = block.kernels
    a = _room(x, len(x), block.qkv)
    r1, masked = between.norm(
        kernels, x, block.norms[0], block.eps, _mask(dropout, block, 0, x), out=block.qkv.input_of(a)
    )
    qkv = _project(block.qkv, a, masked)
    attended, attention = block.attention.forward(qkv, layout, angles)
    residual, attended = (one if rows is None else padded(one[rows]) for one in (x, attended))
    o = _room(x, len(residual), block.o)
    block.o.input_of(o).copy_(attended)
    mask = _mask(dropout, block, 1, o)
    h = _project(block.o, o, block.o.input_of(o) if mask is None else attended * mask, onto=residual)
    b = _room(x, len(h), block.gate_up)
    mask = _mask(dropout, block, 2, b)
    r2, masked = between.norm(kernels, h, block.norms[1], block.eps, mask, out=block.gate_up.input_of(b))
    gate_up = _project(block.gate_up, b, masked, wide=True)
    act = _room(x, len(h), block.down, wide=True)
    masked = between.gated(kernels, gate_up, _mask(dropout, block, 3, act), out=block.down.input_of(act))
    y = _project(block.down, act, masked, onto=h)
    return y, _Kept(
        r1=r1,
        a_inner=a[:, block.qkv.inputs :].clone(),
        attention=attention,
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
    angles: Angles,
    dropout: Dropout,
    rows: torch.Tensor | None,
    *,
    needs_x: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Gradient of x (None unless `needs_x`) and those of `block.parameters`."""
    kernels, down = block.kernels, block.down
    both = torch.mm(down.weight.t(), grad.t())  # features are rows here: blocks of them lie in one piece
    mask = _mask(dropout, block, 3, grad)
    d_gate_up, of_a = between.gated_backward(kernels, kept.gate_up, both, down.stacked_a.t(), mask)
    of_down = _of_adapters(down, of_a, grad, kept.act_inner)
    mask = _mask(dropout, block, 2, grad)
    b = between.norm_again(kernels, kept.h, kept.r2, block.norms[1], mask)
    d_b, more, of_gate_up = _project_backward(block.gate_up, d_gate_up, b, kept.b_inner, mask)
    assert d_b is not None
    d_h = between.norm_backward(kernels, kept.h, kept.r2, block.norms[1], d_b, more, mask, onto=grad)
    o, mask = block.o.input_of(kept.o), _mask(dropout, block, 1, grad)
    d_o, more, of_o = _project_backward(
        block.o, d_h, o if mask is None else o * mask, kept.o[:, block.o.inputs :], mask
    )
    assert d_o is not None
    if more is not None and mask is not None:
        d_o.addcmul_(more, mask)
    if rows is not None:
        d_o = d_o.new_zeros(len(x), d_o.shape[1]).index_copy_(0, rows, d_o[: len(rows)])
        d_h = d_h.new_zeros(x.shape).index_copy_(0, rows, d_h[: len(rows)])
    d_qkv = block.attention.backward(d_o, kept.attention, layout, angles)
    mask = _mask(dropout, block, 0, x)
    a = between.norm_again(kernels, x, kept.r1, block.norms[0], mask)
    d_a, more, of_qkv = _project_backward(block.qkv, d_qkv, a, kept.a_inner, mask, needs_x=needs_x)
    d_x = None
    if d_a is not None:
        d_x = between.norm_backward(kernels, x, kept.r1, block.norms[0], d_a, more, mask, onto=d_h)
    return d_x, [*of_qkv, *of_o, *of_gate_up, *of_down]


def _room(like: torch.Tensor, length: int, projection: Projection, *, wide: bool = False) -> torch.Tensor:
    """Room for a projection's input and its inner values side by side, [n, in + R]; column-major if `wide`."""
    width = projection.inputs + projection.rank
    return like.new_empty(width, length).t() if wide else like.new_empty(length, width)


def _project(
    projection: Projection,
    joint: torch.Tensor,
    masked: torch.Tensor,
    *,
    onto: torch.Tensor | None = None,
    wide: bool = False,
) -> torch.Tensor:
    """W x + bias + adapters (+ onto) of the input in `joint`, whose inner values are written beside it.

    Args:
        masked: what the adapters take, [n, in].
        wide: give the result column-major: the same numbers, and a fifth faster where the output is wider
            than the input (the product splits along the longer side).
    """
    if projection.adapters:
        torch.mm(masked, projection.stacked_a.t(), out=joint[:, projection.inputs :])
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
    masked: torch.Tensor,
    inner: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    needs_x: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor]]:
    """Gradient of the input x in two parts, and those of every adapter's A and B. The gradient is the first part plus
    mask times the second, which is None where there is nothing to be masked."""
    inputs, weight = projection.inputs, projection.weight
    if not needs_x:
        through = grad @ weight[:, inputs:]
        d_x = None
    else:
        both = torch.mm(grad, weight)
        d_x, through = both[:, :inputs], both[:, inputs:]
    if not projection.adapters:
        return d_x, None, []
    of_a = through.t() @ masked
    more = None
    if d_x is not None and mask is None:
        d_x.addmm_(through, projection.stacked_a)
    elif d_x is not None:
        more = through @ projection.stacked_a
    return d_x, more, _of_adapters(projection, of_a, grad, inner)


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
