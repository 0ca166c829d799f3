"""What a metric shard does, apart from being an actor.

``append`` acknowledges a batch when the group it joined is committed to the Postgres log. In the
background, groups move into the metric store in large inserts and leave the log. A restart replays
the log from the last mark, so nothing acknowledged is lost, and exact repeats collapse in the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

import pyarrow as pa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.engine import CONNECTION_ERRORS, why_away
from mlplat.db.group_commit import GroupCommit
from mlplat.db.lease import LeaseKeeper
from mlplat.errors import Fenced, Overloaded, PlatformError, Unavailable
from mlplat.metrics.archive import ArchiveFiles
from mlplat.metrics.archiver import Archiver
from mlplat.metrics.buffer import Cached, FlushBuffer
from mlplat.metrics.log import Group, MetricLog, ends_slot
from mlplat.metrics.model import Archived, concat, decode, encode, names_of, with_experiments
from mlplat.metrics.queries import Statement
from mlplat.metrics.reconcile import apply
from mlplat.metrics.record import pack, unpack
from mlplat.metrics.store import MetricStore
from mlplat.metrics.summary import last_points, merge_last_points

#: What a table takes in memory besides its body, however few rows it has; measured: 5.7 KiB.
TABLE_BYTES = 8 * 1024
MAX_GROUP_BYTES = 8 * 1024 * 1024
MAX_PENDING_BYTES = 64 * 1024 * 1024
MAX_CACHED_BYTES = 128 * 1024 * 1024
#: The log may grow so far while the metric store is away; then batches are refused until it shrinks.
MAX_LOG_BYTES = 16 * 1024 * 1024 * 1024
LOG_SIZE_INTERVAL_S = 5.0
FLUSH_POINTS = 500_000
#: How long groups gather before they move on, when nobody wants to read them.
FLUSH_INTERVAL_S = 1.0
#: What is read of the log at a time; points are what counts in memory.
REPLAY_GROUPS = 2_000
READERS = 3
RETRY_S = 0.5
#: A read during which points were archived is done again, so often at most.
READ_TRIES = 5

R = TypeVar("R")
#: Writes that belong to a batch and are committed with it: params and tags of the same request.
Update = Callable[[AsyncConnection], Awaitable[object]]


@dataclass
class Batch:
    """A batch on its way into the log; ``problem`` is why it was refused, alone of its group."""

    body: bytes
    table: pa.Table
    run_ids: frozenset[str]
    update: Update | None
    problem: Exception | None = None

    @property
    def weight(self) -> int:
        """Bytes in memory: the table's columns lie in the body, unless that is compressed."""
        return max(len(self.body), int(self.table.nbytes)) + TABLE_BYTES


@dataclass
class Counters:
    """Totals since this process started."""

    batches: int = 0
    points: int = 0
    groups: int = 0
    refused_batches: int = 0
    flushed_points: int = 0
    inserts: int = 0
    replayed_groups: int = 0
    flush_errors: int = 0


class MetricService:
    """One shard. Build it inside a running event loop, then ``await start()``."""

    def __init__(
        self, engine: AsyncEngine, store: MetricStore, lease: LeaseKeeper, shard: str, archive: ArchiveFiles
    ) -> None:
        self._store = store
        self._lease = lease
        self._log = MetricLog(engine, shard)
        self._writer = ThreadPoolExecutor(1, "metric-insert")
        self._readers = ThreadPoolExecutor(READERS, "metric-read")
        self._archiver = Archiver(
            engine, store, archive, self._log.experiments_of, partial(self._in, self._writer),
            partial(self._in, self._readers),
        )  # fmt: skip
        self._flushed = asyncio.Condition()
        self._work = asyncio.Event()
        self._hurry = asyncio.Event()
        # What was read from Postgres first is also applied first.
        self._reconciling = asyncio.Lock()
        # The last points of groups that are not flushed yet, made when somebody reads them.
        self._last_points: dict[int, pa.Table] = {}
        # The groups of the log behind a number, on their way.
        self._ahead: tuple[int, asyncio.Task[list[Cached[pa.Table]]]] | None = None
        self._is_open = False
        # Why the last attempt to move groups on was in vain.
        self._problem = ""
        self._log_bytes = 0
        self._log_measured_at = 0.0
        self.counters = Counters()

    async def start(self) -> None:
        """Takes the shard over and starts flushing what the log still holds. The metric store may be away meanwhile."""
        held = await self._lease.start()
        await self._log.prepare()
        last, flushed = await self._log.positions()
        await self._log.truncate_flushed(held, flushed)
        self._buffer: FlushBuffer[pa.Table] = FlushBuffer(flushed, last, MAX_CACHED_BYTES)
        self._commits: GroupCommit[Batch] = GroupCommit(
            self._commit,
            weight=lambda batch: batch.weight,
            max_group=MAX_GROUP_BYTES,
            max_pending=MAX_PENDING_BYTES,
        )
        self._flusher = asyncio.get_running_loop().create_task(self._flush_forever())
        self._work.set()

    async def append(self, body: bytes, update: Update | None = None) -> int:
        """Makes a batch durable, in one transaction with ``update``, and returns its number of points.

        Raises:
            InvalidInput: not a batch of metric points, or one of its runs is deleted.
            NotFound: one of its runs does not exist.
            Overloaded: too much is waiting for the log, or the log for the metric store.
            Unavailable: Postgres is away, or this shard was taken over.
        """
        table = decode(body)
        if self._log_bytes > MAX_LOG_BYTES:
            raise Overloaded(f"{self._log_bytes} bytes of metric points wait for the metric store; retry later")
        if table.num_rows:
            batch = Batch(body, table, frozenset(names_of(table, "run_id")), update)
            await self._commits.submit(batch)
            if batch.problem is not None:
                self.counters.refused_batches += 1
                raise batch.problem
        self.counters.batches += 1
        self.counters.points += table.num_rows
        return int(table.num_rows)

    async def query(self, statement: Statement) -> bytes:
        """Rows of a read as an Arrow IPC stream; sees every point acknowledged before the call.

        Raises:
            Corrupted: archived points cannot be read.
            Unavailable: the metric store is away, or the flush before the read took too long.
        """
        await self._open_store()
        if statement.gives_last_points and statement.run_ids is not None:
            pending = self._buffer.pending(statement.run_ids)
            if pending is not None:
                return encode(await self._with_pending(statement, statement.run_ids, pending))
        await self.barrier(statement.run_ids)
        if statement.reads_points and statement.run_ids is not None:
            return encode(await self._read_points(statement, statement.run_ids))
        return encode(await self._in(self._readers, self._store.query, statement))

    async def _read_points(self, statement: Statement, run_ids: Sequence[str]) -> pa.Table:
        for _ in range(READ_TRIES):
            departures = self._archiver.departures
            await self._archiver.recall(run_ids)
            table = await self._in(self._readers, self._store.query, statement)
            if departures == self._archiver.departures:
                return table
        raise Unavailable("points were archived while they were read; retry")

    async def archive(self, run_ids: Sequence[str]) -> Archived:
        """See ``Archiver.archive``; what was acknowledged before this call is archived with the rest."""
        await self._open_store()
        await self._commits.settle()
        await self.barrier(run_ids)
        return await self._archiver.archive(run_ids)

    async def _with_pending(
        self, statement: Statement, run_ids: Sequence[str], pending: Sequence[Cached[pa.Table]]
    ) -> pa.Table:
        """Rows of a read of last points: of the store, and of groups that were pending before it was asked."""
        stored = await self._in(self._readers, self._store.query, statement)
        if not pending:
            return stored
        tables = [await self._last_points_of(group) for group in pending]
        return await self._in(self._readers, merge_last_points, stored, tables, run_ids)

    async def _last_points_of(self, group: Cached[pa.Table]) -> pa.Table:
        known = self._last_points.get(group.seq)
        if known is not None:
            return known
        points = await self._in(self._readers, lambda: last_points(concat([group.body])))
        if group.seq > self._buffer.flushed_seq:  # else nobody asks for it again
            self._last_points[group.seq] = points
        return points

    async def reconcile(self, run_ids: Sequence[str]) -> int:
        """Makes the metric store agree with Postgres about runs that were purged or moved there.

        Returns:
            Bytes freed in the metric store, an estimate, and in the archive.

        Raises:
            Unavailable: a store is away; repeat the call.
        """
        async with self._reconciling:
            # Points acknowledged or on their way before this call leave the log first, and so cannot come back.
            await self._commits.settle()
            await self.barrier()
            known = await self._log.experiments_of(run_ids)
            freed = await self._archiver.forget([run_id for run_id in run_ids if run_id not in known])
            async with self._archiver.moving:
                homes = {run_id: known.get(run_id) for run_id in run_ids}
                return freed + await self._in(self._writer, apply, self._store, homes)

    async def barrier(self, run_ids: Sequence[str] | None = None, timeout_s: float = 20.0) -> None:
        """Returns when everything acknowledged so far of these runs (None: of all) can be read; at once when idle.

        Raises:
            Unavailable: that took longer than ``timeout_s``.
        """
        target = self._buffer.pending_seq(run_ids)
        if self._buffer.flushed_seq >= target:
            return
        self._hurry.set()
        try:
            async with asyncio.timeout(timeout_s), self._flushed:
                await self._flushed.wait_for(lambda: self._buffer.flushed_seq >= target)
        except TimeoutError as error:
            raise Unavailable(f"the metric store is {self._buffer.lag} groups behind; retry") from error

    def lag(self) -> str:
        """What is committed and not yet readable, for people, and what is in the way."""
        if not self._buffer.lag:
            return "0"
        return f"{self._buffer.lag} groups" + (f": {self._problem}" if self._problem else "")

    def stats(self) -> dict[str, int]:
        """Counters and the state of the buffer."""
        return asdict(self.counters) | {
            "lag_groups": self._buffer.lag,
            "cached_bytes": self._buffer.weight,
            "pending_bytes": self._commits.pending,
            "log_bytes": self._log_bytes,
        }

    async def stop(self) -> None:
        """Flushes what is pending and gives the shard back."""
        await self._commits.close()
        with suppress(Unavailable):  # the log keeps it for the next start
            await self.barrier()
        self._flusher.cancel()
        await self._log.disconnect()
        await self._lease.stop()
        self._store.close()

    async def _commit(self, batches: Sequence[Batch]) -> None:
        points = [batch for batch in batches if batch.update is None]
        if points:
            await self._commit_points(points)
        for batch in batches:
            if batch.update is not None:
                await self._commit_with_update(batch, batch.update)

    async def _commit_points(self, batches: Sequence[Batch]) -> None:
        run_ids = frozenset[str]().union(*(batch.run_ids for batch in batches))
        group = self._group(batches)
        if await self._append(group, self._log.append(self._lease.current, group, sorted(run_ids))):
            self._committed(group, batches, run_ids)
            return
        refusals = await self._log.refusals(sorted(run_ids))
        for batch in batches:
            batch.problem = next((refusals[run_id] for run_id in batch.run_ids if run_id in refusals), None)
        accepted = [batch for batch in batches if batch.problem is None]
        if len(accepted) == len(batches):
            raise Unavailable("a run came and went while its points were written; retry")
        if accepted:
            await self._commit_points(accepted)

    async def _commit_with_update(self, batch: Batch, update: Update) -> None:
        group = self._group([batch])
        try:
            await self._append(group, self._log.append_with(self._lease.current, group, update))
        except Unavailable:
            raise
        except Exception as error:  # refused for its own sake: the rest of the group is not concerned
            batch.problem = error
            return
        self._committed(group, [batch], batch.run_ids)

    def _group(self, batches: Sequence[Batch]) -> Group:
        points = sum(batch.table.num_rows for batch in batches)
        return Group(self._buffer.last_seq + 1, points, pack([batch.body for batch in batches]))

    async def _append(self, group: Group, appending: Awaitable[bool]) -> bool:
        try:
            return await appending
        except (Fenced, IntegrityError) as error:  # somebody else writes this shard's log
            self._lease.lost.set()
            raise Fenced("this shard was taken over; retry") from error
        except CONNECTION_ERRORS as error:
            await self._settle_unknown_commit(group, error)
            return True

    def _committed(self, group: Group, batches: Sequence[Batch], run_ids: frozenset[str]) -> None:
        table, weight = pa.concat_tables([batch.table for batch in batches]), sum(batch.weight for batch in batches)
        self._buffer.add(Cached(group.seq, group.points, weight, table, run_ids))
        self.counters.groups += 1
        self._work.set()

    async def _settle_unknown_commit(self, group: Group, error: Exception) -> None:
        """After a broken connection the commit may have happened: look, so that numbers stay gapless."""
        try:
            last, _flushed = await self._log.positions()
        except CONNECTION_ERRORS:
            # Unknown for good: start over from what the log says.
            self._lease.lost.set()
            raise Unavailable(why_away(error)) from error
        written = await self._log.read_after(group.seq - 1, 1)
        if last < group.seq or not written or written[0].body != group.body:
            # Not there, or somebody else's: nothing of this group is acknowledged.
            if last >= group.seq:
                self._lease.lost.set()
            raise Unavailable(why_away(error)) from error

    async def _open_store(self) -> None:
        if not self._is_open:
            await self._in(self._writer, self._store.create_tables)
            self._is_open = True

    async def _flush_forever(self) -> None:
        while True:
            try:
                await self._measure_log()
                await self._open_store()
                if self._buffer.lag == 0:
                    self._work.clear()
                    self._hurry.clear()
                    await self._work.wait()
                await self._gather()
                if self._problem:  # else every attempt would put half a million points together in vain
                    await self._in(self._writer, self._store.check)
                await self._flush_once()
                self._problem = ""
            except Fenced:
                self._lease.lost.set()
                return
            except (PlatformError, *CONNECTION_ERRORS) as error:
                self._problem = error.message if isinstance(error, PlatformError) else why_away(error)
                self.counters.flush_errors += 1
                await asyncio.sleep(RETRY_S)

    async def _gather(self) -> None:
        """Lets groups gather into a large insert, unless a reader waits, or there is enough already, if in the log."""
        if self._buffer.next_batch(1) and self._buffer.points < FLUSH_POINTS:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), FLUSH_INTERVAL_S)

    async def _measure_log(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._log_measured_at > LOG_SIZE_INTERVAL_S:
            self._log_measured_at = now
            self._log_bytes = await self._log.size_bytes()

    async def _flush_once(self) -> None:
        batch = self._buffer.next_batch(FLUSH_POINTS)
        if not batch:
            batch = await self._next_of_log()
        points = await self._in(self._writer, concat, [group.body for group in batch])
        experiments = await self._log.experiments_of(names_of(points, "run_id"))
        await self._in(self._writer, self._insert, points, experiments)
        flushed_before, seq = self._buffer.flushed_seq, batch[-1].seq
        await self._log.mark_flushed(self._lease.current, seq)
        self.counters.inserts += 1
        self.counters.flushed_points += points.num_rows
        async with self._flushed:
            self._buffer.mark_flushed(seq)
            self._last_points = {number: kept for number, kept in self._last_points.items() if number > seq}
            self._flushed.notify_all()
        if ends_slot(flushed_before, seq):
            await self._log.truncate_flushed(self._lease.current, seq)

    def _insert(self, points: pa.Table, experiments: dict[str, int]) -> None:
        self._store.insert(with_experiments(points, experiments))

    async def _next_of_log(self) -> list[Cached[pa.Table]]:
        """What to flush next, from the log; what comes after it is read while this is inserted."""
        seq = self._buffer.flushed_seq
        ahead, self._ahead = self._ahead, None
        batch = await (ahead[1] if ahead is not None and ahead[0] == seq else self._read_log(seq))
        if not batch:
            raise Unavailable("the log has less than was committed")
        last = batch[-1].seq
        if last < self._buffer.last_seq:
            self._ahead = (last, asyncio.get_running_loop().create_task(self._read_log(last)))
        self.counters.replayed_groups += len(batch)
        return batch

    async def _read_log(self, seq: int) -> list[Cached[pa.Table]]:
        groups = await self._log.read_after(seq, REPLAY_GROUPS, FLUSH_POINTS)
        return await self._in(self._readers, lambda: [_decoded(group) for group in groups])

    async def _in(self, pool: ThreadPoolExecutor, call: Callable[..., R], *arguments: object) -> R:
        return await asyncio.get_running_loop().run_in_executor(pool, call, *arguments)


def _decoded(group: Group) -> Cached[pa.Table]:
    table = concat([decode(body) for body in unpack(group.body)])  # in one: there may be thousands
    return Cached(group.seq, group.points, 0, table)
