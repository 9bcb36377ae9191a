"""Any model on any file: how well it answers, and which of two models answers better. Nothing is trained."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heldout.engine.base import Engine, ModelRef
from heldout.errors import ContextLengthExceeded, InvalidHoldoutFile
from heldout.pipeline import ladder, schema
from heldout.pipeline.consequences.base import Consequence
from heldout.pipeline.dataset import read_dataset
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.evaluate.clusters import find_clusters
from heldout.pipeline.evaluate.scores import Scores, score_model
from heldout.pipeline.evaluate.statistics import AS_GOOD, Comparison, compare, mean_interval
from heldout.pipeline.intake import refuse_errors, tell_findings
from heldout.pipeline.ladder import Rung
from heldout.pipeline.request import Request, Source
from heldout.pipeline.split import split_dataset
from heldout.pipeline.types import Example, Finding, Split
from heldout.pipeline.verdict import MINIMUM, SURE, Verdict
from heldout.pipeline.watch import Watch

#: Rows that are shown in a report.
SHOWN = 10
#: The fewest tokens an answer may have when something looks for a number in it, or judges it.
ROOM_TO_ARGUE = 256


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """A model that is judged: how reports call it, and who lets it answer."""

    name: str
    engine: Engine
    model: ModelRef
    is_prompted: bool = True  # False: its base model is an encoder, which no prompt makes answer
    notes: tuple[str, ...] = ()  # what a reader must know of it


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The rows that models are judged by."""

    file: str
    examples: tuple[Example, ...]
    clusters: tuple[int, ...]  # which rows belong together
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    split: Split | None = None  # with training rows: for the rungs that learn or show some

    @property
    def targets(self) -> list[str]:
        """The answers that choose the metric: of the training rows, where there are any."""
        return [example.target for example in (self.split.train if self.split else self.examples)]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a model answers the rows of a file."""

    model: str
    file: str
    metric: str
    scores: Scores
    rungs: tuple[Rung, ...]  # the cheaper ways to get answers, if there were training rows
    against: dict[str, Comparison]  # the model against each of them
    examples: tuple[Example, ...]
    clusters: int  # pieces of evidence among the rows
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    max_tokens: int
    seconds: float
    verdict: Verdict | None = None  # with training rows
    consequences: tuple[Consequence, ...] = ()  # of a model that was trained and can be asked here

    @property
    def rung(self) -> Rung:
        """The model as one more rung."""
        return Rung(name="model", kind="tuned", description=self.model, scores=self.scores)

    @property
    def sentence(self) -> str:
        """The result."""
        low, high = self.scores.interval
        macro = "" if self.scores.macro_f1 is None else f", macro-F1 {self.scores.macro_f1:.1%}"
        return (
            f"{self.model} scores {self.scores.mean:.1%} ({self.metric}{macro}) on {_rows(len(self.examples))}, "
            f"95 % interval {low:.1%} to {high:.1%}"
        )

    @property
    def beside(self) -> str:
        """How it stands to the best rung; empty without any."""
        if not self.rungs:
            return ""
        best = max(self.rungs, key=lambda rung: rung.scores.mean)
        return conclude(self.model, best.name, self.against[best.name], self.clusters)

    @property
    def shown(self) -> tuple[int, ...]:
        """Positions of some rows that were answered worst."""
        order = sorted(range(len(self.examples)), key=lambda i: self.scores.per_example[i])
        return tuple(i for i in order[:SHOWN] if self.scores.per_example[i] < 1)

    def as_dict(self) -> dict[str, Any]:
        """The machine-readable report (docs/evaluate.md)."""
        return {
            "$schema": schema.EVALUATION,
            "version": 1,
            "model": self.model,
            "file": self.file,
            **self.scores.as_dict(),
            "clusters": self.clusters,
            "sentence": self.sentence,
            "beside": self.beside,
            "verdict": self.verdict.as_dict() if self.verdict else None,
            "consequences": [one.as_dict() for one in self.consequences],
            "notes": list(self.notes),
            "rungs": [rung.as_dict() for rung in self.rungs],
            "against": {name: one.as_dict() for name, one in self.against.items()},
            "max_tokens": self.max_tokens,
            "findings": [finding.as_dict() for finding in self.findings],
            "rows": [
                {"line": example.line, "score": score, "target": example.target, "answer": answer}
                for example, score, answer in zip(
                    self.examples, self.scores.per_example, self.scores.answers, strict=True
                )
            ],
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Two models on the same rows; differences are A minus B."""

    a: str
    b: str
    file: str
    metric: str
    scores_a: Scores
    scores_b: Scores
    comparison: Comparison
    examples: tuple[Example, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    max_tokens: int
    seconds: float

    @property
    def wins(self) -> int:
        """Rows that A answers better."""
        return sum(x > y for x, y in self._pairs)

    @property
    def losses(self) -> int:
        """Rows that B answers better."""
        return sum(x < y for x, y in self._pairs)

    @property
    def rungs(self) -> tuple[Rung, Rung]:
        """Both as rungs, for pictures."""
        return (
            Rung(name="A", kind="tuned", description=self.a, scores=self.scores_a),
            Rung(name="B", kind="tuned", description=self.b, scores=self.scores_b),
        )

    @property
    def conclusion(self) -> str:
        """One sentence."""
        a, b = (self.a, self.b) if self.a != self.b else ("A", "B")
        return conclude(a, b, self.comparison, self.comparison.clusters)

    @property
    def shown(self) -> tuple[int, ...]:
        """Positions of some rows on which the two differ, the largest differences first."""
        differences = [abs(x - y) for x, y in self._pairs]
        order = sorted(range(len(differences)), key=lambda i: -differences[i])
        return tuple(i for i in order[:SHOWN] if differences[i])

    @property
    def _pairs(self) -> list[tuple[float, float]]:
        return list(zip(self.scores_a.per_example, self.scores_b.per_example, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """The machine-readable report (docs/evaluate.md)."""
        return {
            "$schema": schema.COMPARISON,
            "version": 1,
            "file": self.file,
            "a": {"model": self.a, **self.scores_a.as_dict()},
            "b": {"model": self.b, **self.scores_b.as_dict()},
            "comparison": self.comparison.as_dict(),
            "a_better": self.wins,
            "b_better": self.losses,
            "conclusion": self.conclusion,
            "notes": list(self.notes),
            "max_tokens": self.max_tokens,
            "findings": [finding.as_dict() for finding in self.findings],
            "rows": [
                {
                    "line": example.line,
                    "target": example.target,
                    "a": {"score": x, "answer": self.scores_a.answers[i]},
                    "b": {"score": y, "answer": self.scores_b.answers[i]},
                }
                for i, (example, (x, y)) in enumerate(zip(self.examples, self._pairs, strict=True))
            ],
            "seconds": round(self.seconds, 3),
        }


def read_rows(file: Source, train: Source | None, watch: Watch, *, seed: int, keep_leaks: bool) -> Judged:
    """The rows of a file, and of the training file beside it. Rows that leak are left out and told of.

    Raises InvalidHoldoutFile or InvalidTrainingFile with every faulty line: nothing is judged by the rest of a file.
    """
    request = Request(base_model="", training=train or file, holdout=file, directory=Path())
    with file.open() as content:
        dataset, findings = read_dataset(content, name=file.name)
    notes = []
    split = None
    if train is None:
        refuse_errors(request, findings)
        examples = tuple(dataset.examples)
        notes.append(
            "whether the model was trained on these rows is not known; with the training file (--train) such rows are "
            "left out"
        )
    else:
        with train.open() as content:
            taught, in_train = read_dataset(content, name=train.name)
        findings = (*in_train, *findings)
        refuse_errors(request, findings)
        if len(dataset):
            split, left_out = split_dataset(taught, None, dataset, seed=seed, keep_leaks=keep_leaks)
            findings = (*findings, *left_out)
            notes += split.caveats
        examples = split.holdout if split else ()
    if not examples:
        raise InvalidHoldoutFile(f"{file.name}: there are no rows to judge by.")
    tell_findings(findings, watch)
    clusters = find_clusters(examples)
    pieces = len(set(clusters))
    if pieces < len(examples):
        notes.append(
            f"{len(examples)} rows are {pieces} pieces of evidence: some are, or nearly are, the same prompt or belong "
            "together; the intervals know it"
        )
    if pieces < MINIMUM:
        notes.append(
            f"{pieces} {'row is' if pieces == 1 else 'rows are'} too few for a verdict; {MINIMUM} are the minimum"
        )
    return Judged(
        file=file.name, examples=examples, clusters=clusters, findings=findings, notes=tuple(notes), split=split
    )


def evaluate_model(
    answerer: Answerer,
    rows: Judged,
    metric: Metric,
    watch: Watch,
    *,
    max_tokens: int | None = None,
    cheap: Engine | None = None,
    encoder: str | None = None,
) -> Evaluation:
    """Let a model answer, and with training rows the cheaper rungs too.

    Args:
        max_tokens: of an answer. Default: a quarter more than the longest right one, and a little.
        cheap, encoder: the engine of the frozen rung and its encoder; None leaves that rung out.
    """
    started = time.monotonic()
    room = max_tokens or answer_room(answerer, rows, metric)
    scores = _ask(answerer, rows, metric, room, answerer.name, watch)
    rungs: tuple[Rung, ...] = ()
    if rows.split:
        engine = cheap or answerer.engine
        encoder = encoder if cheap else None
        rungs = ladder.climb(rows.split, metric, engine, None, encoder=encoder, max_tokens=room, watch=watch)
        rungs = (*rungs, *_prompted(answerer, rows.split, metric, room, watch))
        rungs = ladder.with_clusters(rungs, rows.clusters)
    return Evaluation(
        model=answerer.name,
        file=rows.file,
        metric=metric.name,
        scores=scores,
        rungs=rungs,
        against={
            rung.name: compare(
                scores.per_example, rung.scores.per_example, binary=scores.binary, clusters=rows.clusters
            )
            for rung in rungs
        },
        examples=rows.examples,
        clusters=len(set(rows.clusters)),
        findings=rows.findings,
        notes=(*rows.notes, *answerer.notes, *_cut(answerer.name, scores, room)),
        max_tokens=room,
        seconds=time.monotonic() - started,
    )


def compare_models(
    a: Answerer, b: Answerer, rows: Judged, metric: Metric, watch: Watch, *, max_tokens: int | None = None
) -> Pairing:
    """Let two models answer the same rows."""
    started = time.monotonic()
    # One limit for both: a model must not lose because it was cut earlier.
    room = max_tokens or max(answer_room(one, rows, metric) for one in (a, b))
    scores_a, scores_b = (
        _ask(one, rows, metric, room, f"{side}: {one.name}", watch) for side, one in (("A", a), ("B", b))
    )
    return Pairing(
        a=a.name,
        b=b.name,
        file=rows.file,
        metric=metric.name,
        scores_a=scores_a,
        scores_b=scores_b,
        comparison=compare(scores_a.per_example, scores_b.per_example, binary=scores_a.binary, clusters=rows.clusters),
        examples=rows.examples,
        findings=rows.findings,
        notes=tuple(
            dict.fromkeys(
                (*rows.notes, *a.notes, *b.notes, *_cut(a.name, scores_a, room), *_cut(b.name, scores_b, room))
            )
        ),
        max_tokens=room,
        seconds=time.monotonic() - started,
    )


def conclude(a: str, b: str, comparison: Comparison, pieces: int) -> str:
    """What a comparison of A with B says, in one sentence; of fewer than MINIMUM pieces of evidence, nothing."""
    low, high = comparison.interval
    facts = (
        f"{100 * comparison.difference:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f}, probability "
        f"that it is better {_probability(comparison.p_better)})"
    )
    if pieces < MINIMUM:
        return f"{pieces} rows are too few to tell {a} and {b} apart ({MINIMUM} are the minimum): {facts}"
    if not comparison.discordant:
        return (
            f"{a} and {b} score the same on every one of {_rows(comparison.n)}; the smallest difference that they "
            f"would have shown is {comparison.smallest_detectable:.1%}"
        )
    if comparison.p_better >= SURE and comparison.difference > 0:
        return f"{a} is better than {b}: {facts}"
    if comparison.p_better <= 1 - SURE and comparison.difference < 0:
        return f"{a} is worse than {b}: {facts}"
    if low >= -AS_GOOD and high <= AS_GOOD:
        return f"{a} and {b} are as good as each other within {100 * AS_GOOD:.0f} points: {facts}"
    return (
        f"These {_rows(comparison.n)} do not tell {a} and {b} apart: {facts}; the smallest difference that they would "
        f"have shown is {comparison.smallest_detectable:.1%}"
    )


def answer_room(answerer: Answerer, rows: Judged, metric: Metric) -> int:
    """The most tokens an answer may have: a quarter more than the longest right one, and a little."""
    counts = answerer.engine.count_tokens(answerer.model.base_model, sorted({one.target for one in rows.examples}))
    room = math.ceil(1.25 * max(counts)) + 4
    return max(room, ROOM_TO_ARGUE) if metric.grade or metric.form == "number" else room


def _ask(answerer: Answerer, rows: Judged, metric: Metric, room: int, stage: str, watch: Watch) -> Scores:
    watch.message(f"{stage} answers {_rows(len(rows.examples))}")
    try:
        scores = score_model(
            answerer.engine,
            answerer.model,
            rows.examples,
            metric,
            max_tokens=room,
            learned=rows.split.train if rows.split and answerer.model.adapter else (),
            progress=lambda done, total: watch.progress(stage, done, total),
        )
    except ContextLengthExceeded as error:
        longest = max(rows.examples, key=lambda example: sum(len(str(one["content"])) for one in example.prompt))
        raise ContextLengthExceeded(
            f"{answerer.name}: {error} The longest prompt of {rows.file} is that of line {longest.line}; take out what "
            "this model cannot read, or ask one that reads more."
        ) from error
    interval = mean_interval(scores.per_example, binary=scores.binary, clusters=rows.clusters)
    return replace(scores, interval=interval)


def _prompted(answerer: Answerer, split: Split, metric: Metric, room: int, watch: Watch) -> list[Rung]:
    """The prompts to beat: of the base model, or, where the model is no tuned one, of the model itself."""
    if not answerer.is_prompted:
        return []
    engine, base = answerer.engine, answerer.model.base_model
    if answerer.model.adapter:
        return ladder.prompt_rungs(split, metric, engine, base, max_tokens=room, watch=watch)
    # Its answers to the prompt as it is are there already.
    rungs = ladder.few_shot_rungs(split, metric, engine, base, max_tokens=room, watch=watch)
    return [replace(rung, description=rung.description.replace("the base model", "the same model")) for rung in rungs]


def _cut(name: str, scores: Scores, room: int) -> list[str]:
    if not scores.cut:
        return []
    return [f"{scores.cut} of {len(scores.answers)} answers of {name} were cut at {room} tokens (--max-tokens)"]


def _rows(n: int) -> str:
    return f"{n} row{'' if n == 1 else 's'}"


def _probability(p: float) -> str:
    return "above 99.9 %" if p > 0.999 else "below 0.1 %" if p < 0.001 else f"{p:.1%}"
