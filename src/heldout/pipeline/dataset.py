"""JSONL bytes -> Dataset of Examples, with every problem of every line reported at once.

A row is never dropped silently: the Dataset holds the sound rows, the Findings name all others, and any
finding of severity "error" means that the job must fail with the list. How one line is read is in `reading/`.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from heldout.engine.base import Progress
from heldout.pipeline.checks.parts import name_lines
from heldout.pipeline.reading.files import not_json_lines
from heldout.pipeline.reading.lines import Lines
from heldout.pipeline.reading.problems import Problem, Report
from heldout.pipeline.reading.rows import Row, read_row
from heldout.pipeline.spool import SPOOL_ABOVE_BYTES, ExampleStore
from heldout.pipeline.types import Dataset, Finding, Format

#: The code of the warning that no method of this version trains on a file; a job takes it for an error.
UNTRAINABLE = "untrainable_format"

_BLANK = Problem("blank_line", "the line is blank and is skipped.", "warning")
_TEXT_METHOD = "The 'supervised' method of this version trains on text only, so a job refuses the file"


def read_dataset(
    content: bytes | BinaryIO,
    *,
    name: str,
    progress: Progress | None = None,
    spool_above: int = SPOOL_ABOVE_BYTES,
) -> tuple[Dataset, tuple[Finding, ...]]:
    """The sound examples of a JSONL file, in order, and everything that is wrong with the others.

    A problem that many lines share is one Finding with all the lines; its message shows the first. Errors
    come before warnings, warnings before notes. Lines are counted from 1 by line feed, blank ones included.
    `content` is read once, in blocks, and not closed. `progress` hears of bytes. The examples of a file of more
    than `spool_above` bytes lie on disk.
    """
    lines = Lines(io.BytesIO(content) if isinstance(content, bytes) else content, progress)
    report = Report(file=name)
    refusal = not_json_lines(lines.head)
    if refusal is not None:
        report.add_file(refusal)
        return Dataset(name=name, examples=()), report.findings()

    examples, seen = ExampleStore(spool_above), _Seen()
    for line in lines:
        number = line.number
        if not line.is_too_long and (not line.raw or line.raw.isspace()):
            report.add_line(number, _BLANK)
            continue
        row = read_row(line, lambda problem, number=number: report.add_line(number, problem))  # type: ignore[misc]
        seen.add(number, row, crlf=line.raw.endswith(b"\r"))
        if row.example is not None:
            examples.add(row.example, lines.bytes_read)
    _look_at_the_whole(lines, seen, report)
    dataset = Dataset(name=name, examples=examples.finish(), format=seen.format, other_rows=seen.other_rows)
    return dataset, report.findings()


@dataclass
class _Seen:
    """What adds up to something about the file."""

    rows: int = 0  # lines that are not blank
    crlf: int = 0
    other_rows: int = 0
    lines: dict[Format, array[int]] = field(default_factory=dict)  # 4 bytes a line

    def add(self, line: int, row: Row, *, crlf: bool) -> None:
        self.rows += 1
        self.crlf += crlf
        self.other_rows += row.is_sound and row.example is None
        if row.format is not None:
            self.lines.setdefault(row.format, array("I")).append(line)

    @property
    def format(self) -> Format:
        """Preference rows and conversations do not mix, so most rows decide; one call makes a file of tools."""
        if len(self.of("preference")) > self.conversations:
            return "preference"
        return "tools" if self.of("tools") else "chat"

    @property
    def conversations(self) -> int:
        return len(self.of("chat")) + len(self.of("tools"))

    def of(self, format: Format) -> Sequence[int]:
        return self.lines.get(format, ())


def _look_at_the_whole(lines: Lines, seen: _Seen, report: Report) -> None:
    """Findings about the file that no single line shows."""
    if not seen.rows:
        blank = report.groups.pop("blank_line", None)
        what = f"it has {len(blank.lines):,} blank lines and no examples" if blank else "it has no examples"
        report.add_file(Problem("empty_file", f"{what}. Put one JSON object on each line"))
        return
    _look_at_formats(seen, report)
    if lines.has_bom:
        report.add_file(Problem("byte_order_mark", "the UTF-8 byte order mark at its start is ignored", "note"))
    if seen.crlf:
        what = "its lines" if seen.crlf >= seen.rows - 1 else f"{seen.crlf} of its {seen.rows} lines"
        text = f"{what} end with CR LF, as on Windows. That is harmless"
        report.add_file(Problem("crlf_line_ends", text, "note"))
    if not lines.ends_with_newline:
        text = "the last line does not end with a line feed. It is read, but a file that is appended to needs one"
        report.add_file(Problem("no_final_newline", text, "note"))


def _look_at_formats(seen: _Seen, report: Report) -> None:
    preferences, tools = seen.of("preference"), seen.of("tools")
    if preferences and seen.conversations:
        few = preferences if seen.format != "preference" else sorted([*seen.of("chat"), *tools])
        what = "preference rows" if seen.format != "preference" else "conversations"
        text = f"{len(few)} of its {seen.rows} rows are {what}, the others are not ({name_lines(few)}). Use two files"
        report.add_file(Problem("mixed_formats", text), few)
    if seen.format == "preference":
        text = (
            "the file holds preference pairs, for training by DPO. Its structure was checked. "
            f"{_TEXT_METHOD}: write each prompt with its preferred answer as 'messages' to train on those"
        )
        report.add_file(Problem(UNTRAINABLE, text, "warning"))
    elif tools:
        text = (
            f"{len(tools)} of its {seen.rows} rows declare or call functions ({name_lines(tools)}). Their structure "
            f"was checked. {_TEXT_METHOD}: leave these rows out, or write the calls as text"
        )
        report.add_file(Problem(UNTRAINABLE, text, "warning"), tools)
