"""Examples to packed micro-batches: what examples have in common once, then each example's own tokens.

The examples of a pack form a prefix tree. A packed sequence is that tree written down depth first: a
system prompt that all share, then the few-shot turns that some of them share, then what is an example's
alone. A token's hidden state depends on the tokens before it only, so each part is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from heldout.engine.template import Tokens, common_prefix
from heldout.train.layout import Layout, Segment

#: A part is worth sharing when it saves this many tokens; a smaller one is computed for each example.
WORTH_SHARING = 8


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One packed sequence of B examples. L packed tokens, T predictions of U different kinds.

    A supervised token is predicted from the packed position before it. Predictions of the same token from
    the same (shared) position are one; every example that learns from it has an entry of its own.
    """

    ids: torch.Tensor  # [L]
    layout: Layout
    spans: tuple[tuple[tuple[int, int], ...], ...]  # per example: its packed stretches (start, end), in order
    rows: torch.Tensor  # [R] packed positions that predict anything, ascending
    sources: torch.Tensor  # [U] which of the R rows predicts
    targets: torch.Tensor  # [U] the token that is to be predicted
    entries: torch.Tensor  # [T] which of the U predictions
    owners: torch.Tensor  # [T] index of the example within the pack
    weights: torch.Tensor  # [T] 1 for a supervised token, the prompt's weight for others
    size: int  # B

    def to(self, device: torch.device) -> Pack:
        """The same pack with its tensors on `device`."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("ids", "layout", "rows", "sources", "targets", "entries", "owners", "weights")
        }
        return Pack(**moved, spans=self.spans, size=self.size)


def pack(examples: Sequence[Tokens], *, prompt_weight: float = 0.0, share: bool = True) -> Pack:
    """Pack examples into one sequence. Every one must have at least two tokens and one supervised token.

    Args:
        prompt_weight: weight of the tokens that are not supervised; at 0 they predict nothing.
        share: False computes every token of every example, as if nothing were shared.
    """
    # The last token of an example predicts nothing, so it is not computed.
    bodies = [example.ids[:-1] for example in examples]
    segments, chains = prefix_tree(bodies) if share else _alone(bodies)
    ids: list[int] = [0] * segments[-1].end
    spans: list[tuple[tuple[int, int], ...]] = []
    known: dict[tuple[int, int], int] = {}
    entries: list[int] = []
    owners: list[int] = []
    weights: list[float] = []
    for owner, (example, chain) in enumerate(zip(examples, chains, strict=True)):
        stretches = tuple((segments[i].start, segments[i].end) for i in chain)
        positions = [position for start, end in stretches for position in range(start, end)]
        for position, token in zip(positions, example.ids, strict=False):
            ids[position] = token
        for i in range(1, len(example)):
            weight = 1.0 if example.supervised[i] else prompt_weight
            if weight:
                entries.append(known.setdefault((positions[i - 1], example.ids[i]), len(known)))
                owners.append(owner)
                weights.append(weight)
        spans.append(stretches)
    rows, sources = torch.tensor([position for position, _ in known]).unique(return_inverse=True)
    return Pack(
        ids=torch.tensor(ids),
        layout=Layout.of(segments),
        spans=tuple(spans),
        rows=rows,
        sources=sources,
        targets=torch.tensor([token for _, token in known]),
        entries=torch.tensor(entries),
        owners=torch.tensor(owners),
        weights=torch.tensor(weights),
        size=len(examples),
    )


def prefix_tree(bodies: Sequence[Sequence[int]]) -> tuple[list[Segment], list[list[int]]]:
    """The prefix tree of token sequences, written down depth first.

    Returns:
        The segments in packed order, and for each sequence the indices of its segments from the root to
        the last, which is its own and has at least one token.
    """
    segments: list[Segment] = []
    chains: list[list[int]] = [[] for _ in bodies]

    def write(start: int, end: int, chain: list[int], *, own: bool) -> list[int]:
        at = segments[-1].end if segments else 0
        segments.append(Segment(start=at, end=at + end - start, offset=start, ancestors=tuple(chain), own=own))
        return [*chain, len(segments) - 1]

    def grow(rows: list[int], common: int, written: int, chain: list[int]) -> None:
        """These rows share their first `common` tokens, of which `written` are written down."""
        if (common - written) * (len(rows) - 1) >= WORTH_SHARING:
            chain, written = write(written, common, chain, own=False), common
        together: dict[int, list[int]] = {}
        for row in rows:
            if len(bodies[row]) == common + 1 or len(rows) == 1:
                chains[row] = write(written, len(bodies[row]), chain, own=True)
            else:
                together.setdefault(bodies[row][common], []).append(row)
        for group in together.values():
            # The last token stays a row's own.
            room = min(len(bodies[row]) for row in group) - 1
            grow(group, min(common_prefix([bodies[row] for row in group]), room), written, chain)

    grow(list(range(len(bodies))), 0, 0, [])
    return segments, chains


def _alone(bodies: Sequence[Sequence[int]]) -> tuple[list[Segment], list[list[int]]]:
    segments: list[Segment] = []
    for body in bodies:
        at = segments[-1].end if segments else 0
        segments.append(Segment(start=at, end=at + len(body), offset=0, ancestors=(), own=True))
    return segments, [[i] for i in range(len(bodies))]


def micro_batches(examples: Sequence[Tokens], rows: Sequence[int], *, limit: int) -> list[list[int]]:
    """Cut the rows of one step into packs of at most `limit` packed tokens, those that share most together.

    One example may exceed the limit by itself.
    """
    packs: list[list[int]] = []
    used = 0
    before: tuple[int, ...] = ()
    # In lexicographic order a row shares more with its neighbour than with any other.
    for row in sorted(rows, key=lambda row: examples[row].ids[:-1]):
        body = examples[row].ids[:-1]
        shared = min(common_prefix([before, body]), len(body) - 1, len(before) - 1) if packs else 0
        # Of what it shares with others the tree writes down again less than is worth sharing.
        new = len(body) - max(0, shared - WORTH_SHARING + 1)
        if packs and used + new <= limit:
            packs[-1].append(row)
            used += new
        else:
            packs.append([row])
            used = len(body)
        before = body
    return packs
