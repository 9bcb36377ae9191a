"""What training kept for its next step is handed back when it has ended."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import psutil, torch
from heldout.train.memory import give_back_memory, keep_freed_memory

def resident():
    return psutil.Process().memory_info().rss >> 20

keep_freed_memory()
before = resident()
blocks = [torch.ones(1 << 18) for _ in range(300)]  # a MiB each
held = resident()
del blocks
kept = resident()
give_back_memory()
print(before, held, kept, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc alone keeps freed memory")
def test_freed_memory_is_kept_between_steps_and_given_back_in_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, held, kept, after = map(int, done.stdout.split())
    assert held - before > 250
    assert kept - before > 250, "kept for the next step"
    assert after - before < 50
