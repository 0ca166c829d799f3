"""Moving points between the metric store and the archive: there when they are old, back when somebody reads them.

Only the shard of a run moves its points. The order of steps makes a crash between any two harmless: a run's file is
written and recorded before its points leave the store, and coming back adds points that may be there already, which
count once.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import pyarrow as pa
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.removals import removing
from mlplat.metrics import changes, queries
from mlplat.metrics.archive import PAGE_POINTS, ArchiveFiles, ArchiveTable
from mlplat.metrics.model import SCHEMA, Archived, concat, with_experiments
from mlplat.metrics.store import MetricStore

#: Runs that are known to have their points in the metric store.
MAX_KNOWN = 100_000

T = TypeVar("T")


class InThread(Protocol):
    """Calls a function in a thread and waits for it."""

    def __call__(self, call: Callable[..., T], /, *arguments: object) -> Awaitable[T]: ...


class Archiver:
    """The moves of one shard.

    Args:
        engine: Postgres.
        store: the metric store.
        files: the archive.
        homes: the experiments of runs.
        write: calls a function in the one thread that inserts points.
        read: calls a function in a thread that reads.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        store: MetricStore,
        files: ArchiveFiles,
        homes: Callable[[Sequence[str]], Awaitable[dict[str, int]]],
        write: InThread,
        read: InThread,
    ) -> None:
        self._engine = engine
        self._table = ArchiveTable(engine)
        self._store = store
        self._files = files
        self._homes = homes
        self._in_writer = write
        self._in_reader = read
        #: Held while points move.
        self.moving = asyncio.Lock()
        self._is_empty: bool | None = None
        self._hot: set[str] = set()
        #: How often points have left the metric store. A read during which that happened may have missed some.
        self.departures = 0

    async def recall(self, run_ids: Sequence[str]) -> None:
        """Returns when all points of the runs are in the metric store.

        Raises:
            Corrupted: a file of the archive is gone or damaged.
            Unavailable, StorageFull: a store is away or full.
        """
        if self._is_empty is None:
            self._is_empty = await self._table.is_empty()
        unknown = [run_id for run_id in run_ids if run_id not in self._hot]
        if self._is_empty or not unknown:
            return
        departures = self.departures
        archived = await self._table.archived(unknown)
        for run_id in archived:
            async with self.moving:
                if run_id not in self._hot:
                    await self._bring_back(run_id)
                    self._know([run_id])
        if departures == self.departures:
            self._know([run_id for run_id in unknown if run_id not in archived])

    async def archive(self, run_ids: Sequence[str]) -> Archived:
        """Moves the points of runs into the archive. Those of a run that gets points meanwhile stay as well.

        Raises:
            Overloaded: a purge, a collection or a backup is under way.
            Corrupted: points that came after a run was archived cannot join the others.
            Unavailable, StorageFull: a store is away or full; what was done is done, repeat the call.
        """
        async with removing(self._engine) as require_alone:
            before = await self._table.archived(run_ids)
            counts = dict[str, int]()
            for run_id in run_ids:
                async with self.moving:
                    if run_id in before:
                        await self._bring_back(run_id)
                    points, size = await self._in_reader(self._export, run_id)
                    await self._table.record(run_id, points, size)
                    self._is_empty = False
                if points:
                    counts[run_id] = points
            await require_alone()
            return await self._depart(counts)

    async def forget(self, run_ids: Sequence[str]) -> int:
        """Removes runs from the archive for good; returns the bytes freed."""
        archived = await self._table.archived(run_ids)
        async with self.moving:
            await self._in_reader(self._files.delete, list(archived))
            await self._table.forget(run_ids)
        return sum(archived.values())

    async def _depart(self, counts: Mapping[str, int]) -> Archived:
        if not counts:
            return Archived()
        async with self.moving:
            self.departures += 1
            self._hot.difference_update(counts)
            gone = await self._in_writer(self._drop, counts)
            if gone:
                await self._table.set_hot(gone, False)
        return Archived(len(gone), sum(counts[run_id] for run_id in gone))

    async def _bring_back(self, run_id: str) -> None:
        await self._table.set_hot([run_id], True)
        homes = await self._homes([run_id])
        pages = self._files.read(run_id)
        while (page := await self._in_reader(next, pages, None)) is not None:
            await self._in_writer(self._store.insert_points, with_experiments(page, homes))

    def _export(self, run_id: str) -> tuple[int, int]:
        return self._files.write(run_id, self._pages(run_id))

    def _pages(self, run_id: str) -> Iterator[pa.Table]:
        """The points of a run in the metric store, in the order of their keys."""
        after = None
        while True:
            page = self._store.query(queries.points_of([run_id], PAGE_POINTS, after))
            if not page.num_rows:
                return
            yield concat([page.select(SCHEMA.names).cast(SCHEMA)])
            if page.num_rows < PAGE_POINTS:
                return
            last = page.slice(page.num_rows - 1).to_pylist()[0]
            value = math.nan if last["value"] is None else last["value"]
            after = (run_id, last["key"], last["step"], last["timestamp"], value)

    def _drop(self, counts: Mapping[str, int]) -> list[str]:
        """Removes the points of those runs that have as many as they should have; which these were.

        In the thread that inserts, so that none can come in between.
        """
        found = self._store.query(changes.counted_points(list(counts))).to_pylist()
        same = [row["run_id"] for row in found if row["points"] == counts[row["run_id"]]]
        if same:
            self._store.change([changes.forget_points(same)])
        return same

    def _know(self, run_ids: Sequence[str]) -> None:
        if len(self._hot) + len(run_ids) > MAX_KNOWN:
            self._hot.clear()
        self._hot.update(run_ids)
