"""What a process may use, read from control groups as the kernel shows them, in folders of our own."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from heldout import machine
from heldout.errors import InvalidValue
from heldout.settings import Settings, read_settings

ALL = len(os.sched_getaffinity(0))
TOTAL = psutil.virtual_memory().total


def cgroups(tmp_path: Path, memberships: str, **files: str) -> tuple[Path, Path]:
    """A file of memberships and a tree with these files; `__` in a name is a slash, `_DOT_` a dot."""
    (tmp_path / "cgroup").write_text(memberships)
    for name, content in files.items():
        path = tmp_path / "sys" / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return tmp_path / "cgroup", tmp_path / "sys"


def test_without_control_groups_it_is_the_affinity_and_the_machines_memory(tmp_path: Path) -> None:
    nothing = tmp_path / "cgroup", tmp_path / "sys"
    assert (machine.cores(*nothing), machine.memory_bytes(*nothing)) == (ALL, TOTAL)


def test_the_affinity_mask_bounds_the_cores(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.cores(tmp_path / "cgroup", tmp_path / "sys") == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", ALL), ("100000 100000", 1), ("50000 100000", 1), ("190000 100000", 1), ("99999999 100000", ALL)],
)
def test_the_quota_of_version_2_is_rounded_down_to_whole_cores(tmp_path: Path, quota: str, expected: int) -> None:
    assert machine.cores(*cgroups(tmp_path, "0::/a/b\n", a__b__cpu_DOT_max=quota)) == expected


def test_a_limit_further_up_binds_too_and_the_smallest_counts(tmp_path: Path) -> None:
    tree = cgroups(
        tmp_path, "0::/a/b\n", a__b__memory_DOT_max="max", a__memory_DOT_max="3000000", memory_DOT_max="9000000"
    )
    assert machine.memory_bytes(*tree) == 3_000_000


def test_in_a_container_the_root_it_sees_is_its_own(tmp_path: Path) -> None:
    assert machine.memory_bytes(*cgroups(tmp_path, "0::/../outside\n", memory_DOT_max="4000000")) == 4_000_000


def test_version_1_has_a_tree_per_controller(tmp_path: Path) -> None:
    tree = cgroups(
        tmp_path,
        "4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n",
        memory__job__memory_DOT_limit_in_bytes="5000000",
        memory__memory_DOT_limit_in_bytes="9223372036854771712",
        **{"cpu,cpuacct__job__cpu_DOT_cfs_quota_us": "100000", "cpu,cpuacct__job__cpu_DOT_cfs_period_us": "100000"},
        **{"cpu,cpuacct__cpu_DOT_cfs_quota_us": "-1", "cpu,cpuacct__cpu_DOT_cfs_period_us": "100000"},
    )
    assert (machine.cores(*tree), machine.memory_bytes(*tree)) == (1, 5_000_000)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("8GB", 8 * 10**9), ("512MiB", 512 * 2**20), ("1.5 GiB", 3 * 2**29), ("123456", 123456), ("", None), ("0", None)],
)
def test_the_memory_limit_is_bytes_or_a_number_with_a_unit(
    monkeypatch: pytest.MonkeyPatch, asked: str, expected: int | None
) -> None:
    monkeypatch.setenv("HELDOUT_MEMORY_LIMIT", asked)
    assert read_settings().memory_limit == (expected or 0)


def test_threads_are_as_set_else_the_cores_else_what_openmp_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (Settings(threads=3).job_threads, Settings(inference_threads=5).chat_threads) == (3, 5)
    assert Settings().job_threads == Settings().chat_threads == machine.cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "1,4")
    assert (Settings().job_threads, Settings(threads=3).job_threads) == (1, 3)


@pytest.mark.parametrize(
    ("name", "value"), [("MEMORY_LIMIT", "much"), ("MEMORY_LIMIT", "-1"), ("THREADS", "-1"), ("NICE", "20")]
)
def test_a_setting_that_makes_no_sense_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"HELDOUT_{name}", value)
    with pytest.raises(InvalidValue, match=f"HELDOUT_{name}"):
        read_settings()
