"""Files that are big, and files made to break a reader: bounded memory, no hang, one clear finding."""

from __future__ import annotations

import gc
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from heldout.pipeline.dataset import read_dataset
from heldout.pipeline.reading.lines import MAX_LINE_BYTES
from heldout.pipeline.spool import SpooledExamples
from heldout.pipeline.types import Dataset, Finding

GOOD = b'{"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]}'
MIB = 1 << 20


def rows(n: int, size: int = 0) -> bytes:
    texts = (
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}" + "x" * size}]}
        for i in range(n)
    )
    return b"".join(json.dumps(text).encode() + b"\n" for text in texts)


def sparse(path: Path, before: bytes, size: int, after: bytes) -> Path:
    """A file with a hole of `size` NUL bytes, which takes no disk and no time to write."""
    with path.open("wb") as out:
        out.write(before)
        out.seek(len(before) + size)
        out.write(after)
    return path


def read(path: Path) -> tuple[Dataset, dict[str, Finding], float]:
    """The dataset, the findings by code, and the most MiB that reading took."""
    tracemalloc.start()
    try:
        with path.open("rb") as content:
            dataset, findings = read_dataset(content, name="a")
        return dataset, {finding.code: finding for finding in findings}, tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


def test_a_line_of_100_mb_is_named_with_its_size_and_never_held(tmp_path: Path):
    path = sparse(tmp_path / "a", rows(100) + b'{"messages": "', 100 * MIB, b'"}\n' + GOOD + b"\n")
    dataset, findings, peak = read(path)
    assert [example.line for example in dataset.examples] == [*range(1, 101), 102]
    assert findings["line_too_long"].lines == (101,)
    assert "100 MiB; at most 16 MiB are read" in findings["line_too_long"].message
    assert len(findings) == 1
    assert peak < 4 * MAX_LINE_BYTES / MIB


def test_a_file_that_is_one_line_of_100_mb_of_brackets_is_named(tmp_path: Path):
    path = tmp_path / "a"
    with path.open("wb") as out:
        for _ in range(100):
            out.write(b"[" * MIB)
    dataset, findings, peak = read(path)
    assert len(dataset) == 0
    assert findings["line_too_long"].severity == "error"
    assert peak < 4 * MAX_LINE_BYTES / MIB


def test_the_longest_line_is_read_and_one_byte_more_is_not():
    start, end = b'{"messages": [{"role": "user", "content": "', b'"}, {"role": "assistant", "content": "x"}]}'
    longest = start + b"a" * (MAX_LINE_BYTES - len(start + end)) + end
    assert len(read_dataset(longest + b"\n", name="a")[0]) == 1
    dataset, findings = read_dataset(b" " + longest + b"\n" + GOOD + b"\n", name="a")
    assert [example.line for example in dataset.examples] == [2]
    assert [(finding.code, finding.lines) for finding in findings] == [("line_too_long", (1,))]


def test_a_line_that_begins_with_a_megabyte_of_blanks_is_not_taken_for_a_blank_one():
    findings = read_dataset(b" " * (MAX_LINE_BYTES + 1) + b"\n" + GOOD + b"\n", name="a")[1]
    assert [(finding.code, finding.lines) for finding in findings] == [("line_too_long", (1,))]


def test_a_million_blank_lines_are_one_finding():
    _, (finding,) = read_dataset(b"\n" * 1_000_000, name="a")
    assert finding.code == "empty_file"
    assert "1,000,000 blank lines" in finding.message


BOMBS = {
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep lists in a row": b'{"messages": ' + b"[" * 100_000,
    "many empty lists": b"[" + b"[]," * 200_000 + b"[]]",
    "many wrong messages": b'{"messages": [' + b'{"role": "bot", "x": 1},' * 50_000 + b"{}]}",
    "many wrong parts": b'{"messages": [{"role": "user", "content": [' + b"1," * 200_000 + b"1]}]}",
    "many wrong calls": b'{"messages": [{"role": "assistant", "tool_calls": [' + b"1," * 200_000 + b"1]}]}",
    "many wrong tools": GOOD[:-1] + b', "tools": [' + b"1," * 200_000 + b"1]}",
    "a million repeated keys": b"{" + b'"a":1,' * 1_000_000 + b'"a":1}',
    "many keys": b'{"messages": [], ' + b",".join(b'"%x":1' % i for i in range(100_000)) + b"}",
    "a number of a million digits": b'{"messages": ' + b"1" * 1_000_000 + b"}",
    "an endless exponent": b'{"messages": 1e' + b"9" * 1_000_000 + b"}",
    "a key of a megabyte": b'{"' + b"k" * 1_000_000 + b'": 1}',
    "NUL bytes": b'{"messages": "' + bytes(1_000_000),
    "deep arguments": json.dumps(
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "function_call": {"name": "f", "arguments": "[" * 100_000}},
            ],
            "functions": [{"name": "f"}],
        }
    ).encode(),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_a_line_made_to_break_a_reader_is_an_error_of_that_line_alone(bomb: bytes):
    dataset, findings = read_dataset(rows(60) + bomb + b"\n" + GOOD + b"\n", name="a")
    assert len(dataset) == 61
    errors = [finding for finding in findings if finding.severity == "error"]
    assert errors
    assert all(finding.lines == (61,) for finding in errors)
    assert all(len(finding.message) < 800 and len(finding.example) < 300 for finding in findings)


def test_a_row_with_more_problems_than_anybody_reads_is_still_an_error():
    line = {"messages": [{"role": "user", "content": "a", "name": "kim"}, {"role": "assistant", "content": "b"}] * 1500}
    dataset, findings = read_dataset(json.dumps(line).encode() + b"\n" + GOOD + b"\n", name="a")
    assert [example.line for example in dataset.examples] == [2]
    assert {finding.code: finding.severity for finding in findings} == {
        "name_ignored": "note",
        "too_many_problems": "error",
    }


def test_a_problem_of_every_line_takes_little_memory(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"17\n" * 20_000)
    _, findings, peak = read(path)
    assert findings["not_an_object"].lines == tuple(range(1, 20_001))
    assert peak < 2.5


def test_a_big_file_lies_on_disk_and_is_the_same_sequence():
    content = rows(3000, size=2000)
    in_memory = read_dataset(content, name="a")[0].examples
    on_disk = read_dataset(content, name="a", spool_above=MIB)[0].examples
    assert isinstance(on_disk, SpooledExamples)
    assert isinstance(in_memory, tuple)
    assert tuple(on_disk) == in_memory
    assert len(on_disk) == 3000
    assert on_disk[0] == in_memory[0]
    assert on_disk[1234] == in_memory[1234]
    assert on_disk[-1] == in_memory[-1]
    assert on_disk[10:2000:700] == in_memory[10:2000:700]
    with pytest.raises(IndexError):
        on_disk[3000]


def test_two_passes_over_a_big_file_do_not_disturb_each_other():
    on_disk = read_dataset(rows(500, size=2000), name="a", spool_above=0)[0].examples
    pairs = zip(on_disk, on_disk, strict=True)
    assert all(one == other and on_disk[7].line == 8 for one, other in pairs)


def test_an_example_larger_than_a_block_is_read_back():
    row = {"messages": [{"role": "user", "content": "x" * 6 * MIB}, {"role": "assistant", "content": "y"}]}
    content = rows(2) + json.dumps(row).encode() + b"\n" + rows(2)
    on_disk = read_dataset(content, name="a", spool_above=0)[0].examples
    assert tuple(on_disk) == read_dataset(content, name="a")[0].examples


def test_the_file_of_a_big_dataset_goes_away_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dataset = read_dataset(rows(100), name="a", spool_above=0)[0]
    descriptor = dataset.examples._file.fileno()  # type: ignore[attr-defined]
    opened = Path(f"/proc/self/fd/{descriptor}")
    if not opened.exists():
        pytest.skip("this system does not show open files")
    assert opened.readlink().parent == tmp_path
    assert not list(tmp_path.iterdir()), "it has no name, so that nobody has to remove it"
    del dataset
    gc.collect()
    assert not opened.exists() or opened.readlink().parent != tmp_path


def test_a_big_file_is_read_and_gone_through_in_little_memory(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(rows(4000, size=4000))
    tracemalloc.start()
    try:
        with path.open("rb") as content:
            dataset = read_dataset(content, name="a", spool_above=MIB)[0]
        assert sum(1 for _ in dataset.examples) == 4000
        assert tracemalloc.get_traced_memory()[1] < 14 * MIB  # blocks to read, to write, and to read again
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("opened", [io.BytesIO, lambda content: io.BufferedReader(Trickle(content))])
def test_progress_counts_bytes_up_to_the_end(opened: Callable[[bytes], BinaryIO]):
    told: list[tuple[int, int]] = []
    content = rows(3000, size=1000)
    read_dataset(opened(content), name="a", progress=lambda done, total: told.append((done, total)))
    assert len(told) >= 3
    assert told == sorted(told)
    assert told[-1] == (len(content), len(content))


class Trickle(io.RawIOBase):
    """A pipe: it hands out a little at a time and cannot say how much is left."""

    def __init__(self, content: bytes) -> None:
        self.rest = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        piece = self.rest.read(min(len(buffer), 1000))
        buffer[: len(piece)] = piece
        return len(piece)


def test_a_pipe_reads_like_a_file():
    content = rows(100, size=100)
    assert read_dataset(Trickle(content), name="a") == read_dataset(content, name="a")  # type: ignore[arg-type]
