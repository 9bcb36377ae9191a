"""What this process may use of the machine: cores and memory, as affinity, container and hardware allow."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_log = logging.getLogger(__name__)

_AUTOGROUP = Path("/proc/self/autogroup")
_MEMBERSHIPS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def cores(memberships: Path = _MEMBERSHIPS, root: Path = _CGROUPS) -> int:
    """Whole cores this process may keep busy: of its affinity mask, and below its cgroup's CPU quota."""
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Rounded down: a thread more than the quota pays for would make all the others wait for it.
    quotas = [int(quota) for folder in _cgroups("cpu", memberships, root) if (quota := _cpu_quota(folder))]
    return max(1, min(mask, *quotas, mask))


def memory_bytes(memberships: Path = _MEMBERSHIPS, root: Path = _CGROUPS) -> int:
    """Bytes of memory this process may fill: the machine's, or less where its cgroup has a limit."""
    total = int(psutil.virtual_memory().total)
    limits = [limit for folder in _cgroups("memory", memberships, root) if (limit := _memory_limit(folder))]
    return min(total, *limits, total)


def give_way(nice: int) -> None:
    """Add `nice` to the niceness of this process, and of its session where the kernel shares out time by session.

    Linux's autogroups give every session the same share, however nice its processes are: beside a job of nice 10
    in a session of its own a chat waited six times as long as alone (sched(7), "The autogroup feature"). Only the
    leader of a session speaks for it.
    """
    os.nice(nice)
    if nice and _AUTOGROUP.exists() and os.getsid(0) == os.getpid():
        try:
            _AUTOGROUP.write_text(str(min(19, os.nice(0))))
        except OSError as error:  # a container may show the file and refuse
            _log.warning("The job's session keeps its priority, so that chats may wait for it: %s", error)


def _cgroups(controller: str, memberships: Path, root: Path) -> Iterator[Path]:
    """The folders whose limits bind this process for `controller`: its own cgroup's and all above it.

    Nothing where there are no cgroups. In a container the own path may not be visible; its root then is.
    """
    try:
        lines = memberships.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controllers if controllers else root  # version 1 has a tree per controller, version 2 one
        folder = top / path.lstrip("/")
        while folder != top and top in folder.parents:
            yield folder
            folder = folder.parent
        yield top


def _cpu_quota(folder: Path) -> float | None:
    """Cores' worth of time, or None without a limit."""
    both = _read(folder / "cpu.max").split()  # version 2: "<quota or max> <period>", in microseconds
    if not both:
        both = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
    quota, period = both
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _memory_limit(folder: Path) -> int | None:
    """Bytes, or None without a limit. Version 1 writes "no limit" as a number near 2^63."""
    limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
    return int(limit) if limit.isdecimal() and 0 < int(limit) < 1 << 62 else None


def _read(path: Path) -> str:
    """What the file says; nothing where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
