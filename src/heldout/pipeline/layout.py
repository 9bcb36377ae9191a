"""What the pages of all reports share: texts that stay texts, tables, the rungs, and the frame of an HTML page."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Sequence

from heldout.pipeline import findings_page
from heldout.pipeline.findings import escaped, markdown_text
from heldout.pipeline.ladder import Rung

#: One row a rung, in Markdown.
RUNG_COLUMNS = ("rung", "score", "95 % interval", "ms per answer", "prompt tokens", "what it is")
RUNG_NUMBERS = RUNG_COLUMNS[1:5]
#: Characters of a cell that stay on one line, at most.
UNBROKEN = 24

#: What a verdict says, in a word or three.
HEADLINES = {"ship": "Ship it", "dont_ship": "Don't ship it", "inconclusive": "Inconclusive"}

VERDICT_STYLE = """
h1[class] { display: inline-block; padding: .1em .6em; border-radius: 6px; color: #fff; print-color-adjust: exact }
h1.ship { background: #1a7f4b } h1.dont_ship { background: #b3261e } h1.inconclusive { background: #8a6d00 }
"""

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 780px; margin: 2em auto; padding: 0 1em; color: #1c2530;
  background: #fff; overflow-wrap: anywhere }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin: 1.6em 0 .4em }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
th { font-weight: normal; color: #5b6673; white-space: nowrap } td { overflow-wrap: anywhere }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.name { overflow-wrap: normal }
svg { width: 100%; height: auto } body > svg { display: block; max-width: 640px } small { color: #5b6673 }
pre { background: #f3f5f8; border-radius: 4px; padding: .6em .8em; white-space: pre-wrap; font: .85em/1.5 ui-monospace,
  monospace }
.case { border-left: 3px solid #d8dee6; margin: .8em 0; padding-left: .8em; break-inside: avoid }
.case td { white-space: pre-wrap } .case td:first-child { color: #5b6673; white-space: nowrap }
@media (max-width: 560px) { body { margin: 1em auto; font-size: 14px } td, th { padding-right: .5em }
  .wide, .wide tbody { display: block } .wide thead { display: none }
  .wide tr { display: flex; flex-wrap: wrap; gap: 0 .8em; padding: .25em 0; border-bottom: 1px solid #eaeef3 }
  .wide td:last-child { flex-basis: 100%; color: #44505c } }
@page { margin: 15mm }
@media print { body { max-width: none; margin: 0; padding: 0; font-size: 10.5pt } svg, pre { print-color-adjust: exact;
  break-inside: avoid } tr, li { break-inside: avoid } h2 { break-after: avoid } p, li { orphans: 3; widows: 3 } }
"""


def html_headline(outcome: str) -> str:
    """The verdict, for who reads nothing else."""
    return f'<h1 class="{outcome}">{HEADLINES[outcome]}</h1>'


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[str] = ()) -> list[str]:
    """Lines of a table; the columns called `numbers` stand at the right."""
    return [
        f"| {' | '.join(head)} |",
        f"|{'|'.join('--:' if column in numbers else '---' for column in head)}|",
        *(f"| {' | '.join(map(markdown_text, row))} |" for row in rows),
    ]


def markdown_code(text: str, language: str = "") -> list[str]:
    """Lines of a block that shows the text as it is."""
    longest = max((len(found) for found in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *text.split("\n"), fence]


def rung_rows(rungs: Iterable[Rung]) -> list[list[str]]:
    """The cells of `RUNG_COLUMNS`."""
    return [[rung.name, f"{rung.scores.mean:.1%}", interval_of(rung), *rung.costs, rung.explained] for rung in rungs]


def interval_of(rung: Rung) -> str:
    """Its 95 % interval in words."""
    low, high = rung.scores.interval
    return f"{low:.1%} to {high:.1%}"


def html_text(text: str) -> str:
    """The text as text of an HTML page."""
    return html.escape(escaped(text))


def html_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[str] = (), *, is_wide: bool = False
) -> str:
    """A table; the columns called `numbers` stand at the right, and short ones are not broken within a word.

    `is_wide`: on a phone the last cell of a row stands below the others.
    """
    rows = [list(row) for row in rows]
    longest = [max(map(len, column), default=0) for column in zip(head, *rows, strict=True)]
    kinds = [
        " class=n" if column in numbers else " class=name" if size <= UNBROKEN else ""
        for column, size in zip(head, longest, strict=True)
    ]
    top = "".join(f"<th{kind}>{html_text(column)}</th>" for kind, column in zip(kinds, head, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{html_text(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in rows
    )
    wide = " class=wide" if is_wide else ""
    return f"<table{wide}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def html_case(caption: str, texts: Iterable[tuple[str, str]]) -> str:
    """One example: texts below each other, each behind its name. Their lines stay lines."""
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in texts)
    return f"<div class=case><small>{html_text(caption)}</small><table>{rows}</table></div>"


def html_rungs(rungs: Iterable[Rung]) -> str:
    """A list of what each rung is, and what an answer of it costs; the scores are in the picture above it."""

    def costs(rung: Rung) -> str:
        words = zip(rung.costs, ("ms an answer", "prompt tokens"), strict=True)
        told = ", ".join(f"{number} {word}" for number, word in words if number)
        return f" <small>({told})</small>" if told else ""

    items = (f"<li><b>{html_text(rung.name)}</b>: {html_text(rung.explained)}{costs(rung)}</li>" for rung in rungs)
    return f"<ul>{''.join(items)}</ul>"


def html_page(title: str, body: str, style: str = "") -> str:
    """A whole page that loads nothing from anywhere; `title` is a text, `body` HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Heldout: {html_text(title)}</title>
<style>{_STYLE}{findings_page.STYLE}{style}</style></head><body>
{body}
</body></html>
"""
