"""Evaluation or Pairing -> report.json, report.md and report.html in a folder."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path

from heldout.pipeline import charts, findings, findings_page
from heldout.pipeline.evaluation import Evaluation, Pairing
from heldout.pipeline.findings import escaped
from heldout.pipeline.ladder import Rung

JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"

#: Characters of a text of the data that are shown.
SHOWN_CHARACTERS = 200

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 780px; margin: 2em auto; padding: 0 1em; color: #1c2530 }
h1 { font-size: 1.4em; overflow-wrap: anywhere } h2 { font-size: 1.1em; margin-top: 1.6em }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } td { overflow-wrap: anywhere }
th { font-weight: normal; color: #5b6673 } svg { width: 100%; height: auto } small { color: #5b6673 }
"""

Done = Evaluation | Pairing


def write(done: Done, directory: Path) -> None:
    """Write every form of the report."""
    (directory / JSON).write_text(json.dumps(done.as_dict(), indent=2) + "\n", encoding="utf-8")
    (directory / MARKDOWN).write_text(markdown(done), encoding="utf-8")
    (directory / HTML).write_text(page(done), encoding="utf-8")


def markdown(done: Done) -> str:
    """The report as a page of text."""
    head = ("", "score", "95 % interval", "macro-F1", "ms per answer", "prompt tokens", "what it is")
    columns, rows = example_table(done)
    lines = [
        f"# {_cell(title(done))}",
        "",
        *(f"{_cell(sentence)}." for sentence in sentences(done)),
        "",
        *(f"- Mind: {_cell(note)}." for note in done.notes),
        "",
        *_table(head, [_rung_cells(rung) for rung in _ladder(done)]),
        "",
        *(_table(("", "value"), [list(row) for row in numbers(done)]) if isinstance(done, Pairing) else []),
        "",
        f"## {rows_title(done)}",
        "",
        *(_table(columns, rows) if rows else ["None."]),
        "",
        "## Findings in the data",
        "",
        *findings.markdown(done.findings),
        "",
    ]
    return "\n".join(lines)


def page(done: Done) -> str:
    """The report as one HTML file that needs nothing else."""
    columns, rows = example_table(done)
    described = "".join(
        f"<li><b>{html.escape(rung.name)}</b>: {html.escape(escaped(rung.description))}</li>" for rung in _ladder(done)
    )
    pairs = _html_table(("", "value"), [list(row) for row in numbers(done)]) if isinstance(done, Pairing) else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Heldout: {html.escape(escaped(title(done)))}</title>
<style>{_STYLE}{findings_page.STYLE}</style></head><body>
<h1>{html.escape(escaped(title(done)))}</h1>
{"".join(f"<p>{html.escape(escaped(sentence))}.</p>" for sentence in sentences(done))}
{"".join(f"<p><small>Mind: {html.escape(escaped(note))}.</small></p>" for note in done.notes)}
{charts.intervals(_ladder(done))}
<small>Points are means, bars 95&nbsp;% intervals, on {len(done.examples)} rows of the file.</small>
<ul>{described}</ul>
{pairs}
<h2>{rows_title(done)}</h2>
{_html_table(columns, rows) if rows else "<p>None.</p>"}
<h2>Findings in the data</h2>
{findings_page.cards(done.findings, {}) or "<p>None.</p>"}
</body></html>
"""


def title(done: Done) -> str:
    """What was asked."""
    if isinstance(done, Pairing):
        return f"{done.a} against {done.b} on {done.file}"
    return f"{done.model} on {done.file}"


def sentences(done: Done) -> list[str]:
    """The result, in words."""
    if isinstance(done, Pairing):
        return [done.conclusion]
    return [sentence for sentence in (done.sentence, done.beside) if sentence]


def numbers(done: Pairing) -> Iterator[tuple[str, str]]:
    """The comparison's numbers, by what they are."""
    found = done.comparison
    low, high = found.interval
    yield "difference, A minus B", f"{100 * found.difference:+.1f} points"
    yield "95 % interval", f"{100 * low:+.1f} to {100 * high:+.1f} points"
    yield "probability that A is better", f"{found.p_better:.1%}"
    yield "rows that A answers better", str(done.wins)
    yield "rows that B answers better", str(done.losses)
    yield "rows without a difference", str(found.n - done.wins - done.losses)
    if found.mid_p is not None:
        yield "McNemar's test, mid-p", f"{found.mid_p:.3g}"
    yield "smallest difference that would show", f"{100 * found.smallest_detectable:.1f} points (80 % power)"


def rows_title(done: Done) -> str:
    """What the rows below it are."""
    return "Rows on which they differ" if isinstance(done, Pairing) else "Rows that were answered worst"


def example_table(done: Done) -> tuple[tuple[str, ...], list[list[str]]]:
    """Head and cells of the rows that are shown."""
    if isinstance(done, Pairing):
        cells = [
            [str(done.examples[i].line), _asked(done, i), _short(done.examples[i].target)]
            + [f"{scores.per_example[i]:.2f}: {_short(scores.answers[i])}" for scores in (done.scores_a, done.scores_b)]
            for i in done.shown
        ]
        return ("line", "asked", "right", "A", "B"), cells
    cells = [
        [
            str(done.examples[i].line),
            _asked(done, i),
            _short(done.examples[i].target),
            f"{done.scores.per_example[i]:.2f}: {_short(done.scores.answers[i])}",
        ]
        for i in done.shown
    ]
    return ("line", "asked", "right", "answered"), cells


def _asked(done: Done, i: int) -> str:
    prompt = done.examples[i].prompt
    return _short(str(prompt[-1]["content"])) if prompt else ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return escaped(text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…")


def _ladder(done: Done) -> tuple[Rung, ...]:
    return done.rungs if isinstance(done, Pairing) else (*done.rungs, done.rung)


def _rung_cells(rung: Rung) -> list[str]:
    low, high = rung.scores.interval
    macro = "" if rung.scores.macro_f1 is None else f"{rung.scores.macro_f1:.1%}"
    return [
        rung.name,
        f"{rung.scores.mean:.1%}",
        f"{low:.1%} to {high:.1%}",
        macro,
        *rung.costs,
        rung.description,
    ]


def _table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(map(_cell, row))} |" for row in rows),
    ]


def _html_table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{html.escape(column)}</th>" for column in head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _cell(text: str) -> str:
    # Nothing of a file may become a tag, a link or a column of the page.
    return "".join(f"\\{character}" if character in "\\`*_[]<>|" else character for character in escaped(text))
