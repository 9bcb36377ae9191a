"""Verdict -> report.json, report.md, report.html and metrics.csv in the job's directory."""

from __future__ import annotations

import csv
import io
import json
from html import escape
from pathlib import Path

from heldout.pipeline import charts, findings, findings_page, layout, lights
from heldout.pipeline.crossfit import CrossFit
from heldout.pipeline.evaluate.forgetting import MARGIN, SURE
from heldout.pipeline.findings import markdown_text
from heldout.pipeline.hyperparameters import KNOBS
from heldout.pipeline.layout import HEADLINES, html_table, html_text, markdown_code, markdown_table
from heldout.pipeline.mistakes import Mistake
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.reproduce import asked_values
from heldout.pipeline.training import Adapter, CurvePoint
from heldout.pipeline.types import Finding
from heldout.pipeline.verdict import Verdict

JSON, MARKDOWN, HTML, METRICS = "report.json", "report.md", "report.html", "metrics.csv"

FOLD_COLUMNS = ("fold", "trained on", "stopped by", "answered", "best step (epochs)", "validation loss", "score")

PLAN_COLUMNS = ("hyperparameter", "value", "from", "why")
AGAIN, FILE_COLUMNS = "Run it again", ("file", "used as", "bytes", "sha256")

MISTAKES = "Wrong answers to learn from"
#: Characters of a text in them.
SHOWN = 300


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
        f"# {HEADLINES[verdict.outcome]}",
        "",
        *(f"**Mind: {markdown_text(caveat)}.**\n" for caveat in verdict.caveats),
        f"{markdown_text(outcome.base_model)}, {markdown_text(_parts(outcome))}.",
        "",
        *(f"- {markdown_text(reason)}" for reason in verdict.reasons),
        "",
        f"The cheapest rung that is as good as the best: **{markdown_text(verdict.cheapest_as_good)}**.",
        "",
        f"## {_question(outcome)}",
        "",
        *markdown_table(layout.RUNG_COLUMNS, layout.rung_rows((*outcome.rungs, outcome.tuned)), layout.RUNG_NUMBERS),
        *lights.markdown(outcome.consequences),
        *_mistakes(outcome),
        *(_folds(outcome.crossfit) if outcome.crossfit else []),
        *(["", "## General skills", "", markdown_text(skills)] if (skills := general_skills(verdict)) else []),
        *(["", "## More data?", "", markdown_text(outcome.more_data.sentence)] if outcome.more_data else []),
        "",
        "## Training",
        "",
        f"{ended(adapter)}{optimism(outcome)} {adapter.trained_parameters:,} parameters, "
        f"{adapter.trained_tokens:,} tokens, {adapter.examples_per_second:.1f} examples a second, peak memory "
        f"{adapter.peak_memory_bytes / 2**30:.2f} GiB, {adapter.seconds:.0f} s.",
        "",
        *_validations(adapter),
        "",
        "## Plan",
        "",
        *markdown_table(PLAN_COLUMNS, plan_rows(outcome), ("value",)),
        "",
        *again(outcome),
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
    rungs = (*outcome.rungs, outcome.tuned)
    body = f"""{layout.html_headline(verdict.outcome)}
{"".join(f"<p><b>Mind: {html_text(caveat)}.</b></p>" for caveat in verdict.caveats)}
<p>{html_text(outcome.base_model)}, {_parts(outcome)}.</p>
<ul>{"".join(f"<li>{html_text(reason)}</li>" for reason in verdict.reasons)}</ul>
<p>The cheapest rung that is as good as the best: <b>{html_text(verdict.cheapest_as_good)}</b>.</p>
<h2>{_question(outcome)}</h2>
{charts.intervals(rungs)}
<small>Points are means, bars 95&nbsp;% intervals, on {_judged_on(outcome)}.</small>
{layout.html_rungs(rungs)}
{lights.html(outcome.consequences)}
{_mistakes_table(outcome)}
{_folds_table(outcome.crossfit) if outcome.crossfit else ""}
{f"<h2>General skills</h2><p>{html_text(skills)}</p>" if (skills := general_skills(verdict)) else ""}
{f"<h2>More data?</h2><p>{html_text(outcome.more_data.sentence)}</p>" if outcome.more_data else ""}
<h2>Training</h2>
{charts.losses(adapter.curve, adapter.best_step, outcome.plan.total_steps)}
<p>{html_text(ended(adapter) + optimism(outcome))}
{adapter.trained_parameters:,} parameters, {adapter.trained_tokens:,} tokens,
{adapter.examples_per_second:.1f} examples a second, peak memory {adapter.peak_memory_bytes / 2**30:.2f} GiB.</p>
<h2>Plan</h2>
{html_table(PLAN_COLUMNS, plan_rows(outcome), ("value",), is_wide=True)}
<h2>{AGAIN}</h2>
<pre>{escape(outcome.reproduction.shown)}</pre>
{html_table(FILE_COLUMNS, file_rows(outcome), ("bytes",), is_wide=True)}
<p><small>{html_text(outcome.reproduction.sentence)}</small></p>
<h2>Findings in the data</h2>
{findings_page.cards(_ordered(outcome), {}) or "<p>None.</p>"}"""
    return layout.html_page(HEADLINES[verdict.outcome], body, layout.VERDICT_STYLE + lights.STYLE)


def plan_rows(outcome: Outcome) -> list[list[str]]:
    """Every hyperparameter with its value, who chose it, and why."""
    asked = asked_values(outcome.asked)

    def origin(name: str) -> str:
        return "asked" if name in asked else "default" if name in KNOBS else "derived"

    rows = [
        [name, _value(choice["value"]), origin(name), choice["reason"]]
        for name, choice in outcome.plan.as_dict().items()
    ]
    # Not the plan's: nothing of training depends on them.
    why = "set in the request" if "metric" in asked else "what fits the training answers, or the grader that was given"
    rung = "set in the request" if "tuned_encoder" in asked else "auto: it costs a training of its own"
    return [
        *rows,
        ["metric", outcome.tuned.scores.metric, origin("metric"), why],
        ["tuned_encoder", _value(bool(outcome.asked.tuned_encoder)), origin("tuned_encoder"), rung],
    ]


def again(outcome: Outcome) -> list[str]:
    """How to run the job again, as lines of a page of text."""
    return [
        f"## {AGAIN}",
        "",
        *markdown_code(outcome.reproduction.shown, "sh"),
        "",
        *markdown_table(FILE_COLUMNS, file_rows(outcome), ("bytes",)),
        "",
        markdown_text(outcome.reproduction.sentence),
    ]


def file_rows(outcome: Outcome) -> list[list[str]]:
    """The files of the job, so that somebody can tell whether theirs are the same."""
    return [[one.name, one.part, f"{one.bytes:,}", one.sha256] for one in outcome.reproduction.files]


def _mistakes(outcome: Outcome) -> list[str]:
    """Wrong answers as a table."""
    if not outcome.mistakes:
        return []
    head = ("line", "how often", "asked", "expected", "tuned", outcome.verdict.best_baseline)
    rows = [
        [str(one.line), _alike(one), *map(_short, (one.asked, one.expected, one.tuned, one.baseline))]
        for one in outcome.mistakes
    ]
    return ["", f"## {MISTAKES}", "", *markdown_table(head, rows, ("line", "how often"))]


def _mistakes_table(outcome: Outcome) -> str:
    """The same as HTML."""
    names = ("asked", "expected", "tuned", outcome.verdict.best_baseline)
    found = "".join(
        layout.html_case(
            f"line {one.line}, {_alike(one)}",
            zip(names, map(_short, (one.asked, one.expected, one.tuned, one.baseline)), strict=True),
        )
        for one in outcome.mistakes
    )
    return f"<h2>{MISTAKES}</h2>{found}" if found else ""


def _alike(one: Mistake) -> str:
    lost = ", the baseline was better" if one.baseline_score > one.score else ""
    return ("once" if one.alike == 1 else f"{one.alike} times") + lost


def _short(text: str) -> str:
    """The beginning of a long text; the files have the rest."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


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
        trained_on = " (see the caveat)" if outcome.split.caveats else ""
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
        f"token, with a probability of at least {SURE:.0%}, which is {found.p_dropped:.1%} here; or surely less than "
        "half of the short questions.)"
    )


def ended(adapter: Adapter) -> str:
    """Why training ended, and why this checkpoint was taken: two sentences."""
    return " ".join(f"{text[:1].upper()}{text[1:]}." for text in (adapter.stopped, adapter.selection.reason))


def optimism(outcome: Outcome) -> str:
    """What choosing the checkpoint made of its score: a sentence, or nothing where that is not known."""
    if outcome.optimism is None:
        return ""
    n, held = len(outcome.adapter.selection.chosen.scores), outcome.tuned.scores.mean
    return (
        f" On the {n} validation rows that chose it, it scores {outcome.optimism + held:.1%}, on the holdout "
        f"{held:.1%}: {100 * outcome.optimism:+.1f} points of optimism."
    )


def _validations(adapter: Adapter) -> list[str]:
    """The table of validation losses, if there were validations."""
    rows = [
        [
            f"{point.step}{' (kept)' if point.step == adapter.best_step else ''}",
            *(f"{loss:.4f}" for loss in (point.train_loss, point.valid_loss, point.valid_calibrated_loss)),
        ]
        for point in adapter.curve
        if point.valid_loss is not None
    ]
    head = ("step", "training loss", "validation loss", "calibrated")
    return markdown_table(head, rows, head) if rows else []


def _folds(crossfit: CrossFit) -> list[str]:
    """The table of the folds."""
    return [
        "",
        "## Folds",
        "",
        f"{crossfit.sentence[:1].upper()}{crossfit.sentence[1:]}.",
        "",
        *markdown_table(FOLD_COLUMNS, _fold_cells(crossfit), FOLD_COLUMNS),
    ]


def _folds_table(crossfit: CrossFit) -> str:
    """The same as HTML."""
    sentence = html_text(crossfit.sentence[:1].upper() + crossfit.sentence[1:])
    return f"<h2>Folds</h2><p>{sentence}.</p>{html_table(FOLD_COLUMNS, _fold_cells(crossfit), FOLD_COLUMNS)}"


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
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
