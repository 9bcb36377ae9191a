"""Attention for packed micro-batches: the common prefix once, then every example's own tokens.

A packed sequence is `prefix | own tokens of example 1 | own tokens of example 2 | …`. Tokens of the
prefix attend causally to the prefix; tokens of an example attend to the whole prefix and causally to
their own example, never to another one. Positions restart after the prefix (`Layout.position_ids`), so
the result equals running every example alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

IMPLEMENTATION = "heldout_shared_prefix"

#: Attention weights of one layer that may be kept for the backward pass, in numbers (16 MiB).
KEPT_SCORES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each token of one packed sequence belongs.

    Sizes: P prefix tokens, B examples, S = the longest example's own tokens, L = P + all own tokens.
    """

    prefix: int
    position_ids: torch.Tensor  # [1, L]
    gather: torch.Tensor  # [B * S] packed positions of own tokens, padded with position 0
    scatter: torch.Tensor  # [L - P] where the packed own tokens lie in [B * S]
    own: torch.Tensor  # [B, S] True where a token is real
    mask: torch.Tensor  # [B, 1, S, P + S] True where a query may look

    @staticmethod
    def of(prefix: int, lengths: list[int]) -> Layout:
        """The layout of one packed sequence.

        Args:
            prefix: tokens shared by all examples (may be 0).
            lengths: number of own tokens of each example, all at least 1.
        """
        longest = max(lengths)
        steps = torch.arange(longest)
        own = steps[None, :] < torch.tensor(lengths)[:, None]
        starts = prefix + torch.tensor([0, *lengths[:-1]]).cumsum(0)
        gather = torch.where(own, starts[:, None] + steps[None, :], 0)
        positions = [torch.arange(prefix), *(torch.arange(prefix, prefix + n) for n in lengths)]
        # A padded query looks at the prefix and at padding before it: never at nothing (softmax of
        # nothing is NaN), and its output is dropped.
        causal = steps[:, None] >= steps[None, :]
        mask = F.pad(causal, (prefix, 0), value=True).expand(len(lengths), 1, longest, prefix + longest)
        return Layout(
            prefix=prefix,
            position_ids=torch.cat(positions)[None],
            gather=gather.flatten(),
            scatter=own.flatten().nonzero()[:, 0],
            own=own,
            mask=mask.contiguous(),
        )

    def to(self, device: torch.device) -> Layout:
        """The same layout with its tensors on `device`."""
        return Layout(
            prefix=self.prefix,
            position_ids=self.position_ids.to(device),
            gather=self.gather.to(device),
            scatter=self.scatter.to(device),
            own=self.own.to(device),
            mask=self.mask.to(device),
        )


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over one packed sequence, in the shape transformers asks of an attention function.

    Args:
        query: [1, heads, L, head_dim]; key, value: [1, kv_heads, L, head_dim].
        layout: the packed sequence's layout, handed through the model's forward.

    Returns:
        [1, L, heads, head_dim], and no attention weights.
    """
    if layout is None:
        raise ValueError("this model does not hand extra arguments to its attention; it cannot be packed")
    if dropout:
        raise ValueError("attention dropout is not supported in packed training")
    (batch, longest), prefix = layout.own.shape, layout.prefix
    if sliding_window is not None and prefix + longest > sliding_window:
        raise ValueError(f"examples of {prefix + longest} tokens exceed the sliding window of {sliding_window}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = query.shape[1] * (batch * longest * (prefix + longest) + prefix * prefix)
    # Small scores are kept for the backward pass; large ones are computed again block by block.
    if query.device.type == "cpu" and query.dtype == torch.float32 and scores <= KEPT_SCORES:
        return _Attention.apply(query[0], key[0], value[0], layout, scale)[None], None
    return _flash(query, key, value, layout, scale), None


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float) -> torch.Tensor:
    """By torch's own fused attention, twice: the prefix, and all examples over prefix and themselves."""
    (batch, longest), prefix = layout.own.shape, layout.prefix
    groups = query.shape[1] // key.shape[1]

    def own(x: torch.Tensor) -> torch.Tensor:  # [1, h, L, d] -> [B, h, S, d]
        _, heads, _, width = x.shape
        return x[0].index_select(1, layout.gather).view(heads, batch, longest, width).transpose(0, 1)

    def repeat(x: torch.Tensor) -> torch.Tensor:  # kv_heads -> heads
        return x if groups == 1 else x.repeat_interleave(groups, dim=1)

    def with_prefix(x: torch.Tensor) -> torch.Tensor:  # [B, h, P + S, d]
        return repeat(torch.cat([x[:, :, :prefix].expand(batch, -1, -1, -1), own(x)], dim=2))

    attended = F.scaled_dot_product_attention(
        own(query), with_prefix(key), with_prefix(value), attn_mask=layout.mask, scale=scale
    )
    packed = attended.transpose(1, 2)[layout.own]  # [L - P, heads, head_dim], in packed order
    if prefix:
        head = F.scaled_dot_product_attention(
            query[:, :, :prefix],
            repeat(key[:, :, :prefix]),
            repeat(value[:, :, :prefix]),
            is_causal=True,
            scale=scale,
        )
        packed = torch.cat([head[0].transpose(0, 1), packed])
    return packed[None]


class _Attention(torch.autograd.Function):
    """The same by plain products, with a backward of our own.

    Left to autograd, every slice and gather of a layer comes back as a tensor of zeros to be filled and
    added; that cost as much as the products. Heads that share keys are rows of one product, so keys are
    never repeated, and the prefix is never copied for an example.

    Sizes: H heads, K kv_heads, G = H / K, d head_dim; otherwise as in Layout.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
    ) -> torch.Tensor:
        (heads, _, width), kv_heads = q.shape, k.shape[0]
        sizes = _Sizes(layout, heads, kv_heads, width)
        p = layout.prefix
        q_own, k_own, v_own = sizes.rows(q, layout), sizes.rows(k, layout), sizes.rows(v, layout)
        k_pre, v_pre = k[:, :p].contiguous(), v[:, :p].contiguous()
        scores = q.new_empty(kv_heads, sizes.batch, sizes.group * sizes.longest, p + sizes.longest)
        if p:
            scores[..., :p] = torch.bmm(sizes.flat(q_own), k_pre.transpose(1, 2)).view(scores[..., :p].shape)
        scores[..., p:] = torch.matmul(q_own, k_own.transpose(2, 3))
        by_query = scores.view(kv_heads, sizes.batch, sizes.group, sizes.longest, -1)
        by_query[..., p:].masked_fill_(_future(sizes.longest, q.device), -math.inf)
        weights = torch.softmax(scores.mul_(scale), dim=-1)
        out_own = torch.matmul(weights[..., p:], v_own)
        if p:
            w_pre = weights[..., :p].reshape(kv_heads, -1, p)
            out_own += torch.bmm(w_pre, v_pre).view_as(out_own)
        out = q.new_empty(q.shape[1], heads, width)
        out[p:] = sizes.packed(out_own, layout).transpose(0, 1)
        w_head = q.new_empty(0)
        if p:
            q_pre = q[:, :p].reshape(kv_heads, sizes.group * p, width)
            head = torch.bmm(q_pre, k_pre.transpose(1, 2)).mul_(scale)
            head.view(kv_heads, sizes.group, p, p).masked_fill_(_future(p, q.device), -math.inf)
            w_head = torch.softmax(head, dim=-1)
            out[:p] = torch.bmm(w_head, v_pre).view(heads, p, width).transpose(0, 1)
            ctx.save_for_backward(q_own, k_own, v_own, weights, k_pre, v_pre, q_pre, w_head)
        else:
            ctx.save_for_backward(q_own, k_own, v_own, weights)
        ctx.sizes, ctx.layout, ctx.scale = sizes, layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q_own, k_own, v_own, weights, *prefix = ctx.saved_tensors
        sizes, layout, scale = ctx.sizes, ctx.layout, ctx.scale
        p, kv_heads = layout.prefix, sizes.kv_heads
        by_head = grad.transpose(0, 1)  # [H, L, d]
        g_own = sizes.rows(by_head, layout)
        d_weights = torch.empty_like(weights)
        d_weights[..., p:] = torch.matmul(g_own, v_own.transpose(2, 3))
        if p:
            k_pre, v_pre, q_pre, w_head = prefix
            g_flat = sizes.flat(g_own)
            d_weights[..., :p] = torch.bmm(g_flat, v_pre.transpose(1, 2)).view(d_weights[..., :p].shape)
        d_scores = _softmax_backward(weights, d_weights, scale)
        # A padded query was gathered from position 0 and its gradient too: neither may count.
        if sizes.padded:
            real = layout.own[None, :, None, :, None]
            shape = (kv_heads, sizes.batch, sizes.group, sizes.longest, -1)
            d_scores = (d_scores.view(shape) * real).view_as(d_scores)
            weights = (weights.view(shape) * real).view_as(weights)
        d_q = torch.matmul(d_scores[..., p:], k_own)
        d_k = torch.matmul(d_scores[..., p:].transpose(2, 3), q_own)
        d_v = torch.matmul(weights[..., p:].transpose(2, 3), g_own)
        if not p:
            return (*(sizes.packed(one, layout) for one in (d_q, d_k, d_v)), None, None)
        s_pre = d_scores[..., :p].reshape(kv_heads, -1, p)
        w_pre = weights[..., :p].reshape(kv_heads, -1, p)
        d_q += torch.bmm(s_pre, k_pre).view_as(d_q)
        g_pre = by_head[:, :p].reshape(kv_heads, sizes.group * p, sizes.width)
        s_head = _softmax_backward(w_head, torch.bmm(g_pre, v_pre.transpose(1, 2)), scale)
        d_k_pre = torch.bmm(s_pre.transpose(1, 2), sizes.flat(q_own)).baddbmm_(s_head.transpose(1, 2), q_pre)
        d_v_pre = torch.bmm(w_pre.transpose(1, 2), g_flat).baddbmm_(w_head.transpose(1, 2), g_pre)
        d_q_pre = torch.bmm(s_head, k_pre).view(sizes.heads, p, sizes.width)
        return (
            torch.cat([d_q_pre, sizes.packed(d_q, layout)], dim=1),
            torch.cat([d_k_pre, sizes.packed(d_k, layout)], dim=1),
            torch.cat([d_v_pre, sizes.packed(d_v, layout)], dim=1),
            None,
            None,
        )


class _Sizes:
    """The shapes of one call, and the two moves between packed tokens and rows of examples."""

    def __init__(self, layout: Layout, heads: int, kv_heads: int, width: int) -> None:
        self.batch, self.longest = layout.own.shape
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.group = heads // kv_heads
        self.padded = len(layout.scatter) < self.batch * self.longest

    def rows(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """[h, L, d] -> [K, B, (h / K)·S, d], padding filled with whatever lies at position 0."""
        rows = x.index_select(1, layout.gather).view(self.kv_heads, -1, self.batch, self.longest, self.width)
        return rows.transpose(1, 2).reshape(self.kv_heads, self.batch, -1, self.width)

    def packed(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """[K, B, g·S, d] -> [K·g, L - P, d], padding dropped."""
        rows = x.reshape(self.kv_heads, self.batch, -1, self.longest, self.width).transpose(1, 2)
        return rows.reshape(-1, self.batch * self.longest, self.width).index_select(1, layout.scatter)

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """[K, B, n, d] -> [K, B·n, d]."""
        return x.reshape(self.kv_heads, -1, self.width)


def _future(n: int, device: torch.device) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).triu_(1)


def _softmax_backward(weights: torch.Tensor, grad: torch.Tensor, scale: float) -> torch.Tensor:
    """Gradient of the scores before scaling, given that of their softmax; `grad` is overwritten."""
    dot = (weights * grad).sum(dim=-1, keepdim=True)
    return grad.sub_(dot).mul_(weights).mul_(scale)


AttentionInterface.register(IMPLEMENTATION, shared_prefix_attention)
