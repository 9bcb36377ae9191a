"""Where what a job made goes: the adapter and the result files to the blobs, the model to the database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from heldout.engine.rungs import CONFIG, TENSORS
from heldout.pipeline import model_card, report
from heldout.records import File, Job, Model, now, rung_name
from heldout.settings import Settings
from heldout.store.blobs import Blobs, put_files
from heldout.store.db import Db

if TYPE_CHECKING:
    from heldout.pipeline.outcome import Outcome

#: Client name of each result file. The CSV comes first: scripts take `result_files[0]`.
RESULTS = {
    report.METRICS: "step_metrics.csv",
    report.JSON: "report.json",
    report.MARKDOWN: "report.md",
    report.HTML: "report.html",
}


def register(outcome: Outcome, job: Job, name: str, settings: Settings, db: Db, blobs: Blobs) -> dict[str, Any]:
    """Make the tuned model callable as `name`, and cheaper rungs as `rung_name` says; the fields of the job's row
    that say so."""
    prefix = f"adapters/{job.id}/final"
    model_card.write(outcome, name)
    put_adapter(blobs, prefix, outcome.adapter.directory, with_card=True)
    directory = outcome.adapter.directory.parent
    files = [
        add_file(db, blobs, directory / stored, filename=filename, purpose="fine-tune-results")
        for stored, filename in RESULTS.items()
    ]
    db.add_model(Model(id=name, job_id=job.id, base_model=job.base_model, blobs=prefix, owned_by=settings.organization))
    for served in outcome.served_rungs:
        prefix = f"adapters/{job.id}/rung-{served.rung}"
        model_card.write_rung(outcome, served, rung_name(name, served.rung))
        put_adapter(blobs, prefix, served.directory, with_card=True)
        db.add_model(
            Model(
                id=rung_name(name, served.rung),
                job_id=job.id,
                base_model=served.base_model,
                blobs=prefix,
                owned_by=settings.organization,
            )
        )
    return {
        "fine_tuned_model": name,
        "finished_at": now(),
        "trained_tokens": outcome.adapter.trained_tokens,
        "result_files": files,
        "verdict": outcome.verdict.as_dict(),
    }


def add_file(db: Db, blobs: Blobs, path: Path, *, filename: str, purpose: str) -> str:
    """Store a local file as if it had been uploaded; its id."""
    file = File(filename=filename, purpose=purpose, bytes=path.stat().st_size)
    with path.open("rb") as content:
        blobs.put(file.blob, content)
    db.add_file(file)
    return file.id


def put_adapter(blobs: Blobs, prefix: str, folder: Path, *, with_card: bool = False) -> None:
    """Store an adapter's files, and nothing else of a checkpoint's folder. A prompt that is served has no tensors.

    `with_card`: its model card too. A checkpoint has none of ours: nothing was measured of it.
    """
    tensors = (TENSORS,) if (folder / TENSORS).exists() else ()
    put_files(blobs, prefix, folder, (*tensors, CONFIG, *((model_card.FILE,) if with_card else ())))
