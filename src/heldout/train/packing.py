"""Examples to packed micro-batches: the common prefix once, then each example's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from heldout.engine.template import Tokens, common_prefix
from heldout.train.attention import Layout

#: Packed tokens of one micro-batch, at most; bounds the activations' memory. One example may exceed it.
MICRO_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One packed sequence of B examples. L packed tokens, T supervised ones.

    A supervised token is predicted from the packed position before it; a position of the shared prefix
    may predict the first token of several examples, and appears once for each.
    """

    ids: torch.Tensor  # [1, L]
    layout: Layout
    sources: torch.Tensor  # [T] packed position whose hidden state predicts the token
    targets: torch.Tensor  # [T] the token
    owners: torch.Tensor  # [T] index of the example within the pack
    size: int  # B


def pack(examples: Sequence[Tokens]) -> Pack:
    """Pack examples into one sequence. Every one must have at least two tokens and one supervised token."""
    # The last token of an example predicts nothing, so it is not computed; at least one token stays an
    # example's own.
    bodies = [example.ids[:-1] for example in examples]
    prefix = min(common_prefix(bodies), min(map(len, bodies)) - 1) if len(bodies) > 1 else 0
    ids = list(bodies[0][:prefix])
    sources: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for owner, (example, body) in enumerate(zip(examples, bodies, strict=True)):
        shift = len(ids) - prefix  # where this example's token i lies, for i >= prefix
        for i in range(1, len(example.ids)):
            if example.supervised[i]:
                sources.append(i - 1 if i - 1 < prefix else i - 1 + shift)
                targets.append(example.ids[i])
                owners.append(owner)
        ids += body[prefix:]
    return Pack(
        ids=torch.tensor([ids]),
        layout=Layout.of(prefix, [len(body) - prefix for body in bodies]),
        sources=torch.tensor(sources),
        targets=torch.tensor(targets),
        owners=torch.tensor(owners),
        size=len(examples),
    )


def micro_batches(examples: Sequence[Tokens], rows: Sequence[int], *, limit: int = MICRO_TOKENS) -> list[list[int]]:
    """Cut the rows of one step into packs of at most `limit` packed tokens, similar lengths together."""
    packs: list[list[int]] = []
    for row in sorted(rows, key=lambda row: len(examples[row])):
        together = [*packs[-1], row] if packs else []
        if together and _packed_length([examples[i] for i in together]) <= limit:
            packs[-1] = together
        else:
            packs.append([row])
    return packs


def _packed_length(examples: Sequence[Tokens]) -> int:
    prefix = common_prefix([example.ids for example in examples])
    return prefix + sum(len(example) - prefix for example in examples)
