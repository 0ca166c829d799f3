"""All Postgres tables. Migrations build the same schema; a test compares the two."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSON, JSONB

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_now = text("clock_timestamp()")


def _time(name: str, *, nullable: bool = False, default: bool = False) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=nullable, server_default=_now if default else None)


# -- leases ------------------------------------------------------------------------------------

lease = Table(
    "lease",
    metadata,
    Column("name", Text, primary_key=True),
    Column("holder", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    _time("until"),
)

# -- tracking ----------------------------------------------------------------------------------

experiment = Table(
    "experiment",
    metadata,
    Column("experiment_id", BigInteger, Identity(start=1), primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("artifact_location", Text, nullable=False),
    Column("deleted", Boolean, nullable=False, server_default=text("false")),
    _time("created_at"),
    _time("updated_at"),
)

experiment_tag = Table(
    "experiment_tag",
    metadata,
    Column("experiment_id", ForeignKey("experiment.experiment_id", ondelete="CASCADE"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

run = Table(
    "run",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("experiment_id", ForeignKey("experiment.experiment_id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("artifact_uri", Text, nullable=False),
    Column("deleted", Boolean, nullable=False, server_default=text("false")),
    _time("started_at"),
    _time("ended_at", nullable=True),
    # Null: nobody promised heartbeats. Part of no index, so that a beat stays a heap-only update.
    _time("heartbeat_at", nullable=True),
    Index(None, "experiment_id", text("started_at DESC"), "run_id"),
    Index("ix_run_running", "run_id", postgresql_where=text("status = 'RUNNING'")),
)

run_param = Table(
    "run_param",
    metadata,
    Column("run_id", ForeignKey("run.run_id", ondelete="CASCADE"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

run_tag = Table(
    "run_tag",
    metadata,
    Column("run_id", ForeignKey("run.run_id", ondelete="CASCADE"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
    # Values can be 8,000 characters long, more than a btree entry holds.
    Index("ix_run_tag_key_value", "key", text("left(value, 256)")),
)

# -- metrics -----------------------------------------------------------------------------------

metric_log = Table(
    "metric_log",
    metadata,
    # ``<shard>/<number>``: a shard's partitions take turns, and the shard creates them.
    Column("slot", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("points", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),
    postgresql_partition_by="LIST (slot)",
)

metric_flush = Table(
    "metric_flush",
    metadata,
    Column("shard", Text, primary_key=True),
    Column("seq", BigInteger, nullable=False),
)

# -- registry ----------------------------------------------------------------------------------

registered_model = Table(
    "registered_model",
    metadata,
    Column("name", Text, primary_key=True),
    Column("description", Text, nullable=False, server_default=""),
    Column("last_version", BigInteger, nullable=False, server_default="0"),
    _time("created_at"),
    _time("updated_at"),
)

registered_model_tag = Table(
    "registered_model_tag",
    metadata,
    Column(
        "name",
        ForeignKey("registered_model.name", ondelete="CASCADE", onupdate="CASCADE"),
        primary_key=True,
    ),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

model_version = Table(
    "model_version",
    metadata,
    Column(
        "name",
        ForeignKey("registered_model.name", ondelete="CASCADE", onupdate="CASCADE"),
        primary_key=True,
    ),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("description", Text, nullable=False, server_default=""),
    Column("source", Text, nullable=False),
    Column("artifact_uri", Text, nullable=False),
    Column("run_id", Text, nullable=True),
    Column("run_link", Text, nullable=True),
    Column("user_id", Text, nullable=False, server_default=""),
    _time("created_at"),
    _time("updated_at"),
    Index(None, "run_id"),
)

model_version_tag = Table(
    "model_version_tag",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
    ForeignKeyConstraint(
        ["name", "version"],
        ["model_version.name", "model_version.version"],
        ondelete="CASCADE",
        onupdate="CASCADE",
    ),
)

model_alias = Table(
    "model_alias",
    metadata,
    Column("name", Text, primary_key=True),
    Column("alias", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),
    ForeignKeyConstraint(
        ["name", "version"],
        ["model_version.name", "model_version.version"],
        ondelete="CASCADE",
        onupdate="CASCADE",
    ),
)

registry_event = Table(
    "registry_event",
    metadata,
    Column("event_id", BigInteger, Identity(), primary_key=True),
    # The caller's id of the mutation: a repeat finds its first answer here instead of acting twice.
    Column("request_id", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("command", JSONB, nullable=False),
    Column("answer", JSONB, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    _time("created_at", default=True),
    Index(None, "name", "event_id"),
)

# -- pipelines ---------------------------------------------------------------------------------

pipeline = Table(
    "pipeline",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("name", Text, nullable=False),
    # json, not jsonb: the steps keep the order in which they were defined.
    Column("spec", JSON, nullable=False),
    _time("created_at", default=True),
)

pipeline_run = Table(
    "pipeline_run",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("digest", ForeignKey("pipeline.digest"), nullable=False),
    Column("name", Text, nullable=False),
    Column("params", JSONB, nullable=False),
    Column("state", Text, nullable=False),
    Column("error", Text, nullable=True),
    Column("executor", Text, nullable=True),
    # Raised by the scheduler at every (re)assignment; each transition of the run checks it.
    Column("epoch", BigInteger, nullable=False, server_default="0"),
    Column("idempotency_key", Text, nullable=True, unique=True),
    Column("submitted_by", Text, nullable=False, server_default=""),
    _time("created_at", default=True),
    _time("started_at", nullable=True),
    _time("finished_at", nullable=True),
    Index(None, text("created_at DESC"), "run_id"),
    Index("ix_pipeline_run_open", "created_at", postgresql_where=text("state IN ('PENDING', 'QUEUED', 'RUNNING')")),
)

step_run = Table(
    "step_run",
    metadata,
    Column("run_id", ForeignKey("pipeline_run.run_id", ondelete="CASCADE"), primary_key=True),
    Column("step", Text, primary_key=True),
    # -1 is the step itself; 0..n-1 are the items of a fan-out.
    Column("item", Integer, primary_key=True, autoincrement=False),
    Column("state", Text, nullable=False),
    Column("items", Integer, nullable=True),
    Column("attempt", SmallInteger, nullable=False, server_default="0"),
    # Failures that count against the step's retries; attempts lost with their process do not.
    Column("failures", SmallInteger, nullable=False, server_default="0"),
    # json, not jsonb: jsonb reorders keys and rewrites numbers, and a fan-out must see the same list twice.
    Column("output", JSON, nullable=True),
    Column("error", Text, nullable=True),
    _time("retry_at", nullable=True),
    _time("started_at", nullable=True),
    _time("finished_at", nullable=True),
)

attempt = Table(
    "attempt",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("step", Text, primary_key=True),
    Column("item", Integer, primary_key=True, autoincrement=False),
    Column("attempt", SmallInteger, primary_key=True, autoincrement=False),
    Column("state", Text, nullable=False),
    Column("error", Text, nullable=True),
    _time("started_at"),
    _time("finished_at", nullable=True),
    ForeignKeyConstraint(
        ["run_id", "step", "item"],
        ["step_run.run_id", "step_run.step", "step_run.item"],
        ondelete="CASCADE",
    ),
)
