"""`heldout evaluate` and `compare` on a terminal. What comes from a file is escaped and never read as markup."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from heldout.pipeline import evaluation_report as report
from heldout.pipeline.evaluation import Evaluation, Pairing
from heldout.pipeline.findings import escaped
from heldout.pipeline.lights import LIGHTS, by_light


def print_evaluation(done: Evaluation | Pairing, console: Console | None = None) -> None:
    """The result, what stands beside it, and some rows."""
    console = console or Console(highlight=False)
    for sentence in report.sentences(done):
        console.print(Text(escaped(f"{sentence}."), style="bold"), soft_wrap=not console.is_terminal)
    for note in report.notes(done):
        console.print(Text(escaped(f"Mind: {note}."), style="dim"), soft_wrap=not console.is_terminal)
    if isinstance(done, Pairing) or done.rungs:
        console.print(_scores(done))
    for one in by_light(done.consequences) if isinstance(done, Evaluation) else ():
        told = f"{LIGHTS[one.status][2]}, {one.name}: {one.sentence.removeprefix('not measured: ')}."
        console.print(Text(escaped(told)), soft_wrap=not console.is_terminal)
    if isinstance(done, Pairing):
        numbers = Table(box=None, padding=(0, 2), show_header=False)
        for name, value in report.numbers(done):
            numbers.add_row(name, value)
        console.print(numbers)
    columns, rows = report.example_table(done)
    if rows:
        table = Table(box=None, padding=(0, 1), title=f"{report.rows_title(done)}:", title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold", justify="right" if column == "line" else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)


def _scores(done: Evaluation | Pairing) -> Table:
    table = Table(box=None, padding=(0, 2))
    for column in ("", "score", "95 % interval", "ms", "prompt tokens"):
        table.add_column(column, justify="left" if not column else "right")
    ladder = done.rungs if isinstance(done, Pairing) else (*done.rungs, done.rung)
    for rung in ladder:
        low, high = rung.scores.interval
        name = f"{rung.name}: {rung.description}" if isinstance(done, Pairing) else rung.name
        table.add_row(Text(escaped(name)), f"{rung.scores.mean:.1%}", f"{low:.1%} to {high:.1%}", *rung.costs)
    return table
