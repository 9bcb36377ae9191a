"""The memory of a training process: kept between steps, and the most it held while a block ran."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from types import TracebackType
from typing import Any

import psutil
import torch

from heldout.engine import device

#: Bytes of a block that malloc can be told to keep at most (DEFAULT_MMAP_THRESHOLD_MAX of glibc).
LARGEST = 1 << 25
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Let malloc keep what a training step frees for the next step.

    By default glibc hands large blocks back to the kernel at once and gets them again, zeroed page by
    page, a moment later: up to a tenth of a step. To be called when the model is loaded: what loading it
    left behind is given back first. Elsewhere than on glibc nothing is changed.
    """
    library = _glibc()
    if library is not None:
        give_back_memory()
        library.mallopt(_M_MMAP_THRESHOLD, LARGEST)
        library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        library.mallopt(_M_TOP_PAD, 1 << 28)


def give_back_memory() -> None:
    """Hand back what was freed and kept: when training has ended, the engine loads the model anew."""
    gc.collect()
    if device.is_gpu():
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Hand back what malloc holds free."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> Any:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


class PeakMemory:
    """The most memory held in a block: `with PeakMemory() as peak: …`, then `peak.bytes`. Of a GPU where models compute
    on one, what torch holds of it; else the process's resident memory, sampled every 20 ms."""

    def __init__(self) -> None:
        self.bytes = 0
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        if device.is_gpu():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return self
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if device.is_gpu():
            self.bytes = torch.cuda.max_memory_reserved()
            return
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, self._process.memory_info().rss)
            if self._done.wait(0.02):
                return
