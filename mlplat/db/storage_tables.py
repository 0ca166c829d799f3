"""The tables of storage: collections, legal holds, quotas, archived metrics."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Identity, Table, Text
from sqlalchemy.dialects.postgresql import JSONB

from mlplat.db.metadata import metadata
from mlplat.db.metadata import time_column as _time

artifact_collection = Table(
    "artifact_collection",
    metadata,
    Column("collection_id", BigInteger, Identity(), primary_key=True),
    Column("dry_run", Boolean, nullable=False),
    _time("started_at", default=True),
    _time("finished_at", nullable=True),
    # What was found and done; none when it was cut short.
    Column("report", JSONB, nullable=True),
)

legal_hold = Table(
    "legal_hold",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("user_id", Text, nullable=False),
    _time("created_at", default=True),
)

storage_quota = Table(
    "storage_quota",
    metadata,
    Column("experiment_id", ForeignKey("experiment.experiment_id", ondelete="CASCADE"), primary_key=True),
    Column("limit_bytes", BigInteger, nullable=False),
    # As of the last collection, and what was accepted since.
    Column("used_bytes", BigInteger, nullable=False),
)

metric_archive = Table(
    "metric_archive",
    metadata,
    # No foreign key: the file has to be found when the run is gone.
    Column("run_id", Text, primary_key=True),
    Column("points", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    _time("archived_at"),
    # Since when the points may be in the metric store as well.
    _time("hot_since", nullable=True),
)
