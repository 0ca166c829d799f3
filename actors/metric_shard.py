"""MetricShard: group commit of metric batches, and the only door to the metric store."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from functools import partial

from actors.lifecycle import Health, Started, actor_id, spare_garbage_collection
from mlplat.db.engine import open_engine
from mlplat.db.lease import LeaseKeeper
from mlplat.errors import PlatformError
from mlplat.metrics.archive import ArchiveFiles
from mlplat.metrics.model import Archived
from mlplat.metrics.queries import Statement
from mlplat.metrics.service import MetricService
from mlplat.metrics.store import MetricStore
from mlplat.settings import PlatformConfig
from mlplat.tracking.model import RunUpdate
from mlplat.tracking.runs import write_update


class MetricShard:
    """One shard; see ``MetricService``."""

    def __init__(self, config: PlatformConfig, name: str) -> None:
        engine = open_engine(config.postgres_url, name, pool_size=4)
        lease = LeaseKeeper(engine, name, actor_id())
        store = MetricStore(config.clickhouse_url)
        store.load_engine()
        self._service = MetricService(engine, store, lease, name, ArchiveFiles(config.artifacts_url))
        self._started = Started(self._service.start, lease)
        spare_garbage_collection()

    async def append(self, batch: bytes, update: RunUpdate | None = None) -> int:
        """Makes an Arrow IPC batch durable, together with params and tags; returns its number of points."""
        await self._started.wait()
        return await self._service.append(batch, None if update is None else partial(write_update, new=update))

    async def append_all(self, batches: list[bytes]) -> list[int | PlatformError]:
        """``append`` for several batches in one call: each answers for itself."""
        await self._started.wait()
        answers = await asyncio.gather(*map(self._service.append, batches), return_exceptions=True)
        return [_own_answer(answer) for answer in answers]

    async def query(self, statement: Statement) -> bytes:
        """Rows of a read, as an Arrow IPC stream."""
        await self._started.wait()
        return await self._service.query(statement)

    async def reconcile(self, run_ids: Sequence[str]) -> int:
        """Makes the metric store agree with Postgres about these runs; returns the bytes freed."""
        await self._started.wait()
        return await self._service.reconcile(run_ids)

    async def archive(self, run_ids: Sequence[str]) -> Archived:
        """Moves the points of these runs into the archive."""
        await self._started.wait()
        return await self._service.archive(run_ids)

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


def _own_answer(answer: int | BaseException) -> int | PlatformError:
    if isinstance(answer, int | PlatformError):
        return answer
    raise answer
