"""MetricShard: group commit of metric batches, and the only door to the metric store."""

from __future__ import annotations

import os
from collections.abc import Sequence

from actors.lifecycle import Health, Started, actor_id
from mlplat.db.engine import open_engine
from mlplat.db.lease import LeaseKeeper
from mlplat.metrics.queries import Statement
from mlplat.metrics.service import MetricService
from mlplat.metrics.store import MetricStore
from mlplat.settings import PlatformConfig


class MetricShard:
    """One shard; see ``MetricService``."""

    def __init__(self, config: PlatformConfig, name: str) -> None:
        engine = open_engine(config.postgres_url, name, pool_size=4)
        lease = LeaseKeeper(engine, name, actor_id())
        self._service = MetricService(engine, MetricStore(config.clickhouse_url), lease, name)
        self._started = Started(self._service.start, lease)

    async def append(self, batch: bytes) -> int:
        """Makes an Arrow IPC batch durable; returns its number of points."""
        await self._started.wait()
        return await self._service.append(batch)

    async def query(self, statement: Statement) -> bytes:
        """Rows of a read, as an Arrow IPC stream."""
        await self._started.wait()
        return await self._service.query(statement)

    async def reconcile(self, run_ids: Sequence[str]) -> int:
        """Makes the metric store agree with Postgres about these runs; returns the bytes freed."""
        await self._started.wait()
        return await self._service.reconcile(run_ids)

    async def stats(self) -> dict[str, int]:
        """Counters."""
        await self._started.wait()
        return self._service.stats()

    async def health(self) -> Health:
        """Answers when the shard is in charge."""
        await self._started.wait()
        return {"pid": os.getpid(), "lag": self._service.lag()}

    async def stop(self) -> None:
        """Flushes and lets go."""
        await self._started.wait()
        self._started.release()
        await self._service.stop()
