"""What the reader and the checks of texts promise of any bytes: held by the property tests and the fuzzer."""

from __future__ import annotations

import io
import json
import re
from contextlib import ExitStack
from unittest import mock

from heldout.pipeline.checks.parts import Parts
from heldout.pipeline.checks.text import find_damaged_texts
from heldout.pipeline.dataset import UNTRAINABLE, read_dataset
from heldout.pipeline.reading import lines as reading_lines
from heldout.pipeline.reading.lines import UTF8_BOM, Line
from heldout.pipeline.reading.problems import Problem
from heldout.pipeline.reading.rows import read_carefully, read_plain
from heldout.pipeline.types import Dataset, Finding

#: Codes of findings about a whole file that name lines all the same.
_ABOUT_FILE = {UNTRAINABLE, "mixed_formats"}
#: With one of these the file was not read line by line.
_REFUSALS = {"not_a_text_file", "wrong_encoding", "cr_line_ends", "not_json_lines"}


def check_promises(content: bytes, *, block: int = 1 << 20, longest: int = 16 << 20) -> None:
    """Read the bytes in every way there is; AssertionError when a promise is broken.

    `block` (3 bytes or more: a byte order mark) stands in for the block that is read at once, `longest` for the
    longest line.
    """
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(reading_lines, "_BLOCK_BYTES", block))
        patches.enter_context(mock.patch.object(reading_lines, "MAX_LINE_BYTES", longest))
        dataset, findings = read_dataset(io.BytesIO(content), name="a.jsonl")
        spooled, same_findings = read_dataset(content, name="a.jsonl", spool_above=0)
        assert tuple(spooled.examples) == tuple(dataset.examples)
        assert [spooled.examples[i] for i in range(len(spooled))] == list(dataset.examples)
        assert (spooled.format, spooled.other_rows) == (dataset.format, dataset.other_rows)
        assert same_findings == findings
    _check_findings(content, findings)
    damaged = tuple(find_damaged_texts(Parts(train=spooled)))
    _check_findings(content, damaged)
    assert {line for finding in damaged for line in finding.lines} <= {example.line for example in dataset.examples}
    if _REFUSALS & {finding.code for finding in findings}:
        assert len(findings) == 1
        assert dataset.sound_rows == 0
        return
    _check_every_row_is_accounted_for(content, dataset, findings, longest)
    _check_rejected_byte(content, findings, longest)
    for line in _lines(content):
        if line.size <= longest:
            _check_short_way(line)


def _lines(content: bytes) -> list[Line]:
    raws = content.split(b"\n")
    if not raws[-1]:
        raws.pop()
    found, start = [], 0
    for number, raw in enumerate(raws, start=1):
        skipped = len(UTF8_BOM) if number == 1 and raw.startswith(UTF8_BOM) else 0
        found.append(Line(number, start, raw[skipped:], len(raw), skipped))
        start += len(raw) + 1
    return found


def _check_findings(content: bytes, findings: tuple[Finding, ...]) -> None:
    n_lines = len(_lines(content))
    assert len({finding.code for finding in findings}) == len(findings), "one finding for each code"
    for finding in findings:
        assert list(finding.lines) == sorted(set(finding.lines))
        assert all(1 <= line <= n_lines for line in finding.lines)
        assert 0 < len(finding.message) < 2000
        assert len(finding.example) < 400
        json.dumps(finding.as_dict(), ensure_ascii=False).encode("utf-8")  # it can be sent and printed


def _check_every_row_is_accounted_for(
    content: bytes, dataset: Dataset, findings: tuple[Finding, ...], longest: int
) -> None:
    rows = {line.number for line in _lines(content) if line.raw.strip() or line.size > longest}
    kept = [example.line for example in dataset.examples]
    assert kept == sorted(set(kept))
    wrong = {
        line
        for finding in findings
        if finding.severity == "error" and finding.code not in _ABOUT_FILE
        for line in finding.lines
    }
    assert wrong.isdisjoint(kept)
    assert wrong <= rows
    assert set(kept) <= rows
    assert len(kept) + len(wrong) + dataset.other_rows == len(rows)
    assert bool(rows) != any(finding.code == "empty_file" for finding in findings)


def _check_rejected_byte(content: bytes, findings: tuple[Finding, ...], longest: int) -> None:
    """The first line that is no UTF-8 is named, with the byte at which it stops being UTF-8."""
    for line in _lines(content):
        if line.size > longest or not line.raw.strip():
            continue
        wrong_at = _first_wrong_byte(line.raw.removesuffix(b"\r"))
        if wrong_at is None:
            continue
        (finding,) = (finding for finding in findings if finding.code == "invalid_utf8")
        assert finding.lines[0] == line.number
        found = re.search(r"byte (\d+) of the line .* It is byte (\d+) of the file", finding.message)
        assert found
        in_line, in_file = map(int, found.groups())
        assert in_line == line.skipped + wrong_at
        assert in_file == line.start + in_line
        assert content[in_file] == line.raw[wrong_at]
        return
    assert not any(finding.code == "invalid_utf8" for finding in findings)


def _first_wrong_byte(raw: bytes) -> int | None:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None


def _check_short_way(line: Line) -> None:
    """A plain row is read the short way as it would be the long way."""
    short = read_plain(line)
    if short is not None:
        problems: list[Problem] = []
        row = read_carefully(line, problems.append)
        assert row.example == short
        assert (row.format, row.is_sound, problems) == ("chat", True, [])
