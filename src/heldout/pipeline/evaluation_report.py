"""Evaluation or Pairing -> report.json, report.md and report.html in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from heldout.pipeline import charts, findings, findings_page, layout, lights
from heldout.pipeline.evaluation import Evaluation, Pairing
from heldout.pipeline.findings import escaped, markdown_text
from heldout.pipeline.ladder import Rung
from heldout.pipeline.layout import HEADLINES, html_table, html_text, markdown_table

JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"

#: Characters of a text of the data that are shown.
SHOWN_CHARACTERS = 200

Done = Evaluation | Pairing


def write(done: Done, directory: Path) -> None:
    """Write every form of the report."""
    (directory / JSON).write_text(json.dumps(done.as_dict(), indent=2) + "\n", encoding="utf-8")
    (directory / MARKDOWN).write_text(markdown(done), encoding="utf-8")
    (directory / HTML).write_text(page(done), encoding="utf-8")


def markdown(done: Done) -> str:
    """The report as a page of text."""
    columns, rows = example_table(done)
    lines = [
        f"# {markdown_text(title(done))}",
        "",
        *(f"- {markdown_text(sentence)}." for sentence in sentences(done)),
        "",
        *(f"- Mind: {markdown_text(note)}." for note in notes(done)),
        "",
        *markdown_table(layout.RUNG_COLUMNS, layout.rung_rows(_ladder(done)), layout.RUNG_NUMBERS),
        *(lights.markdown(done.consequences) if isinstance(done, Evaluation) else []),
        "",
        *(markdown_table(("", "value"), numbers(done), ("value",)) if isinstance(done, Pairing) else []),
        "",
        f"## {rows_title(done)}",
        "",
        *(markdown_table(columns, rows, ("line",)) if rows else ["None."]),
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
    body = f"""{_head(done)}
{"".join(f"<p><small>Mind: {html_text(note)}.</small></p>" for note in notes(done))}
{charts.intervals(_ladder(done))}
<small>Points are means, bars 95&nbsp;% intervals, on {len(done.examples)} rows of the file.</small>
{layout.html_rungs(_ladder(done))}
{lights.html(done.consequences) if isinstance(done, Evaluation) else ""}
{html_table(("", "value"), numbers(done), ("value",)) if isinstance(done, Pairing) else ""}
<h2>{rows_title(done)}</h2>
{"".join(_case(columns, row) for row in rows) or "<p>None.</p>"}
<h2>Findings in the data</h2>
{findings_page.cards(done.findings, {}) or "<p>None.</p>"}"""
    return layout.html_page(title(done), body, layout.VERDICT_STYLE + lights.STYLE)


def _head(done: Done) -> str:
    """The verdict and its reasons, or what was asked and the result."""
    if isinstance(done, Evaluation) and done.verdict:
        first = "".join(f"<p><b>{html_text(caveat)}.</b></p>" for caveat in caveats(done))
        reasons = (*done.verdict.reasons, done.sentence, done.beside)
        told = "".join(f"<li>{html_text(reason)}</li>" for reason in reasons)
        return f"{layout.html_headline(done.verdict.outcome)}{first}<p>{html_text(title(done))}</p><ul>{told}</ul>"
    result = "".join(f"<p>{html_text(sentence)}.</p>" for sentence in sentences(done))
    return f"<h1>{html_text(title(done))}</h1>{result}"


def _case(columns: Sequence[str], row: Sequence[str]) -> str:
    return layout.html_case(f"line {row[0]}", zip(columns[1:], row[1:], strict=True))


def title(done: Done) -> str:
    """What was asked."""
    if isinstance(done, Pairing):
        return f"{done.a} against {done.b} on {done.file}"
    return f"{done.model} on {done.file}"


def sentences(done: Done) -> list[str]:
    """The result, in words: the verdict first, where there is one."""
    if isinstance(done, Pairing):
        return [done.conclusion]
    if done.verdict:
        first, *more = done.verdict.reasons
        return [*caveats(done), f"{HEADLINES[done.verdict.outcome]}: {first}", *more, done.sentence, done.beside]
    return [sentence for sentence in (done.sentence, done.beside) if sentence]


def caveats(done: Done) -> list[str]:
    """What a reader must know before the verdict."""
    known = done.verdict.caveats if isinstance(done, Evaluation) and done.verdict else ()
    return [f"Mind: {caveat}" for caveat in known]


def notes(done: Done) -> list[str]:
    """What else a reader must know."""
    return [note for note in done.notes if f"Mind: {note}" not in caveats(done)]


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
    # Here, for the terminal that prints these cells too.
    return escaped(text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…")


def _ladder(done: Done) -> tuple[Rung, ...]:
    return done.rungs if isinstance(done, Pairing) else (*done.rungs, done.rung)
