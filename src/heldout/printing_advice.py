"""`heldout advise` on a terminal: one screen of 80 by 40, plain where stdout is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from heldout.pipeline.advise.advice import Advice, Job, Unmeasured
from heldout.pipeline.advise.costs import Costs, Tokens
from heldout.pipeline.advise.duration import Duration
from heldout.pipeline.advise.task import WORDS

WIDTH = 80
TOOLS = {
    "prompt": "a good prompt",
    "retrieval": "retrieval",
    "classifier": "a small classifier",
    "fine-tune": "a fine-tune",
    "none": "nothing yet",
}


def print_advice(advice: Advice, console: Console | None = None) -> None:
    """Everything on one screen; `--json` has the rest."""
    console = console or Console(highlight=False)
    console.width = min(console.width, WIDTH)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, text in lines(advice):
        table.add_row(name, _plain(text))
    console.print(table)


def lines(advice: Advice) -> Iterator[tuple[str, str]]:
    """What is told, as (heading, text); a heading is empty where the one above goes on."""
    prompts = "" if advice.prompts == advice.examples else f", {advice.prompts} different prompts"
    yield "File", f"{advice.file}: {advice.examples} examples{prompts}"
    if advice.errors or advice.warnings:
        found = f"{advice.errors} errors, {advice.warnings} warnings"
        yield "Findings", f"{found}; heldout check {advice.file} names them"
    yield "Task", f"{WORDS[advice.task.kind]}: {advice.task.why}"
    yield "Try", TOOLS[advice.recommendation.tool]
    yield from (("", reason) for reason in advice.recommendation.reasons)
    heading = "Rungs"
    for rung in advice.cheap:
        low, high = rung.interval
        yield heading, f"{rung.score:6.1%}  {rung.name} ({low:.0%} to {high:.0%} of {rung.rows})"
        heading = ""
    for one in advice.prompted:
        low, high = one.interval
        yield heading, f"{one.score:6.1%}  {one.name} prompt ({low:.0%} to {high:.0%} of {one.rows})"
        heading = ""
    yield "It can show", advice.proof.sentence
    more = advice.more_data
    yield "More data?", f"Not estimated: {more.why}." if isinstance(more, Unmeasured) else more.sentence
    if isinstance(advice.job, Unmeasured):
        yield "A job", f"not measured: {advice.job.why}"
    else:
        yield from _job(advice.job)


def _job(job: Job) -> Iterator[tuple[str, str]]:
    duration, tokens = job.duration, job.tokens
    trainings = f"{duration.trainings} trainings, " if duration.trainings > 1 else ""
    if duration.typical_steps == duration.steps:
        told = f"{_time(duration.at_most)} here ({trainings}{duration.steps} steps)"
    else:
        told = (
            f"{_time(duration.typical)} here, at most {_time(duration.at_most)} ({trainings}{duration.typical_steps} "
            f"of {duration.steps} steps: as if each stopped half way and a patience later)"
        )
    yield "A job", f"{told}; {_stages(duration)}"
    memory = f"{job.memory_bytes / 2**30:.2f} GiB at its highest" if job.memory_bytes else "not predicted: it is small"
    yield "", f"memory {memory}; {job.base_model}, {job.steps_measured} steps were timed"
    yield "Tokens", _tokens(tokens)
    if tokens.plain:
        yield "", _prompts(tokens)
    if job.costs:
        yield "Costs", _costs(job.costs)


def _stages(duration: Duration) -> str:
    ordered = sorted(duration.stages, key=lambda stage: -stage.typical)
    return ", ".join(f"{stage.name} {_time(stage.typical)}" for stage in ordered[:3] if stage.typical >= 1)


def _tokens(tokens: Tokens) -> str:
    return (
        f"{tokens.per_epoch:,} an epoch, {tokens.supervised:,} of them learned from; epochs: at most {tokens.epochs}, "
        f"{tokens.per_epoch * tokens.epochs:,} tokens a training"
    )


def _prompts(tokens: Tokens) -> str:
    behind = f"{tokens.with_shots} behind {tokens.shots} examples, " if tokens.shots else ""
    return (
        f"a call's prompt: {behind}{tokens.plain} as it is, {tokens.without_system} without the system prompt: up to "
        f"{tokens.saved} saved; an answer: {tokens.answer}"
    )


def _costs(costs: Costs) -> str:
    told = [
        ("hosted: training", costs.hosted_training),
        ("1,000 calls", costs.hosted_calls),
        ("with the short prompt", costs.hosted_calls_short),
        ("here: a job", costs.here_training),
        ("1,000 calls", costs.here_calls),
    ]
    return ", ".join(f"{name} {_money(price)}" for name, price in told if price is not None)


def _money(price: float) -> str:
    return f"{price:.2f}" if price >= 0.1 or price == 0 else f"{price:.2g}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)  # a name in square brackets is no markup
