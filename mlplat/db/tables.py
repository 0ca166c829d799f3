"""All Postgres tables. Migrations build the same schema; a test compares the two."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Computed,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
    text,
)
from sqlalchemy.dialects.postgresql import DOUBLE_PRECISION, JSON, JSONB

from mlplat.db.approval_tables import move_decision as move_decision
from mlplat.db.approval_tables import move_request as move_request
from mlplat.db.approval_tables import registry_refusal as registry_refusal
from mlplat.db.lineage_tables import lineage_edge as lineage_edge
from mlplat.db.lineage_tables import lineage_run as lineage_run
from mlplat.db.metadata import metadata as metadata
from mlplat.db.metadata import short_value as short_value
from mlplat.db.metadata import time_column as _time
from mlplat.db.metadata import value_indexes
from mlplat.db.registry_tables import model_alias as model_alias
from mlplat.db.registry_tables import model_version as model_version
from mlplat.db.registry_tables import model_version_tag as model_version_tag
from mlplat.db.registry_tables import registered_model as registered_model
from mlplat.db.registry_tables import registered_model_tag as registered_model_tag
from mlplat.db.registry_tables import registry_change as registry_change
from mlplat.db.registry_tables import registry_event as registry_event
from mlplat.db.storage_tables import artifact_collection as artifact_collection
from mlplat.db.storage_tables import legal_hold as legal_hold
from mlplat.db.storage_tables import metric_archive as metric_archive
from mlplat.db.storage_tables import storage_quota as storage_quota
from mlplat.db.webhook_tables import webhook as webhook
from mlplat.db.webhook_tables import webhook_delivery as webhook_delivery


def number_sql(column: str) -> str:
    """SQL for the number in a text column, NULL when it is none. The bounds keep the cast from overflowing."""
    number = (
        r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?$|^[+-]?[0-9](\.[0-9]{0,17})?[eE][+-]?[12][0-9]{2}$"
    )
    infinity = "^[+-]?(inf|infinity)$"
    return (
        f"CASE WHEN length({column}) <= 200 AND ({column} ~ '{number}' OR {column} ~* '{infinity}') "
        f"THEN ({column})::double precision END"
    )


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
    _time("deleted_at", nullable=True),
    # Set for good when a purge has begun: from then on it cannot be restored.
    _time("purge_started_at", nullable=True),
    # What it was imported from. While it is being imported it counts as deleted.
    Column("import_origin", Text, nullable=True, unique=True),
    Column("importing", Boolean, nullable=False, server_default=text("false")),
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
    _time("deleted_at", nullable=True),
    # Deleted because its experiment was: restoring the experiment restores it.
    Column("deleted_with_experiment", Boolean, nullable=False, server_default=text("false")),
    # Counts as deleted along with its experiment until the import is complete; takes points meanwhile.
    Column("importing", Boolean, nullable=False, server_default=text("false")),
    _time("purge_started_at", nullable=True),
    _time("started_at"),
    _time("ended_at", nullable=True),
    # Null: nobody promised heartbeats. Part of no index, so that a beat stays a heap-only update.
    _time("heartbeat_at", nullable=True),
    # The order of a search; with ``deleted`` in it a page is found without a look at the table.
    Index(None, "experiment_id", text("started_at DESC"), "run_id", postgresql_include=["deleted"]),
    Index("ix_run_deleted", "run_id", postgresql_where=text("deleted")),
    Index("ix_run_running", "run_id", postgresql_where=text("status = 'RUNNING'")),
)

run_param = Table(
    "run_param",
    metadata,
    Column("run_id", ForeignKey("run.run_id", ondelete="CASCADE"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
    Column("number", DOUBLE_PRECISION, Computed(number_sql("value"), persisted=True), nullable=True),
    *value_indexes("run_param", "run_id"),
    Index("ix_run_param_number", "key", "number", postgresql_include=["run_id"],
          postgresql_where=text("number IS NOT NULL")),
)  # fmt: skip

run_tag = Table(
    "run_tag",
    metadata,
    Column("run_id", ForeignKey("run.run_id", ondelete="CASCADE"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
    *value_indexes("run_tag", "run_id"),
    # The runs of a pipeline run.
    Index("ix_run_tag_pipeline_run", "value", "run_id", postgresql_where=text("key = 'mlplat.pipelineRun'")),
    # The runs within a run.
    Index("ix_run_tag_parent", "value", "run_id", postgresql_where=text("key = 'mlflow.parentRunId'")),
)

# -- datasets and logged models ----------------------------------------------------------------

#: The run whose file a dataset is, by its source ``mlplat://RUN/PATH``; empty for one from elsewhere. No id is longer,
#: and an index takes no text of any length.
DATASET_RUN = literal_column("left(split_part(split_part(source, 'mlplat://', 2), '/', 1), 64)", Text)
IS_OF_RUN = text(f"{DATASET_RUN} <> ''")

dataset = Table(
    "dataset",
    metadata,
    Column("dataset_id", BigInteger, Identity(), primary_key=True),
    Column("experiment_id", ForeignKey("experiment.experiment_id", ondelete="CASCADE"), nullable=False),
    Column("name", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("source_type", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("schema", Text, nullable=True),
    Column("profile", Text, nullable=True),
    UniqueConstraint("experiment_id", "name", "digest"),
    Index(None, "digest", "name"),
    Index("ix_dataset_run", text(str(DATASET_RUN)), postgresql_where=IS_OF_RUN),
)
run_input = Table(
    "run_input",
    metadata,
    Column("run_id", ForeignKey("run.run_id", ondelete="CASCADE"), primary_key=True),
    Column("dataset_id", ForeignKey("dataset.dataset_id", ondelete="CASCADE"), primary_key=True),
    # Key → value; MLflow's context of the dataset is the tag mlflow.data.context.
    Column("tags", JSONB, nullable=False, server_default=text("'{}'")),
    # Inputs are answered in the order in which they were logged.
    Column("position", BigInteger, Identity(), nullable=False),
    Index(None, "dataset_id"),
    # By its keys: the runs that read data through a feature view.
    Index(None, "tags", postgresql_using="gin"),
)

logged_model = Table(
    "logged_model",
    metadata,
    Column("model_id", Text, primary_key=True),
    Column("experiment_id", ForeignKey("experiment.experiment_id", ondelete="CASCADE"), nullable=False),
    Column("name", Text, nullable=False),
    Column("artifact_location", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("model_type", Text, nullable=True),
    # No foreign key: a model outlives the run that made it.
    Column("source_run_id", Text, nullable=True),
    Column("deleted", Boolean, nullable=False, server_default=text("false")),
    _time("created_at"),
    _time("updated_at"),
    Index(None, "experiment_id", text("created_at DESC"), "model_id"),
    Index(None, "source_run_id"),
)

logged_model_param = Table(
    "logged_model_param",
    metadata,
    Column("model_id", ForeignKey("logged_model.model_id", ondelete="CASCADE"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

logged_model_tag = Table(
    "logged_model_tag",
    metadata,
    Column("model_id", ForeignKey("logged_model.model_id", ondelete="CASCADE"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

logged_model_metric = Table(
    "logged_model_metric",
    metadata,
    Column("model_id", ForeignKey("logged_model.model_id", ondelete="CASCADE"), primary_key=True),
    # Hash of all the other columns: a point that is sent again is the same row.
    Column("digest", LargeBinary, primary_key=True),
    Column("run_id", ForeignKey("run.run_id", ondelete="CASCADE"), nullable=False),
    Column("key", Text, nullable=False),
    Column("value", DOUBLE_PRECISION, nullable=False),
    Column("timestamp", BigInteger, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("dataset_name", Text, nullable=True),
    Column("dataset_digest", Text, nullable=True),
    Index(None, "model_id", "key"),
    Index(None, "run_id"),
)

run_model = Table(
    "run_model",
    metadata,
    Column("run_id", ForeignKey("run.run_id", ondelete="CASCADE"), primary_key=True),
    # "input" or "output" of the run.
    Column("direction", Text, primary_key=True),
    Column("model_id", ForeignKey("logged_model.model_id", ondelete="CASCADE"), primary_key=True),
    Column("step", BigInteger, nullable=False),
    Column("position", BigInteger, Identity(), nullable=False),
    Index(None, "model_id"),
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

# Runs that were purged or moved in Postgres, and not yet in the metric store.
metric_outbox = Table(
    "metric_outbox",
    metadata,
    Column("run_id", Text, primary_key=True),
    _time("created_at", default=True),
)

# -- imports -----------------------------------------------------------------------------------

# Which run became of each run that an import brings: the same again when the import goes on after a crash.
run_import = Table(
    "run_import",
    metadata,
    Column("experiment_id", ForeignKey("experiment.experiment_id", ondelete="CASCADE"), primary_key=True),
    Column("source_id", Text, primary_key=True),
    # No foreign key: ids are given out before the runs exist.
    Column("run_id", Text, nullable=False, unique=True),
    # Its points and artifacts have arrived too.
    Column("complete", Boolean, nullable=False, server_default=text("false")),
)

# The same for logged models.
model_import = Table(
    "model_import",
    metadata,
    Column("experiment_id", ForeignKey("experiment.experiment_id", ondelete="CASCADE"), primary_key=True),
    Column("source_id", Text, primary_key=True),
    Column("model_id", Text, nullable=False, unique=True),
    # Whether it stays deleted when the import is complete; until then all of them count as deleted.
    Column("deleted", Boolean, nullable=False, server_default=text("false")),
    Column("complete", Boolean, nullable=False, server_default=text("false")),
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
    # Number of the run's last transition; rows carry the number of the one that wrote them.
    Column("seq", BigInteger, nullable=False, server_default="0"),
    Column("idempotency_key", Text, nullable=True, unique=True),
    Column("submitted_by", Text, nullable=False, server_default=""),
    Column("source", Text, nullable=False, server_default=""),
    Column("priority", SmallInteger, nullable=False, server_default="0"),
    Column("concurrency_key", Text, nullable=True),
    Column("concurrency_limit", Integer, nullable=True),
    Column("resumed_from", Text, nullable=True),
    Column("resumed_step", Text, nullable=True),
    Column("output", JSON, nullable=True),
    # The state that a run which is being stopped will end in.
    Column("stopping", Text, nullable=True),
    _time("created_at", default=True),
    _time("started_at", nullable=True),
    _time("finished_at", nullable=True),
    # The transaction that ended it.
    Column("ended_txid", BigInteger, nullable=True),
    Index(None, text("created_at DESC"), "run_id"),
    Index("ix_pipeline_run_open", "created_at", postgresql_where=text("state IN ('PENDING', 'QUEUED', 'RUNNING')")),
    Index("ix_pipeline_run_name", "name", text("created_at DESC")),
    Index("ix_pipeline_run_finished", "finished_at", postgresql_where=text("finished_at IS NOT NULL")),
    Index("ix_pipeline_run_ended", "ended_txid", postgresql_where=text("ended_txid IS NOT NULL")),
)

# Rows appear when the executor first looks at a step. No reference to pipeline_run: fenced writes see to that, and a
# check per row would cost as much as the row.
step_run = Table(
    "step_run",
    metadata,
    Column("run_id", Text, primary_key=True),
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
    Column("reused_from", Text, nullable=True),
    Column("seq", BigInteger, nullable=False, server_default="0"),
    _time("retry_at", nullable=True),
    _time("queued_at", nullable=True),
    _time("started_at", nullable=True),
    _time("finished_at", nullable=True),
    Index("ix_step_run_reused", "reused_from", postgresql_where=text("reused_from IS NOT NULL")),
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
    Column("node", Text, nullable=True),
    Column("progress", JSON, nullable=True),
    # The run of a sub-pipeline.
    Column("child_id", Text, nullable=True),
    Column("seq", BigInteger, nullable=False, server_default="0"),
    _time("queued_at"),
    _time("started_at", nullable=True),
    _time("finished_at", nullable=True),
)

# What people told a run. The executor applies each once: what it leads to is in the run's rows.
pipeline_signal = Table(
    "pipeline_signal",
    metadata,
    Column("signal_id", BigInteger, Identity(), primary_key=True),
    Column("run_id", ForeignKey("pipeline_run.run_id", ondelete="CASCADE"), nullable=False, index=True),
    Column("kind", Text, nullable=False),
    Column("step", Text, nullable=False, server_default=""),
    Column("by", Text, nullable=False),
    Column("comment", Text, nullable=False, server_default=""),
    _time("created_at", default=True),
)

# Outputs by what made them: code, arguments and environment.
step_cache = Table(
    "step_cache",
    metadata,
    Column("key", Text, primary_key=True),
    Column("output", JSON, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("step", Text, nullable=False),
    Column("item", Integer, nullable=False),
    _time("created_at", default=True),
)

# -- schedules and triggers --------------------------------------------------------------------

schedule = Table(
    "schedule",
    metadata,
    Column("name", Text, primary_key=True),
    Column("digest", ForeignKey("pipeline.digest"), nullable=False),
    # Values may have expressions over the fire time.
    Column("params", JSONB, nullable=False),
    Column("cron", Text, nullable=False),
    Column("time_zone", Text, nullable=False),
    Column("catch_up", Text, nullable=False),
    Column("catch_up_limit", Integer, nullable=False),
    Column("misfire_grace_s", DOUBLE_PRECISION, nullable=False),
    _time("starts_at", nullable=True),
    _time("ends_at", nullable=True),
    Column("paused", Boolean, nullable=False),
    # The fire time that it waits for; null: paused, or over.
    _time("next_at", nullable=True),
    _time("last_at", nullable=True),
    Column("last_run_id", Text, nullable=True),
    Column("created_by", Text, nullable=False, server_default=""),
    _time("created_at", default=True),
    _time("updated_at", default=True),
    Index("ix_schedule_next", "next_at", postgresql_where=text("next_at IS NOT NULL")),
)

trigger = Table(
    "trigger",
    metadata,
    Column("name", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("digest", ForeignKey("pipeline.digest"), nullable=False),
    # Values may have expressions over the event.
    Column("params", JSONB, nullable=False),
    Column("filter", JSONB, nullable=False),
    Column("max_per_hour", Integer, nullable=False),
    Column("paused", Boolean, nullable=False),
    # A snapshot: what had happened before the trigger was there, or was resumed, is none of its events.
    Column("since", Text, nullable=False),
    # "bearer": the secret is its SHA-256; "signature": it is the key itself, without which nothing can be verified.
    Column("auth", Text, nullable=True),
    Column("secret", LargeBinary, nullable=True),
    _time("last_at", nullable=True),
    Column("last_run_id", Text, nullable=True),
    Column("created_by", Text, nullable=False, server_default=""),
    _time("created_at", default=True),
    _time("updated_at", default=True),
)

# Up to where events were read, by what they are read from.
event_cursor = Table(
    "event_cursor",
    metadata,
    Column("origin", Text, primary_key=True),
    Column("snapshot", Text, nullable=False),
)

# What schedules and triggers decided, before anything is done about it.
firing = Table(
    "firing",
    metadata,
    Column("firing_id", BigInteger, Identity(), primary_key=True),
    # "schedule:<name>" or "trigger:<name>"
    Column("source", Text, nullable=False),
    Column("event_id", Text, nullable=False),
    Column("event_at", DateTime(timezone=True), nullable=False),
    # Null where nothing is to be submitted.
    Column("digest", ForeignKey("pipeline.digest"), nullable=True),
    Column("params", JSONB(none_as_null=True), nullable=True),
    Column("submitted_by", Text, nullable=False, server_default=""),
    # Names of the triggers that led here, this one included.
    Column("lineage", JSONB, nullable=False, server_default=text("'[]'")),
    Column("state", Text, nullable=False),
    Column("reason", Text, nullable=False, server_default=""),
    Column("run_id", Text, nullable=True),
    Column("tries", Integer, nullable=False, server_default="0"),
    _time("retry_at", nullable=True),
    _time("created_at", default=True),
    UniqueConstraint("source", "event_id"),
    Index(None, "source", "created_at"),
    Index("ix_firing_pending", "firing_id", postgresql_where=text("state = 'PENDING'")),
    Index("ix_firing_run", "run_id", postgresql_where=text("run_id IS NOT NULL")),
)
