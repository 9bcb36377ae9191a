"""The same pipeline without a server: `heldout tune` and `heldout.tune`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from heldout.errors import InvalidValue
from heldout.pipeline import report
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.ladder import Rung
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.run import Request, Source, Tools, run_job
from heldout.pipeline.verdict import Verdict
from heldout.pipeline.watch import Silent, Watch
from heldout.settings import DEFAULT_MODEL, Settings


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `heldout.tune` returns."""

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
        hyperparameters: `n_epochs`, `learning_rate`, `lora_r`, … as on the wire.

    Raises UserError (bad data, unknown model, value out of range); its message says what to do.
    """
    settings = settings or Settings()
    asked = Hyperparameters.parse(hyperparameters)
    training = source(train)
    valid, held = (source(path) if path else None for path in (validation, holdout))
    # torch and transformers come in here: bad arguments are told before.
    from heldout.engine.local import LocalEngine
    from heldout.train.trainer import TorchTrainer

    directory = _directory(out, suffix)
    options: dict[str, Any] = {
        "cache": settings.cache,
        "aliases": settings.model_aliases,
        "precision": settings.precision,
        "allow_paths": True,
    }
    engine = LocalEngine(**options)
    request = Request(
        base_model=model,
        training=training,
        validation=valid,
        holdout=held,
        seed=random.randrange(2**31) if seed is None else seed,
        hyperparameters=asked,
        directory=directory,
    )
    tools = Tools(engine=engine, trainer=TorchTrainer(**options), watch=watch or Silent())
    outcome = run_job(request, tools)
    engine.close()
    return Result(
        verdict=outcome.verdict,
        rungs=outcome.rungs,
        tuned=outcome.tuned,
        adapter=outcome.adapter.directory,
        report=directory / report.HTML,
        outcome=outcome,
    )


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
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidValue(f"cannot write to {directory}: {error.strerror}") from error
    return directory
