"""Points of runs that ended long ago move from the metric store into the archive."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Protocol

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.tables import metric_archive, run
from mlplat.metrics.model import Archived

#: Runs of one call: their points leave the metric store together, which rewrites what lies beside them.
BATCH = 100
#: Points that came back when somebody read them stay so long.
STAYS_HOT = timedelta(days=7)


class MetricsPort(Protocol):
    """The metric shard, as far as archiving needs it."""

    async def archive(self, run_ids: Sequence[str]) -> Archived:
        """Moves the points of runs into the archive."""
        ...


class OldMetrics:
    """Archives by age.

    Args:
        engine: Postgres.
        metrics: the metric shard.
        hot: how long after a run's end its points stay in the metric store.
    """

    def __init__(self, engine: AsyncEngine, metrics: MetricsPort, hot: timedelta) -> None:
        self._engine = engine
        self._metrics = metrics
        self._hot = hot

    async def archive(self, *, dry_run: bool) -> Archived:
        """Archives what is due; a dry run counts runs, with and without points, and no points.

        Raises:
            Overloaded: a purge, a collection or a backup is under way.
            Corrupted, StorageFull, Unavailable: it was cut short; what was done is done.
        """
        until, done, after = datetime.now(UTC) - self._hot, Archived(), ""
        while run_ids := await self._due(until, after):
            done += Archived(len(run_ids)) if dry_run else await self._metrics.archive(run_ids)
            after = run_ids[-1]
        return done

    async def _due(self, until: datetime, after: str) -> list[str]:
        query = (
            select(run.c.run_id)
            .outerjoin(metric_archive, metric_archive.c.run_id == run.c.run_id)
            .where(
                run.c.run_id > after,
                run.c.ended_at <= until,
                or_(metric_archive.c.run_id.is_(None), metric_archive.c.hot_since <= datetime.now(UTC) - STAYS_HOT),
            )
            .order_by(run.c.run_id)
            .limit(BATCH)
        )
        async with self._engine.connect() as connection:
            return list((await connection.execute(query)).scalars())
