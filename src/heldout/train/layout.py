"""Where each token of a packed sequence belongs, and which others it may look at.

A packed sequence is a prefix tree written down depth first (train/packing.py). A token attends causally to
its own segment and to all of the segments above it, never to a sibling. Positions count along the path
(`Layout.position_ids`), so the result equals running every example alone.

Without kernels a processor takes queries in groups: a shared segment is a group of its own, the segments that belong
to one example each are padded to rows of one group, bucketed by length. All tokens are taken to the groups' slots at
once and back again. A group's keys are those above it, for each of its rows, and then its own: one product for all of
them is faster than one for what rows share and one for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

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
    def tree(self) -> torch.Tensor:
        """[segments, 4]: start, end, tokens above and parent (-1 for none) of each segment, as int32."""
        rows = [(one.start, one.end, one.offset, one.ancestors[-1] if one.ancestors else -1) for one in self.segments]
        return torch.tensor(rows, dtype=torch.int32)

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
