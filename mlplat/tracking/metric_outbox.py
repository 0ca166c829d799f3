"""Runs that changed in Postgres and not yet in the metric store.

A run is noted here in the transaction that purges or moves it, and crossed out when the metric store
has followed. Whatever dies in between, the next ``settle`` catches up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa
from sqlalchemy import delete, func, select, tuple_
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.tables import metric_outbox
from mlplat.metrics.changes import MAX_RUN_IDS
from mlplat.metrics.queries import Statement


class MetricStorePort(Protocol):
    """The metric shard, as far as purging and moving need it."""

    async def query(self, statement: Statement) -> pa.Table:
        """The statement's rows."""
        ...

    async def reconcile(self, run_ids: Sequence[str]) -> int:
        """Makes the metric store agree with Postgres about these runs; returns the bytes freed."""
        ...


async def note(connection: AsyncConnection, run_ids: Sequence[str]) -> None:
    """Notes runs whose points the metric store must move or remove."""
    if not run_ids:
        return
    statement = upsert(metric_outbox).values([{"run_id": run_id} for run_id in run_ids])
    await connection.execute(
        statement.on_conflict_do_update(index_elements=["run_id"], set_={"created_at": func.clock_timestamp()})
    )


class MetricOutbox:
    """All methods are safe to call concurrently."""

    def __init__(self, engine: AsyncEngine, metrics: MetricStorePort) -> None:
        self._engine = engine
        self._metrics = metrics

    async def settle(self) -> int:
        """Returns when the metric store has followed every run noted before this call, with the bytes it freed.

        Raises:
            Unavailable: the metric store is away. The notes stay.
        """
        freed = 0
        query = select(metric_outbox).order_by(metric_outbox.c.created_at).limit(MAX_RUN_IDS)
        while True:
            async with self._engine.connect() as connection:
                noted = [(row.run_id, row.created_at) for row in await connection.execute(query)]
            if not noted:
                return freed
            freed += await self._metrics.reconcile([run_id for run_id, _created_at in noted])
            # A run that was noted again meanwhile has another time, and stays.
            done = tuple_(metric_outbox.c.run_id, metric_outbox.c.created_at).in_(noted)
            async with self._engine.begin() as connection:
                await connection.execute(delete(metric_outbox).where(done))
