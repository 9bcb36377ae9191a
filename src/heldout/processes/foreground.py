"""The same pipeline without a server: `heldout tune` and `heldout.tune`."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from heldout.engine import catalogue
from heldout.errors import InvalidValue
from heldout.pipeline import report
from heldout.pipeline.checks.groups import fingerprint
from heldout.pipeline.evaluate.graders.read import checked_grader, grader_json
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.ladder import Rung
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.reproduce import UsedFile
from heldout.pipeline.request import Request, Source
from heldout.pipeline.run import run_job
from heldout.pipeline.verdict import Verdict
from heldout.pipeline.watch import Silent, Watch
from heldout.processes.register import add_file, register
from heldout.records import Event, Job, JobStatus, fine_tuned_name, now
from heldout.settings import DEFAULT_MODEL, Settings, read_settings
from heldout.store.blobs import open_blobs
from heldout.store.db import open_db


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `heldout.tune` returns."""

    model: str  # the name under which `heldout serve` and `heldout chat` answer with the tuned model
    verdict: Verdict
    rungs: tuple[Rung, ...]  # the cheaper ways to get answers, with their scores
    tuned: Rung  # the tuned model with its scores
    adapter: Path  # a folder in the standard PEFT layout
    report: Path  # report.html; report.md, report.json and metrics.csv lie beside it
    outcome: Outcome  # everything else


def tune(
    train: str | Path,
    validation: str | Path | None = None,
    holdout: str | Path | None = None,
    *,
    model: str = DEFAULT_MODEL,
    suffix: str | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    keep_leaks: bool = False,
    grader: str | Path | dict[str, Any] | None = None,
    watch: Watch | None = None,
    settings: Settings | None = None,
    **hyperparameters: Any,
) -> Result:
    """Run one fine-tuning job in this process, from the files to the verdict.

    Args:
        train, validation, holdout: JSONL files in OpenAI's chat format. Without `validation` or `holdout`
            that part is split off `train`.
        model: the bundled model's name, an alias, a directory, or a Hugging Face id.
        seed: decides the split, the order and the start; drawn when left out, and written in the report.
        out: where the adapter and the report go. Running again with the same folder continues a job
            that was interrupted; a finished one is refused. Default: a new folder `heldout-<suffix or
            time>` here.
        keep_leaks: score rows of `validation` and `holdout` although the training file has them, or nearly, and ask
            held-out questions with the codes that tell their answers; the verdict says so first. Default: such rows
            and codes are left out, and listed.
        grader: one of OpenAI's graders that asks no model, as JSON in a file or as a dict: scores answers instead of
            a metric (docs/metrics.md).
        hyperparameters: `n_epochs`, `learning_rate`, `lora_r`, … as on the wire.

    Raises UserError (bad data, unknown model, value out of range); its message says what to do.
    """
    settings = settings or read_settings()
    asked = Hyperparameters.parse(hyperparameters)
    graded_by = checked_grader(None if grader is None else grader_json(grader), metric=asked.metric)
    training = source(train)
    valid, held = (source(path) if path else None for path in (validation, holdout))
    base_model = catalogue.resolve(model, settings.model_aliases, allow_paths=True).name
    # torch and transformers come in here: bad arguments are told before.
    from heldout.processes.tools import local_tools

    directory = _directory(out, suffix)
    seed = _same_request(
        directory,
        {
            "model": model,
            "files": [one and UsedFile.read("", one).sha256 for one in (training, valid, held)],
            "hyperparameters": asked.as_dict(),
            **({"grader": graded_by} if graded_by else {}),
            **({"keep_leaks": True} if keep_leaks else {}),  # absent in the notes of earlier versions
        },
        seed,
    )
    recorder = Recorder(watch or Silent())
    db = open_db(settings.database)
    # The folder stands for the job, whose id is drawn at its end.
    look = hashlib.sha256(f"{directory.resolve()}/{seed}".encode()).hexdigest()
    tools = replace(
        local_tools(settings, model, recorder),
        look=lambda examples: db.look(look, [fingerprint(one.messages) for one in examples]),
    )
    request = Request(
        base_model=base_model,
        training=training,
        validation=valid,
        holdout=held,
        seed=seed,
        hyperparameters=asked,
        directory=directory,
        suffix=suffix,
        environment=settings.of_jobs,
        keep_leaks=keep_leaks,
        eval_budget=settings.eval_budget,
        grader=graded_by,
    )
    outcome = run_job(request, tools)
    tools.engine.close()
    return Result(
        model=_remember(outcome, request, recorder, settings, model=model),
        verdict=outcome.verdict,
        rungs=outcome.rungs,
        tuned=outcome.tuned,
        adapter=outcome.adapter.directory,
        report=directory / report.HTML,
        outcome=outcome,
    )


def _same_request(directory: Path, request: dict[str, Any], seed: int | None) -> int:
    """The job's seed, drawn once; note the request, or check that the interrupted one was the same.

    Going on with other data or another seed would split anew and judge on rows that were trained on.
    """
    note = directory / "request.json"
    if note.exists():
        before = json.loads(note.read_text())
        if before["request"] != request or seed not in (None, before["seed"]):
            raise InvalidValue(
                f"{directory} holds an unfinished job with other files, model, hyperparameters, options or seed; "
                "choose another --out, or delete the folder"
            )
        return int(before["seed"])
    seed = random.randrange(2**31) if seed is None else seed
    note.write_text(json.dumps({"seed": seed, "request": request}))
    return seed


class Recorder:
    """Passes everything on to another watch and keeps the sentences for the job's row."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.sentences: list[tuple[int, str, str]] = []  # time, level, text

    def message(self, text: str, *, level: str = "info", data: dict[str, Any] | None = None) -> None:
        """See Watch.message."""
        self.sentences.append((now(), level, text))
        self._watch.message(text, level=level, data=data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watch, name)


def _remember(outcome: Outcome, request: Request, recorder: Recorder, settings: Settings, *, model: str) -> str:
    """Enter the finished job in the data directory, where the server's jobs are; the model's name."""
    db, blobs = open_db(settings.database), open_blobs(settings.blobs)
    files = {
        part: add_file(db, blobs, Path(one.name), filename=Path(one.name).name, purpose="fine-tune")
        for part, one in (
            ("training_file", request.training),
            ("validation_file", request.validation),
            ("holdout_file", request.holdout),
        )
        if one is not None
    }
    job = Job(
        model=model,
        base_model=request.base_model,
        suffix=request.suffix,
        seed=request.seed,
        hyperparameters=request.hyperparameters.as_dict(),
        plan=outcome.plan.as_dict(),
        training_file=files["training_file"],
        validation_file=files.get("validation_file"),
        holdout_file=files.get("holdout_file"),
        keep_leaks=request.keep_leaks,
        started_at=now() - round(outcome.seconds),
    )
    name = fine_tuned_name(model, settings.organization, request.suffix, job.id)
    results = register(outcome, job, name, settings, db, blobs)
    # Added as a whole when everything is there: a worker never sees it unfinished.
    db.add_job(
        replace(job, status=JobStatus.SUCCEEDED, **results),
        *(Event(job_id=job.id, created_at=time, level=level, message=text) for time, level, text in recorder.sentences),
    )
    return name


def source(path: str | Path) -> Source:
    """A file on disk as a source of the pipeline. Raises InvalidValue when there is none."""
    file = Path(path)
    if not file.is_file():
        raise InvalidValue(f"There is no file {file}")
    return Source(name=str(path), open=lambda: file.open("rb"))


def _directory(out: str | Path | None, suffix: str | None) -> Path:
    directory = Path(out or f"heldout-{suffix or datetime.now().strftime('%Y%m%d-%H%M%S')}")
    if (directory / report.JSON).exists():
        raise InvalidValue(f"{directory} already holds a finished job; choose another --out or delete it")
    return make_folder(directory)


def make_folder(directory: Path) -> Path:
    """The folder, made if it is not there. Raises InvalidValue when it cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidValue(f"cannot write to {directory}: {error.strerror}") from error
    return directory
