"""What the command line asks of the data directory: a model to talk to, the jobs and their stories."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from heldout import gate
from heldout.engine import catalogue
from heldout.engine.base import Engine, ModelRef
from heldout.errors import ModelNotFound
from heldout.pipeline import report
from heldout.records import Event, Job
from heldout.settings import Settings, read_settings
from heldout.store.blobs import fetch_folder, open_blobs
from heldout.store.db import open_db

#: What PEFT writes beside an adapter's weights.
ADAPTER_CONFIG = "adapter_config.json"


def open_model(name: str) -> tuple[Engine, ModelRef]:
    """An engine and what to ask it for. `name`: base model, `ft:` model, or the folder that `tune` wrote."""
    settings = read_settings()
    ref = find_model(name, settings)
    from heldout.processes.tools import local_engine

    return local_engine(settings), ref


def find_model(name: str, settings: Settings, *, base: str | None = None) -> ModelRef:
    """What a name means on the command line. `base`: the base model of an adapter that was trained elsewhere, where
    the name in its configuration is not known here. Raises ModelNotFound, or NotFound for an unknown `ft:` model."""
    if name.startswith("ft:"):
        model = open_db(settings.database).get_model(name)
        folder = fetch_folder(open_blobs(settings.blobs), model.blobs, settings.adapters / model.blobs)
        return ModelRef(base_model=model.base_model, adapter=str(folder))
    folder = Path(name)
    for out in (folder, folder.parent):  # `tune --out DIR`: DIR or DIR/adapter
        if (out / report.JSON).is_file() and (out / "adapter").is_dir():
            known = base or json.loads((out / report.JSON).read_text()).get("base_model")
            if known:  # not so in an evaluation's report
                return ModelRef(base_model=known, adapter=str((out / "adapter").absolute()))
    if (folder / ADAPTER_CONFIG).is_file():
        base = base or _base_of(folder)
        _refuse_other_adapters(folder)
        catalogue.resolve(base, settings.model_aliases, allow_paths=True)
        return ModelRef(base_model=base, adapter=str(folder.absolute()))
    catalogue.resolve(name, settings.model_aliases, allow_paths=True)
    return ModelRef(base_model=name)


def caution(name: str) -> str | None:
    """What whoever talks to this model should know. Nobody is refused here, whatever the setting: before a model is
    released somebody has to look at it."""
    settings = read_settings()
    if settings.gate == "off" or not name.startswith("ft:"):
        return None
    outcome = gate.admit("warn", open_db(settings.database), name)
    return outcome and f"the verdict on this model is {outcome}"


def _base_of(adapter: Path) -> str:
    """The base model that an adapter from elsewhere names."""
    base = _adapter_config(adapter).get("base_model_name_or_path")
    if isinstance(base, str) and base:
        return base
    raise ModelNotFound(
        f"{adapter} is an adapter, but neither its {ADAPTER_CONFIG} nor a {report.JSON} beside it says which base "
        "model it belongs to"
    )


def _refuse_other_adapters(adapter: Path) -> None:
    kind = _adapter_config(adapter).get("peft_type")
    if kind != "LORA":
        # Our decoding goes round PEFT's own forward pass: a prefix or a soft prompt would be left out without a word.
        raise ModelNotFound(f"The adapter in {adapter} is of the kind {kind!r}; LORA is the one that is supported.")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ModelNotFound(
            f"There is no adapter_model.safetensors in {adapter}. Weights in pickles (adapter_model.bin) are not "
            "loaded: opening one runs whatever is in it. Save the adapter anew with safe_serialization=True."
        )


def _adapter_config(adapter: Path) -> dict[str, Any]:
    try:
        config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"The {ADAPTER_CONFIG} in {adapter} cannot be read: {error}") from error
    return config if isinstance(config, dict) else {}


def list_jobs(settings: Settings) -> list[dict[str, Any]]:
    """All jobs, newest first."""
    jobs, _ = open_db(settings.database).list_jobs(after=None, limit=1_000)
    return [_row(job) for job in jobs]


def job_story(settings: Settings, job_id: str) -> dict[str, Any]:
    """One job with all its events, oldest first. Raises NotFound."""
    db = open_db(settings.database)
    job = db.get_job(job_id)
    events, _ = db.list_events(job_id, after=None, limit=1_000_000)
    return _row(job) | {"events": [_event(event) for event in reversed(events)]}


def release_job(settings: Settings, job_id: str, reason: str) -> dict[str, Any]:
    """Let the models of a job answer although its verdict is not `ship`; the job. See gate.release."""
    job = gate.release(open_db(settings.database), open_blobs(settings.blobs), job_id, reason)
    return _row(job)


def _row(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "created": _time(job.created_at),
        "status": job.status.value,
        "pause": job.pause,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "verdict": job.verdict["outcome"] if job.verdict else None,
        "release": job.release,
        "error": job.error,
    }


def _event(event: Event) -> dict[str, Any]:
    return {
        "time": _time(event.created_at),
        "level": event.level,
        "message": event.message,
        "data": event.data,
    }


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
