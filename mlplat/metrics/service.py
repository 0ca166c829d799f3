"""What a metric shard does, apart from being an actor.

``append`` acknowledges a batch when the group it joined is committed to the Postgres log. In the
background, groups move into the metric store in large inserts and leave the log. A restart replays
the log from the last mark, so nothing acknowledged is lost, and exact repeats collapse in the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass

import pyarrow as pa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.db.group_commit import GroupCommit
from mlplat.db.lease import LeaseKeeper
from mlplat.errors import Fenced, PlatformError, Unavailable
from mlplat.metrics.buffer import Cached, FlushBuffer
from mlplat.metrics.log import Group, MetricLog
from mlplat.metrics.model import decode, encode
from mlplat.metrics.queries import Statement
from mlplat.metrics.reconcile import apply, experiments_of
from mlplat.metrics.store import MetricStore

MAX_GROUP_BYTES = 8 * 1024 * 1024
MAX_PENDING_BYTES = 64 * 1024 * 1024
MAX_CACHED_BYTES = 128 * 1024 * 1024
FLUSH_POINTS = 100_000
#: How long groups gather before they move on, when nobody wants to read them.
FLUSH_INTERVAL_S = 0.2
REPLAY_GROUPS = 16
READERS = 3
RETRY_S = 0.5


@dataclass
class Counters:
    """Totals since this process started."""

    batches: int = 0
    points: int = 0
    groups: int = 0
    flushed_points: int = 0
    inserts: int = 0
    replayed_groups: int = 0
    flush_errors: int = 0


class MetricService:
    """One shard. Build it inside a running event loop, then ``await start()``."""

    def __init__(self, engine: AsyncEngine, store: MetricStore, lease: LeaseKeeper, shard: str) -> None:
        self._engine = engine
        self._store = store
        self._lease = lease
        self._log = MetricLog(engine, shard)
        self._writer = ThreadPoolExecutor(1, "metric-insert")
        self._readers = ThreadPoolExecutor(READERS, "metric-read")
        self._flushed = asyncio.Condition()
        self._work = asyncio.Event()
        self._hurry = asyncio.Event()
        # What was read from Postgres first is also applied first.
        self._reconciling = asyncio.Lock()
        self.counters = Counters()

    async def start(self) -> None:
        """Takes the shard over, opens the store and starts flushing what the log still holds.

        Raises:
            Unavailable: the metric store cannot be opened.
        """
        await self._lease.start()
        last, flushed = await self._log.positions()
        self._buffer: FlushBuffer[pa.Table] = FlushBuffer(flushed, MAX_CACHED_BYTES)
        self._buffer.last_seq = last
        await self._in(self._writer, self._store.create_tables)
        self._commits = GroupCommit(
            self._commit, weight=lambda table: table.nbytes, max_group=MAX_GROUP_BYTES, max_pending=MAX_PENDING_BYTES
        )
        self._flusher = asyncio.get_running_loop().create_task(self._flush_forever())
        self._work.set()

    async def append(self, batch: bytes) -> int:
        """Makes a batch durable and returns its number of points.

        Raises:
            InvalidInput: not a batch of metric points.
            Overloaded: too much is waiting for the log.
            Unavailable: Postgres is away, or this shard was taken over.
        """
        table = decode(batch)
        if table.num_rows:
            await self._commits.submit(table)
        self.counters.batches += 1
        self.counters.points += table.num_rows
        return int(table.num_rows)

    async def query(self, statement: Statement) -> bytes:
        """Rows of a read as an Arrow IPC stream; sees every point acknowledged before the call.

        Raises:
            Unavailable: the metric store is away, or the flush before the read took too long.
        """
        await self.barrier()
        table = await self._in(self._readers, self._store.query, statement)
        return encode(table)

    async def reconcile(self, run_ids: Sequence[str]) -> int:
        """Makes the metric store agree with Postgres about runs that were purged or moved there.

        Returns:
            Bytes freed in the metric store, an estimate.

        Raises:
            Unavailable: a store is away; repeat the call.
        """
        async with self._reconciling:
            # Points acknowledged or on their way before this call leave the log first, and so cannot come back.
            await self._commits.settle()
            await self.barrier()
            experiments = await experiments_of(self._engine, run_ids)
            freed = await self._in(self._writer, apply, self._store, experiments)
            assert isinstance(freed, int)
            return freed

    async def barrier(self, timeout_s: float = 20.0) -> None:
        """Returns when everything acknowledged so far can be read; at once when idle.

        Raises:
            Unavailable: that took longer than ``timeout_s``.
        """
        target = self._buffer.last_seq
        if self._buffer.flushed_seq >= target:
            return
        self._hurry.set()
        try:
            async with asyncio.timeout(timeout_s), self._flushed:
                await self._flushed.wait_for(lambda: self._buffer.flushed_seq >= target)
        except TimeoutError as error:
            raise Unavailable(f"the metric store is {self._buffer.lag} groups behind; retry") from error

    def lag(self) -> str:
        """What is committed and not yet readable, for people."""
        return f"{self._buffer.lag} groups" if self._buffer.lag else "0"

    def stats(self) -> dict[str, int]:
        """Counters and the state of the buffer."""
        return asdict(self.counters) | {"lag_groups": self._buffer.lag, "cached_bytes": self._buffer.weight}

    async def stop(self) -> None:
        """Flushes what is pending and gives the shard back."""
        await self._commits.close()
        with suppress(Unavailable):  # the log keeps it for the next start
            await self.barrier()
        self._flusher.cancel()
        await self._lease.stop()
        self._store.close()

    async def _commit(self, tables: Sequence[pa.Table]) -> None:
        table = pa.concat_tables(tables)
        group = Group(self._buffer.last_seq + 1, table.num_rows, encode(table, "zstd"))
        try:
            await self._log.append(self._lease.current, group)
        except (Fenced, IntegrityError) as error:  # somebody else writes this shard's log
            self._lease.lost.set()
            raise Fenced("this shard was taken over; retry") from error
        except CONNECTION_ERRORS as error:
            await self._settle_unknown_commit(group, error)
        self._buffer.add(Cached(group.seq, group.points, table.nbytes, table))
        self.counters.groups += 1
        self._work.set()

    async def _settle_unknown_commit(self, group: Group, error: Exception) -> None:
        """After a broken connection the commit may have happened: look, so that numbers stay gapless."""
        try:
            last, _flushed = await self._log.positions()
        except CONNECTION_ERRORS:
            # Unknown for good: start over from what the log says.
            self._lease.lost.set()
            raise Unavailable("Postgres is away; retry") from error
        written = await self._log.read_after(group.seq - 1, 1)
        if last < group.seq or not written or written[0].body != group.body:
            # Not there, or somebody else's: nothing of this group is acknowledged.
            if last >= group.seq:
                self._lease.lost.set()
            raise Unavailable("Postgres is away; retry") from error

    async def _flush_forever(self) -> None:
        while True:
            if self._buffer.lag == 0:
                self._work.clear()
                self._hurry.clear()
                await self._work.wait()
            try:
                await self._gather()
                await self._flush_once()
            except Fenced:
                self._lease.lost.set()
                return
            except (PlatformError, *CONNECTION_ERRORS):
                self.counters.flush_errors += 1
                await asyncio.sleep(RETRY_S)

    async def _gather(self) -> None:
        """Lets groups gather into a large insert, unless a reader waits or there is enough already."""
        if self._buffer.points < FLUSH_POINTS:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), FLUSH_INTERVAL_S)

    async def _flush_once(self) -> None:
        batch = self._buffer.next_batch(FLUSH_POINTS)
        if not batch:
            groups = await self._log.read_after(self._buffer.flushed_seq, REPLAY_GROUPS)
            self.counters.replayed_groups += len(groups)
            batch = [Cached(group.seq, group.points, 0, decode(group.body)) for group in groups]
        if not batch:
            raise Unavailable("the log has less than was committed")
        points = pa.concat_tables([group.body for group in batch])
        await self._in(self._writer, self._store.insert, points)
        await self._log.mark_flushed(self._lease.current, batch[-1].seq)
        self.counters.inserts += 1
        self.counters.flushed_points += points.num_rows
        async with self._flushed:
            self._buffer.mark_flushed(batch[-1].seq)
            self._flushed.notify_all()

    async def _in(self, pool: ThreadPoolExecutor, call: object, *arguments: object) -> object:
        assert callable(call)
        return await asyncio.get_running_loop().run_in_executor(pool, call, *arguments)
