"""The output head's loss without keeping its logits.

The head is frozen, so the gradient of the loss with respect to the hidden states is known as soon as the
logits are: both are computed chunk by chunk in the forward pass, and no logits outlive their chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from heldout.kernels import Kernels
from heldout.train.memory import LARGEST
from heldout.train.products import Weights
from heldout.train.rounding import padded, spare_rows

#: Predictions whose logits exist at the same time, by products of torch and by those of kernels, which need fewer rows
#: to be fast; bounds the memory of the output head. (Twice as many in bfloat16 where logits become their own gradient.)
CHUNK, FEW = 256, 96
#: Rows of logits that a processor works on at a time, so that they stay in its cache.
CACHED = 16


@dataclass(frozen=True)
class _Part:
    """What a chunk of predictions gives, [n] each, and the gradient of `loss` with respect to its hidden states."""

    loss: torch.Tensor
    plain: torch.Tensor
    right: torch.Tensor
    tempered: dict[int, torch.Tensor]  # by the number of the temperature
    gradient: torch.Tensor | None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weights: Weights,
        targets: torch.Tensor,
        smoothing: float,
        temperatures: Sequence[float],
        chunk: int | None,
    ) -> Any:
        count = len(targets)
        loss = torch.empty(count, device=hidden.device)
        plain, right = torch.empty_like(loss), torch.empty(count, dtype=torch.bool, device=hidden.device)
        tempered = torch.empty(len(temperatures), count, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        kernels = None if temperatures else weights.kernels
        chunk = chunk or at_once(weights, hidden, in_place=kernels is not None)
        # Chunks of one length, since a short one at the end costs nearly as much as a long one, and of as many rows as
        # their products have.
        even = math.ceil(count / max(1, math.ceil(count / chunk)))
        spare = 0 if weights.kernels else spare_rows(even, hidden)
        chunk = max(1, min(chunk, even + spare))
        for start in range(0, count, chunk):
            part, through = slice(start, start + chunk), gradient is not None
            if kernels:
                found = _by_kernels(kernels, hidden[part], weights, targets[part], smoothing, through)
            else:
                found = _by_torch(hidden[part], weights, targets[part], smoothing, temperatures, through)
            loss[part], plain[part], right[part] = found.loss, found.plain, found.right
            for number, losses in found.tempered.items():
                tempered[number, part] = losses
            if gradient is not None and found.gradient is not None:
                gradient[part] = found.gradient
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(plain, right, tempered)
        return loss, plain, right, tempered

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None].to(gradient.dtype), None, None, None, None, None


def at_once(weights: Weights, hidden: torch.Tensor, *, in_place: bool) -> int:
    """Predictions of a chunk. Where logits become their own gradient they take half as much in bfloat16."""
    if weights.kernels is None:
        return CHUNK
    many = FEW * 4 // hidden.itemsize
    return many if in_place and many * weights.beside.shape[0] * hidden.itemsize <= LARGEST else FEW


def _by_kernels(
    kernels: Kernels, hidden: torch.Tensor, weights: Weights, aims: torch.Tensor, smoothing: float, through: bool
) -> _Part:
    logits = weights.product(hidden)
    loss, plain, right = kernels.cross_entropy(logits, aims, smoothing, gradient=through)
    return _Part(loss, plain, right, {}, weights.product_back(logits) if through else None)


def _by_torch(
    hidden: torch.Tensor,
    weights: Weights,
    aims: torch.Tensor,
    smoothing: float,
    temperatures: Sequence[float],
    through: bool,
) -> _Part:
    room = weights.product(hidden if weights.kernels else padded(hidden)).float()
    logits, behind = room[: len(aims)], room[len(aims) :]
    aimed = logits.gather(1, aims[:, None])[:, 0]
    mean = logits.mean(dim=-1) if smoothing else aimed
    highest = logits.amax(dim=-1, keepdim=True)
    # Two logits that are equal are common in bfloat16 only, and argmax takes as long as all other passes.
    exact = hidden.dtype == torch.float32
    right = aimed == highest[:, 0] if exact else logits.argmax(dim=-1) == aims
    logits.sub_(highest)
    tempered = {
        number: sums.log() + (highest[:, 0] - aimed) / temperatures[number]
        for number, sums in _tempered_sums(logits, temperatures).items()
    }
    powers = logits.exp_()
    sums = powers.sum(dim=-1, keepdim=True)
    total = (highest + sums.log())[:, 0]
    loss = total - (1 - smoothing) * aimed - smoothing * mean
    gradient = None
    if through:
        # d loss / d logits = softmax - (1 - e) onehot - e / V; times the sum of powers here, and divided by it where
        # rows are short.
        if smoothing:
            powers.sub_(sums * (smoothing / logits.shape[1]))
        powers[torch.arange(len(aims), device=aims.device), aims] -= (1 - smoothing) * sums[:, 0]
        behind.zero_()
        gradient = weights.product_back(room.to(hidden.dtype))[: len(aims)] / sums
    return _Part(loss, total - aimed, right, tempered, gradient)


def _tempered_sums(logits: torch.Tensor, temperatures: Sequence[float]) -> dict[int, torch.Tensor]:
    """The sum of exp(logits / T) over the vocabulary, for each of the temperatures by its number; logits are at
    most 0.

    exp(x / T) is the square of exp(x / 2T): where 2T is a temperature too, a product is enough.
    """
    rows = CACHED if logits.device.type == "cpu" else max(1, len(logits))
    sums: dict[int, list[torch.Tensor]] = {number: [] for number in range(len(temperatures))}
    for block in logits.split(rows):
        for chain in _halving(temperatures):
            powers = torch.div(block, temperatures[chain[0]]).exp_()
            for number in chain:
                if number != chain[0]:
                    powers.mul_(powers)
                sums[number].append(powers.sum(dim=-1))
    return {number: torch.cat(parts) for number, parts in sums.items()}


def _halving(temperatures: Sequence[float]) -> list[list[int]]:
    """The temperatures by number, in chains of which each is half the one before."""
    chains: list[list[int]] = []
    for number in sorted(range(len(temperatures)), key=lambda one: -temperatures[one]):
        double = 2 * temperatures[number]
        chain = next((one for one in chains if math.isclose(temperatures[one[-1]], double)), None)
        if chain is None:
            chains.append([number])
        else:
            chain.append(number)
    return chains


def losses(
    hidden: torch.Tensor,
    weights: Weights,
    targets: torch.Tensor,
    *,
    smoothing: float = 0.0,
    temperatures: Sequence[float] = (),
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of each prediction, without logits kept.

    Args:
        hidden: [U, h]; weights: of the head, [V, h]; targets: [U].
        smoothing: share e of the target's mass spread evenly over the vocabulary.
        temperatures: K numbers above 0 that logits are divided by.
        chunk: predictions whose logits exist at the same time, see at_once.

    Returns:
        The loss with smoothing and with gradient, negative log-likelihood without either (nats), and whether the
        target is the argmax (of equal ones the first, in float32 by torch any); [U] each. Negative log-likelihood at
        every temperature, [K, U].
    """
    return _Loss.apply(hidden, weights, targets, smoothing, temperatures, chunk)
