"""Answers that are likely, so that several of their tokens can be read at once and need not be asked for one by one.

A guess costs as much as an answer's token when it is wrong, and a pass over the model less when it is right; hence
only what more than half of the expected answers go on with is guessed. What the model says decides, always.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

#: Share of the expected answers that must go on alike, for it to be guessed.
LIKELY = 0.5
#: Most tokens guessed at once, and tokens of an answer that are known.
AHEAD, DEEP = 32, 64


class _Node:
    __slots__ = ("count", "next")

    def __init__(self) -> None:
        self.count = 0
        self.next: dict[int, _Node] = {}


class Expected:
    """The expected answers as a tree of tokens."""

    def __init__(self, answers: Iterable[Sequence[int]] = ()) -> None:
        self._root = _Node()
        for answer in answers:
            node = self._root
            node.count += 1
            for token in answer[:DEEP]:
                node = node.next.setdefault(token, _Node())
                node.count += 1

    def __bool__(self) -> bool:
        return bool(self._root.next)

    def after(self, begun: Sequence[int], most: int) -> list[int]:
        """How an answer that begins so goes on, as far as that is likely; at most so many tokens."""
        node = self._root
        for token in begun:
            if token not in node.next:
                return []
            node = node.next[token]
        guessed: list[int] = []
        enough = LIKELY * node.count
        while node.next and len(guessed) < min(most, AHEAD):
            token, node = max(node.next.items(), key=lambda item: item[1].count)
            if node.count <= enough:
                break
            guessed.append(token)
        return guessed
