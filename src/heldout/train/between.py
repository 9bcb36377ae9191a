"""What lies between a decoder layer's products: norms, and the gated activation; forward and backward.

Each takes the dropout mask of the projection behind it, and gives that projection's adapters their masked input. With
kernels each is one pass over memory; without, torch's operations. Shapes: n tokens, h or F features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from heldout.kernels import Kernels

#: Numbers in a block of activations of which a processor's cache holds a handful.
CACHED = 1 << 18


def norm(
    kernels: Kernels | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    mask: torch.Tensor | None,
    *,
    out: torch.Tensor,
    masked: torch.Tensor,
) -> torch.Tensor:
    """RMSNorm of x, [n, h], into `out`, and with a mask mask * out into `masked`, which is `out` without one.

    Returns:
        1 / sqrt(mean(x^2) + eps) in fp32, [n, 1].
    """
    if kernels:
        return kernels.norm(x, weight, eps, mask, out=out, masked=masked)
    r = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    torch.mul((x.float() * r).to(x.dtype), weight, out=out)
    if mask is not None:
        torch.mul(out, mask, out=masked)
    return r


def norm_again(
    kernels: Kernels | None, x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """mask * RMSNorm of x, given r: cheaper to compute than to keep."""
    if kernels:
        return kernels.norm_again(x, r, weight, mask)
    normed = (x.float() * r).to(x.dtype) * weight
    return normed if mask is None else normed.mul_(mask)


def norm_backward(
    kernels: Kernels | None,
    x: torch.Tensor,
    r: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
    more: torch.Tensor | None,
    mask: torch.Tensor | None,
    *,
    onto: torch.Tensor,
) -> torch.Tensor:
    """`onto` + the gradient of x, given that of RMSNorm(x), which is grad + mask * more (written to `grad` or not).

    dx = r g - x r^3 mean(g * x) with g = weight * (grad + mask * more).
    """
    if kernels:
        return kernels.norm_backward(x, r, weight, grad, more, mask, onto=onto)
    if more is not None and mask is not None:
        grad = grad.addcmul_(more, mask)
    wide, g = x.float(), (grad * weight).float()
    dot = torch.linalg.vecdot(g, wide)[:, None].mul_(r.pow(3)).div_(-x.shape[-1])
    return g.mul_(r).addcmul_(wide, dot).add_(onto).to(x.dtype)


def gated(
    kernels: Kernels | None,
    gate_up: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    out: torch.Tensor,
    masked: torch.Tensor,
) -> None:
    """silu(gate) * up into `out`, [n, F], and with a mask mask * out into `masked`, which is `out` without one;
    gate_up [n, 2 F]. Without kernels all are column-major."""
    if kernels:
        kernels.gated(gate_up, mask, out=out, masked=masked)
        return
    width = out.shape[1]
    torch.ops.aten.silu.out(gate_up[:, :width], out=out)
    out.mul_(gate_up[:, width:])
    if mask is not None:
        torch.mul(out, mask, out=masked)


def gated_backward(
    kernels: Kernels | None,
    gate_up: torch.Tensor,
    both: torch.Tensor,
    a: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Through y = W act + s B A (mask * act) with act = silu(gate) * up. Without kernels all but `a` are column-major.

    Args:
        gate_up: [n, 2 F].
        both: [n, F + r], may be overwritten: W' grad and, beside it, (s B)' grad.
        a: [r, F]; r may be 0.
        mask: [n, F].

    Returns:
        The gradient of gate and up, [n, 2 F], and that of A, [r, F].
    """
    if kernels:
        return kernels.gated_backward(gate_up, both, a, mask)
    ranks, width = a.shape
    both, a, masks = both.t(), a.t(), None if mask is None else mask.t()
    gates, ups = gate_up.t().split(width)
    d_act, through = both[:width], both[width:]
    d_gate_up = torch.empty_like(gate_up.t())
    d_gates, d_ups = d_gate_up.split(width)
    of_a = both.new_empty(width, ranks)
    # By blocks of features that a processor's cache holds: each pass over all of them would read and write memory.
    blocks = max(1, math.ceil(width * both.shape[1] / CACHED)) if both.device.type == "cpu" else 1
    step = math.ceil(width / blocks)
    for start in range(0, width, step):
        rows = slice(start, start + step)
        gate, up, d = gates[rows], ups[rows], d_act[rows]
        silu = F.silu(gate)
        if ranks:
            act = silu * up
            if masks is None:
                torch.mm(act, through.t(), out=of_a[rows])
                d.addmm_(a[rows], through)
            else:
                torch.mm(act.mul_(masks[rows]), through.t(), out=of_a[rows])
                d.addcmul_(torch.mm(a[rows], through, out=act), masks[rows])
        torch.mul(d, silu, out=d_ups[rows])
        torch.ops.aten.silu_backward.grad_input(d.mul_(up), gate, grad_input=d_gates[rows])
    return d_gate_up.t(), of_a.t()
