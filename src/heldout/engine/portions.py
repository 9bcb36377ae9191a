"""How much is computed at once where answers are made. Imports no torch: memory is predicted with the same numbers."""

from __future__ import annotations

from dataclasses import dataclass

#: Places whose logits are in memory at once.
POSITIONS = 256


@dataclass(frozen=True, kw_only=True)
class Portions:
    """Whatever is computed, its numbers do not depend on them but for rounding."""

    cached: int  # tokens of all rows of a batch, prompt and answer: bounds the memory of keys and values
    rows: int  # of a batch
    read: int  # tokens read at once
    padded: int  # an encoder's tokens, padding counted


#: A processor is fastest while activations stay in its cache; a GPU's time goes into starting operations, whatever
#: their size.
PROCESSOR = Portions(cached=4096, rows=48, read=768, padded=512)
GPU = Portions(cached=16_384, rows=256, read=4096, padded=16_384)
