"""Dropout masks for LoRA, cut from one pool of random bits."""

from __future__ import annotations

import copy
import hashlib

import torch


class Dropout:
    """Masks for all layers of a step, cut from one pool of random bits at random offsets.

    Drawing fresh bits for 210 layers took a quarter of a step on two cores; a pool drawn every few steps
    and read at random offsets costs nothing to speak of. Every element is still dropped with probability p.
    A mask depends on (seed, step, pack, place) and nothing else, so a step that is computed again, in a job
    that is taken up again or in the backward pass of a checkpointed layer, draws the same ones.
    """

    POOL = 1 << 21
    #: Steps that share a pool.
    STEPS = 8

    def __init__(self, p: float, seed: int) -> None:
        self.p, self.seed, self.on = p, seed, False
        self._step = self._pack = 0
        self._pool = torch.empty(0)
        self._drawn = (0, -1)

    def start(self, step: int, largest: int) -> None:
        """Switch dropout on for this step, whose largest mask has `largest` elements."""
        self.on = self.p > 0
        self._step, self._pack = step, 0
        if not self.on:
            return
        # A power of two: steps differ in length, and each new size would be drawn anew.
        size, draw = max(self.POOL, 1 << (2 * largest).bit_length()), step // self.STEPS
        if (size, draw) != self._drawn:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + draw) % (1 << 62))
            self._pool = torch.empty(0)  # or both would be in memory
            self._pool = torch.rand(size, generator=generator).ge_(self.p).div_(1 - self.p)
            self._drawn = (size, draw)

    def next_pack(self, number: int) -> None:
        """The masks of this step's pack `number` come next."""
        self._pack = number

    def stop(self) -> None:
        """Switch dropout off: validation."""
        self.on = False

    @property
    def address(self) -> int:
        """Where the masks are."""
        return self._pool.data_ptr()

    def frozen(self) -> Dropout:
        """These masks for as long as they are needed, whatever step or pack this object goes on to."""
        return copy.copy(self)

    def mask(
        self, place: int, rows: int, width: int, like: torch.Tensor, *, column_major: bool = False
    ) -> torch.Tensor | None:
        """A mask [rows, width] of 0 and 1 / (1 - p), on the device and in the type of `like`.

        `place` names the layer; `column_major` is the memory order of what is masked.
        """
        if not self.on:
            return None
        count = rows * width
        if self._pool.numel() <= count:
            raise ValueError(f"a mask of {count} elements, but the step was started for fewer")
        start = self._number(place) % (self._pool.numel() - count)
        # Once for a pool, not for every mask: on a GPU each would be copied there.
        self._pool = self._pool.to(like.device, like.dtype)
        bits = self._pool[start : start + count]
        return bits.view(width, rows).t() if column_major else bits.view(rows, width)

    def _number(self, place: int) -> int:
        """Where in the pool the mask of this place lies, a number as good as random."""
        return _hash(self.seed, self._step, self._pack, place)


class DrawnOnGpu(Dropout):
    """The same on a GPU, where drawing bits costs next to nothing: anew for every pack, into the same memory. A place's
    mask always lies at the same address, as recorded graphs want it (train/graphs.py)."""

    def __init__(self, p: float, seed: int, like: torch.Tensor) -> None:
        """Masks are where `like` is, and in its type."""
        super().__init__(p, seed)
        self._pool = like.new_empty(0)

    def start(self, step: int, largest: int) -> None:
        """See Dropout.start. `largest` is the same in every step: the pool's size decides where masks lie."""
        self.on, self._step = self.p > 0, step
        if self.on and self._pool.numel() <= 2 * largest:
            self._pool = self._pool.new_empty(max(self.POOL, 1 << (2 * largest).bit_length()))

    def next_pack(self, number: int) -> None:
        """See Dropout.next_pack. The masks of the pack before are gone."""
        self._pack = number
        if self.on:
            generator = torch.Generator(device=self._pool.device)
            generator.manual_seed(_hash(self.seed, self._step, number) % (1 << 62))
            self._pool.bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)

    def _number(self, place: int) -> int:
        return _hash(self.seed, place)


def _hash(*numbers: int) -> int:
    key = "/".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
