"""Many conversations at once: the common prompt prefix is computed once, each row keeps its own cache.

Rows are padded on the left, between the shared prefix and their own tokens; padding is never looked at.
The cache is written by the attention function itself, so nothing is copied while an answer grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from transformers import AttentionInterface

from heldout.engine.base import Sampling
from heldout.engine.template import common_prefix

IMPLEMENTATION = "heldout_decode"

#: Own tokens of all rows of one batch, prompt and answer, at most. Bounds the cache's memory.
BATCH_TOKENS = 4096
BATCH_ROWS = 48
#: Queries computed at once; bounds the score matrix of a long prompt.
CHUNK = 512


#: What several rows start with: {layer: (keys, values)}, each [kv_heads, tokens, d].
Prefix: TypeAlias = dict[int, tuple[torch.Tensor, torch.Tensor]]


class Answer(NamedTuple):
    """New tokens without the end token, and whether the end token came."""

    tokens: list[int]
    ended: bool


class Rows:
    """The keys and values of one batch: a shared prefix and B rows of their own.

    Sizes: B rows, P prefix tokens, W slots for each row's own tokens.
    """

    def __init__(self, rows: int, slots: int, pads: torch.Tensor | None = None) -> None:
        self.slots = slots
        self.used = 0
        self.pads = torch.zeros(rows, dtype=torch.long) if pads is None else pads  # [B]
        self.prefix: Prefix = {}
        self.own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> [B, kv_heads, W, d] twice

    @property
    def prefix_length(self) -> int:
        return length_of(self.prefix)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, kv_heads, n, d] at this layer; all own keys and values so far."""
        if layer not in self.own:
            rows, heads, _, width = key.shape
            empty = key.new_zeros(rows, heads, self.slots, width)
            self.own[layer] = (empty, torch.zeros_like(empty))
        end = self.used + key.shape[2]
        keys, values = self.own[layer]
        keys[:, :, self.used : end] = key
        values[:, :, self.used : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def mask(self, queries: int) -> torch.Tensor:
        """[B, 1, n, used + n]: True where a query of the next n slots may look at an own slot.

        A padded query looks at itself, so that no softmax is over nothing.
        """
        slots = torch.arange(self.used + queries, device=self.pads.device)
        query = slots[self.used :]
        causal = slots[None, :] <= query[:, None]
        real = slots[None, None, :] >= self.pads[:, None, None]
        return ((causal & real) | (slots[None, :] == query[:, None]))[:, None]

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all other rows."""
        self.pads = self.pads[rows]
        self.own = {layer: (k[rows], v[rows]) for layer, (k, v) in self.own.items()}

    def as_prefix(self) -> Prefix:
        """This batch's single row as the prefix of another batch."""
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
    """
    if rows is None or mask is None:
        raise ValueError("this model does not hand extra arguments to its attention")
    batch, heads, n, width = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    keys, values = rows.write(layer, key, value)
    if sliding_window is not None and rows.prefix_length + keys.shape[2] > sliding_window:
        raise ValueError(f"conversations longer than the sliding window of {sliding_window} are not supported")
    scale = scaling if scaling is not None else width**-0.5
    # Heads that share keys become further queries of one product: nothing is repeated.
    q = query.reshape(batch, kv_heads, group * n, width) * scale
    scores = torch.matmul(q, keys.transpose(2, 3)).view(batch, kv_heads, group, n, -1)
    scores = scores.masked_fill(~mask[:, :, None], -math.inf)
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


def forward(model: Any, ids: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Hidden states [B, n, hidden] of the next n tokens of every row; the rows' caches grow by n."""
    n = ids.shape[1]
    slots = torch.arange(rows.used, rows.used + n, device=ids.device)
    positions = (rows.prefix_length + slots[None] - rows.pads[:, None]).clamp(min=0)
    hidden = model.base_model(
        input_ids=ids, position_ids=positions, use_cache=False, rows=rows, mask=rows.mask(n)
    ).last_hidden_state
    rows.used += n
    return hidden


def shared_prefix(model: Any, prompts: Sequence[Sequence[int]]) -> Prefix:
    """The cache of what all prompts start with. At least one token of each prompt stays its own."""
    length = min(common_prefix(prompts), min(map(len, prompts)) - 1)
    if length <= 0 or len(prompts) == 1:
        return {}
    return with_prefix(model, {}, prompts[0][:length])


def with_prefix(model: Any, prefix: Prefix, more: Sequence[int]) -> Prefix:
    """The cache of a prefix and these tokens after it."""
    if not more:
        return prefix
    rows, chunks = read_rows(model, prefix, [more], room=0)
    for _ in chunks:
        pass  # what they predict is not asked for
    own = rows.as_prefix()
    if not prefix:
        return own
    return {
        layer: (torch.cat([k, own[layer][0]], 1), torch.cat([v, own[layer][1]], 1)) for layer, (k, v) in prefix.items()
    }


def length_of(prefix: Prefix) -> int:
    """How many tokens."""
    return next(iter(prefix.values()))[0].shape[1] if prefix else 0


def read_rows(
    model: Any, prefix: Prefix, own: Sequence[Sequence[int]], room: int
) -> tuple[Rows, Iterator[torch.Tensor]]:
    """Rows of the tokens that follow the prefix, with room for more; and their hidden states [B, n, hidden], some
    places after others: each is read when it is asked for."""
    longest = max(map(len, own))
    pads = torch.tensor([longest - len(row) for row in own], device=_device(model))
    rows = Rows(len(own), longest + room, pads)
    rows.prefix = prefix
    padded = ids_of(model, [[0] * (longest - len(row)) + list(row) for row in own])
    chunk = max(1, CHUNK // len(own)) if longest > CHUNK else longest
    return rows, (forward(model, padded[:, start : start + chunk], rows) for start in range(0, longest, chunk))


def start_rows(model: Any, prefix: Prefix, prompts: Sequence[Sequence[int]], room: int) -> tuple[Rows, torch.Tensor]:
    """Read the prompts; the rows, and the hidden state [B, hidden] that predicts each next token."""
    rows, chunks = read_rows(model, prefix, [prompt[length_of(prefix) :] for prompt in prompts], room)
    for hidden in chunks:
        last = hidden[:, -1]
    return rows, last


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: Sampling,
    stop_ids: frozenset[int],
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """An answer to each prompt, in order.

    Args:
        limits: the most new tokens for each prompt, at least 1.
        progress: called with (answers done, all of them) after every token of a batch; a batch that is
            half way counts half.
    """
    tell = progress or (lambda done, total: None)
    tell(0, len(prompts))
    prefix = shared_prefix(model, prompts)
    skip = length_of(prefix)
    generator = _generator(model, sampling)
    answers: dict[int, Answer] = {}
    for batch in batches([len(p) - skip + limit for p, limit in zip(prompts, limits, strict=True)]):
        before = len(answers)
        batch_answers = _generate_batch(
            model,
            prefix,
            [prompts[i] for i in batch],
            [limits[i] for i in batch],
            lambda hidden: pick(model.get_output_embeddings()(hidden), sampling, generator),
            stop_ids,
            lambda done, before=before: tell(before + done, len(prompts)),  # type: ignore[misc]
        )
        answers.update(zip(batch, batch_answers, strict=True))
    tell(len(prompts), len(prompts))
    return [answers[i] for i in range(len(prompts))]


def _generate_batch(
    model: Any,
    prefix: Prefix,
    prompts: list[Sequence[int]],
    limits: list[int],
    choose: Callable[[torch.Tensor], torch.Tensor],
    stop_ids: frozenset[int],
    tell: Callable[[int], None],
) -> list[Answer]:
    rows, hidden = start_rows(model, prefix, prompts, max(limits))
    indices = list(range(len(prompts)))  # indices[r] is the prompt of cache row r
    answers = [Answer([], False) for _ in prompts]
    open_ = set(indices)
    for step in range(1, max(limits) + 1):
        tokens = choose(hidden)
        for index, token in zip(indices, tokens.tolist(), strict=True):
            if index in open_:
                if token in stop_ids:
                    answers[index] = Answer(answers[index].tokens, True)
                else:
                    answers[index].tokens.append(token)
                if token in stop_ids or step >= limits[index]:
                    open_.remove(index)
        if not open_:
            break
        tell(max(len(prompts) - len(open_), len(prompts) * step // max(limits)))
        # Finished rows are carried along until enough of them are worth the copy.
        if len(open_) <= 0.75 * len(indices):
            keep = [row for row, index in enumerate(indices) if index in open_]
            chosen = torch.tensor(keep, device=tokens.device)
            rows.keep(chosen)
            tokens, indices = tokens[chosen], [indices[row] for row in keep]
        hidden = forward(model, tokens[:, None], rows)[:, -1]
    return answers


def generate_stream(
    model: Any, prompt: Sequence[int], limit: int, sampling: Sampling, stop_ids: frozenset[int]
) -> Iterator[int | None]:
    """One prompt's new tokens as they come; None at the end token.

    Nothing that belongs to a thread is held while a token is handed over: a server may ask for the next
    one from another thread.
    """
    generator = _generator(model, sampling)
    with torch.no_grad():
        rows, hidden = start_rows(model, {}, [prompt], limit)
    for _ in range(limit):
        with torch.no_grad():
            token = pick(model.get_output_embeddings()(hidden), sampling, generator)
        if int(token) in stop_ids:
            yield None
            return
        yield int(token)
        with torch.no_grad():
            hidden = forward(model, token[:, None], rows)[:, -1]


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


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows of similar length, longest first, so little padding is computed."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (lengths[batch[0]] * (len(batch) + 1) > BATCH_TOKENS or len(batch) >= BATCH_ROWS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _generator(model: Any, sampling: Sampling) -> torch.Generator | None:
    if sampling.temperature <= 0 or sampling.seed is None:
        return None
    return torch.Generator(device=_device(model)).manual_seed(sampling.seed)


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def ids_of(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """The tokens [B, n] on the model's device."""
    return torch.tensor([list(row) for row in rows], dtype=torch.long, device=_device(model))
