"""A stream of bytes -> its lines, in memory that does not depend on how long a line or the file is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from heldout.engine.base import Progress

#: The longest line that is read. A million tokens of Chinese, every character written as \uXXXX, are 9 MB;
#: no model here reads more, and what JSON makes of 16 MiB of brackets still fits into memory.
MAX_LINE_BYTES = 16 << 20

UTF8_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20
_SHOWN_BYTES = 200


class Line(NamedTuple):
    """One line without its line feed. Of a line longer than MAX_LINE_BYTES, `raw` is only the beginning."""

    number: int  # counted from 1 by line feed
    start: int  # its first byte in the file, counted from 0
    raw: bytes
    size: int
    skipped: int = 0  # bytes of the line before `raw`: a byte order mark

    @property
    def is_too_long(self) -> bool:
        """True when `raw` is not all of it."""
        return self.size > MAX_LINE_BYTES


class Lines:
    """The lines of a stream, once. `head` is the file's first block, to be looked at before."""

    def __init__(self, stream: BinaryIO, progress: Progress | None = None) -> None:
        self._stream, self._progress = stream, progress
        self._total = _bytes_left(stream)
        self.head = _read(stream)
        self.has_bom = self.head.startswith(UTF8_BOM)
        self.bytes_read = 0
        self.ends_with_newline = False

    def __iter__(self) -> Iterator[Line]:
        skipped = len(UTF8_BOM) if self.has_bom else 0
        number, start, kept, size = 1, 0, b"", 0  # `kept` and `size`: of the line that a block ended in
        for block in self._blocks():
            parts = block.split(b"\n")
            tail = parts.pop()
            for raw in parts:
                length = len(raw)
                if size:
                    raw, length, kept, size = _grow(kept, raw, size), size + length, b"", 0
                if skipped:
                    raw = raw[skipped:]
                yield Line(number, start, raw, length, skipped)
                number, start, skipped = number + 1, start + length + 1, 0
            kept, size = _grow(kept, tail, size), size + len(tail)
        if size:
            yield Line(number, start, kept[skipped:], size, skipped)

    def _blocks(self) -> Iterator[bytes]:
        block = self.head
        while block:
            self.bytes_read += len(block)
            self.ends_with_newline = block.endswith(b"\n")
            yield block
            if self._progress:
                self._progress(self.bytes_read, max(self._total, self.bytes_read))
            block = _read(self._stream)


def _grow(kept: bytes, more: bytes, size: int) -> bytes:
    return kept + more if size + len(more) <= MAX_LINE_BYTES else (kept[:_SHOWN_BYTES] or more[:_SHOWN_BYTES])


def _read(stream: BinaryIO) -> bytes:
    """A full block, also from a stream that hands out less at a time; shorter only at the end."""
    block = stream.read(_BLOCK_BYTES)
    while block and len(block) < _BLOCK_BYTES and (more := stream.read(_BLOCK_BYTES - len(block))):
        block += more
    return block


def _bytes_left(stream: BinaryIO) -> int:
    """0 where nobody knows: a pipe."""
    if not stream.seekable():
        return 0
    here = stream.tell()
    end = stream.seek(0, os.SEEK_END)
    stream.seek(here)
    return end - here
