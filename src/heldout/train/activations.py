"""What leaves the frozen layers, computed once for every example and kept in a memory-mapped file.

Below the cut there is no adapter and nothing random, so an example's activations depend on its tokens, the
cut and the model alone: later epochs, validations, folds and rates find them by these. What examples share
is stored once for every pack they were computed in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from heldout.engine.template import Tokens
from heldout.train.body import Body
from heldout.train.packing import Pack, micro_batches, pack

#: Packed tokens computed at once, where memory is no concern.
TOKENS = 4096
DATA, INDEX = "activations.bin", "index.json"


class Activations:
    """A file of [rows, h] numbers, and where in it each example lies."""

    def __init__(self, folder: Path, body: Body, dtype: torch.dtype, width: int, tokens: int = TOKENS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.body, self.dtype, self.width, self.tokens = folder, body, dtype, width, tokens
        self._size = width * dtype.itemsize
        self._spans: dict[str, list[list[int]]] = {}  # example -> [first row, rows] in order
        self._rows = 0
        self._open()

    @staticmethod
    def of_model(root: Path, body: Body, model: Path, dtype: torch.dtype, tokens: int = TOKENS) -> Activations:
        """Those of one model, cut and precision, below `root`; computed in packs of at most `tokens`."""
        whole = [*sorted(model.glob("*.safetensors")), model / "config.json"]
        files = [(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in whole]
        key = hashlib.sha256(json.dumps([str(model), files, body.cut, str(dtype)]).encode()).hexdigest()[:16]
        return Activations(root / key, body, dtype, int(body.model.config.hidden_size), tokens)

    def prepare(self, examples: Iterable[Tokens], tell: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Compute what is missing; the number of examples that were computed. When `tell` raises, because the job is
        paused, what is done is kept."""
        missing = list({_key(one): one for one in examples if _key(one) not in self._spans}.values())
        done = 0
        for rows in micro_batches(missing, range(len(missing)), limit=self.tokens) if missing else []:
            chosen = [missing[row] for row in rows]
            one = pack(chosen)
            self._append(self.body.below(one.to(self._device)))
            for example, spans in zip(chosen, one.spans, strict=True):
                self._spans[_key(example)] = [[self._rows + start, end - start] for start, end in spans]
            self._rows += one.layout.segments[-1].end
            done += len(chosen)
            try:
                tell(done, len(missing))
            except BaseException:
                # The packs that are left will be the same ones: they are cut greedily, in the order of their tokens.
                self._close_index()
                raise
        if missing:
            self._close_index()
        return len(missing)

    def of(self, one: Pack, examples: Sequence[Tokens]) -> torch.Tensor:
        """What enters the first trained layer for this pack of these examples, [L, h]."""
        self.prepare(examples)
        rows = np.empty(one.layout.segments[-1].end, dtype=np.int64)
        for example, spans in zip(examples, one.spans, strict=True):
            stored = np.concatenate([np.arange(first, first + n) for first, n in self._spans[_key(example)]])
            packed = np.concatenate([np.arange(start, end) for start, end in spans])
            rows[packed] = stored
        numbers = torch.from_numpy(self._map()[rows]).view(self.dtype)
        return numbers.to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.body.model.parameters()).device

    def _map(self) -> np.ndarray:
        # Raw integers of the same size: numpy has no bfloat16.
        kind = {2: np.int16, 4: np.int32}[self.dtype.itemsize]
        return np.memmap(self.folder / DATA, dtype=kind, mode="r", shape=(self._rows, self.width))

    def _append(self, numbers: torch.Tensor) -> None:
        raw = numbers.detach().to("cpu", self.dtype).contiguous()
        with (self.folder / DATA).open("ab") as file:
            file.write(raw.view(torch.uint8).numpy().tobytes())

    def _open(self) -> None:
        """Read the index; what a killed process wrote after it is cut off."""
        data, index = self.folder / DATA, self.folder / INDEX
        with contextlib.suppress(OSError, ValueError):  # none yet, or damaged: everything is computed again
            known = json.loads(index.read_text())
            if data.stat().st_size >= known["rows"] * self._size:
                self._spans, self._rows = known["examples"], known["rows"]
        with data.open("ab") as file:
            file.truncate(self._rows * self._size)

    def _close_index(self) -> None:
        temporary = self.folder / f".{INDEX}"
        with temporary.open("w") as file:
            json.dump({"rows": self._rows, "examples": self._spans}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / INDEX)


def _key(example: Tokens) -> str:
    # The last token of an example predicts nothing and is not computed.
    return hashlib.sha256(array("q", example.ids[:-1]).tobytes()).hexdigest()[:32]
