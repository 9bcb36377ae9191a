"""Which prompts are read together: those that begin alike share the beginning, those of one length share a batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from heldout.engine.template import common_prefix

#: Tokens that a further beginning must save: each is read alone, and its rows have batches of their own.
WORTH = 512
#: Times that prompts part before they are left as they are: rows that are each the beginning of the next part often.
DEEPEST = 100


class Family(NamedTuple):
    """Prompts that begin with the same tokens."""

    shared: int  # how many; at least one token of each prompt stays its own
    members: list[int]  # places in what was asked


def families(prompts: Sequence[Sequence[int]]) -> list[Family]:
    """Every prompt in one family, so that few tokens are read in all."""
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    found: list[Family] = []
    if rest := _split(prompts, order, 0, found, DEEPEST) if order else []:
        found.append(_family(prompts, rest))
    return found


def _split(prompts: Sequence[Sequence[int]], order: list[int], read: int, found: list[Family], deep: int) -> list[int]:
    """Add the families that are worth it; the prompts that are left over.

    Args:
        order: prompts in lexicographic order, in which those that share more are neighbours.
        read: how many tokens of their beginning the family around them shares.
        deep: how often they may part.
    """
    if len(order) == 1 or not deep:
        return order
    shared = common_prefix([prompts[order[0]], prompts[order[-1]]])
    parts = list(_parts(prompts, order, shared))
    # Its beginning is read once more, from the first token on.
    is_family = (len(order) - 1) * (shared - read) - read >= WORTH
    rest: list[int] = order
    if len(parts) > 1:
        rest = [i for part in parts for i in _split(prompts, part, shared if is_family else read, found, deep - 1)]
    if rest and is_family:
        found.append(_family(prompts, rest))
        return []
    return rest


def _family(prompts: Sequence[Sequence[int]], members: list[int]) -> Family:
    some = [prompts[i] for i in members]
    shared = min(common_prefix(some), min(map(len, some)) - 1) if len(members) > 1 else 0
    return Family(shared, sorted(members))


def _parts(prompts: Sequence[Sequence[int]], order: list[int], shared: int) -> Iterator[list[int]]:
    """Runs whose neighbours have more than `shared` tokens in common."""
    part = [order[0]]
    for before, after in itertools.pairwise(order):
        if common_prefix([prompts[before], prompts[after]]) <= shared:
            yield part
            part = []
        part.append(after)
    yield part


def batches(lengths: Sequence[int], tokens: int, rows: int) -> Iterator[list[int]]:
    """Places of rows of similar length, longest first, so little padding is computed: at most so many tokens (one row
    may have more) and so many rows."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (lengths[batch[0]] * (len(batch) + 1) > tokens or len(batch) >= rows):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
