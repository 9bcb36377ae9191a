"""Attention for packed micro-batches: every token looks at its own path through the prefix tree.

A packed sequence is a prefix tree written down depth first (train/packing.py). A token attends causally to
its own segment and to all of the segments above it, never to a sibling. Positions count along the path
(`Layout.position_ids`), so the result equals running every example alone.

Queries are taken in groups: a shared segment is a group of its own, the segments that belong to one
example each are padded to rows of one group, bucketed by length. The scores of a group have a column for
every position above it and then one for every slot of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

IMPLEMENTATION = "heldout_prefix_tree"

#: Attention weights of one layer that may be kept for the backward pass, in numbers (16 MiB).
KEPT_SCORES = 1 << 22
#: Rows of one group differ in length at most by this factor, or by a few tokens.
SPREAD, FEW = 1.5, 16


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of the packed sequence whose tokens have the same examples below them."""

    start: int
    end: int
    offset: int  # tokens above it on its path
    ancestors: tuple[int, ...]  # indices of the segments above it, from the root
    own: bool  # belongs to one example alone

    def __len__(self) -> int:
        return self.end - self.start


class Above(NamedTuple):
    """Keys [start, end) of the packed sequence are columns [column, …) for rows [first, last) of a group."""

    first: int
    last: int
    start: int
    end: int
    column: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """Queries that are computed together: B rows of S slots with M columns of keys above them."""

    start: int  # of the packed tokens, where the group is one unpadded row
    gather: torch.Tensor  # [B * S] packed positions, padding filled with a position of the group's first row
    scatter: torch.Tensor  # [n] the slots that are real, in the order of `packed`
    packed: torch.Tensor  # [n] packed positions of the real slots
    rows: int
    slots: int
    above: tuple[Above, ...]
    columns: int  # M
    hidden: torch.Tensor  # [B, 1, M + S or fewer] or [0]: True at columns above that a row may not see
    padded: bool


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each of the L tokens of one packed sequence belongs."""

    position_ids: torch.Tensor  # [1, L]
    groups: tuple[Group, ...]  # a processor's; none on a GPU, which attends everywhere at once
    segments: tuple[Segment, ...]
    # [L]: where the tokens end that may look at this one: those of its segment and of all below it, which in
    # depth-first order lie behind it in one piece.
    until: torch.Tensor

    @staticmethod
    def of(segments: list[Segment]) -> Layout:
        """The layout of one packed sequence."""
        positions = [torch.arange(one.offset, one.offset + len(one)) for one in segments]
        groups = [_group([one], segments) for one in segments if not one.own]
        groups += [_group(bucket, segments) for bucket in _buckets([one for one in segments if one.own])]
        return Layout(
            position_ids=torch.cat(positions)[None],
            groups=tuple(groups),
            segments=tuple(segments),
            until=_until(segments),
        )

    def to(self, device: torch.device) -> Layout:
        """The same layout with its tensors on `device`."""
        if self.position_ids.device == device:
            return self
        return Layout(
            position_ids=self.position_ids.to(device), groups=(), segments=self.segments, until=self.until.to(device)
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest path; 0 where segments are not known."""
        return max((one.offset + len(one) for one in self.segments), default=0)

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """[1, 1, L, L]: 0 where a token may look, else minus infinity. One for all layers: on a GPU making it costs
        more than a layer."""
        if dtype not in self._biases:
            length = len(self.until)
            places = torch.arange(length, device=self.until.device)
            hidden = (places[None, :] > places[:, None]) | (places[:, None] >= self.until[None, :])
            # Rows of whole 16 bytes: torch's kernels copy what begins elsewhere, in every layer.
            room = torch.zeros(length, -(-length // 8) * 8, dtype=dtype, device=hidden.device)
            self._biases[dtype] = room[None, None, :, :length].masked_fill_(hidden, -math.inf)
        return self._biases[dtype]

    @cached_property
    def _biases(self) -> dict[torch.dtype, torch.Tensor]:
        return {}

    def scores(self) -> int:
        """Attention weights of one head."""
        return sum(group.rows * group.slots * (group.columns + group.slots) for group in self.groups)


def _until(segments: list[Segment]) -> torch.Tensor:
    ends = [one.end for one in segments]
    for one in segments:
        for above in one.ancestors:
            ends[above] = max(ends[above], one.end)
    return torch.tensor(ends).repeat_interleave(torch.tensor([len(one) for one in segments]))


def _buckets(segments: list[Segment]) -> list[list[Segment]]:
    """Segments of similar length together, each bucket in packed order."""
    buckets: list[list[Segment]] = []
    for one in sorted(segments, key=len):
        if buckets and len(one) <= max(SPREAD * len(buckets[-1][0]), len(buckets[-1][0]) + FEW):
            buckets[-1].append(one)
        else:
            buckets.append([one])
    return [sorted(bucket, key=lambda one: one.start) for bucket in buckets]


def _group(rows: list[Segment], segments: list[Segment]) -> Group:
    slots = max(map(len, rows))
    steps = torch.arange(slots)
    starts = torch.tensor([one.start for one in rows])
    real = steps[None, :] < torch.tensor([len(one) for one in rows])[:, None]
    positions = starts[:, None] + steps[None, :]
    columns = max(one.offset for one in rows)
    hidden = torch.zeros(0)
    if any(one.offset < columns for one in rows):
        hidden = torch.arange(columns)[None, None, :] >= torch.tensor([one.offset for one in rows])[:, None, None]
    above = []
    for index in sorted({i for one in rows for i in one.ancestors}):
        # Rows below one segment lie side by side: packed order is depth first.
        below = [row for row, one in enumerate(rows) if index in one.ancestors]
        key = segments[index]
        above.append(Above(below[0], below[-1] + 1, key.start, key.end, key.offset))
    return Group(
        start=rows[0].start,
        gather=torch.where(real, positions, rows[0].start).flatten(),
        scatter=real.flatten().nonzero()[:, 0],
        packed=positions[real],
        rows=len(rows),
        slots=slots,
        above=tuple(above),
        columns=columns,
        hidden=hidden,
        padded=not bool(real.all()),
    )


class Kept(NamedTuple):
    """What the backward pass of one group needs. K kv_heads, B rows, n = slots x queries per key head."""

    q: torch.Tensor  # [K, B, n, d]
    k: torch.Tensor  # [K, B, S, d]
    v: torch.Tensor  # [K, B, S, d]
    weights: torch.Tensor  # [K, B, n, M + S]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
) -> tuple[torch.Tensor, list[Kept]]:
    """Attention by plain products; what the backward pass needs is kept.

    Heads that share keys are rows of one product, so keys are never repeated, and what is shared is never
    copied for an example.

    Args:
        q: [L, H, d]; k, v: [L, K, d].

    The products are in float32 whatever the inputs are in: they are small, and a processor's bfloat16 products cost
    memory for every new shape (train/rounding.py).

    Returns:
        [L, H, d], and one Kept for each group of the layout. L may count rows behind the layout's last token; nobody
        looks at them, and theirs are 0.
    """
    length, heads, width = q.shape
    kv_heads = k.shape[1]
    out = _zero_behind(q.new_empty(length, heads, width), layout)
    kept: list[Kept] = []
    shared: dict[int, Kept] = {}  # a segment above others is a group by itself, and comes before them
    for group in layout.groups:
        q_own = _queries(q, group, kv_heads).float()
        k_own, v_own = _keys(k, group).float(), _keys(v, group).float()
        scores = q_own.new_empty(kv_heads, group.rows, q_own.shape[2], group.columns + group.slots)
        if len(group.hidden):
            scores[..., : group.columns] = 0  # what no segment fills is hidden below; it must not be NaN
        for one in group.above:
            flat = q_own[:, one.first : one.last].reshape(kv_heads, -1, width)
            part = scores[:, one.first : one.last, :, one.column : one.column + one.end - one.start]
            part.copy_(torch.bmm(flat, shared[one.start].k[:, 0].transpose(1, 2)).view(part.shape))
        own = scores[..., group.columns :]
        own.copy_(torch.matmul(q_own, k_own.transpose(2, 3)))
        by_slot = own.view(kv_heads, group.rows, group.slots, -1, group.slots)
        by_slot.masked_fill_(_future(group.slots, q.device)[:, None, :], -math.inf)
        if len(group.hidden):
            scores[..., : group.columns].masked_fill_(group.hidden, -math.inf)
        weights = torch.softmax(scores.mul_(scale), dim=-1)
        result = torch.matmul(weights[..., group.columns :], v_own)
        for one in group.above:
            part = weights[:, one.first : one.last, :, one.column : one.column + one.end - one.start]
            product = torch.bmm(part.reshape(kv_heads, -1, part.shape[-1]), shared[one.start].v[:, 0])
            result[:, one.first : one.last] += product.view(kv_heads, one.last - one.first, -1, width)
        _put(out, result, group)
        kept.append(Kept(q_own, k_own, v_own, weights))
        shared[group.start] = kept[-1]
    return out, kept


def attend_backward(
    grad: torch.Tensor, kept: list[Kept], layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q [L, H, d], k and v [L, K, d], given that of `attend`'s result [L, H, d]."""
    kv_heads, width = kept[0].k.shape[0], kept[0].k.shape[3]
    # A segment above others is a group by itself: its keys and values are what that group kept.
    shared = {group.start: one for group, one in zip(layout.groups, kept, strict=True)}
    # Every position is some group's own once and is written there; what is added to it comes from groups
    # further down the tree, which come later.
    d_q, d_k, d_v = (
        _zero_behind(grad.new_empty(len(grad), heads, width), layout) for heads in (grad.shape[1], kv_heads, kv_heads)
    )
    for group, (q_own, k_own, v_own, weights) in zip(layout.groups, kept, strict=True):
        g_own = _queries(grad, group, kv_heads).float()
        d_weights = torch.empty_like(weights)
        d_weights[..., group.columns :] = torch.matmul(g_own, v_own.transpose(2, 3))
        if len(group.hidden):
            d_weights[..., : group.columns] = 0
        for one in group.above:
            flat = g_own[:, one.first : one.last].reshape(kv_heads, -1, width)
            part = d_weights[:, one.first : one.last, :, one.column : one.column + one.end - one.start]
            part.copy_(torch.bmm(flat, shared[one.start].v[:, 0].transpose(1, 2)).view(part.shape))
        d_scores = _softmax_backward(weights, d_weights, scale)
        if group.padded:  # a padded query was gathered from a real position, and its gradient too
            real = torch.zeros(group.rows * group.slots, dtype=weights.dtype, device=weights.device)
            real[group.scatter] = 1
            shape = (1, group.rows, group.slots, 1, 1)
            by_slot = (kv_heads, group.rows, group.slots, -1, weights.shape[-1])
            d_scores = (d_scores.view(by_slot) * real.view(shape)).view_as(d_scores)
            weights = (weights.view(by_slot) * real.view(shape)).view_as(weights)
        own = d_scores[..., group.columns :]
        d_q_own = torch.matmul(own, k_own)
        _put(d_k, torch.matmul(own.transpose(2, 3), q_own), group)
        _put(d_v, torch.matmul(weights[..., group.columns :].transpose(2, 3), g_own), group)
        for one in group.above:
            rows, columns = slice(one.first, one.last), slice(one.column, one.column + one.end - one.start)
            s_part = d_scores[:, rows, :, columns].reshape(kv_heads, -1, one.end - one.start)
            w_part = weights[:, rows, :, columns].reshape(kv_heads, -1, one.end - one.start)
            below = torch.bmm(s_part, shared[one.start].k[:, 0])
            d_q_own[:, rows] += below.view(kv_heads, one.last - one.first, -1, width)
            flat_q = q_own[:, rows].reshape(kv_heads, -1, width)
            flat_g = g_own[:, rows].reshape(kv_heads, -1, width)
            d_k[one.start : one.end] += torch.bmm(s_part.transpose(1, 2), flat_q).transpose(0, 1)
            d_v[one.start : one.end] += torch.bmm(w_part.transpose(1, 2), flat_g).transpose(0, 1)
        _put(d_q, d_q_own, group)
    return d_q, d_k, d_v


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
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
    ) -> torch.Tensor:
        out, kept = attend(q, k, v, layout, scale)
        ctx.save_for_backward(*(tensor for one in kept for tensor in one))
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        saved = ctx.saved_tensors
        kept = [Kept(*saved[i : i + 4]) for i in range(0, len(saved), 4)]
        return (*attend_backward(grad.contiguous(), kept, ctx.layout, ctx.scale), None, None)


def prefix_tree_attention(
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
    longest = int(layout.position_ids.max()) + 1
    if sliding_window is not None and longest > sliding_window:
        raise ValueError(f"examples of {longest} tokens exceed the sliding window of {sliding_window}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if keeps_scores(q, layout):
        return _Attention.apply(q, k, v, layout, scale)[None], None
    return attend_anew(q, k, v, layout, scale)[None], None


def _queries(q: torch.Tensor, group: Group, kv_heads: int) -> torch.Tensor:
    """[L, H, d] -> [K, B, S x H / K, d]; a slot's heads of one key head lie side by side."""
    width = q.shape[2]
    by_key = q.reshape(q.shape[0], kv_heads, -1).transpose(0, 1)
    return _taken(by_key, group).view(kv_heads, group.rows, -1, width)


def _keys(k: torch.Tensor, group: Group) -> torch.Tensor:
    """[L, K, d] -> [K, B, S, d]."""
    return _taken(k.transpose(0, 1), group).view(k.shape[1], group.rows, group.slots, -1)


def _taken(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[K, L, w] -> [K, B * S, w], contiguous."""
    if group.rows == 1:
        return x[:, group.start : group.start + group.slots].contiguous()
    return x.index_select(1, group.gather)


def _put(out: torch.Tensor, x: torch.Tensor, group: Group) -> None:
    """Write [K, B, S x g, d] to the group's positions of `out` [L, K x g, d], padding dropped."""
    kv_heads = x.shape[0]
    flat = x.reshape(kv_heads, group.rows * group.slots, -1).to(out.dtype)
    target = out.view(out.shape[0], kv_heads, -1)
    if group.rows == 1:
        target[group.start : group.start + group.slots] = flat.transpose(0, 1)
        return
    if group.padded:
        flat = flat.index_select(1, group.scatter)
    target.index_copy_(0, group.packed, flat.transpose(0, 1))


def _zero_behind(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`x` with 0 in the rows behind the layout's last token."""
    x[layout.segments[-1].end :] = 0
    return x


def _future(n: int, device: torch.device) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).triu_(1)


def _softmax_backward(weights: torch.Tensor, grad: torch.Tensor, scale: float) -> torch.Tensor:
    """Gradient of the scores before scaling, given that of their softmax; `grad` is overwritten."""
    dot = (weights * grad).sum(dim=-1, keepdim=True)
    return grad.sub_(dot).mul_(weights).mul_(scale)


AttentionInterface.register(IMPLEMENTATION, prefix_tree_attention)
