"""Attention for packed micro-batches: every token looks at its own path through the prefix tree.

A packed sequence is a prefix tree written down depth first (train/packing.py). A token attends causally to
its own segment and to all of the segments above it, never to a sibling. Positions count along the path
(`Layout.position_ids`), so the result equals running every example alone.

Queries are taken in groups: a shared segment is a group of its own, the segments that belong to one
example each are padded to rows of one group, bucketed by length. All tokens are taken to the groups' slots at
once and back again. A group's keys are those above it, for each of its rows, and then its own: one product for
all of them is faster than one for what rows share and one for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

IMPLEMENTATION = "heldout_prefix_tree"

#: Attention weights of one layer that may be kept for the backward pass, in numbers (16 MiB).
KEPT_SCORES = 1 << 22
#: Slots of one group that may be padding: this share of them, or as many as a group of its own would cost.
SPARE, FEW = 0.3, 64
#: Keys of one group, all rows together, if it has more than one row.
KEYS = 1 << 14

NOWHERE = torch.empty(0, dtype=torch.long)


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
    """Keys at the layout's slots [start, end) are columns [column, …) for rows [first, last) of a group."""

    first: int
    last: int
    start: int
    end: int
    column: int

    @property
    def rows(self) -> slice:
        """The rows below."""
        return slice(self.first, self.last)

    @property
    def columns(self) -> slice:
        """Where the keys are."""
        return slice(self.column, self.column + self.end - self.start)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Queries that are computed together: B rows of S slots with M columns of keys above them."""

    first: int  # of the layout's slots; the group's are the B * S from here
    rows: int
    slots: int
    above: tuple[Above, ...]
    columns: int  # M
    hidden: torch.Tensor  # [B, 1, M] or [0]: True at columns above that a row may not see
    spare: torch.Tensor  # [m] those of its slots that are padding

    @cached_property
    def future(self) -> torch.Tensor:
        """[S, 1, S]: 0 where a slot may look at another one of its row, else minus infinity."""
        return torch.full((self.slots, self.slots), -math.inf).triu_(1)[:, None]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each of the L tokens of one packed sequence belongs."""

    position_ids: torch.Tensor  # [1, L]
    segments: tuple[Segment, ...]
    # [L]: where the tokens end that may look at this one: those of its segment and of all below it, which in
    # depth-first order lie behind it in one piece.
    until: torch.Tensor
    # A processor's; none on a GPU, which attends everywhere at once.
    groups: tuple[Group, ...] = ()
    tokens: torch.Tensor = NOWHERE  # [T]: the token in each slot of all groups; in padding, the first of the group
    slots: torch.Tensor = NOWHERE  # [L]: the slot of each token

    @staticmethod
    def of(segments: list[Segment]) -> Layout:
        """The layout of one packed sequence."""
        rows = [[one] for one in segments if not one.own] + _buckets([one for one in segments if one.own])
        groups: list[Group] = []
        taken: list[torch.Tensor] = []
        firsts: dict[int, int] = {}  # a segment's start, and the first of its slots
        first = 0
        for bucket in rows:
            group, of_group = _group(bucket, segments, first, firsts)
            firsts[bucket[0].start] = first
            groups.append(group)
            taken.append(of_group)
            first += len(of_group)
        tokens = torch.cat(taken)
        real = torch.ones(len(tokens), dtype=torch.bool)
        for group in groups:
            real[group.first + group.spare] = False
        slots = torch.full((sum(map(len, segments)),), -1)
        slots[tokens[real]] = real.nonzero()[:, 0]
        return Layout(
            position_ids=torch.cat([torch.arange(one.offset, one.offset + len(one)) for one in segments])[None],
            segments=tuple(segments),
            until=_until(segments),
            groups=tuple(groups),
            tokens=tokens,
            slots=slots,
        )

    def to(self, device: torch.device) -> Layout:
        """The same layout with its tensors on `device`."""
        if self.position_ids.device == device:
            return self
        return Layout(position_ids=self.position_ids.to(device), segments=self.segments, until=self.until.to(device))

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
    total = deepest = 0  # tokens of the last bucket, and the most above a row of it
    for one in sorted(segments, key=len):
        rows = len(buckets[-1]) + 1 if buckets else 0
        slots = rows * len(one)
        spare = slots - total - len(one)
        keys = slots + rows * max(deepest, one.offset)
        if rows and spare <= max(SPARE * slots, FEW) and keys <= KEYS:
            buckets[-1].append(one)
            total, deepest = total + len(one), max(deepest, one.offset)
        else:
            buckets.append([one])
            total, deepest = len(one), one.offset
    return [sorted(bucket, key=lambda one: one.start) for bucket in buckets]


def _group(
    rows: list[Segment], segments: list[Segment], first: int, firsts: Mapping[int, int]
) -> tuple[Group, torch.Tensor]:
    """A group whose slots begin with `first`, and the tokens in them, [B * S]."""
    slots = max(map(len, rows))
    steps = torch.arange(slots)
    starts = torch.tensor([one.start for one in rows])
    real = steps[None, :] < torch.tensor([len(one) for one in rows])[:, None]
    columns = max(one.offset for one in rows)
    hidden = torch.zeros(0)
    if any(one.offset < columns for one in rows):
        hidden = torch.arange(columns)[None, None, :] >= torch.tensor([one.offset for one in rows])[:, None, None]
    above = []
    for index in sorted({i for one in rows for i in one.ancestors}):
        # Rows below one segment lie side by side: packed order is depth first.
        below = [row for row, one in enumerate(rows) if index in one.ancestors]
        key = segments[index]
        start = firsts[key.start]
        above.append(Above(below[0], below[-1] + 1, start, start + len(key), key.offset))
    group = Group(
        first=first,
        rows=len(rows),
        slots=slots,
        above=tuple(above),
        columns=columns,
        hidden=hidden,
        spare=(~real).flatten().nonzero()[:, 0],
    )
    return group, torch.where(real, starts[:, None] + steps[None, :], rows[0].start).flatten()


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
        gradients = attend_backward(grad.contiguous(), kept, ctx.layout, ctx.scale)
        kv_heads = len(kept[0].k)
        return (*gradients.split([grad.shape[1], kv_heads, kv_heads], dim=1), None, None)


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
