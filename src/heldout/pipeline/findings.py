"""Findings as people and programs read them: the most harmful first, in groups, in few words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from heldout.pipeline.checks import Parts
from heldout.pipeline.types import Dataset, Finding, Severity

RANK: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}

#: What `heldout fix` repairs. Nothing of it can change what a model learns, but for the copies that are gone.
FIXABLE = (
    "byte_order_mark",
    "crlf_line_ends",
    "blank_line",
    "exact_duplicate",
    "answer_whitespace",
    "answer_code_fence",
)

#: Findings of one code and severity that are told one by one; more are told as a group.
TOLD_ONE_BY_ONE = 3
#: Lines that a file object or an event carries: it is sent with every list of files or events.
LINES_ON_THE_WIRE = 1_000
#: In a short form, what stands in parentheses may have so many characters.
ASIDE = 40

#: Characters that could drive a terminal, turn the direction of a line, or hide. The joiners of emoji and of
#: Indic and Persian script (U+200C, U+200D) stay.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)
_SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


@dataclass(frozen=True, kw_only=True)
class CheckedFile:
    """One of the files that were looked at together."""

    name: str
    part: str  # train, valid or holdout
    sound: int  # rows that a job would use
    faulty: int  # rows with errors
    last_line: int  # the last line that is known to hold something

    @property
    def rows(self) -> int:
        """Sound or not."""
        return self.sound + self.faulty

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the JSON report."""
        return {"name": self.name, "part": self.part, "sound": self.sound, "faulty": self.faulty}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `heldout check` says of the files of one job; `findings` are ordered, the most harmful first."""

    files: tuple[CheckedFile, ...]
    findings: tuple[Finding, ...]
    seconds: float
    quick: bool = False  # each row was looked at, rows were not compared
    model: str | None = None  # whose tokens were counted

    def count(self, severity: Severity) -> int:
        """Findings of that severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def refused(self) -> bool:
        """True when a job would not start with these files."""
        return self.count("error") > 0

    def as_dict(self) -> dict[str, Any]:
        """The JSON report (docs/checks/README.md)."""
        return {
            "files": [file.as_dict() for file in self.files],
            "findings": [finding.as_dict() for finding in self.findings],
            "summary": {severity: self.count(severity) for severity in RANK},
            "refused": self.refused,
            "fixable": {name: list(codes) for name, codes in self.fixable().items()},
            "quick": self.quick,
            "model": self.model,
            "seconds": round(self.seconds, 3),
        }

    def html(self) -> str:
        """One page that needs nothing else."""
        from heldout.pipeline.findings_page import page

        return page(self)

    def fixable(self) -> dict[str, tuple[str, ...]]:
        """File -> the codes of its findings that `heldout fix` repairs. Files without any are left out."""
        found: dict[str, dict[str, None]] = {}
        for finding in self.findings:
            if finding.code in FIXABLE:
                found.setdefault(finding.file, {})[finding.code] = None
        return {name: tuple(codes) for name, codes in found.items()}


def make_report(
    parts: Parts,
    seen: Sequence[Finding],
    found: Sequence[Finding],
    *,
    seconds: float,
    quick: bool = False,
    model: str | None = None,
) -> Report:
    """What reading (`seen`) and the checks (`found`) saw, put together.

    A row whose errors were seen while reading is not in the parts; one whose errors a check saw is.
    """
    names = (("train", parts.train), ("valid", parts.valid), ("holdout", parts.holdout))
    files = tuple(_file(part, one, seen, found) for part, one in names if one is not None)
    rows = {file.name: file.rows for file in files}
    ordered = most_harmful_first((*seen, *found), rows)
    return Report(files=files, findings=ordered, seconds=seconds, quick=quick, model=model)


def _file(part: str, dataset: Dataset, seen: Sequence[Finding], found: Sequence[Finding]) -> CheckedFile:
    unread = _lines_with_errors(seen, dataset.name)
    refused = _lines_with_errors(found, dataset.name)
    last = dataset.examples[-1].line if len(dataset) else 0
    named = (finding.lines[-1] for finding in (*seen, *found) if finding.file == dataset.name and finding.lines)
    return CheckedFile(
        name=dataset.name,
        part=part,
        sound=len(dataset) - len(refused - unread),
        faulty=len(unread | refused),
        last_line=max(last, *named, 0),
    )


def _lines_with_errors(findings: Sequence[Finding], name: str) -> set[int]:
    errors = (one for one in findings if one.severity == "error" and one.file == name)
    return {line for one in errors for line in one.lines}


def most_harmful_first(findings: Iterable[Finding], rows: Mapping[str, int]) -> tuple[Finding, ...]:
    """Errors, then warnings, then notes; within each, what concerns the largest share of a file's rows first.

    A finding without lines is about the whole file. `rows` are those of each file, by name.
    """

    def harm(finding: Finding) -> tuple[int, float]:
        concerned = len(finding.lines)
        share = concerned / max(rows.get(finding.file, 0), concerned) if concerned else 1.0
        return RANK[finding.severity], -share

    return tuple(sorted(findings, key=harm))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Findings of one code and severity, in order; there is at least one."""

    findings: tuple[Finding, ...]

    @property
    def code(self) -> str:
        """Of all of them."""
        return self.findings[0].code

    @property
    def severity(self) -> Severity:
        """Of all of them."""
        return self.findings[0].severity

    @property
    def shown(self) -> tuple[Finding, ...]:
        """Those that are told in full; the others are only counted and named."""
        return self.findings[:TOLD_ONE_BY_ONE]

    @property
    def more(self) -> tuple[Finding, ...]:
        """The others."""
        return self.findings[TOLD_ONE_BY_ONE:]


def grouped(findings: Iterable[Finding]) -> tuple[Group, ...]:
    """Findings of one code and severity together, each group where its first finding was."""
    groups: dict[tuple[Severity, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.code), []).append(finding)
    return tuple(Group(findings=tuple(group)) for group in groups.values())


def on_the_wire(finding: Finding) -> dict[str, Any]:
    """As file objects and events carry it: `n_lines` says how many lines there are when `lines` has not all."""
    return finding.as_dict() | {"lines": list(finding.lines[:LINES_ON_THE_WIRE]), "n_lines": len(finding.lines)}


def markdown(findings: Iterable[Finding]) -> list[str]:
    """The findings as lines of a Markdown list."""
    lines = []
    for group in grouped(findings):
        for finding in group.shown:
            where = f", {place(finding.lines, at_most=10)}" if finding.lines else ""
            head = f"{finding.severity}, `{finding.code}`, {markdown_text(finding.file)}{where}"
            lines.append(f"- {head}: {markdown_text(finding.message)}")
        if group.more:
            lines.append(f"- {group.severity}, `{group.code}`: {markdown_text(name_more(group))}")
    return lines or ["None."]


def markdown_text(text: str) -> str:
    """A text of which nothing can become a tag, a link or a column of the page."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", escaped(text))


def name_more(group: Group) -> str:
    """What there is besides the findings of a group that are shown."""
    n_lines = sum(len(finding.lines) for finding in group.more)
    lines = f", {n_lines} lines" if n_lines else ""
    return f"and {len(group.more)} more findings of this kind{lines}"


def place(lines: Sequence[int], *, at_most: int | None = None) -> str:
    """ "line 8", "lines 3-8, 12", "lines 3-8, 12 and 40 more": at most so many numbers or ranges."""
    if len(lines) == 1:
        return f"line {lines[0]}"
    ranges = _ranges(lines)
    kept = ranges if at_most is None else ranges[:at_most]
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in kept)
    more = len(set(lines)) - sum(last - first + 1 for first, last in kept)
    return f"lines {shown}{f' and {more} more' if more else ''}"


def _ranges(lines: Sequence[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for line in sorted(set(lines)):
        if ranges and line == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], line)
        else:
            ranges.append((line, line))
    return ranges


def escaped(text: str) -> str:
    """The text with everything that a terminal obeys, or that nobody sees, written as an escape."""
    return _UNSEEN.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    character = found.group()
    code = ord(character)
    known = _SHORT_ESCAPES.get(character)
    return known or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")


def tidy(finding: Finding) -> str:
    """The finding's message without the lines that it names at its ends, where these stand beside it anyway."""
    message = re.sub(r" Also on lines? [\d, and]+( more)?\.$", "", finding.message)
    return re.sub(r"^Line \d+: ", "", message) if len(finding.lines) == 1 else message


def brief(message: str) -> str:
    """The message without its longer asides in parentheses, and without those that only name lines."""
    kept: list[str] = []
    depth, aside = 0, ""
    for character in message:
        depth += character == "("
        if depth:
            aside += character
        else:
            kept.append(character)
        if character == ")" and depth:
            depth -= 1
            if depth == 0:
                kept.append("" if len(aside) > ASIDE or aside.startswith("(line") else aside)
                aside = ""
    if depth:
        return message  # a parenthesis of the data, not of the sentence
    return re.sub(r" +(?=[ .,;:])", "", "".join(kept)).strip()


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Each file's last part, where no other file has the same."""
    names = list(dict.fromkeys(names))
    last = [PurePath(name).name or name for name in names]
    return {name: short if last.count(short) == 1 else name for name, short in zip(names, last, strict=True)}


def shortened(text: str, names: Mapping[str, str]) -> str:
    """The text with short names of files in the place of long ones."""
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, names[name])
    return text


def next_step(report: Report) -> str:
    """One line: whether a job would take the files, and what to do now."""
    refused = sum(file.faulty for file in report.files)
    rows = f" for {refused:,} rows" if refused > 1 else " for one row" if refused else ""
    verdict = f"A job would refuse this{rows}." if report.refused else "A job would take this."
    quick = " Rows were not compared (--quick)." if report.quick else ""
    fixes = [f"{command(name)} (repairs {', '.join(codes)})" for name, codes in report.fixable().items()]
    errors = any(one.severity == "error" and one.code not in FIXABLE for one in report.findings)
    if fixes:
        after = " The other errors need you." if errors else ""
        return f"{verdict}{quick} Next: {'; '.join(fixes)}.{after}"
    return f"{verdict}{quick}{' Next: correct the errors, and check again.' if errors else ''}"


def command(name: str) -> str:
    """The command that repairs what is safe to repair in this file."""
    path = PurePath(name)
    out = path.with_name(f"{path.stem}.fixed{path.suffix or '.jsonl'}")
    return f"heldout fix {shlex.quote(name)} -o {shlex.quote(str(out))}"
