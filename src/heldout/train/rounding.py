"""Numbers of rows that a processor's bfloat16 products are cheap for.

oneDNN, which multiplies where no kernels do (and with adapters of layers that are not one call), compiles every product
of a new shape and keeps what it compiled, about half a megabyte each. Packed batches have a new number of tokens in
almost every step, so that a process grew by 25 MB a step (docs/experiments.md, "bfloat16 on a processor"). With rows of
zeros behind the real ones there are few shapes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: Rows come in multiples of this, in bfloat16 on a processor.
STEP = 32


def padded(x: torch.Tensor) -> torch.Tensor:
    """[L, w] with rows of zeros behind it, as many as the products with it should have."""
    spare = spare_rows(len(x), x)
    return F.pad(x, (0, 0, 0, spare)) if spare else x


def spare_rows(rows: int, like: torch.Tensor) -> int:
    """How many rows to add to so many, for products with tensors like this one."""
    return -rows % STEP if like.dtype == torch.bfloat16 and like.device.type == "cpu" else 0
