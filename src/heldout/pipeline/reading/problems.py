"""What is wrong with single lines, gathered into one Finding for each kind of problem."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from heldout.pipeline.checks.parts import name_lines
from heldout.pipeline.reading.words import show, show_json
from heldout.pipeline.types import Finding, Severity

_MAX_NAMED_KEYS = 10
_MAX_PLACES = 10
#: Different keys that are remembered, to say how many there are.
_MAX_KEYS = 1000


class Problem(NamedTuple):
    """One thing seen in one line. `text` continues "Line 7: "; `keys` are listed behind it, once per file."""

    code: str
    text: str
    severity: Severity = "error"
    keys: tuple[str, ...] = ()
    place: str = ""  # where in the line, when that is told of other lines too: "byte 12"
    example: Any = ""  # a text, or what the file holds there


@dataclass
class _Group:
    """The lines that share a problem, and the first of them in words."""

    severity: Severity
    text: str
    example: str = ""
    # A number of 4 bytes for each line: every line of a big file may have the problem.
    lines: array[int] = field(default_factory=lambda: array("I"))
    places: list[str] = field(default_factory=list)
    keys: dict[str, None] = field(default_factory=dict)  # a set that remembers its order


@dataclass
class Report:
    """Collects problems by code while the file is read."""

    file: str
    groups: dict[str, _Group] = field(default_factory=dict)

    def add_line(self, line: int, problem: Problem) -> None:
        """Note a problem of a line; lines come in order."""
        group = self.groups.get(problem.code)
        if group is None:
            text = f"Line {line}: {problem.text}"
            example = problem.example if isinstance(problem.example, str) else show_json(problem.example)
            group = self.groups[problem.code] = _Group(problem.severity, text, example)
        for key in problem.keys:
            if len(group.keys) < _MAX_KEYS:
                group.keys[show(key)] = None
        if not group.lines or group.lines[-1] != line:
            group.lines.append(line)
            if len(group.lines) <= _MAX_PLACES + 1:
                group.places.append(problem.place)

    def add_file(self, problem: Problem, lines: Iterable[int] = ()) -> None:
        """Note a problem of the whole file."""
        text = f"{self.file}: {problem.text}."
        self.groups[problem.code] = _Group(problem.severity, text, str(problem.example), array("I", lines))

    def findings(self) -> tuple[Finding, ...]:
        """One for each code: errors, then warnings, then notes."""
        rank = {"error": 0, "warning": 1, "note": 2}
        ordered = sorted(self.groups.items(), key=lambda item: rank[item[1].severity])
        return tuple(
            Finding(
                code=code,
                severity=group.severity,
                message=_message(group),
                file=self.file,
                lines=tuple(group.lines),
                example=group.example,
            )
            for code, group in ordered
        )


def _message(group: _Group) -> str:
    message = group.text
    if group.keys:
        named = ", ".join(list(group.keys)[:_MAX_NAMED_KEYS])
        more = len(group.keys) - _MAX_NAMED_KEYS
        at_least = "at least " if len(group.keys) == _MAX_KEYS else ""
        message += f": {named}{f' and {at_least}{more} more' if more > 0 else ''}."
    if len(group.lines) > 1 and group.places:
        message += f" Also on {_name_places(group)}."
    return message


def _name_places(group: _Group) -> str:
    """ "lines 3 and 8", or "line 3 (byte 12), line 8 (byte 5) and 7 more"."""
    others, places = group.lines[1:], group.places[1:]
    if not any(places):
        return name_lines(others)
    named = [f"line {line} ({place})" if place else f"line {line}" for line, place in zip(others, places, strict=False)]
    more = len(others) - len(named)
    last = f"{more} more" if more else named.pop() if len(named) > 1 else ""
    return ", ".join(named) + (f" and {last}" if last else "")
