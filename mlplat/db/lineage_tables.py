"""The tables of lineage that outlives what it tells of."""

from __future__ import annotations

from sqlalchemy import Column, Index, Table, Text
from sqlalchemy.dialects.postgresql import JSONB

from mlplat.db.metadata import metadata
from mlplat.db.metadata import time_column as _time

# Purged runs from which a model version came.
lineage_run = Table(
    "lineage_run",
    metadata,
    Column("run_id", Text, primary_key=True),
    # All that was known of it; see lineage/records.py.
    Column("record", JSONB, nullable=False),
    _time("created_at", default=True),
)

# Edges to and from them, and those that go with purged experiments. Nodes are written as lineage/model.py writes them.
lineage_edge = Table(
    "lineage_edge",
    metadata,
    Column("upstream", Text, primary_key=True),
    Column("downstream", Text, primary_key=True),
    Index(None, "downstream"),
)
