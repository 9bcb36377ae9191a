"""The only link between processes: SQLAlchemy Core over SQLite (WAL) or Postgres.

A change of status is one conditional update; losing the race is a normal answer, not an error.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import (
    Connection,
    Engine,
    RowMapping,
    Table,
    create_engine,
    delete,
    event,
    func,
    insert,
    null,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from heldout.errors import InvalidValue, NotFound
from heldout.records import COMES_BEFORE, Checkpoint, Event, File, Job, JobStatus, Model, is_rung
from heldout.store import schema

Record = TypeVar("Record", File, Job, Event, Checkpoint, Model)
Order = Literal["asc", "desc"]

#: Seconds that one process waits for another's lock on an SQLite file.
PATIENCE = 30

_TABLES: dict[type, Table] = {
    File: schema.files,
    Job: schema.jobs,
    Event: schema.events,
    Checkpoint: schema.checkpoints,
    Model: schema.models,
}


class Db:
    """Every question the product asks its database, by name."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # Files

    def add_file(self, file: File) -> None:
        """Record an accepted file. Its blob must already be stored."""
        self._add(file)

    def get_file(self, file_id: str) -> File:
        """Raises NotFound with OpenAI's wording."""
        return self._get(File, file_id, f"No such File object: {file_id}", "id")

    def list_files(
        self, *, after: str | None, limit: int, order: Order = "desc", purpose: str | None = None
    ) -> tuple[list[File], bool]:
        """One page of files and whether there are more."""
        conditions = [] if purpose is None else [schema.files.c.purpose == purpose]
        return self._page(File, conditions, after=after, limit=limit, order=order)

    def set_findings(self, file_id: str, findings: list[dict[str, Any]]) -> None:
        """What the checks said of a file when a job last looked at it."""
        with self._engine.begin() as connection:
            connection.execute(update(schema.files).where(schema.files.c.id == file_id).values(findings=findings))

    def delete_file(self, file_id: str) -> None:
        """Forget a file. Raises NotFound."""
        self.get_file(file_id)
        with self._engine.begin() as connection:
            connection.execute(delete(schema.files).where(schema.files.c.id == file_id))

    # Jobs

    def add_job(self, job: Job, *events: Event) -> None:
        """Record a job together with its first events."""
        with self._engine.begin() as connection:
            _insert(connection, job)
            for one in events:
                _insert(connection, one)

    def get_job(self, job_id: str) -> Job:
        """Raises NotFound with OpenAI's code."""
        message = f"Could not find fine tune: {job_id}"
        return self._get(Job, job_id, message, "fine_tune_id", "fine_tune_not_found")

    def list_jobs(
        self, *, after: str | None, limit: int, metadata: dict[str, str] | None = None
    ) -> tuple[list[Job], bool]:
        """One page of jobs, newest first. `metadata={}` asks for jobs without any."""
        conditions = [] if metadata is None else [schema.jobs.c.id.in_(self._jobs_with(metadata))]
        return self._page(Job, conditions, after=after, limit=limit, order="desc")

    def _jobs_with(self, metadata: dict[str, str]) -> list[str]:
        # Compared here, not in SQL: a key may hold quotes or any letter, and JSON paths may not.
        with self._engine.connect() as connection:
            rows = connection.execute(select(schema.jobs.c.id, schema.jobs.c.metadata)).all()
        wanted = metadata.items()
        return [job_id for job_id, has in rows if (wanted <= has.items() if metadata else not has)]

    def jobs_in(self, *statuses: JobStatus) -> list[Job]:
        """All jobs in these statuses, oldest first."""
        condition = schema.jobs.c.status.in_([status.value for status in statuses])
        return self._page(Job, [condition], after=None, limit=1_000_000, order="asc")[0]

    def jobs_with_handle(self, *statuses: JobStatus) -> list[Job]:
        """Jobs in these statuses whose process may still be there."""
        conditions = [
            schema.jobs.c.status.in_([status.value for status in statuses]),
            schema.jobs.c.handle.is_not(None),
        ]
        return self._page(Job, conditions, after=None, limit=1_000_000, order="asc")[0]

    def move_job(self, job_id: str, to: JobStatus, *events: Event, **values: Any) -> bool:
        """Move a job to a new status, with its events. False if it had already moved elsewhere."""
        came_from = [status.value for status in COMES_BEFORE[to]]
        with self._engine.begin() as connection:
            moved = connection.execute(
                update(schema.jobs)
                .where(schema.jobs.c.id == job_id, schema.jobs.c.status.in_(came_from))
                .values(status=to.value, **values)
            )
            if moved.rowcount == 1:
                for one in events:
                    _insert(connection, one)
        return moved.rowcount == 1

    def update_job(self, job_id: str, **values: Any) -> None:
        """Change fields other than the status."""
        with self._engine.begin() as connection:
            connection.execute(update(schema.jobs).where(schema.jobs.c.id == job_id).values(**values))

    def pause_job(self, job_id: str, paused: bool, one: Event) -> bool:
        """Ask a job to wait, or to go on. False if that had been asked before, or if the job has ended."""
        alive = [status.value for status in JobStatus if not status.ended]
        asked = (schema.jobs.c.id == job_id, schema.jobs.c.status.in_(alive), schema.jobs.c.paused != paused)
        with self._engine.begin() as connection:
            changed = connection.execute(update(schema.jobs).where(*asked).values(paused=paused, attempts=0))
            if changed.rowcount == 1:
                _insert(connection, one)
        return changed.rowcount == 1

    def release_job(self, job_id: str, one: Event, files: Sequence[File], **values: Any) -> bool:
        """Record a release with its event, the files that tell it and the fields of the row, `release` among them.
        False if the job was released before."""
        held = (schema.jobs.c.id == job_id, schema.jobs.c.release.is_(null()))
        with self._engine.begin() as connection:
            changed = connection.execute(update(schema.jobs).where(*held).values(values))
            if changed.rowcount == 1:
                _insert(connection, one)
                for file in files:
                    _insert(connection, file)
        return changed.rowcount == 1

    def put_back(self, job_id: str, one: Event) -> bool:
        """A paused job has come to rest: back to the queue. False if it is not running (any more).

        Its process may still be leaving; the handle stays until the worker has seen it gone.
        """
        running = (schema.jobs.c.id == job_id, schema.jobs.c.status == JobStatus.RUNNING.value)
        values = {"status": JobStatus.QUEUED.value, "estimated_finish": None, "attempts": 0}
        with self._engine.begin() as connection:
            moved = connection.execute(update(schema.jobs).where(*running).values(values))
            if moved.rowcount == 1:
                _insert(connection, one)
        return moved.rowcount == 1

    def claim_job(self, job: Job, handle: str) -> bool:
        """Note who runs the job. False if another worker was faster, or the job has ended or was paused."""
        alive = [status.value for status in JobStatus if not status.ended]
        same = schema.jobs.c.handle.is_(None) if job.handle is None else schema.jobs.c.handle == job.handle
        with self._engine.begin() as connection:
            claimed = connection.execute(
                update(schema.jobs)
                .where(schema.jobs.c.id == job.id, schema.jobs.c.status.in_(alive), same)
                .where(schema.jobs.c.paused == job.paused)
                .values(handle=handle, attempts=schema.jobs.c.attempts + 1)
            )
        return claimed.rowcount == 1

    def note_handle(self, job_id: str, claimed: str, handle: str | None) -> None:
        """Replace the claim by the process that was started, or a dead process by none, unless the row has
        moved on meanwhile."""
        same = (schema.jobs.c.id == job_id, schema.jobs.c.handle == claimed)
        with self._engine.begin() as connection:
            connection.execute(update(schema.jobs).where(*same).values(handle=handle))

    # Events and checkpoints

    def add_event(self, one: Event) -> None:
        """Append to a job's story."""
        self._add(one)

    def list_events(self, job_id: str, *, after: str | None, limit: int) -> tuple[list[Event], bool]:
        """One page of a job's events, newest first."""
        return self._page(Event, [schema.events.c.job_id == job_id], after=after, limit=limit, order="desc")

    def add_checkpoint(self, checkpoint: Checkpoint, model: Model, event: Event | None = None) -> bool:
        """Record a checkpoint, the model it is called by and the event that tells of it. Recording the same again
        changes nothing: a job that was taken up again passes the same steps. One that started again at a smaller
        learning rate passes them with other metrics: they replace those before. True when something was recorded."""
        table = schema.checkpoints
        here = (table.c.job_id == checkpoint.job_id) & (table.c.step == checkpoint.step)
        with self._engine.begin() as connection:
            known = connection.execute(select(table.c.metrics).where(here)).first()
            if known and known.metrics == checkpoint.metrics:
                return False
            if known:
                connection.execute(update(table).where(here).values(metrics=checkpoint.metrics))
            else:
                _insert(connection, checkpoint)
                _insert(connection, model)
            if event:
                _insert(connection, event)
        return True

    def list_checkpoints(self, job_id: str, *, after: str | None, limit: int) -> tuple[list[Checkpoint], bool]:
        """One page of a job's checkpoints, those of the latest steps first: the one that is kept is recorded last,
        when it is not the end of an epoch."""
        condition = schema.checkpoints.c.job_id == job_id
        return self._page(Checkpoint, [condition], after=after, limit=limit, order="desc", by="step")

    def mark_best(self, job_id: str, step: int) -> None:
        """Say which checkpoint the fine-tuned model is, or has as its middle."""
        table = schema.checkpoints
        with self._engine.begin() as connection:
            connection.execute(update(table).where(table.c.job_id == job_id).values(best=table.c.step == step))

    # Models

    def add_model(self, model: Model) -> None:
        """Record a fine-tuned model; recording it again changes nothing."""
        try:
            self._add(model)
        except IntegrityError:
            self.get_model(model.id)  # the same name: the same job taken up again

    def get_model(self, model_id: str) -> Model:
        """Raises NotFound in OpenAI's wording."""
        return self._get(Model, model_id, f"The model '{model_id}' does not exist", "model", "model_not_found")

    def list_models(self) -> list[Model]:
        """All fine-tuned models, newest first."""
        return self._page(Model, [], after=None, limit=1_000_000, order="desc")[0]

    def jobs_of_models(self, *names: str) -> dict[str, Job]:
        """The jobs whose verdict is about these models, or about all models, by the model's name. A model without a
        job is left out, and so is a cheaper rung: the verdict compares with it, and judges the tuned model."""
        models, jobs = schema.models, schema.jobs
        query = select(models.c.id.label("made"), *(jobs.c[one.name] for one in fields(Job))).join(
            jobs, jobs.c.id == models.c.job_id
        )
        if names:
            query = query.where(models.c.id.in_(names))
        with self._engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return {row["made"]: _record(Job, row) for row in rows if not is_rung(row["made"])}

    def delete_model(self, model_id: str) -> Model:
        """Forget a fine-tuned model. Raises NotFound."""
        model = self.get_model(model_id)
        with self._engine.begin() as connection:
            connection.execute(delete(schema.models).where(schema.models.c.id == model_id))
        return model

    # Looks at holdouts

    def look(self, look: str, examples: Collection[str]) -> int:
        """Note that a verdict looks at these examples, each a digest; the number of the look: 1, and one more for
        every earlier look at at least half of them. The same look again has the same number."""
        table = schema.looks
        mine, other = table.alias(), table.alias()
        with self._engine.begin() as connection:
            if not connection.execute(select(table.c.seq).where(table.c.look == look)).first():
                rows = [{"look": look, "example": example} for example in dict.fromkeys(examples)]
                connection.execute(insert(table), rows)
            first = select(func.min(table.c.seq)).where(table.c.look == look).scalar_subquery()
            shared = (
                select(other.c.look)
                .join(mine, mine.c.example == other.c.example)
                .where(mine.c.look == look, other.c.seq < first)
                .group_by(other.c.look)
                .having(func.count() * 2 >= len(set(examples)))
            )
            return 1 + len(connection.execute(shared).all())

    # How the questions are asked

    def _add(self, record: Record) -> None:
        with self._engine.begin() as connection:
            _insert(connection, record)

    def _get(self, kind: type[Record], record_id: str, message: str, param: str, code: str | None = None) -> Record:
        table = _TABLES[kind]
        with self._engine.connect() as connection:
            row = connection.execute(select(table).where(table.c.id == record_id)).mappings().first()
        if row is None:
            raise NotFound(message, param=param, code=code)
        return _record(kind, row)

    def _page(
        self,
        kind: type[Record],
        conditions: list[Any],
        *,
        after: str | None,
        limit: int,
        order: Order,
        by: str = "seq",
    ) -> tuple[list[Record], bool]:
        """Records in the order of a column in which no two of them are alike."""
        table = _TABLES[kind]
        place = table.c[by]
        query = select(table).where(*conditions)
        with self._engine.connect() as connection:
            if after is not None:
                last = connection.execute(select(place).where(table.c.id == after, *conditions)).scalar()
                if last is None:
                    # Page 1 here would make a client that follows the cursor loop for ever.
                    raise InvalidValue(f"after={after!r}: no such object in this list", param="after")
                query = query.where(place < last if order == "desc" else place > last)
            ordered = place.desc() if order == "desc" else place.asc()
            rows = connection.execute(query.order_by(ordered).limit(limit + 1)).mappings().all()
        return [_record(kind, row) for row in rows[:limit]], len(rows) > limit


def _insert(connection: Connection, record: File | Job | Event | Checkpoint | Model) -> None:
    values = asdict(record)
    if isinstance(record, Job):
        values["status"] = record.status.value
    connection.execute(insert(_TABLES[type(record)]).values(values))


def _record(kind: type[Record], row: RowMapping) -> Record:
    values = {one.name: row[one.name] for one in fields(kind)}
    if kind is Job:
        values["status"] = JobStatus(values["status"])
    return kind(**values)


def open_db(url: str) -> Db:
    """Connect, and bring the tables up to date (each process does; the first one wins)."""
    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _tune_sqlite)
    migrate(engine)
    return Db(engine)


def _tune_sqlite(connection: Any, _: Any) -> None:
    connection.execute(f"PRAGMA busy_timeout={1000 * PATIENCE}")
    _write_ahead(connection)
    # FULL: an accepted row survives a power cut.
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _write_ahead(connection: Any) -> None:
    """WAL: readers never wait for the writer. While another process opens or closes the file for the first or last time
    SQLite says that it is locked without waiting (sqlite.org/wal.html, "Sometimes Queries Return SQLITE_BUSY")."""
    began = time.monotonic()
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() - began > PATIENCE:
                raise
            time.sleep(0.02)
        else:
            return


#: What one process at a time gets, until it commits. The number is ours: Postgres locks have no names.
_LOCK = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "SELECT pg_advisory_xact_lock(29384913793807732)"}


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the tables up to a revision."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.connect() as connection:
        # Of several processes that start together one changes the tables, the others wait and find it done.
        connection.exec_driver_sql(_LOCK[engine.dialect.name])
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        connection.commit()
