"""LoRA as one operation: PEFT's layers and parameters, our forward and backward. For architectures whose
layers train/block.py does not know.

PEFT computes `W x + s·B(A(dropout(x)))` as half a dozen operations with as many temporaries; most of a
training step on a CPU is these layers. Here each is one autograd function with the same result.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners.lora import Linear

from heldout.train.dropout import Dropout


class _LoRA(torch.autograd.Function):
    """y = x Wᵀ + b + s·(x∘m Aᵀ) Bᵀ with W and b frozen and m a dropout mask (or None)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        # Masters are fp32; the products run in the base model's precision.
        low_a, low_b = a.to(flat.dtype), b.to(flat.dtype)
        dropped = flat if mask is None else flat * mask
        inner = dropped @ low_a.t()
        y = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        y.addmm_(inner, low_b.t(), alpha=scaling)
        ctx.save_for_backward(dropped, inner, low_a, low_b)
        ctx.weight, ctx.scaling, ctx.mask, ctx.shape = weight, scaling, mask, x.shape
        ctx.dtypes = (a.dtype, b.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        dropped, inner, low_a, low_b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        through_b = (flat @ low_b).mul_(ctx.scaling)
        grad_a = (through_b.t() @ dropped).to(ctx.dtypes[0])
        grad_b = (flat.t() @ inner).mul_(ctx.scaling).to(ctx.dtypes[1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = flat @ ctx.weight
            if ctx.mask is None:
                grad_x.addmm_(through_b, low_a)
            else:
                grad_x.addcmul_(through_b @ low_a, ctx.mask)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None, None


def fuse(model: torch.nn.Module, dropout: Dropout) -> None:
    """Give every PEFT LoRA layer of `model` our forward. Its parameters and its saved form stay PEFT's."""

    def forward(self: Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        (name,) = self.active_adapters
        base = self.base_layer
        flat = x.reshape(-1, x.shape[-1])
        return _LoRA.apply(
            x,
            base.weight,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            dropout.mask(places[self], len(flat), flat.shape[1], flat),
        )

    places = {module: place for place, module in enumerate(m for m in model.modules() if isinstance(m, Linear))}
    for module in places:
        module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
