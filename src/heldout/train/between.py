"""What lies between a decoder layer's products: norms, and the gated activation; forward and backward.

Each takes the dropout mask of the projection behind it, and gives that projection's adapters their masked input, in the
backward pass once more. With kernels each is one pass over memory; without, torch's operations. Shapes: n tokens, h or
F features.
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
    *,
    onto: torch.Tensor,
) -> torch.Tensor:
    """`onto` + the gradient of x, given that of RMSNorm(x).

    dx = r g - x r^3 mean(g * x) with g = weight * grad.
    """
    if kernels:
        return kernels.norm_backward(x, r, weight, grad, onto=onto)
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
    grad: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    masked: torch.Tensor | None,
) -> torch.Tensor:
    """Through act = silu(gate) * up; mask * act, cheaper to compute than to keep, goes into `masked`, [n, F], unless it
    is None.

    Args:
        gate_up: [n, 2 F].
        grad: of act, [n, F]; may be overwritten.
        mask: [n, F].

    Returns:
        The gradient of gate and up, [n, 2 F]. Without kernels all are column-major.
    """
    if kernels:
        return kernels.gated_backward(gate_up, grad, mask, masked=masked)
    width, masks = grad.shape[1], None if mask is None else mask.t()
    gates, ups = gate_up.t().split(width)
    grads, acts = grad.t(), None if masked is None else masked.t()
    found = torch.empty_like(gate_up.t())
    d_gates, d_ups = found.split(width)
    # By blocks of features that a processor's cache holds: each pass over all of them would read and write memory.
    blocks = max(1, math.ceil(grad.numel() / CACHED)) if grad.device.type == "cpu" else 1
    step = math.ceil(width / blocks)
    for start in range(0, width, step):
        rows = slice(start, start + step)
        gate, up, d = gates[rows], ups[rows], grads[rows]
        silu = F.silu(gate)
        if acts is not None:
            torch.mul(silu, up, out=acts[rows])
        if acts is not None and masks is not None:
            acts[rows].mul_(masks[rows])
        torch.mul(d, silu, out=d_ups[rows])
        torch.ops.aten.silu_backward.grad_input(d.mul_(up), gate, grad_input=d_gates[rows])
    return found.t()
