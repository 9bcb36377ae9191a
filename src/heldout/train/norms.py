"""RMSNorm as one operation: transformers computes it as six, each a pass over the activations."""

from __future__ import annotations

import types
from typing import Any

import torch

#: Classes whose forward is exactly `weight * x / sqrt(mean(x²) + variance_epsilon)`.
KNOWN = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


class _RMSNorm(torch.autograd.Function):
    """y = w ∘ x·r with r = 1/sqrt(mean(x²) + eps), over the last axis; w is frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, r = ctx.saved_tensors
        scaled = grad * weight
        # dx = r·g − x·r³·mean(g∘x), with g = w ∘ dy
        dot = (scaled * x).sum(dim=-1, keepdim=True).mul_(r.pow(3)).div_(-x.shape[-1])
        return scaled.mul_(r).addcmul_(x, dot), None, None


def fuse(model: torch.nn.Module) -> None:
    """Give every known RMSNorm of a float32 model our forward."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, self.variance_epsilon)

    for module in model.modules():
        if type(module).__name__ in KNOWN and module.weight.dtype == torch.float32:
            module.forward = types.MethodType(forward, module)
