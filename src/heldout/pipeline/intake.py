"""The files of a job: read, checked, told of, and refused when training on them would be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from heldout.engine import catalogue
from heldout.engine.base import Engine
from heldout.errors import (
    ContextLengthExceeded,
    InvalidHoldoutFile,
    InvalidTrainingFile,
    InvalidValidationFile,
    UserError,
)
from heldout.pipeline.checks import ModelTools, Parts, check
from heldout.pipeline.dataset import UNTRAINABLE, read_dataset
from heldout.pipeline.findings import grouped, most_harmful_first, name_more, on_the_wire
from heldout.pipeline.plan import MAX_LENGTH
from heldout.pipeline.request import Request, Source
from heldout.pipeline.training import ModelFacts, Trainer
from heldout.pipeline.types import Dataset, Finding
from heldout.pipeline.watch import Silent, Watch

#: Bytes from which on reading a file is worth a bar.
TOLD_FROM = 16 << 20


def check_files(
    request: Request, model: ModelTools = ModelTools(), watch: Watch = Silent()
) -> tuple[Parts, tuple[Finding, ...]]:
    """Read every file and look at all of them together; every problem is in the findings, the most harmful
    first. `model` is what the checks may ask of models."""
    parts, seen = read_files(request, model, watch)
    found = check(parts, lambda done, total: watch.progress("checks", done, total))
    return parts, most_harmful_first((*seen, *found), {one.name: len(one) for one in parts.given()})


def read_files(
    request: Request, model: ModelTools = ModelTools(), watch: Watch = Silent()
) -> tuple[Parts, tuple[Finding, ...]]:
    """The sound rows of every file, and what is wrong with the others."""
    train, findings = _read(request.training, watch)
    valid, valid_findings = _read(request.validation, watch) if request.validation else (None, ())
    holdout, holdout_findings = _read(request.holdout, watch) if request.holdout else (None, ())
    parts = Parts(train=train, valid=valid, holdout=holdout, model=model)
    return parts, (*findings, *valid_findings, *holdout_findings)


def model_tools(
    base_model: str, facts: ModelFacts, trainer: Trainer, engine: Engine, *, max_length: int | None = None
) -> ModelTools:
    """What checks may ask of a base model: its tokens, by its own tokenizer and template, and vectors by the encoder
    of the frozen rung where there is one. Each is loaded at its first question."""
    usual = facts.context if facts.kind == catalogue.ENCODER else min(facts.context, MAX_LENGTH)
    encoder = frozen_encoder(base_model, facts)
    return ModelTools(
        kind=facts.kind,
        limit=min(facts.context, max_length or usual),
        count_tokens=lambda examples: trainer.count_tokens(examples, base_model=base_model),
        embed=(lambda texts: _vectors(engine, encoder, texts)) if encoder else None,
    )


def frozen_encoder(base_model: str, facts: ModelFacts) -> str | None:
    """The encoder of the frozen rung: the base model, if it is one."""
    return base_model if facts.kind == catalogue.ENCODER else catalogue.bundled_encoder()


def refuse_errors(request: Request, findings: Sequence[Finding]) -> None:
    """Raise the error of the first file concerned, with every problem of every file in its message.

    A sound file in a format that no method trains on is a warning to who only looks, and an error to a job.
    """
    errors = [finding for finding in findings if finding.severity == "error" or finding.code == UNTRAINABLE]
    if not errors:
        return
    first = errors[0]
    kind: type[UserError] = InvalidTrainingFile
    if request.validation and first.file == request.validation.name:
        kind = InvalidValidationFile
    if request.holdout and first.file == request.holdout.name:
        kind = InvalidHoldoutFile
    # OpenAI's sentence and code stay as they are: scripts look for them.
    code = first.code if first.code == "invalid_n_examples" else None
    raise kind("\n".join(_sentence(finding) for finding in errors), code=code)


def tell_findings(findings: Sequence[Finding], watch: Watch) -> None:
    """What the checks or the split saw: a sentence for each, and one for what there is of a kind beyond a few."""
    levels = {"error": "error", "warning": "warn", "note": "info"}
    for group in grouped(findings):
        level = levels[group.severity]
        for finding in group.shown:
            watch.message(f"{finding.file}: {finding.message}", level=level, data=on_the_wire(finding))
        if group.more:
            data = {"code": group.code, "findings": [on_the_wire(finding) for finding in group.more]}
            watch.message(f"{group.code}: {name_more(group)}", level=level, data=data)


def _read(source: Source, watch: Watch) -> tuple[Dataset, tuple[Finding, ...]]:
    def tell(done: int, total: int) -> None:
        if total >= TOLD_FROM:
            watch.progress(f"reading {PurePath(source.name).name}, MB", done >> 20, total >> 20)

    with source.open() as content:
        return read_dataset(content, name=source.name, progress=tell)


def _vectors(engine: Engine, encoder: str, texts: Sequence[str]) -> list[list[float]]:
    """Of as much of a text as the encoder reads: its beginning says what it is about."""
    longest = max(map(len, texts), default=0)
    while True:
        try:
            return engine.embed(encoder, [text[:longest] for text in texts])
        except ContextLengthExceeded:
            longest //= 2


def _sentence(finding: Finding) -> str:
    alone = finding.code == "invalid_n_examples"
    return finding.message if alone else f"{finding.file}: {finding.message}"
