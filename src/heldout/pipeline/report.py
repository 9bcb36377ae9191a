"""Verdict -> report.json, report.md, report.html and metrics.csv in the job's directory."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from heldout.pipeline import charts, findings, findings_page
from heldout.pipeline.consequences.base import Consequence
from heldout.pipeline.crossfit import CrossFit
from heldout.pipeline.evaluate.forgetting import MARGIN, SURE
from heldout.pipeline.ladder import Rung
from heldout.pipeline.mistakes import Mistake
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.training import Adapter, CurvePoint
from heldout.pipeline.types import Finding
from heldout.pipeline.verdict import Verdict

JSON, MARKDOWN, HTML, METRICS = "report.json", "report.md", "report.html", "metrics.csv"

FOLD_COLUMNS = ("fold", "trained on", "stopped by", "answered", "best step (epochs)", "validation loss", "score")

#: A light, its colour and its word: nobody has to tell red from green.
_LIGHTS = {
    "ok": ("🟢", "#1a7f4b", "ok"),
    "warn": ("🟡", "#8a6d00", "warning"),
    "fail": ("🔴", "#b3261e", "fails"),
    "not_measured": ("⚪", "#5b6673", "not measured"),
}

MISTAKES = "Wrong answers to learn from"
#: Characters of a text in them.
SHOWN = 300

_HEADLINES = {
    "ship": "Ship it",
    "dont_ship": "Don't ship it",
    "inconclusive": "Inconclusive",
}


def write(outcome: Outcome, directory: Path) -> None:
    """Write every form of the report."""
    (directory / JSON).write_text(json.dumps(outcome.as_dict(), indent=2, ensure_ascii=False) + "\n")
    (directory / MARKDOWN).write_text(markdown(outcome))
    (directory / HTML).write_text(page(outcome))
    (directory / METRICS).write_text(metrics_csv(outcome.adapter.curve))


def metrics_csv(curve: tuple[CurvePoint, ...]) -> str:
    """OpenAI's result file: five documented columns, a cell is empty where nothing was measured."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
    for point in curve:
        row = [point.train_loss, point.train_accuracy, point.valid_loss, point.valid_accuracy]
        writer.writerow([point.step, *("" if value is None else f"{value:.5f}" for value in row)])
    return out.getvalue()


def markdown(outcome: Outcome) -> str:
    """The report as a page of text."""
    verdict, adapter = outcome.verdict, outcome.adapter
    lines = [
        f"# {_HEADLINES[verdict.outcome]}",
        "",
        *(f"**Mind: {caveat}.**\n" for caveat in verdict.caveats),
        f"`{outcome.base_model}`, {_parts(outcome)}.",
        "",
        *(f"- {reason}" for reason in verdict.reasons),
        "",
        f"The cheapest rung that is as good as the best: **{verdict.cheapest_as_good}**.",
        "",
        f"## {_question(outcome)}",
        "",
        "| rung | score | 95 % interval | ms per answer | prompt tokens | what it is |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for rung in (*outcome.rungs, outcome.tuned):
        low, high = rung.scores.interval
        lines.append(
            f"| {rung.name} | {rung.scores.mean:.1%} | {low:.1%} to {high:.1%} | {' | '.join(rung.costs)} | "
            f"{_cell(rung.explained)} |"
        )
    lines += [
        *_consequences(outcome.consequences),
        *_mistakes(outcome),
        *(_folds(outcome.crossfit) if outcome.crossfit else []),
        *(["", "## General skills", "", skills] if (skills := general_skills(verdict)) else []),
        *(["", "## More data?", "", outcome.more_data.sentence] if outcome.more_data else []),
        "",
        "## Training",
        "",
        f"{_ended(adapter)} {adapter.trained_parameters:,} parameters, "
        f"{adapter.trained_tokens:,} tokens, {adapter.examples_per_second:.1f} examples a second, peak memory "
        f"{adapter.peak_memory_bytes / 2**30:.2f} GiB, {adapter.seconds:.0f} s.",
        "",
        *_validations(adapter),
        "",
        "## Plan",
        "",
        "| hyperparameter | value | why |",
        "|---|--:|---|",
        *(
            f"| {name} | {_value(choice['value'])} | {_cell(choice['reason'])} |"
            for name, choice in outcome.plan.as_dict().items()
        ),
        "",
        "## Findings in the data",
        "",
        *findings.markdown(_ordered(outcome)),
        "",
    ]
    return "\n".join(lines)


def page(outcome: Outcome) -> str:
    """The report as one HTML file that needs nothing else."""
    verdict, adapter = outcome.verdict, outcome.adapter
    plan = "".join(
        f"<tr><td>{name}</td><td class=n>{_value(choice['value'])}</td><td>{html.escape(choice['reason'])}</td></tr>"
        for name, choice in outcome.plan.as_dict().items()
    )
    rungs = "".join(
        f"<li><b>{html.escape(rung.name)}</b>: {html.escape(rung.explained)}"
        f"{f' <small>({costs})</small>' if (costs := _cost_sentence(rung)) else ''}</li>"
        for rung in (*outcome.rungs, outcome.tuned)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Heldout: {_HEADLINES[verdict.outcome]}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 780px; margin: 2em auto; padding: 0 1em; color: #1c2530 }}
h1 {{ display: inline-block; padding: .1em .6em; border-radius: 6px; color: #fff }}
h1.ship {{ background: #1a7f4b }} h1.dont_ship {{ background: #b3261e }} h1.inconclusive {{ background: #8a6d00 }}
table {{ border-collapse: collapse }} td {{ padding: .15em .8em .15em 0; vertical-align: top }}
td.light {{ white-space: nowrap; font-weight: 600 }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums }}
svg {{ width: 100%; height: auto }} small {{ color: #5b6673 }}
td:last-child, li, p {{ overflow-wrap: anywhere }}
.mistake {{ border-left: 3px solid #d8dee6; margin: .8em 0; padding-left: .8em; break-inside: avoid }}
.mistake td {{ white-space: pre-wrap }} .mistake td:first-child {{ color: #5b6673; white-space: nowrap }}
@media (max-width: 560px) {{ body {{ margin: 1em auto; font-size: 14px }} td {{ padding-right: .4em }} }}
@media print {{ body {{ max-width: none; margin: 0 }} h1, .light, svg {{ print-color-adjust: exact }}
h2 {{ break-after: avoid }} }}
{findings_page.STYLE}</style></head><body>
<h1 class="{verdict.outcome}">{_HEADLINES[verdict.outcome]}</h1>
{"".join(f"<p><b>Mind: {html.escape(caveat)}.</b></p>" for caveat in verdict.caveats)}
<p>{html.escape(outcome.base_model)}, {_parts(outcome)}.</p>
<ul>{"".join(f"<li>{html.escape(reason)}</li>" for reason in verdict.reasons)}</ul>
<p>The cheapest rung that is as good as the best: <b>{html.escape(verdict.cheapest_as_good)}</b>.</p>
<h2>{_question(outcome)}</h2>
{charts.intervals((*outcome.rungs, outcome.tuned))}
<small>Points are means, bars 95&nbsp;% intervals, on {_judged_on(outcome)}.</small>
<ul>{rungs}</ul>
{_consequences_table(outcome.consequences)}
{_mistakes_table(outcome)}
{_folds_table(outcome.crossfit) if outcome.crossfit else ""}
{f"<h2>General skills</h2><p>{html.escape(skills)}</p>" if (skills := general_skills(verdict)) else ""}
{f"<h2>More data?</h2><p>{html.escape(outcome.more_data.sentence)}</p>" if outcome.more_data else ""}
<h2>Training</h2>
{charts.losses(adapter.curve, adapter.best_step, outcome.plan.total_steps)}
<p>{html.escape(_ended(adapter))}
{adapter.trained_parameters:,} parameters, {adapter.trained_tokens:,} tokens,
{adapter.examples_per_second:.1f} examples a second, peak memory {adapter.peak_memory_bytes / 2**30:.2f} GiB.</p>
<h2>Plan</h2><table>{plan}</table>
<h2>Findings in the data</h2>
{findings_page.cards(_ordered(outcome), {}) or "<p>None.</p>"}
</body></html>
"""


def _mistakes(outcome: Outcome) -> list[str]:
    """Wrong answers as a table."""
    if not outcome.mistakes:
        return []
    rows = [
        f"| {one.line} | {_alike(one)} | {_cell(_short(one.asked))} | {_cell(_short(one.expected))} | "
        f"{_cell(_short(one.tuned))} | {_cell(_short(one.baseline))} |"
        for one in outcome.mistakes
    ]
    return [
        "",
        f"## {MISTAKES}",
        "",
        f"| line | how often | asked | expected | tuned | {outcome.verdict.best_baseline} |",
        "|--:|--:|---|---|---|---|",
        *rows,
    ]


def _mistakes_table(outcome: Outcome) -> str:
    """The same as HTML."""

    def rows(one: Mistake) -> str:
        pairs = (
            ("asked", one.asked),
            ("expected", one.expected),
            ("tuned", one.tuned),
            (outcome.verdict.best_baseline, one.baseline),
        )
        return "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(_short(text))}</td></tr>" for name, text in pairs
        )

    found = "".join(
        f"<div class=mistake><small>line {one.line}, {_alike(one)}</small><table>{rows(one)}</table></div>"
        for one in outcome.mistakes
    )
    return f"<h2>{MISTAKES}</h2>{found}" if found else ""


def _alike(one: Mistake) -> str:
    lost = ", the baseline was better" if one.baseline_score > one.score else ""
    return ("once" if one.alike == 1 else f"{one.alike} times") + lost


def _short(text: str) -> str:
    """The beginning of a long text; the files have the rest."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _cost_sentence(rung: Rung) -> str:
    """The same in words, for the page."""
    words = zip(rung.costs, ("ms an answer", "prompt tokens"), strict=True)
    return ", ".join(f"{number} {word}" for number, word in words if number)


def _ordered(outcome: Outcome) -> tuple[Finding, ...]:
    """Those of the checks are; the split's come with them."""
    return tuple(sorted(outcome.findings, key=lambda finding: findings.RANK[finding.severity]))


def _question(outcome: Outcome) -> str:
    return f"Who answers how well {'out of fold' if outcome.crossfit else 'on the holdout'}"


def _parts(outcome: Outcome) -> str:
    split = outcome.split
    stopped = f"stopped by {len(split.valid)}, " if split.valid else ""
    return f"trained on {len(split.train)} examples, {stopped}judged on {_judged_on(outcome)}"


def _judged_on(outcome: Outcome) -> str:
    if outcome.crossfit is None:
        trained_on = " (but see above)" if outcome.split.caveats else ""
        return f"{len(outcome.split.holdout)} examples nobody trained on{trained_on}"
    return (
        f"{len(outcome.tuned.scores.per_example)} examples, each answered by the one of "
        f"{len(outcome.crossfit.folds)} models that never saw it"
    )


def general_skills(verdict: Verdict) -> str:
    """What became of them, if that was measured."""
    found = verdict.forgetting
    if found is None:
        return ""
    result = f"They dropped: {found.advice}" if found.dropped else "They did not surely drop"
    return (
        f"{found.sentence[:1].upper()}{found.sentence[1:]}. {result}. (Dropped means: by more than {MARGIN:g} nats per "
        f"token, with a probability of at least {SURE:.0%}; it is {found.p_dropped:.1%}.)"
    )


def _consequences(found: Sequence[Consequence]) -> list[str]:
    """The table of lights, and what the lit ones look like."""
    if not found:
        return []
    found = _by_light(found)
    shown = [f"- {one.name}: {_cell(example)}" for one in found for example in one.examples]
    return [
        "",
        "## What training may have made worse",
        "",
        "| | consequence | what was measured |",
        "|---|---|---|",
        *(
            f"| {_LIGHTS[one.status][0]} {_LIGHTS[one.status][2]} | {one.name} | {_cell(_plain(one))} |"
            for one in found
        ),
        *(["", "Examples:", "", *shown] if shown else []),
    ]


def _consequences_table(found: Sequence[Consequence]) -> str:
    """The same as HTML."""
    if not found:
        return ""
    found = _by_light(found)
    rows = "".join(
        f'<tr><td class=light style="color:{_LIGHTS[one.status][1]}">● {_LIGHTS[one.status][2]}</td>'
        f"<td>{one.name}</td><td>{html.escape(_plain(one))}"
        f"{''.join(f'<br><small>{html.escape(example)}</small>' for example in one.examples)}</td></tr>"
        for one in found
    )
    return f"<h2>What training may have made worse</h2><table>{rows}</table>"


def _by_light(found: Sequence[Consequence]) -> list[Consequence]:
    """What fails first, what was not measured last."""
    order = ("fail", "warn", "ok", "not_measured")
    return sorted(found, key=lambda one: order.index(one.status))


def _plain(one: Consequence) -> str:
    """Its sentence; the light says already that it was not measured."""
    text = one.sentence.removeprefix("not measured: ")
    return f"{text[:1].upper()}{text[1:]}."


def _ended(adapter: Adapter) -> str:
    """Why training ended, and why this checkpoint was taken: two sentences."""
    return " ".join(f"{text[:1].upper()}{text[1:]}." for text in (adapter.stopped, adapter.selection.reason))


def _validations(adapter: Adapter) -> list[str]:
    """The table of validation losses, if there were validations."""
    measured = [point for point in adapter.curve if point.valid_loss is not None]
    if not measured:
        return []
    return [
        "| step | training loss | validation loss | calibrated |",
        "|--:|--:|--:|--:|",
        *(
            f"| {point.step}{' (kept)' if point.step == adapter.best_step else ''} | {point.train_loss:.4f} | "
            f"{point.valid_loss:.4f} | {point.valid_calibrated_loss:.4f} |"
            for point in measured
        ),
    ]


def _folds(crossfit: CrossFit) -> list[str]:
    """The table of the folds."""
    rows = [" | ".join(cells) for cells in _fold_cells(crossfit)]
    return [
        "",
        "## Folds",
        "",
        f"{crossfit.sentence[:1].upper()}{crossfit.sentence[1:]}.",
        "",
        f"| {' | '.join(FOLD_COLUMNS)} |",
        f"|{'--:|' * len(FOLD_COLUMNS)}",
        *(f"| {row} |" for row in rows),
    ]


def _folds_table(crossfit: CrossFit) -> str:
    """The same as HTML."""
    head = "".join(f"<td class=n>{column}</td>" for column in FOLD_COLUMNS)
    rows = "".join(
        f"<tr>{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>" for cells in _fold_cells(crossfit)
    )
    return (
        f"<h2>Folds</h2><p>{html.escape(crossfit.sentence[:1].upper() + crossfit.sentence[1:])}.</p>"
        f"<table><tr>{head}</tr>{rows}</table>"
    )


def _fold_cells(crossfit: CrossFit) -> list[list[str]]:
    return [
        [
            str(fold.number),
            str(fold.train),
            str(fold.valid),
            str(len(fold.scores.per_example)),
            f"{fold.best_step} ({fold.best_epoch:.1f})",
            "" if fold.valid_loss is None else f"{fold.valid_loss:.4f}",
            f"{fold.scores.mean:.1%}",
        ]
        for fold in crossfit.folds
    ]


def _value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
