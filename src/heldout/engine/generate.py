"""Many conversations at once: what prompts begin with is computed once, each row keeps its own cache, and what answers
are expected to say is read ahead.

A greedy answer is the same however it comes about, but for rounding: a guess is kept as far as the model says the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from heldout.engine import cache, device
from heldout.engine.base import Sampling
from heldout.engine.cache import Prefix, Rows
from heldout.engine.expected import AHEAD, Expected
from heldout.engine.portions import POSITIONS
from heldout.engine.sharing import batches, families


class Answer(NamedTuple):
    """New tokens without the end token, and whether the end token came."""

    tokens: list[int]
    ended: bool


class _Open:
    """An answer that grows."""

    def __init__(self, place: int, prompt: Sequence[int], limit: int) -> None:
        self.place = place  # in what was asked
        self.limit = limit
        self.unread: Sequence[int] = prompt  # of the prompt and the answer, what the model has not read
        self.tokens: list[int] = []
        self.ended = False

    @property
    def done(self) -> bool:
        """Whether nothing more is said."""
        return self.ended or len(self.tokens) >= self.limit

    def hear(self, said: Sequence[int], stop_ids: frozenset[int]) -> None:
        """Take what the model said, as far as the answer goes."""
        self.unread = said[-1:]
        for token in said:
            if self.done:
                return
            self.ended = token in stop_ids
            if not self.ended:
                self.tokens.append(token)


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: Sampling,
    stop_ids: frozenset[int],
    progress: Callable[[int, int], None] | None = None,
    expected: Expected | None = None,
) -> list[Answer]:
    """An answer to each prompt, in order.

    Args:
        limits: the most new tokens for each prompt, at least 1.
        progress: called with (answers done, all of them) after every pass of a batch; a batch that is
            half way counts half.
        expected: what greedy answers are likely to be, to be read ahead.
    """
    tell = progress or (lambda done, total: None)
    tell(0, len(prompts))
    portions = device.portions()
    generator = _generator(model, sampling)
    if not expected or sampling.temperature > 0:
        expected = Expected()
    ahead = 1 + AHEAD if expected else 0
    answers: dict[int, Answer] = {}
    for shared, members in families(prompts):
        prefix = cache.prefix_of(model, prompts[members[0]][:shared])
        lengths = [len(prompts[i]) - shared + limits[i] + min(limits[i], ahead) for i in members]
        for batch in batches(lengths, portions.cached, portions.rows):
            rows = [_Open(members[i], prompts[members[i]][shared:], limits[members[i]]) for i in batch]
            before = len(answers)
            _answer(
                model,
                prefix,
                rows,
                lambda hidden: pick(model.get_output_embeddings()(hidden), sampling, generator),
                stop_ids,
                expected,
                lambda done, before=before: tell(before + done, len(prompts)),  # type: ignore[misc]
            )
            answers.update((row.place, Answer(row.tokens, row.ended)) for row in rows)
    tell(len(prompts), len(prompts))
    return [answers[i] for i in range(len(prompts))]


def _answer(
    model: Any,
    prefix: Prefix,
    answers: Sequence[_Open],
    choose: Callable[[torch.Tensor], torch.Tensor],
    stop_ids: frozenset[int],
    expected: Expected,
    tell: Callable[[int], None],
) -> None:
    """Let one batch of answers grow to their ends."""
    longest, limit = max(len(one.unread) for one in answers), max(one.limit for one in answers)
    # Whoever is the longest, another may have guessed most.
    rows = Rows(model, len(answers), longest + limit + (min(limit, 1 + AHEAD) if expected else 0), prefix)
    unread = cache.read_but_the_last(model, rows, [one.unread for one in answers])
    for one, left in zip(answers, unread, strict=True):
        one.unread = left
    carried = list(answers)  # carried[r] is the answer of cache row r
    while not all(one.done for one in carried):
        # What the answer says so far decides what is guessed; behind a guess that is right one token more is known.
        guesses = [[] if one.done else expected.after(one.tokens, one.limit - len(one.tokens) - 1) for one in carried]
        asked = [len(one.unread) - 1 for one in carried]  # the place whose next token is asked for
        read = cache.read(model, rows, [[*one.unread, *guess] for one, guess in zip(carried, guesses, strict=True)])
        states = [hidden[place:] for hidden, place in zip(read, asked, strict=True)]
        chosen = torch.cat([choose(some) for some in torch.cat(states).split(POSITIONS)])
        said = chosen.cpu().split([len(some) for some in states])  # once for all rows: on a GPU each would wait
        kept = []
        for one, guess, words in zip(carried, guesses, map(torch.Tensor.tolist, said), strict=True):
            right = next((i for i, token in enumerate(guess) if token != words[i]), len(guess))
            kept.append(0 if one.done else len(one.unread) + right)
            one.hear(words[: right + 1], stop_ids)
        rows.count(kept)
        tell(_done(answers))
        # Finished rows are carried along until enough of them are worth the copy.
        open_ = [r for r, one in enumerate(carried) if not one.done]
        if open_ and len(open_) <= 0.75 * len(carried):
            rows.keep(open_)
            carried = [carried[r] for r in open_]


def _done(answers: Sequence[_Open]) -> int:
    """Of a batch, the answers that are done; or as many as the open ones are surely on their way."""
    open_ = [one for one in answers if not one.done]
    if not open_:
        return len(answers)
    share = min(len(one.tokens) for one in open_) / max(one.limit for one in answers)
    return max(len(answers) - len(open_), int(len(answers) * share))


def generate_stream(
    model: Any, prompt: Sequence[int], limit: int, sampling: Sampling, stop_ids: frozenset[int]
) -> Iterator[int | None]:
    """One prompt's new tokens as they come; None at the end token.

    Nothing that belongs to a thread is held while a token is handed over: a server may ask for the next
    one from another thread.
    """
    generator = _generator(model, sampling)
    rows = Rows(model, 1, len(prompt) + limit, {})
    with torch.no_grad():
        [unread] = cache.read_but_the_last(model, rows, [prompt])
    for _ in range(limit):
        with torch.no_grad():
            [hidden] = cache.read(model, rows, [unread])
            rows.count([len(unread)])
            token = int(pick(model.get_output_embeddings()(hidden[-1:]), sampling, generator))
        if token in stop_ids:
            yield None
            return
        yield token
        unread = [token]


def pick(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> torch.Tensor:
    """The next token of every row, [B]."""
    if sampling.temperature <= 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token stays while the mass before it is below top_p; the first one always stays.
        beyond = (ordered.cumsum(dim=-1) - ordered) >= sampling.top_p
        beyond[..., 0] = False
        ordered = ordered.masked_fill(beyond, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _generator(model: Any, sampling: Sampling) -> torch.Generator | None:
    if sampling.temperature <= 0 or sampling.seed is None:
        return None
    return torch.Generator(device=cache.device_of(model)).manual_seed(sampling.seed)
