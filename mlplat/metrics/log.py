"""The durable log in front of the metric store: one Postgres row per committed group.

Contract: ``append`` returns after the commit, so an acknowledged group survives any Ray node and the
metric store. Sequence numbers of a shard have no gap. Only the holder of the shard's lease appends,
and only points of runs that may be written to: both are checked in the INSERT itself. Groups stay
until ``mark_flushed`` says the store has them.

A shard's rows lie in a few partitions that take turns, ``GROUPS_PER_SLOT`` numbers at a time. One that
holds nothing but flushed groups is truncated: no dead rows, no vacuum, and the space is back at once.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import func, literal, select, text
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.types import BigInteger, Text

from mlplat.db.engine import ANSWER_TIMEOUT_S, HeldConnection, vital_transaction
from mlplat.db.lease import Lease
from mlplat.db.tables import metric_flush, metric_log, run
from mlplat.errors import InvalidInput, NotFound, PlatformError

SLOTS = 3
GROUPS_PER_SLOT = 256
#: A truncation waits for readers of the log only so long; the next one covers it.
TRUNCATE_LOCK_MS = 2_000


@dataclass(frozen=True)
class Group:
    """One committed group: ``body`` is a record of ``points`` rows (see ``metrics.record``)."""

    seq: int
    points: int
    body: bytes


class MetricLog:
    """The log of one shard. ``prepare`` comes first; ``append`` is for one caller at a time."""

    def __init__(self, engine: AsyncEngine, shard: str) -> None:
        self._engine = engine
        self._shard = shard
        self._slots = [f"{shard}/{number}" for number in range(SLOTS)]
        # All appends, each a transaction by itself: no checkout, no BEGIN, no ping.
        self._writer = HeldConnection(engine, ANSWER_TIMEOUT_S)

    async def prepare(self) -> None:
        """Creates the shard's partitions where they are missing."""
        async with self._engine.begin() as connection:
            for slot in self._slots:
                name = _partition(slot)
                known = (await connection.execute(select(func.to_regclass(name)))).scalar()
                if known is not None:
                    continue
                quoted = literal(slot).compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
                await connection.execute(
                    text(f"CREATE TABLE IF NOT EXISTS {name} PARTITION OF metric_log FOR VALUES IN ({quoted})")
                )
                # The bodies are compressed already.
                await connection.execute(text(f"ALTER TABLE {name} ALTER COLUMN body SET STORAGE EXTERNAL"))

    async def positions(self) -> tuple[int, int]:
        """``(last appended, last flushed)`` sequence numbers; 0 before the first."""
        flushed_query = select(func.coalesce(func.max(metric_flush.c.seq), 0)).where(
            metric_flush.c.shard == self._shard
        )
        appended_query = select(func.coalesce(func.max(metric_log.c.seq), 0)).where(metric_log.c.slot.in_(self._slots))
        async with self._engine.connect() as connection:
            flushed = (await connection.execute(flushed_query)).scalar_one()
            appended = (await connection.execute(appended_query)).scalar_one()
        return max(appended, flushed), flushed

    async def append(self, held: Lease, group: Group, run_ids: Sequence[str]) -> bool:
        """Makes ``group``, which has points of ``run_ids``, durable.

        Returns:
            False when a run does not exist or is deleted; then nothing was written.

        Raises:
            Fenced: the shard's lease has another epoch; nothing was written.
        """
        written = await self._writer.execute(_APPEND, self._append_values(held, group, run_ids))
        if not written:
            async with self._engine.connect() as connection:
                await held.check(connection)
        return bool(written)

    async def append_with(
        self, held: Lease, group: Group, update: Callable[[AsyncConnection], Awaitable[object]]
    ) -> bool:
        """Makes ``group`` durable together with what ``update`` writes, which also checks the run.

        Raises:
            Fenced: the shard's lease has another epoch; nothing was written.
        """
        row = self._row(group)
        async with self._engine.begin() as connection:
            await held.check(connection)
            await update(connection)
            await connection.execute(insert(metric_log).values(**row))
        return True

    async def size_bytes(self) -> int:
        """What the log takes on disk, flushed groups of partitions in use included."""
        sizes = [func.pg_total_relation_size(func.to_regclass(_partition(slot))) for slot in self._slots]
        async with self._engine.connect() as connection:
            return sum((await connection.execute(select(*sizes))).one())

    async def refusals(self, run_ids: Sequence[str]) -> dict[str, PlatformError]:
        """Why points of these runs are not taken; runs that may be written to are left out."""
        ids = literal(list(run_ids), ARRAY(Text))
        refused = (run.c.deleted & ~run.c.importing).label("deleted")
        query = select(run.c.run_id, refused).where(run.c.run_id == func.any(ids))
        async with self._engine.connect() as connection:
            deleted = {row.run_id: row.deleted for row in await connection.execute(query)}
        found: dict[str, PlatformError] = {}
        for run_id in run_ids:
            if run_id not in deleted:
                found[run_id] = NotFound(f"Run with id={run_id} not found")
            elif deleted[run_id]:
                found[run_id] = InvalidInput(
                    f"The run {run_id} must be in the 'active' state. Current state is deleted."
                )
        return found

    async def experiments_of(self, run_ids: Sequence[str]) -> dict[str, int]:
        """Experiment ids by run; runs that no longer exist are left out."""
        ids = literal(list(run_ids), ARRAY(Text))
        query = select(run.c.run_id, run.c.experiment_id).where(run.c.run_id == func.any(ids))
        async with self._engine.connect() as connection:
            return {row.run_id: row.experiment_id for row in await connection.execute(query)}

    async def read_after(self, seq: int, limit: int, max_points: int = sys.maxsize) -> list[Group]:
        """At most ``limit`` groups behind ``seq``, in order, and none after ``max_points`` points."""
        so_far = func.sum(metric_log.c.points).over(order_by=metric_log.c.seq) - metric_log.c.points
        # Numbers have no gap: with both ends, only what is read is looked at.
        found = (
            select(metric_log.c.seq, metric_log.c.points, metric_log.c.body, so_far.label("so_far"))
            .where(metric_log.c.slot.in_(self._slots), metric_log.c.seq > seq, metric_log.c.seq <= seq + limit)
            .subquery()
        )
        query = select(found).where(found.c.so_far < literal(max_points, BigInteger)).order_by(found.c.seq)
        async with self._engine.connect() as connection:
            return [Group(row.seq, row.points, row.body) for row in await connection.execute(query)]

    async def mark_flushed(self, held: Lease, seq: int) -> None:
        """Records that the store has everything up to ``seq``."""
        mark = insert(metric_flush).values(shard=self._shard, seq=seq)
        mark = mark.on_conflict_do_update(index_elements=["shard"], set_={"seq": mark.excluded.seq})
        async with vital_transaction(self._engine) as connection:
            await held.check(connection)
            await connection.execute(mark)

    async def truncate_flushed(self, held: Lease, seq: int) -> None:
        """Empties the partitions in which no group is newer than ``seq``, all of which the store has."""
        for slot in self._slots:
            async with vital_transaction(self._engine) as connection:
                await held.check(connection)
                last = select(func.max(metric_log.c.seq)).where(metric_log.c.slot == slot)
                found = (await connection.execute(last)).scalar()
                if found is None or found > seq:
                    continue
                name = _partition(slot)
                await connection.execute(text(f"SET LOCAL lock_timeout = {TRUNCATE_LOCK_MS}"))
                await connection.execute(text(f"LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE"))
                # Under the lock nothing is appended any more: look again.
                if ((await connection.execute(last)).scalar() or 0) <= seq:
                    await connection.execute(text(f"TRUNCATE TABLE {name}"))

    async def disconnect(self) -> None:
        """Closes the writer's connection; the next append opens another."""
        await self._writer.close()

    def _append_values(self, held: Lease, group: Group, run_ids: Sequence[str]) -> dict[str, object]:
        return {
            "lease": held.name,
            "epoch": held.epoch,
            "run_ids": list(run_ids),
            "runs": len(run_ids),
            **self._row(group),
        }

    def _row(self, group: Group) -> dict[str, object]:
        slot = self._slots[group.seq // GROUPS_PER_SLOT % SLOTS]
        return {"slot": slot, "seq": group.seq, "points": group.points, "body": group.body}


def ends_slot(flushed_before: int, flushed: int) -> bool:
    """True when a partition was left behind between two flush positions."""
    return flushed_before // GROUPS_PER_SLOT != flushed // GROUPS_PER_SLOT


def _partition(slot: str) -> str:
    return f"metric_log_{hashlib.sha256(slot.encode()).hexdigest()[:16]}"


# The fence pins the lease row until the commit: a plain `exists` leaks writes of the old epoch.
_APPEND = """
    WITH fence AS MATERIALIZED (
        SELECT 1 FROM lease WHERE name = %(lease)s AND epoch = %(epoch)s FOR SHARE
    ), writable AS MATERIALIZED (
        SELECT count(*) AS runs FROM run
        WHERE run_id = ANY(%(run_ids)s::text[]) AND (NOT deleted OR importing)
    )
    INSERT INTO metric_log (slot, seq, points, body)
    SELECT %(slot)s::text, %(seq)s::bigint, %(points)s::integer, %(body)s::bytea
    FROM fence, writable WHERE writable.runs = %(runs)s
    RETURNING seq
"""
