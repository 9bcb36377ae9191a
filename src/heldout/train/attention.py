"""Attention for packed micro-batches: the common prefix once, then every example's own tokens.

A packed sequence is `prefix | own tokens of example 1 | own tokens of example 2 | …`. Tokens of the
prefix attend causally to the prefix; tokens of an example attend to the whole prefix and causally to
their own example, never to another one. Positions restart after the prefix (`Layout.position_ids`), so
the result equals running every example alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

IMPLEMENTATION = "heldout_shared_prefix"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each token of one packed sequence belongs.

    Sizes: P prefix tokens, B examples, S = the longest example's own tokens, L = P + all own tokens.
    """

    prefix: int
    position_ids: torch.Tensor  # [1, L]
    gather: torch.Tensor  # [B * S] packed positions of own tokens, padded with position 0
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
            own=own,
            mask=mask.contiguous(),
        )

    def to(self, device: torch.device) -> Layout:
        """The same layout with its tensors on `device`."""
        return Layout(
            prefix=self.prefix,
            position_ids=self.position_ids.to(device),
            gather=self.gather.to(device),
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
    (batch, longest), prefix = layout.own.shape, layout.prefix
    if sliding_window is not None and prefix + longest > sliding_window:
        raise ValueError(f"examples of {prefix + longest} tokens exceed the sliding window of {sliding_window}")
    groups = query.shape[1] // key.shape[1]

    def own(x: torch.Tensor) -> torch.Tensor:  # [1, h, L, d] -> [B, h, S, d]
        _, heads, _, width = x.shape
        return x[0].index_select(1, layout.gather).view(heads, batch, longest, width).transpose(0, 1)

    def repeat(x: torch.Tensor) -> torch.Tensor:  # kv_heads -> heads
        return x if groups == 1 else x.repeat_interleave(groups, dim=1)

    def with_prefix(x: torch.Tensor) -> torch.Tensor:  # [B, h, P + S, d]
        return repeat(torch.cat([x[:, :, :prefix].expand(batch, -1, -1, -1), own(x)], dim=2))

    attended = F.scaled_dot_product_attention(
        own(query),
        with_prefix(key),
        with_prefix(value),
        attn_mask=layout.mask,
        dropout_p=dropout,
        scale=scaling,
    )
    packed = attended.transpose(1, 2)[layout.own]  # [L - P, heads, head_dim], in packed order
    if prefix:
        head = F.scaled_dot_product_attention(
            query[:, :, :prefix],
            repeat(key[:, :, :prefix]),
            repeat(value[:, :, :prefix]),
            is_causal=True,
            dropout_p=dropout,
            scale=scaling,
        )
        packed = torch.cat([head[0].transpose(0, 1), packed])
    return packed[None], None


AttentionInterface.register(IMPLEMENTATION, shared_prefix_attention)
