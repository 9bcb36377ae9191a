"""Attention for packed micro-batches: every token looks at its own path through the prefix tree (train/layout.py).

With kernels one pass from the joint queries, keys and values to the result. Without, by plain products of padded
groups, whose weights are kept for the backward pass; or by torch's fused attention where they would be too many, and on
a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from heldout.kernels import Kernels
from heldout.train.layout import Group, Layout

IMPLEMENTATION = "heldout_prefix_tree"

#: Attention weights of one layer that may be kept for the backward pass, in numbers (16 MiB).
KEPT_SCORES = 1 << 22

#: Cosines and sines of the packed positions, [L, d] each.
Angles = tuple[torch.Tensor, torch.Tensor]


class Kept(NamedTuple):
    """What the backward pass of one group needs. K kv_heads, B rows, n = slots x queries per key head."""

    q: torch.Tensor  # [K, B, n, d]
    k: torch.Tensor  # [K, B, S, d]
    v: torch.Tensor  # [K, B, S, d]
    weights: torch.Tensor  # [K, B, n, M + S]


@dataclass(frozen=True, kw_only=True)
class Attended:
    """What attention's backward pass needs: one of the two, and the joint tensor unless scores are kept."""

    qkv: torch.Tensor | None = None  # with kernels as it came, else turned
    log_sums: torch.Tensor | None = None
    scores: list[Kept] | None = None


@dataclass(frozen=True, kw_only=True)
class Attention:
    """H heads of d, K key heads."""

    heads: int
    kv_heads: int
    width: int
    scale: float
    kernels: Kernels | None = None  # used for the widths they are for

    @property
    def attending(self) -> Kernels | None:
        """The kernels, if they are for heads of this width."""
        return self.kernels if self.kernels and self.kernels.attends(self.width) else None

    def forward(
        self, qkv: torch.Tensor, layout: Layout, angles: Angles | None, *, room: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Attended]:
        """[L, (H + 2 K) d] -> [L, H d], in `room` if there is one and kernels attend. With angles queries and keys are
        turned by them first, in place or not."""
        if kernels := self.attending:
            out = qkv.new_empty(len(qkv), self.heads * self.width) if room is None else room
            log_sums = kernels.attend(qkv, (self.heads, self.kv_heads), layout, angles, self.scale, out)
            return out, Attended(qkv=qkv, log_sums=log_sums)
        if angles:
            self._turn(qkv, *angles)
        q, k, v = self._parts(qkv)
        if keeps_scores(q, layout):
            out, scores = attend(q, k, v, layout, self.scale)
            return out.flatten(1), Attended(scores=scores)
        return attend_anew(q, k, v, layout, self.scale).reshape(len(qkv), -1), Attended(qkv=qkv)

    def backward(self, grad: torch.Tensor, kept: Attended, layout: Layout, angles: Angles | None) -> torch.Tensor:
        """The gradient of `qkv`, given that of the result."""
        if kept.log_sums is not None:
            assert self.kernels is not None
            assert kept.qkv is not None
            heads = (self.heads, self.kv_heads)
            return self.kernels.attend_backward(kept.qkv, heads, layout, angles, self.scale, grad, kept.log_sums)
        by_head = grad.reshape(len(grad), self.heads, -1)
        if kept.scores is not None:
            d_qkv = attend_backward(by_head, kept.scores, layout, self.scale).flatten(1)
        else:
            assert kept.qkv is not None
            with torch.enable_grad():
                q, k, v = (one.detach().requires_grad_() for one in self._parts(kept.qkv))
                parts = torch.autograd.grad(attend_anew(q, k, v, layout, self.scale), (q, k, v), by_head)
            d_qkv = torch.cat(parts, dim=1).flatten(1)
        if angles:
            self._turn(d_qkv, angles[0], -angles[1])
        return d_qkv

    def _parts(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of q [L, H, d], k and v [L, K, d] in their joint tensor."""
        widths = [heads * self.width for heads in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (part.unflatten(1, (-1, self.width)) for part in qkv.split(widths, dim=1))
        return q, k, v

    def _turn(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotary position embedding of q and k in place; with -sin its inverse. cos, sin: [L, d]."""
        x = qkv[:, : (self.heads + self.kv_heads) * self.width].view(len(qkv), -1, self.width)
        half = self.width // 2
        first, second = x[..., :half], x[..., half:]
        c, s = cos[:, None, :half], sin[:, None, :half]
        turned = torch.mul(second, c).addcmul_(first, s)
        first.mul_(c).addcmul_(second, s, value=-1)
        second.copy_(turned)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
) -> tuple[torch.Tensor, list[Kept]]:
    """Attention by plain products; what the backward pass needs is kept.

    Heads that share keys are rows of one product, so keys are not repeated for them. What is kept of shared keys is
    kept once; for the products of a group they are copied for each of its rows (KEYS bounds how many).

    Args:
        q: [L, H, d]; k, v: [L, K, d].

    The products are in float32 whatever the inputs are in: they are small, and a processor's bfloat16 products cost
    memory for every new shape (train/rounding.py).

    Returns:
        [L, H, d], and one Kept for each group of the layout. L may count rows behind the layout's last token; nobody
        looks at them, and theirs are 0.
    """
    kv_heads = k.shape[1]
    q, k, v, length = (*(_to_slots(one, layout) for one in (q, k, v)), len(q))
    out = torch.empty_like(q)
    kept: list[Kept] = []
    shared: dict[int, Kept] = {}  # a segment above others is a group by itself, and comes before them
    for group in layout.groups:
        q_own, k_own, v_own = (_own(one, group, kv_heads) for one in (q, k, v))
        keys, values = _with_above(k_own, v_own, group, shared)
        scores = torch.matmul(q_own, keys.transpose(2, 3))
        own = scores[..., group.columns :]
        own.view(kv_heads, group.rows, group.slots, -1, group.slots).add_(group.future)
        if len(group.hidden):
            scores[..., : group.columns].masked_fill_(group.hidden, -math.inf)
        weights = torch.softmax(scores.mul_(scale), dim=-1)
        _put(out, torch.matmul(weights, values), group)
        kept.append(Kept(q_own, k_own, v_own, weights))
        shared[group.first] = kept[-1]
    return _to_tokens(out, layout, length), kept


def attend_backward(grad: torch.Tensor, kept: list[Kept], layout: Layout, scale: float) -> torch.Tensor:
    """Gradients of q [L, H, d], k and v [L, K, d], given that of `attend`'s result [L, H, d]; side by side,
    [L, H + 2 K, d]."""
    heads, kv_heads, width = grad.shape[1], kept[0].k.shape[0], kept[0].k.shape[3]
    # A segment above others is a group by itself: its keys and values are what that group kept.
    shared = {group.first: one for group, one in zip(layout.groups, kept, strict=True)}
    grad, length = _to_slots(grad, layout), len(grad)
    # Every slot is written by its group; what is added to it comes from groups further down the tree, which come later.
    gradients = grad.new_empty(len(grad), heads + 2 * kv_heads, width)
    d_q, d_k, d_v = gradients.split([heads, kv_heads, kv_heads], dim=1)
    for group, (q_own, k_own, v_own, weights) in zip(layout.groups, kept, strict=True):
        g_own = _own(grad, group, kv_heads)
        # Padding is filled with a real token. Without a gradient it adds nothing to any other.
        g_own.view(kv_heads, group.rows * group.slots, -1).index_fill_(1, group.spare, 0)
        keys, values = _with_above(k_own, v_own, group, shared)
        d_weights = torch.matmul(g_own, values.transpose(2, 3))
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(scale)
        _put(d_q, torch.matmul(d_scores, keys), group)
        _put_keys(d_k, torch.matmul(d_scores.transpose(2, 3), q_own), group)
        _put_keys(d_v, torch.matmul(weights.transpose(2, 3), g_own), group)
    return _to_tokens(gradients, layout, length)


def attend_anew(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float) -> torch.Tensor:
    """The same by torch's fused attention, which computes large score matrices again block by block in its
    backward pass instead of keeping them. Differentiable by autograd; on a GPU one call with a mask."""
    heads, kv_heads = q.shape[1], k.shape[1]

    def repeat(x: torch.Tensor) -> torch.Tensor:  # [n, K, d] -> [1, H, n, d]
        x = x.transpose(0, 1)
        return (x if heads == kv_heads else x.repeat_interleave(heads // kv_heads, dim=0))[None]

    if not layout.groups:
        everything = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], repeat(k), repeat(v), attn_mask=layout.bias(q.dtype), scale=scale
        )
        return everything[0].transpose(0, 1)
    pieces = []
    for one in layout.segments:
        path = [*(layout.segments[i] for i in one.ancestors), one]
        keys = torch.cat([k[part.start : part.end] for part in path])
        values = torch.cat([v[part.start : part.end] for part in path])
        queries = q[one.start : one.end].transpose(0, 1)[None]
        causal = torch.ones(len(one), len(keys), dtype=torch.bool).tril_(len(keys) - len(one))
        attended = F.scaled_dot_product_attention(queries, repeat(keys), repeat(values), attn_mask=causal, scale=scale)
        pieces.append(attended[0].transpose(0, 1))
    behind = len(q) - layout.segments[-1].end
    return torch.cat([*pieces, q.new_zeros(behind, heads, q.shape[2])])


def keeps_scores(q: torch.Tensor, layout: Layout) -> bool:
    """True when a layer's attention weights are small enough to be kept for the backward pass."""
    return bool(layout.groups) and q.shape[1] * layout.scores() <= KEPT_SCORES


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, attention: Attention, layout: Layout) -> torch.Tensor:
        out, ctx.kept = attention.forward(qkv, layout, None)
        ctx.call = (attention, layout)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        attention, layout = ctx.call
        return attention.backward(grad.contiguous(), ctx.kept, layout, None), None, None


def prefix_tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    tree_kernels: Kernels | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over one packed sequence, in the shape transformers asks of an attention function.

    Args:
        query: [1, heads, L, head_dim]; key, value: [1, kv_heads, L, head_dim].
        layout: the packed sequence's layout, handed through the model's forward; `tree_kernels` as well.

    Returns:
        [1, L, heads, head_dim], and no attention weights.
    """
    if layout is None:
        raise ValueError("this model does not hand extra arguments to its attention; it cannot be packed")
    if dropout:
        raise ValueError("attention dropout is not supported in packed training")
    longest = int(layout.position_ids.max()) + 1
    if sliding_window is not None and longest > sliding_window:
        raise ValueError(f"examples of {longest} tokens exceed the sliding window of {sliding_window}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    (length, heads, width), kv_heads = q.shape, k.shape[1]
    attention = Attention(heads=heads, kv_heads=kv_heads, width=width, scale=scale, kernels=tree_kernels)
    if not layout.groups or not (attention.attending or keeps_scores(q, layout)):  # autograd computes nothing twice
        return attend_anew(q, k, v, layout, scale)[None], None
    return _Attention.apply(torch.cat([q, k, v], dim=1).flatten(1), attention, layout).view(
        1, length, heads, width
    ), None


def _to_slots(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[L, heads, d] -> [T, heads, d]. Whole rows, all groups at once: taking a group's rows of every head is four times
    as slow."""
    return x.reshape(len(x), -1).index_select(0, layout.tokens).view(-1, *x.shape[1:])


def _to_tokens(x: torch.Tensor, layout: Layout, length: int) -> torch.Tensor:
    """[T, heads, d] -> [length, heads, d], padding dropped; 0 behind the layout's last token."""
    rows = x.view(len(x), -1).index_select(0, layout.slots)
    spare = length - len(rows)
    return (F.pad(rows, (0, 0, 0, spare)) if spare else rows).view(length, *x.shape[1:])


def _own(x: torch.Tensor, group: Group, kv_heads: int) -> torch.Tensor:
    """[T, K x g, d] -> [K, B, S x g, d]: a group's, in memory of its own. A slot's heads of one key head lie side by
    side."""
    rows = x[group.first : group.first + group.rows * group.slots].view(-1, kv_heads, x[0].numel() // kv_heads)
    by_key = rows.transpose(0, 1).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return by_key.view(kv_heads, group.rows, -1, x.shape[2])


def _put(out: torch.Tensor, x: torch.Tensor, group: Group) -> None:
    """Write [K, B, S x g, d] to the group's slots of `out`, [T, K x g, d]."""
    by_key = x.reshape(len(x), group.rows * group.slots, -1)
    target = out[group.first : group.first + by_key.shape[1]]
    target.view(len(target), len(x), -1).copy_(by_key.transpose(0, 1))


def _with_above(
    k: torch.Tensor, v: torch.Tensor, group: Group, shared: Mapping[int, Kept]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A group's keys and values, [K, B, M + S, d]: those above each row, and its own k, v [K, B, S, d]. `shared` has
    the groups above by their first slot."""
    if not group.above:
        return k, v
    kv_heads, rows, slots, width = k.shape
    # Where a row has nothing above it is hidden, and must be a number.
    room = k.new_zeros if len(group.hidden) else k.new_empty
    keys, values = (room(kv_heads, rows, group.columns + slots, width) for _ in range(2))
    keys[:, :, group.columns :], values[:, :, group.columns :] = k, v
    for one in group.above:
        above = shared[one.start]
        keys[:, one.rows, one.columns], values[:, one.rows, one.columns] = above.k, above.v
    return keys, values


def _put_keys(out: torch.Tensor, x: torch.Tensor, group: Group) -> None:
    """Write gradients of a group's own keys, [K, B, M + S, d], to its slots of `out` [T, K, d], and add those of the
    keys above."""
    _put(out, x[:, :, group.columns :], group)
    for one in group.above:
        below = x[:, one.rows, one.columns].sum(dim=1)
        out[one.start : one.end] += below.transpose(0, 1)


AttentionInterface.register(IMPLEMENTATION, prefix_tree_attention)
