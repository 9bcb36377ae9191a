"""How likely given answers are: many in one pass, and what their prompts share is read once.

Answers to one prompt (the labels of a task, a fact and its decoys) continue the same cache; prompts that share their
beginning share that. A sum of logarithms differs by rounding from that of a pass alone, as sums of fp32 do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from heldout.engine.generate import Prefix, batches, ids_of, length_of, read_rows, shared_prefix, with_prefix
from heldout.engine.template import Tokens

#: Positions whose logits over the whole vocabulary are in memory at once.
POSITIONS = 256


class _Row(NamedTuple):
    place: int  # in what was asked
    ids: Sequence[int]  # behind the prefix
    answer: int  # how many of the last ids are judged


def log_probs(
    model: Any, conversations: Sequence[Tokens], progress: Callable[[int, int], None] | None = None
) -> list[float]:
    """The sum of the natural-log probabilities of each conversation's supervised tokens, which are its last ones.

    Args:
        progress: called with (conversations done, all of them) after every pass.
    """
    tell = progress or (lambda done, total: None)
    tell(0, len(conversations))
    if not conversations:
        return []
    found: dict[int, float] = {}
    for prefix, rows in _passes(model, conversations):
        found.update(zip((row.place for row in rows), _read(model, prefix, rows), strict=True))
        tell(len(found), len(conversations))
    return [found[i] for i in range(len(conversations))]


def _passes(model: Any, conversations: Sequence[Tokens]) -> Iterator[tuple[Prefix, list[_Row]]]:
    """Rows that are read together, with the cache of what stands before them."""
    prompts = [tokens.ids[: tokens.supervised.index(True)] for tokens in conversations]
    common = shared_prefix(model, prompts)
    begin = length_of(common)
    answers: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        answers.setdefault(prompt, []).append(i)
    single = [indices[0] for indices in answers.values() if len(indices) == 1]
    yield from _batched(common, [_row(conversations, prompts, i, begin) for i in single])
    for prompt, indices in answers.items():
        if len(indices) > 1:
            # The prompt's last token stays with each answer: what it predicts is the answer's first token.
            prefix = with_prefix(model, common, prompt[begin:-1])
            yield from _batched(prefix, [_row(conversations, prompts, i, len(prompt) - 1) for i in indices])


def _row(conversations: Sequence[Tokens], prompts: Sequence[Sequence[int]], i: int, begin: int) -> _Row:
    ids = conversations[i].ids
    return _Row(i, ids[begin:], len(ids) - len(prompts[i]))


def _batched(prefix: Prefix, rows: list[_Row]) -> Iterator[tuple[Prefix, list[_Row]]]:
    for batch in batches([len(row.ids) for row in rows]):
        yield prefix, [rows[i] for i in batch]


def _read(model: Any, prefix: Prefix, rows: Sequence[_Row]) -> list[float]:
    hidden = torch.cat(list(read_rows(model, prefix, [row.ids for row in rows], room=0)[1]), dim=1)
    # Rows are padded on the left, so all end at the same place.
    states = torch.cat([hidden[r, -row.answer - 1 : -1] for r, row in enumerate(rows)])
    wanted = ids_of(model, [[token for row in rows for token in row.ids[-row.answer :]]])[0]
    head = model.get_output_embeddings()
    chosen = torch.cat(
        [
            torch.log_softmax(head(some).float(), dim=-1).gather(1, those[:, None])[:, 0]
            for some, those in zip(states.split(POSITIONS), wanted.split(POSITIONS), strict=True)
        ]
    )
    return [float(part.sum()) for part in chosen.split([row.answer for row in rows])]
