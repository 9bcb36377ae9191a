"""The tables. Times are Unix seconds; JSON columns hold what only the product's own code reads."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    false,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)


def _table(name: str, *columns: Column[object] | Index) -> Table:
    # `seq` is the insertion counter: several rows of one second still have an order.
    return Table(
        name,
        metadata,
        Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
        *columns,
    )


files = _table(
    "files",
    Column("id", String(64), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("findings", JSON, nullable=False),
)

jobs = _table(
    "jobs",
    Column("id", String(64), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("status", String(32), nullable=False, index=True),
    Column("model", Text, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("training_file", String(64), nullable=False),
    Column("validation_file", String(64)),
    Column("holdout_file", String(64)),
    Column("keep_leaks", Boolean, nullable=False, server_default=false()),
    Column("suffix", String(64)),
    Column("seed", BigInteger, nullable=False),
    Column("method", String(32), nullable=False),
    Column("hyperparameters", JSON, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("integrations", JSON, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Column("estimated_finish", BigInteger),
    Column("plan", JSON(none_as_null=True)),
    Column("trained_tokens", BigInteger),
    Column("fine_tuned_model", Text),
    Column("result_files", JSON, nullable=False),
    Column("verdict", JSON(none_as_null=True)),
    Column("release", JSON(none_as_null=True)),
    Column("grader", JSON(none_as_null=True)),
    Column("error", JSON(none_as_null=True)),
    Column("paused", Boolean, nullable=False, server_default=false()),
    Column("handle", Text),
    Column("attempts", Integer, nullable=False),
)

events = _table(
    "events",
    Column("id", String(64), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("job_id", String(64), ForeignKey("jobs.id"), nullable=False, index=True),
    Column("level", String(16), nullable=False),
    Column("type", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON, nullable=False),
)

checkpoints = _table(
    "checkpoints",
    Column("id", String(64), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("job_id", String(64), ForeignKey("jobs.id"), nullable=False, index=True),
    Column("step", Integer, nullable=False),
    Column("model", Text, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("best", Boolean, nullable=False),
)

models = _table(
    "models",
    Column("id", String(255), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("job_id", String(64), nullable=False, index=True),
    Column("base_model", Text, nullable=False),
    Column("blobs", Text, nullable=False),
    Column("owned_by", Text, nullable=False),
)

#: A row for each example that a verdict looked at; `look` is the job, or what stands for one outside the server.
looks = _table(
    "looks",
    Column("look", String(64), nullable=False, index=True),
    Column("example", String(64), nullable=False, index=True),
)
