"""What a model's files say of its weights, without reading them. No torch but for its names of types."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def parameters(folder: Path) -> int:
    """How many numbers there are."""
    return sum(math.prod(one.get_shape()) for one in _tensors(folder))


def precision(folder: Path) -> torch.dtype:
    """What nothing is lost in: bfloat16 if that is what all weights are stored in, else float32."""
    return torch.bfloat16 if {one.get_dtype() for one in _tensors(folder)} == {"BF16"} else torch.float32


def _tensors(folder: Path) -> Iterator[Any]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield tensors.get_slice(name)
