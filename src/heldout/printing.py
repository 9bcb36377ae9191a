"""What commands print for people. What comes from a file is escaped first and never read as markup."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from heldout.pipeline.findings import (
    RANK,
    Group,
    Report,
    brief,
    escaped,
    grouped,
    name_more,
    next_step,
    place,
    short_names,
    shortened,
    tidy,
)
from heldout.records import rung_name

if TYPE_CHECKING:
    from heldout.pipeline.fix import Fixed
    from heldout.pipeline.types import Finding
    from heldout.processes.foreground import Result

_COLOURS = {"error": "bold red", "warning": "bold yellow", "note": "bold blue"}
_VERDICTS = {"ship": "green", "dont_ship": "red"}

#: Line numbers and ranges that stand behind a code, and so many where there is only one line for all.
PLACES, FEW_PLACES = 6, 3
#: How much is shown of a finding: so many lines of the terminal, or all with the example.
ONE_LINE, FULL = 1, 1_000
LEVELS = (ONE_LINE, 2, 3, FULL)


def _console() -> Console:
    # What the terminal cannot show is written as an escape, rather than ending the command.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(highlight=False)


def print_json(document: Any) -> None:
    """One JSON document on stdout. What a terminal would obey is written as an escape."""
    text = json.dumps(document, ensure_ascii="utf" not in (sys.stdout.encoding or "utf-8").lower(), indent=2)
    print(re.sub("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", lambda one: f"\\u{ord(one.group()):04x}", text))


def print_report(report: Report, *, verbose: bool = False) -> None:
    """The report of `heldout check`: on a terminal as much of it as one screen takes, elsewhere all."""
    console = _console()
    height = console.height - 1 if console.is_terminal and not verbose else None
    for line in report_lines(report, console, height=height, verbose=verbose):
        console.print(line, soft_wrap=True)


def report_lines(report: Report, console: Console, *, height: int | None, verbose: bool = False) -> list[Text]:
    """Head, findings and what to do next, as lines that fit into the console's width.

    With a `height`, findings are told in fewer words where there would be more lines, the least harmful
    first; none is left out. Without `verbose`, notes take one line each.
    """
    names = short_names(file.name for file in report.files)
    head = _wrap(_head(report, names), console)
    end = _wrap(Text(escaped(next_step(report)), style="bold"), console)
    groups = grouped(report.findings)
    widest = [ONE_LINE if group.severity == "note" and not verbose else FULL for group in groups]
    room = None if height is None else height - len(head) - len(end) - 1
    levels = widest if room is None else _levels(groups, widest, names, console, room)
    body = [line for group, level in zip(groups, levels, strict=True) for line in _shown(group, level, names, console)]
    if levels != widest:
        end = [*_wrap(Text("More of each with --verbose, --html OUT or --json.", style="dim"), console), *end]
    return [*head, *body, *end]


def _levels(
    groups: Sequence[Group], widest: Sequence[int], names: dict[str, str], console: Console, room: int
) -> list[int]:
    """How much to show of each group, so that all fit into `room` lines: more of the more harmful."""
    sizes = [{level: len(_shown(group, level, names, console)) for level in LEVELS} for group in groups]
    levels = [ONE_LINE] * len(groups)
    left = room - sum(size[ONE_LINE] for size in sizes)
    for level in LEVELS:
        for position, size in enumerate(sizes):
            more = size[level] - size[levels[position]]
            if level <= widest[position] and more <= left:
                levels[position] = level
                left -= more
    return levels


def _head(report: Report, names: dict[str, str]) -> Text:
    files = []
    for file in report.files:
        faulty = f", {file.faulty:,} with errors" if file.faulty else ""
        files.append(f"{names[file.name]}: {file.sound:,} sound {'row' if file.sound == 1 else 'rows'}{faulty}")
    counted = [(severity, report.count(severity)) for severity in RANK]
    found = ", ".join(f"{n} {word}{'' if n == 1 else 's'}" for word, n in counted if n) or "nothing to complain about"
    return Text(escaped(f"{'; '.join(files)}. {found[:1].upper()}{found[1:]}; {report.seconds:.1f} s."))


def _shown(group: Group, level: int, names: dict[str, str], console: Console) -> list[Text]:
    if level == ONE_LINE:
        return [_one_line(group, names, console)]
    lines = [line for finding in group.shown for line in _finding(finding, level, names, console)]
    if group.more:
        lines += _wrap(Text(f"  … {name_more(group)}", style="dim"), console)
    return lines


def _finding(finding: Finding, level: int, names: dict[str, str], console: Console) -> list[Text]:
    message = shortened(tidy(finding), names)
    if level == FULL:
        lines = _wrap(_start(finding, names).append(escaped(message)), console)
        if finding.example:
            lines.append(_cut(Text(f"    {escaped(finding.example)}", style="dim"), console))
        return lines
    lines = _wrap(_start(finding, names).append(escaped(brief(message))), console)
    if len(lines) > level:
        last = lines[level - 1]
        last.rstrip()
        last.append(f" {lines[level].plain.strip()}")
        lines = [*lines[: level - 1], _cut(last, console)]
    return lines


def _one_line(group: Group, names: dict[str, str], console: Console) -> Text:
    first = group.findings[0]
    text = _start(first, names, at_most=FEW_PLACES).append(escaped(brief(shortened(tidy(first), names))))
    if len(group.findings) == 1:
        return _cut(text, console)
    more = Text(f" (+{len(group.findings) - 1})", style="dim")
    return _cut(text, console, room=len(more)).append_text(more)


def _start(finding: Finding, names: dict[str, str], at_most: int = PLACES) -> Text:
    where = f" {place(finding.lines, at_most=at_most)}" if finding.lines else ""
    file = "" if finding.file == next(iter(names)) else f" {names.get(finding.file, finding.file)}"  # not of train
    return Text.assemble(
        (finding.severity, _COLOURS[finding.severity]),
        " ",
        (escaped(finding.code), "bold"),
        (escaped(f"{file}{where}: "), "cyan"),
    )


def _wrap(text: Text, console: Console) -> list[Text]:
    """Lines that fit, the second and later ones indented."""
    width = max(20, console.width)
    first, *rest = text.wrap(console, width) or [Text()]
    if not rest:
        return [first]
    # What is left of the first line is wrapped again, to the smaller width.
    remaining = text[len(first.plain) :]
    remaining = remaining[len(remaining.plain) - len(remaining.plain.lstrip()) :]
    return [first, *(Text("  ").append_text(line) for line in remaining.wrap(console, width - 2))]


def _cut(text: Text, console: Console, *, room: int = 0) -> Text:
    text = text.copy()
    text.truncate(max(20, console.width) - room, overflow="ellipsis")
    return text


def print_fixed(fixed: Fixed) -> None:
    """What `heldout fix` did, a line for each kind of change, and what it left to the user."""
    console = _console()
    for line in fixed.sentences():
        console.print(Text(escaped(line)), soft_wrap=True)


def print_result(result: Result) -> None:
    """The verdict of a job that ran in the foreground."""
    console = _console()
    colour = _VERDICTS.get(result.verdict.outcome, "yellow")
    console.print(f"\nVerdict: [bold {colour}]{result.verdict.outcome}[/]")
    for caveat in result.verdict.caveats:
        console.print(f"  Mind: {caveat}", markup=False)
    for reason in result.verdict.reasons:
        console.print(f"  - {reason}", markup=False)
    table = Table(box=None, padding=(0, 2))
    for column, side in (
        ("rung", "left"),
        ("score", "right"),
        ("95 % interval", "right"),
        ("ms per answer", "right"),
        ("prompt tokens", "right"),
    ):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for rung in (*result.rungs, result.tuned):
        low, high = rung.scores.interval
        name = f"[bold]{rung.name}[/]" if rung is result.tuned else rung.name
        table.add_row(name, f"{rung.scores.mean:.1%}", f"{low:.1%} to {high:.1%}", *rung.costs)
    console.print(table)
    console.print(f"Cheapest as good: {result.verdict.cheapest_as_good}")
    for served in result.outcome.served_rungs:
        console.print(f"Rung {served.rung}, as a model: {rung_name(result.model, served.rung)}", soft_wrap=True)
    console.print(
        f"Model:   {result.model}\nAdapter: {result.adapter}\nReport:  {result.report}", markup=False, soft_wrap=True
    )


def print_jobs(rows: list[dict[str, Any]]) -> None:
    """The jobs of a data directory, a line for each."""
    if not rows:
        print("No jobs yet in this data directory.")
        return
    table = Table(box=None, padding=(0, 2))
    for column in ("job", "created", "status", "verdict", "model"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            row["id"],
            row["created"],
            row["pause"] or row["status"],
            (row["verdict"] or "") + (" (released)" if row["release"] else ""),
            row["fine_tuned_model"] or row["model"],
        )
    _console().print(table)
