"""How likely given answers are: many in one pass, and what their prompts share is read once.

All answers to one prompt (the labels of a task, a fact and its decoys) are a tree behind it: what they begin with is
read once, and every token looks at its own past only. Trees are batched as prompts are. A sum of logarithms differs by
rounding from that of a pass alone, as sums of fp32 do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from heldout.engine import cache, device
from heldout.engine.cache import Prefix, Rows
from heldout.engine.portions import POSITIONS
from heldout.engine.sharing import batches, families
from heldout.engine.template import Tokens

#: Tokens of answers from which on another tree is begun: every token is held against all others of its tree.
LARGE = 1024


@dataclass
class Tree:
    """The last tokens of a prompt and the answers behind it. Node i comes before all that follow it."""

    tokens: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)  # the node each stands behind; -1: the prefix
    places: list[int] = field(default_factory=list)  # in what was asked, of the answers
    paths: list[list[int]] = field(default_factory=list)  # the nodes of each answer, in order
    _next: dict[tuple[int, int], int] = field(default_factory=dict)

    def grow(self, begin: int, tokens: Sequence[int]) -> list[int]:
        """The nodes of these tokens behind a node, those that are there already among them."""
        nodes = []
        for token in tokens:
            if (begin, token) not in self._next:
                self._next[begin, token] = len(self.tokens)
                self.tokens.append(token)
                self.before.append(begin)
            begin = self._next[begin, token]
            nodes.append(begin)
        return nodes


def log_probs(
    model: Any, conversations: Sequence[Tokens], progress: Callable[[int, int], None] | None = None
) -> list[float]:
    """The sum of the natural-log probabilities of each conversation's supervised tokens, which are its last ones.

    Args:
        progress: called with (conversations done, all of them) after every pass.
    """
    tell = progress or (lambda done, total: None)
    tell(0, len(conversations))
    answers: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(conversations):
        answers.setdefault(one.ids[: one.supervised.index(True)], []).append(i)
    prompts, portions = list(answers), device.portions()
    found: dict[int, float] = {}
    for shared, members in _together(prompts):
        prefix = cache.prefix_of(model, prompts[members[0]][:shared])
        trees = [
            tree
            for member in members
            for tree in _trees(conversations, answers[prompts[member]], shared, len(prompts[member]))
        ]
        for batch in batches([len(tree.tokens) for tree in trees], portions.read, portions.rows):
            some = [trees[i] for i in batch]
            places = [place for tree in some for place in tree.places]
            found.update(zip(places, _read(model, prefix, some), strict=True))
            tell(len(found), len(conversations))
    return [found[i] for i in range(len(conversations))]


def _together(prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
    """Prompts whose trees stand behind one prefix. One with much of its own is read by itself, all but its last token:
    a tree is no way to read a long text."""
    for shared, members in families(prompts):
        if short := [i for i in members if len(prompts[i]) - shared <= cache.CHUNK]:
            yield shared, short
        for i in members:
            if len(prompts[i]) - shared > cache.CHUNK:
                yield len(prompts[i]) - 1, [i]


def _trees(conversations: Sequence[Tokens], places: Sequence[int], shared: int, prompt: int) -> Iterator[Tree]:
    """The answers to one prompt, of so many tokens, as one tree or several."""
    tree = Tree()
    for place in places:
        if len(tree.tokens) - (prompt - shared) >= LARGE:
            yield tree
            tree = Tree()
        ids = conversations[place].ids
        # The prompt's last token is the tree's own: what it predicts is an answer's first token.
        begin = tree.grow(-1, ids[shared:prompt])[-1]
        tree.places.append(place)
        tree.paths.append(tree.grow(begin, ids[prompt:]))
    yield tree


def _read(model: Any, prefix: Prefix, trees: Sequence[Tree]) -> list[float]:
    """The sum of each answer's logarithms, tree by tree."""
    hidden = _hidden(model, prefix, trees)
    # Every answer's token is judged by what the token before it predicts.
    judged = [(r, node) for r, tree in enumerate(trees) for node in sorted({n for path in tree.paths for n in path})]
    rows = torch.tensor([r for r, _ in judged], device=hidden.device)
    before = torch.tensor([trees[r].before[node] for r, node in judged], device=hidden.device)
    tokens = torch.tensor([trees[r].tokens[node] for r, node in judged], device=hidden.device)
    states, place = torch.unique(torch.stack([rows, before]), dim=1, return_inverse=True)
    logs = torch.empty(len(judged), device=hidden.device)
    head = model.get_output_embeddings()
    for start in range(0, states.shape[1], POSITIONS):
        r, node = states[:, start : start + POSITIONS]
        predicted = torch.log_softmax(head(hidden[r, node]).float(), dim=-1)
        here = ((place >= start) & (place < start + POSITIONS)).nonzero()[:, 0]
        logs[here] = predicted[place[here] - start, tokens[here]]
    of = dict(zip(judged, logs.tolist(), strict=True))
    return [sum(of[r, node] for node in path) for r, tree in enumerate(trees) for path in tree.paths]


def _hidden(model: Any, prefix: Prefix, trees: Sequence[Tree]) -> torch.Tensor:
    """Hidden states [B, n, hidden] of the nodes of every tree."""
    n = max(len(tree.tokens) for tree in trees)
    rows = Rows(model, len(trees), n, prefix)
    seen = torch.stack([_seen(tree, n) for tree in trees])  # [B, n, n]
    depths = (seen.sum(-1) - 1).to(rows.lengths.device)
    seen = seen.to(rows.lengths.device)
    chunk = n if n <= cache.CHUNK else max(1, cache.CHUNK // len(trees))
    states = []
    for start in range(0, n, chunk):
        end = min(n, start + chunk)
        some = [tree.tokens[start:end] for tree in trees]
        states.append(cache.read_masked(model, rows, some, depths[:, start:end], seen[:, start:end, :end]))
        rows.count([end - start] * len(trees))
    return torch.cat(states, dim=1)


def _seen(tree: Tree, n: int) -> torch.Tensor:
    """[n, n]: which nodes each looks at: itself and those on the way to it. Rows that are filled up look at
    themselves, so that no softmax is over nothing."""
    seen = torch.eye(n, dtype=torch.bool)
    for node, before in enumerate(tree.before):
        if before >= 0:
            seen[node] |= seen[before]
    return seen
