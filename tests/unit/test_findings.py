"""Findings in order, in groups, in few words; nothing that a file holds drives a terminal or becomes HTML."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import heldout
from heldout.pipeline import findings
from heldout.pipeline.findings import CheckedFile, Report, grouped, most_harmful_first, on_the_wire, place
from heldout.pipeline.findings_page import bar
from heldout.pipeline.intake import tell_findings
from heldout.pipeline.types import Finding, Severity
from heldout.printing import report_lines
from tests.conftest import colour_row, write_rows
from tests.unit.test_imports import run

#: What a file may hold to clear the screen, set the title, turn the line around, or run in a browser.
ATTACK = "\x1b[2J\x9b31m\x07\r\u202e<script>alert(1)</script><img src=x onerror=y>[bold]\ud800"


def finding(
    code: str,
    severity: Severity = "warning",
    lines: tuple[int, ...] = (),
    message: str = "It is odd. Correct it.",
    file: str = "train.jsonl",
    example: str = "",
) -> Finding:
    return Finding(code=code, severity=severity, message=message, file=file, lines=lines, example=example)


def report(*found: Finding, sound: int = 100, quick: bool = False) -> Report:
    errors = {line for one in found if one.severity == "error" for line in one.lines}
    file = CheckedFile(name="train.jsonl", part="train", sound=sound, faulty=len(errors), last_line=sound)
    return Report(files=(file,), findings=found, seconds=0.5, quick=quick)


def shown(report: Report, width: int = 80, height: int | None = None, *, verbose: bool = False) -> list[str]:
    console = Console(width=width, file=StringIO(), color_system=None)
    return [line.plain for line in report_lines(report, console, height=height, verbose=verbose)]


def test_errors_come_first_and_then_what_concerns_the_most_rows() -> None:
    ordered = most_harmful_first(
        (
            finding("note", "note"),
            finding("few", lines=(1,)),
            finding("half of a short file", lines=(1, 2), file="valid.jsonl"),
            finding("many", lines=(1, 2, 3)),
            finding("whole file"),
            finding("error", "error", lines=(7,)),
        ),
        {"train.jsonl": 100, "valid.jsonl": 4},
    )
    assert [one.code for one in ordered] == ["error", "whole file", "half of a short file", "many", "few", "note"]


def test_lines_are_named_as_ranges_and_none_is_forgotten() -> None:
    assert place([8]) == "line 8"
    assert place([12, 3, 4, 5, 6, 7, 8]) == "lines 3-8, 12"
    assert place([1, 2, 5, 9, 10, 11], at_most=2) == "lines 1-2, 5 and 3 more"


def test_findings_of_one_kind_become_a_group_that_names_what_it_does_not_show() -> None:
    (group,) = grouped(finding("odd", lines=(n, n + 1)) for n in range(10, 60, 10))
    assert [one.lines for one in group.shown] == [(10, 11), (20, 21), (30, 31)]
    assert findings.name_more(group) == "and 2 more findings of this kind, 4 lines"
    assert len(grouped([finding("odd"), finding("odd", "note")])) == 2, "a note is no warning"


def test_events_tell_a_few_findings_of_a_kind_and_then_the_rest_at_once() -> None:
    told: list[tuple[str, str, dict[str, object]]] = []

    class Watch:
        def message(self, text: str, *, level: str, data: dict[str, object]) -> None:
            told.append((text, level, data))

    tell_findings([finding("odd", lines=(n,)) for n in range(6)], Watch())  # type: ignore[arg-type]
    assert [text for text, _, _ in told] == ["train.jsonl: It is odd. Correct it."] * 3 + [
        "odd: and 3 more findings of this kind, 3 lines"
    ]
    assert {level for _, level, _ in told} == {"warn"}
    assert [one["lines"] for one in told[3][2]["findings"]] == [[3], [4], [5]]  # type: ignore[attr-defined]


def test_the_wire_carries_a_thousand_lines_and_says_how_many_there_are() -> None:
    sent = on_the_wire(finding("odd", lines=tuple(range(1, 5001))))
    assert (len(sent["lines"]), sent["n_lines"]) == (1000, 5000)


def test_a_messy_file_is_one_screen_with_every_kind_on_it_and_the_worst_in_full() -> None:
    advice = "It is odd (lines 1 and 2; lines 3 and 4; and so on for a while) in a way that takes many words. " * 2
    errors = [finding(f"error_{n}", "error", (n,), advice) for n in range(6)]
    warnings = [finding(f"warning_{n}", "warning", tuple(range(n, 90, 2)), advice) for n in range(15)]
    notes = [finding(f"note_{n}", "note", (n,), advice) for n in range(5)]
    lines = shown(report(*errors, *warnings, *notes), width=80, height=39)
    assert len(lines) <= 39
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    assert all(one.code in text for one in (*errors, *warnings, *notes)), "none is left out"
    start = next(n for n, line in enumerate(lines) if "error_0" in line)
    assert "error_1" not in lines[start + 1], "errors get more room than notes"
    assert "--verbose" in text


def test_where_there_is_room_each_finding_is_shown_with_its_example_and_notes_take_a_line() -> None:
    whole = report(
        finding("odd", "error", (3,), "Line 3: " + "it is wrong. " * 20, example="{'x': 1}"),
        finding("quiet", "note", (4,), "nothing " * 40, example="unseen"),
    )
    lines = shown(whole)
    assert lines[1].startswith("error odd line 3: it is wrong.")
    assert "    {'x': 1}" in lines
    assert sum("nothing" in line for line in lines) == 1
    assert "unseen" not in "\n".join(lines)
    assert "unseen" in "\n".join(shown(whole, verbose=True))


def test_what_a_file_holds_cannot_drive_the_terminal() -> None:
    odd = finding(ATTACK, "error", (1,), ATTACK, example=ATTACK)
    text = "\n".join(shown(report(odd)))
    assert not set(text) & set("\x1b\x9b\x07\r\u202e\ud800")
    assert "\\x1b[2J" in text
    assert "[bold]" in text, "no markup is read"
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    for line in report_lines(report(odd), console, height=20):
        console.print(line, soft_wrap=True)
    out.getvalue().encode()  # no half of a surrogate pair is left
    assert "\x1b[2J" not in out.getvalue()


def test_an_emoji_made_of_several_stays_one() -> None:
    assert findings.escaped("👩\u200d🔬 é") == "👩\u200d🔬 é"


def test_long_asides_are_left_out_of_short_forms_and_short_ones_stay() -> None:
    message = "3 of 9 rows repeat another (lines 1 and 2; lines 3 and 4). Remove them (or not)."
    assert findings.brief(message) == "3 of 9 rows repeat another. Remove them (or not)."
    assert findings.brief("the answer '(((' is odd") == "the answer '(((' is odd"


def test_the_last_line_says_what_to_do() -> None:
    broken = finding("truncated_json", "error", (3,))
    assert findings.next_step(report()) == "A job would take this."
    assert findings.next_step(report(broken)) == (
        "A job would refuse this for one row. Next: correct the errors, and check again."
    )
    repaired = findings.next_step(report(broken, finding("blank_line", lines=(4,)), finding("odd")))
    assert "heldout fix train.jsonl -o train.fixed.jsonl (repairs blank_line)" in repaired
    assert repaired.endswith("The other errors need you.")
    assert "--quick" in findings.next_step(report(quick=True))
    assert findings.command("a b/it's.jsonl") == "heldout fix 'a b/it'\"'\"'s.jsonl' -o 'a b/it'\"'\"'s.fixed.jsonl'"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else_and_shows_nothing_as_markup() -> None:
    odd = [finding(ATTACK, "error", (1, 2, 50), ATTACK, example=ATTACK, file="train.jsonl") for _ in range(5)]
    page = report(*odd).html()
    tags = Tags()
    tags.feed(page)
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in tags.seen}
    assert not [attributes for _, attributes in tags.seen if {"src", "href", "onerror"} & attributes.keys()]
    assert "url(" not in page
    assert "@import" not in page
    assert 'name="viewport"' in page
    assert "&lt;script&gt;" in page
    page.encode()


def test_a_bar_is_dark_where_the_lines_are() -> None:
    assert bar((), 100) == ""
    last = bar((1000,), 1000)
    assert 'x="199"' in last
    assert 'x="0"' not in last
    assert bar(tuple(range(1, 1001)), 1000).count('opacity="1.00"') == 200
    assert "<rect" in bar((7,), 0), "a file whose last line nobody knows"


def test_a_report_counts_sound_rows_and_rows_with_errors(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [colour_row(i) for i in range(60)])
    with path.open("a") as out:
        out.write('\n{"messages": []}\n{"messages": 1}\n')
    found = heldout.check(path)
    (file,) = found.files
    assert (file.sound, file.faulty, file.rows, file.last_line) == (60, 2, 62, 63)
    assert found.refused
    assert "blank_line" in found.fixable()[str(path)]
    assert json.loads(json.dumps(found.as_dict()))["summary"]["error"] == 1


def test_a_quick_check_looks_at_rows_only(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [colour_row(0)] * 60)
    assert "exact_duplicate" in [one.code for one in heldout.check(path).findings]
    quick = heldout.check(path, quick=True)
    assert quick.findings == ()
    assert quick.as_dict()["quick"] is True


def test_a_check_without_a_model_loads_no_torch(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [colour_row(i) for i in range(60)])
    program = f"import sys, heldout\nheldout.check({str(path)!r})\nprint('torch' in sys.modules)"
    assert run(program) == "False\n"


def test_a_big_file_tells_how_much_of_it_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from heldout.pipeline import intake
    from heldout.pipeline.watch import Silent

    told: list[tuple[str, int, int]] = []

    class Watch(Silent):
        def progress(self, stage: str, done: int, total: int) -> None:
            told.append((stage, done, total))

    monkeypatch.setattr(intake, "TOLD_FROM", 1)
    path = write_rows(tmp_path / "a.jsonl", [colour_row(i) for i in range(60)])
    heldout.check(path, watch=Watch())
    assert told[0][0] == "reading a.jsonl, MB"
    assert [stage for stage, _, _ in told][-1] == "checks"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_report_can_be_printed_whatever_the_terminal_can_show(tmp_path: Path, encoding: str) -> None:
    path = write_rows(tmp_path / "é\x1b[31m.jsonl", [colour_row(0)] * 12)
    command = [sys.executable, "-m", "heldout", "check", str(path)]
    environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": f"{encoding}:strict", "PATH": "/usr/bin"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr.decode()
    assert b"\x1b[31m" not in done.stdout
