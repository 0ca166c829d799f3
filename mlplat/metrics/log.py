"""The durable log in front of the metric store: one Postgres row per committed group.

Contract: ``append`` returns after the commit, so an acknowledged group survives any Ray node and the
metric store. Sequence numbers of a shard have no gap. Only the holder of the shard's lease appends
(the fence is part of the INSERT). Groups stay until ``mark_flushed`` says the store has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import delete, func, literal, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.lease import Lease
from mlplat.db.tables import metric_flush, metric_log
from mlplat.errors import Fenced


@dataclass(frozen=True)
class Group:
    """One committed group: ``body`` is an Arrow IPC stream of ``points`` rows."""

    seq: int
    points: int
    body: bytes


class MetricLog:
    """The log of one shard."""

    def __init__(self, engine: AsyncEngine, shard: str) -> None:
        self._engine = engine
        self._shard = shard

    async def positions(self) -> tuple[int, int]:
        """``(last appended, last flushed)`` sequence numbers; 0 before the first."""
        flushed_query = select(func.coalesce(func.max(metric_flush.c.seq), 0)).where(
            metric_flush.c.shard == self._shard
        )
        appended_query = select(func.coalesce(func.max(metric_log.c.seq), 0)).where(metric_log.c.shard == self._shard)
        async with self._engine.connect() as connection:
            flushed = (await connection.execute(flushed_query)).scalar_one()
            appended = (await connection.execute(appended_query)).scalar_one()
        return max(appended, flushed), flushed

    async def append(self, held: Lease, group: Group) -> None:
        """Makes ``group`` durable.

        Raises:
            Fenced: the shard's lease has another epoch; nothing was written.
        """
        fence = held.holds().subquery()
        row = select(literal(self._shard), literal(group.seq), literal(group.points), literal(group.body)).select_from(
            fence
        )
        statement = insert(metric_log).from_select(["shard", "seq", "points", "body"], row)
        async with self._engine.begin() as connection:
            written = (await connection.execute(statement.returning(metric_log.c.seq))).first()
        if written is None:
            raise Fenced(f"metric shard {self._shard!r}: epoch {held.epoch} is over")

    async def read_after(self, seq: int, limit: int) -> list[Group]:
        """At most ``limit`` groups behind ``seq``, in order."""
        query = (
            select(metric_log.c.seq, metric_log.c.points, metric_log.c.body)
            .where(metric_log.c.shard == self._shard, metric_log.c.seq > seq)
            .order_by(metric_log.c.seq)
            .limit(limit)
        )
        async with self._engine.connect() as connection:
            return [Group(row.seq, row.points, row.body) for row in await connection.execute(query)]

    async def mark_flushed(self, held: Lease, seq: int) -> None:
        """Records that the store has everything up to ``seq`` and drops it from the log, at once."""
        mark = insert(metric_flush).values(shard=self._shard, seq=seq)
        mark = mark.on_conflict_do_update(index_elements=["shard"], set_={"seq": mark.excluded.seq})
        async with self._engine.begin() as connection:
            await held.check(connection)
            await connection.execute(mark)
            await connection.execute(
                delete(metric_log).where(metric_log.c.shard == self._shard, metric_log.c.seq <= seq)
            )
