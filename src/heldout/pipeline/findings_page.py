"""Findings as HTML: cards that the check's page and the verdict's page share. Nothing is loaded from anywhere."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from heldout.pipeline.findings import (
    Group,
    Report,
    escaped,
    grouped,
    name_more,
    next_step,
    place,
    short_names,
    shortened,
    tidy,
)
from heldout.pipeline.types import Finding

#: Places in a file that its bar can tell apart, and numbers or ranges that are listed when asked for.
BINS = 200
LISTED = 2_000
SHOWN = 8

STYLE = """
.finding { border: 1px solid #d8dee6; border-left: 5px solid #8a94a0; border-radius: 6px; margin: .7em 0;
  padding: .55em .8em; overflow-wrap: anywhere; break-inside: avoid }
.finding.error { border-left-color: #b3261e } .finding.warning { border-left-color: #c28a00 }
.finding.note { border-left-color: #3a6ea5 }
.finding h3 { font-size: 1em; margin: 0; display: flex; flex-wrap: wrap; gap: .1em .7em; align-items: baseline }
.finding h3 b { text-transform: uppercase; font-size: .75em; letter-spacing: .04em }
.error h3 b { color: #b3261e } .warning h3 b { color: #8a6200 } .note h3 b { color: #3a6ea5 }
.finding p { margin: .35em 0 } .finding code { font: .87em ui-monospace, monospace }
.finding .sample { display: block; background: #f3f5f8; padding: .3em .5em; border-radius: 4px; color: #44505c }
.finding .where { color: #5b6673; font-weight: normal; font-size: .9em }
.finding svg { width: 100%; height: 10px; display: block; margin: .4em 0 .2em }
.finding details { color: #5b6673; font-size: .85em }
@media print { .finding details { display: none } .finding, svg { print-color-adjust: exact } }
"""

_PAGE_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 780px; margin: 1.5em auto; padding: 0 1em; color: #1c2530 }
h1 { font-size: 1.4em; margin: 0 0 .3em } h2 { font-size: 1.1em; margin: 1.6em 0 .4em }
table { border-collapse: collapse } td, th { padding: .15em .9em .15em 0; text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
td { overflow-wrap: anywhere } th { font-weight: normal; color: #5b6673 }
.next { padding: .5em .8em; border-radius: 6px; background: #e8f2ec; overflow-wrap: anywhere }
.next.refused { background: #fbeae9 } small { color: #5b6673 }
@media print { body { margin: 0; max-width: none; font-size: 11pt } }
"""

_PLURALS = {"error": "errors", "warning": "warnings", "note": "notes"}


def page(report: Report) -> str:
    """The report as one HTML file that needs nothing else."""
    names = short_names(file.name for file in report.files)
    last_lines = {file.name: file.last_line for file in report.files}
    counted = ", ".join(
        f"{report.count(severity)} {plural if report.count(severity) != 1 else severity}"  # type: ignore[arg-type]
        for severity, plural in _PLURALS.items()
    )
    files = "".join(
        f"<tr><td>{_text(names[file.name])}</td><td>{file.part}</td><td class=n>{file.sound:,}</td>"
        f"<td class=n>{file.faulty:,}</td></tr>"
        for file in report.files
    )
    title = _text(names[report.files[0].name])
    model = f", tokens counted for {_text(report.model)}" if report.model else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Heldout: {title}</title>
<style>{_PAGE_STYLE}{STYLE}</style></head><body>
<h1>{title}</h1>
<p>{counted}; looked at in {report.seconds:.1f} s{model}.</p>
<p class="next{" refused" if report.refused else ""}">{_text(next_step(report))}</p>
<table><tr><th>file</th><th>used as</th><th class=n>sound rows</th><th class=n>with errors</th></tr>{files}</table>
<h2>Findings</h2>
{cards(report.findings, last_lines, names) or "<p>None.</p>"}
<p><small>A bar shows where in its file the lines of a finding lie, from the first line to the last. Nothing was
changed and nothing was left out. What the codes mean: docs/checks of Heldout.</small></p>
</body></html>
"""


def cards(findings: Iterable[Finding], last_lines: Mapping[str, int], names: Mapping[str, str] | None = None) -> str:
    """Each finding in a box, most harmful first. `last_lines` is what a bar of that file ends with."""
    names = names or {}
    return "\n".join(_cards(group, last_lines, names) for group in grouped(findings))


def _cards(group: Group, last_lines: Mapping[str, int], names: Mapping[str, str]) -> str:
    boxes = [_card(finding, last_lines.get(finding.file, 0), names) for finding in group.shown]
    if group.more:
        rest = "".join(f"<li>{_text(shortened(tidy(finding), names))}</li>" for finding in group.more[:LISTED])
        boxes.append(
            f'<div class="finding {group.severity}"><details><summary>{_text(name_more(group))} '
            f"(<code>{_text(group.code)}</code>)</summary><ul>{rest}</ul></details></div>"
        )
    return "\n".join(boxes)


def _card(finding: Finding, last_line: int, names: Mapping[str, str]) -> str:
    where = place(finding.lines, at_most=SHOWN) if finding.lines else "the whole file"
    file = names.get(finding.file, finding.file)
    every = place(finding.lines, at_most=LISTED) if finding.lines else ""
    listed = f"<details><summary>all lines</summary>{_text(every)}</details>" if every not in ("", where) else ""
    sample = f'<code class="sample">{_text(finding.example)}</code>' if finding.example else ""
    return (
        f'<div class="finding {finding.severity}"><h3><b>{finding.severity}</b> <code>{_text(finding.code)}</code> '
        f'<span class="where">{_text(file)}, {where}</span></h3>'
        f"<p>{_text(shortened(tidy(finding), names))}</p>{sample}"
        f"{bar(finding.lines, last_line)}{listed}</div>"
    )


def bar(lines: Sequence[int], last_line: int) -> str:
    """A strip as long as the file, darker where more of its lines are concerned."""
    if not lines:
        return ""
    last = max(last_line, max(lines))
    bins = min(BINS, last)
    counts = [0] * bins
    for line in lines:
        counts[(line - 1) * bins // last] += 1
    most = max(1, -(-last // bins))  # lines of a place
    marks = "".join(
        f'<rect x="{x}" width="1" height="10" opacity="{min(1.0, 0.35 + 0.65 * count / most):.2f}"/>'
        for x, count in enumerate(counts)
        if count
    )
    label = f"{len(lines)} of {last} lines"
    return (
        f'<svg viewBox="0 0 {bins} 10" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'<rect width="{bins}" height="10" fill="#eaeef3"/><g fill="#1c2530">{marks}</g></svg>'
    )


def _text(text: str) -> str:
    return html.escape(escaped(text))
