"""Examples of a file too big for memory: a sequence that lies on disk."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, overload

import msgspec

from heldout.pipeline.types import Example

#: Files up to this size stay in memory, where their examples take a few times as much.
SPOOL_ABOVE_BYTES = 64 << 20

_BLOCK_BYTES = 4 << 20


class SpooledExamples(Sequence[Example]):
    """Examples in a temporary file that goes away with this object.

    Going through them in order reads big blocks; each pass has a place of its own, so several may be under
    way. Picking one by its index reads just that one. A slice is a tuple in memory.
    """

    def __init__(self, file: BinaryIO, ends: array[int]) -> None:
        self._file, self._ends = file, ends  # `ends[i]`: the byte behind example i
        self._decode = msgspec.msgpack.Decoder(Example).decode

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        position = range(len(self))[index]  # raises IndexError, counts negative ones from the end
        start = self._start(position)
        return self._decode(os.pread(self._file.fileno(), self._ends[position] - start, start))

    def __iter__(self) -> Iterator[Example]:
        decode, ends, first = self._decode, self._ends, 0
        while first < len(ends):
            start = self._start(first)
            block = memoryview(os.pread(self._file.fileno(), max(_BLOCK_BYTES, ends[first] - start), start))
            here = 0
            while first < len(ends) and (end := ends[first] - start) <= len(block):
                yield decode(block[here:end])
                here, first = end, first + 1
            if not here:
                raise OSError("the temporary file of the examples was cut short")

    def close(self) -> None:
        """Give the disk space back now."""
        self._file.close()

    def _start(self, position: int) -> int:
        return self._ends[position - 1] if position else 0


class ExampleStore:
    """Collects the examples of a file: in memory at first, on disk once the file has turned out to be big."""

    def __init__(self, spool_above: int = SPOOL_ABOVE_BYTES) -> None:
        self._spool_above = spool_above
        self._kept: list[Example] = []
        self._file: BinaryIO | None = None
        self._ends = array("Q")
        self._encode = msgspec.msgpack.Encoder().encode
        self._buffer = bytearray()
        self._written = 0

    def add(self, example: Example, bytes_read: int) -> None:
        """Keep an example; `bytes_read` is how much of its file has been read by now."""
        self._kept.append(example)
        if self._file is not None or bytes_read > self._spool_above:
            self._spool()

    def finish(self) -> Sequence[Example]:
        """All examples, in order."""
        if self._file is None:
            return tuple(self._kept)
        self._flush()
        return SpooledExamples(self._file, self._ends)

    def _spool(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="heldout-", dir=roomy_folder())  # noqa: SIM115 - SpooledExamples owns it
        for example in self._kept:
            self._buffer += self._encode(example)
            self._ends.append(self._written + len(self._buffer))
        self._kept.clear()
        if len(self._buffer) >= _BLOCK_BYTES:
            self._flush()

    def _flush(self) -> None:
        assert self._file is not None
        self._file.write(self._buffer)
        self._file.flush()
        self._written += len(self._buffer)
        self._buffer.clear()


def roomy_folder() -> str | None:
    """Where big temporary files belong. /tmp is memory on many machines, and memory is what is short."""
    folder, big = tempfile.gettempdir(), Path("/var/tmp")
    return str(big) if folder == "/tmp" and os.access(big, os.W_OK | os.X_OK) else None
