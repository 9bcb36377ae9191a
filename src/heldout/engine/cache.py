"""What has been read of several rows: the keys and values of a shared prefix, and those of each row's own tokens.

Every layer's attention function writes the cache itself, so nothing is copied while an answer grows. A slot may hold a
token that does not count (what rows of other lengths are filled up with, or a guess that was wrong): no later token
looks at it, and positions count real tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from transformers import AttentionInterface

from heldout.engine import device

IMPLEMENTATION = "heldout_decode"

#: Queries computed at once; bounds the score matrix of a long prompt.
CHUNK = 512

#: What several rows start with: {layer: (keys, values)}, each [kv_heads, tokens, d].
Prefix: TypeAlias = dict[int, tuple[torch.Tensor, torch.Tensor]]


class Rows:
    """The keys and values of one batch: a shared prefix and B rows of their own.

    Sizes: B rows, P prefix tokens, W slots for each row's own tokens.
    """

    def __init__(self, model: Any, rows: int, slots: int, prefix: Prefix) -> None:
        """`slots`: no row has more own tokens at a time, guesses included."""
        self.prefix = prefix
        self.prefix_length = length_of(prefix)
        self.slots = slots
        self.used = 0
        self.reach = 0  # the largest number of tokens that a row's conversation had at the last reading
        self.span = slice(None)  # the rows that are being read
        self.real = torch.zeros(rows, slots, dtype=torch.bool, device=device_of(model))
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device_of(model))  # own tokens that count
        self.own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> [B, kv_heads, W, d] twice

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, kv_heads, n, d] at this layer, to the rows of `span`; their own keys and values so far."""
        if layer not in self.own:
            _, heads, _, width = key.shape
            empty = key.new_zeros(len(self.lengths), heads, self.slots, width)
            self.own[layer] = (empty, torch.zeros_like(empty))
        end = self.used + key.shape[2]
        keys, values = (whole[self.span] for whole in self.own[layer])
        keys[:, :, self.used : end] = key
        values[:, :, self.used : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def count(self, kept: Sequence[int]) -> None:
        """Of the tokens that were read last, the first `kept[r]` of row r count from now on."""
        wanted = torch.tensor(kept, device=self.lengths.device)
        end = self.used + max(kept)
        self.real[:, self.used : end] = torch.arange(max(kept), device=wanted.device) < wanted[:, None]
        self.lengths += wanted
        self.used = end

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows, and the slots that do not count."""
        which = torch.tensor(rows, device=self.lengths.device)
        self.lengths, real = self.lengths[which], self.real[which]
        self.used = int(self.lengths.max())
        order = torch.sort((~real).to(torch.int8), dim=1, stable=True).indices[:, : self.used]  # [B, longest]
        self.real = torch.zeros_like(real)
        self.real[:, : self.used] = torch.arange(self.used, device=which.device) < self.lengths[:, None]

        def moved(old: torch.Tensor) -> torch.Tensor:
            new = old.new_zeros(len(which), *old.shape[1:])
            index = order[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
            new[:, :, : self.used] = old[which].gather(2, index)
            return new

        for layer in self.own:  # one after the other: both copies of all would not be counted on
            keys, values = self.own[layer]
            self.own[layer] = (moved(keys), moved(values))

    def as_prefix(self) -> Prefix:
        """This batch's single row, which stands behind no prefix, as the prefix of another batch."""
        return {layer: (k[0, :, : self.used], v[0, :, : self.used]) for layer, (k, v) in self.own.items()}


def decode_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    rows: Rows | None = None,
    mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of n new tokens of every row over the shared prefix and the row's own past.

    Args:
        query: [B, heads, n, d]; key, value: [B, kv_heads, n, d].
        mask: [B, n, used + n], True where a query may look at an own slot.
    """
    if rows is None or mask is None:
        raise ValueError("this model does not hand extra arguments to its attention")
    batch, heads, n, width = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    keys, values = rows.write(layer, key, value)
    if sliding_window is not None and rows.reach > sliding_window:
        raise ValueError(f"conversations longer than the sliding window of {sliding_window} are not supported")
    scale = scaling if scaling is not None else width**-0.5
    # Heads that share keys become further queries of one product: nothing is repeated.
    q = query.reshape(batch, kv_heads, group * n, width) * scale
    scores = torch.matmul(q, keys.transpose(2, 3)).view(batch, kv_heads, group, n, -1)
    scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    p = rows.prefix_length
    if p:
        prefix_keys, prefix_values = rows.prefix[layer]
        folded = q.transpose(0, 1).reshape(kv_heads, batch * group * n, width)
        shared = torch.bmm(folded, prefix_keys.transpose(1, 2))
        shared = shared.view(kv_heads, batch, group, n, p).transpose(0, 1)
        scores = torch.cat([shared, scores], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    own = weights[..., p:].reshape(batch, kv_heads, group * n, -1)
    out = torch.matmul(own, values)
    if p:
        folded = weights[..., :p].transpose(0, 1).reshape(kv_heads, batch * group * n, p)
        out = out + torch.bmm(folded, prefix_values).view(kv_heads, batch, group * n, width).transpose(0, 1)
    return out.reshape(batch, heads, n, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, decode_attention)


def read(model: Any, rows: Rows, own: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Read the next tokens of every row, at least one of some row: the hidden states [n, hidden] of each row's. What
    counts of them `rows.count` is told next."""
    longest = max(map(len, own))
    if rows.used + longest > rows.slots:
        rows.keep(range(len(own)))
    states: list[torch.Tensor] = []
    for span in _spans([len(row) for row in own]):
        some = own[span]
        n = max(1, *map(len, some))
        offsets = torch.arange(n, device=rows.lengths.device)
        causal = (offsets[None, :] <= offsets[:, None]).expand(len(some), n, n)
        past = rows.real[span, None, : rows.used].expand(-1, n, -1)
        mask = torch.cat([past, causal], dim=-1)
        # What fills a row up stands where its last token does: positions beyond it need not exist.
        last = torch.tensor([max(0, len(row) - 1) for row in some], device=offsets.device)
        places = rows.lengths[span, None] + torch.minimum(offsets, last[:, None])
        hidden = read_masked(model, rows, some, places, mask, span)
        states += [row[: len(tokens)] for row, tokens in zip(hidden, some, strict=True)]
    return states


def _spans(lengths: Sequence[int]) -> Iterator[slice]:
    """Neighbouring rows that are read at once: little is filled up, and what is computed stays in a processor's
    cache."""
    start, longest, most = 0, 0, device.portions().read
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > start and (i + 1 - start) * longest > most:
            yield slice(start, i)
            start, longest = i, length
    yield slice(start, len(lengths))


def read_masked(
    model: Any,
    rows: Rows,
    own: Sequence[Sequence[int]],
    offsets: torch.Tensor,
    mask: torch.Tensor,
    span: slice = slice(None),
) -> torch.Tensor:
    """Hidden states [B, n, hidden] of tokens that stand at `offsets` [B, n] behind the prefix and look where `mask`
    [B, n, used + n] says; those of shorter rows are followed by what means nothing. B: the rows of `span`."""
    n = offsets.shape[1]
    ids = torch.tensor([[*row, *[0] * (n - len(row))] for row in own], dtype=torch.long, device=offsets.device)
    rows.span, rows.reach = span, rows.prefix_length + int(offsets.max()) + 1
    hidden: torch.Tensor = model.base_model(
        input_ids=ids, position_ids=rows.prefix_length + offsets, use_cache=False, rows=rows, mask=mask
    ).last_hidden_state
    return hidden


def read_but_the_last(model: Any, rows: Rows, own: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Long rows some places after others, to bound the memory of scores; what is left to read, at least a token of
    every row. Short rows are left as they are."""
    longest = max(map(len, own))
    if longest <= CHUNK:
        return list(own)
    chunk = max(1, CHUNK // len(own))
    for start in range(0, longest - 1, chunk):
        parts = [row[:-1][start : start + chunk] for row in own]
        read(model, rows, parts)
        rows.count([len(part) for part in parts])
    return [row[-1:] for row in own]


def prefix_of(model: Any, tokens: Sequence[int]) -> Prefix:
    """The cache of what several rows begin with."""
    if not tokens:
        return {}
    rows = Rows(model, 1, len(tokens), {})
    [left] = read_but_the_last(model, rows, [tokens])
    read(model, rows, [left])
    rows.count([len(left)])
    return rows.as_prefix()


def length_of(prefix: Prefix) -> int:
    """How many tokens."""
    return next(iter(prefix.values()))[0].shape[1] if prefix else 0


def device_of(model: Any) -> torch.device:
    """Where the model computes."""
    device: torch.device = next(model.parameters()).device
    return device
