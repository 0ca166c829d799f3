"""Upkeep of what is stored: what is past its time goes or is archived, then blobs go that nothing refers to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import Null, func, insert, null, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.artifacts.collector import Collected, Collector
from mlplat.artifacts.console import FOLDER as CONSOLE
from mlplat.artifacts.model import served_path
from mlplat.artifacts.references import referred_digests
from mlplat.artifacts.store import ArtifactStore
from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.db.removals import removing
from mlplat.db.tables import artifact_collection, pipeline_run, run
from mlplat.errors import Overloaded, PlatformError
from mlplat.storage.guard import StorageGuard
from mlplat.storage.model import Owner, Retention, owner_of
from mlplat.storage.old_metrics import MetricsPort, OldMetrics
from mlplat.storage.usage import StorageUse, measure_versions, storage_use

PIPELINES = "pipelines"
BATCH = 500
#: In reports: runs that had ended by then have no console any more.
GONE_UNTIL = "consoles_gone_until"
#: How often is looked whether it is time.
LOOK_EVERY_S = 300.0
#: How often a collection looks whether it is still the only one.
ALONE_EVERY_S = 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collection:
    """A collection. ``report``: see ``Collected``, with ``expired_checkpoints`` and ``expired_logs``, folders that
    were past their time, ``archived_runs`` and ``archived_points``, and ``not_archived``, why there are no more of
    these; None while it is under way, and when it was cut short."""

    collection_id: int
    dry_run: bool
    started_at: datetime
    finished_at: datetime | None
    report: dict[str, Any] | None


class Upkeep:
    """Collections of one store; one at a time, whoever asks."""

    def __init__(
        self,
        engine: AsyncEngine,
        store: ArtifactStore,
        guard: StorageGuard,
        metrics: MetricsPort,
        retention: Retention,
    ) -> None:
        self._engine = engine
        self._metrics = OldMetrics(engine, metrics, retention.hot_metrics)
        self._store = store
        self._guard = guard
        self._retention = retention

    async def collect(self, *, dry_run: bool = False) -> Collection:
        """Runs a collection to its end.

        Raises:
            Overloaded: another is under way, or a purge or a backup.
            Corrupted, StorageFull, Unavailable: it was cut short; run it again.
        """
        async with removing(self._engine):
            collection_id = await self._begin(dry_run=dry_run)
        try:
            archived = await self._archive_metrics(dry_run=dry_run)  # the shard takes care of being alone
            async with removing(self._engine) as require_alone:
                report = archived | await self._collect(require_alone, dry_run=dry_run)
        except BaseException:
            with suppress(*CONNECTION_ERRORS):
                await self._end(collection_id, null())
            raise
        return await self._end(collection_id, report)

    async def collect_when_due(self) -> None:
        """Runs collections for ever, one in each interval; what stops one is logged, and it is tried again later."""
        if self._retention.every is None:
            return
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                if await self._is_due(self._retention.every):
                    await self.collect()
            except Overloaded:
                continue
            except (PlatformError, *CONNECTION_ERRORS) as error:
                _log.warning("artifacts were not collected: %s", error)
            except Exception:  # whatever it is, the next one may come to its end
                _log.exception("artifacts were not collected")

    async def last(self, *, limit: int = 1, finished: bool = False) -> list[Collection]:
        """The newest collections; only real ones that came to their end if ``finished``."""
        query = select(artifact_collection).order_by(artifact_collection.c.collection_id.desc()).limit(limit)
        if finished:
            query = query.where(artifact_collection.c.report.is_not(None), ~artifact_collection.c.dry_run)
        async with self._engine.connect() as connection:
            return [Collection(*row) for row in await connection.execute(query)]

    async def use(self) -> StorageUse | None:
        """Who has how much, as of the last collection; None: there was none yet."""
        found = await self.last(finished=True)
        report = found[0].report if found else None
        return None if report is None else await storage_use(self._engine, found[0].started_at, report)

    async def _is_due(self, every: timedelta) -> bool:
        found = await self.last(finished=True)
        return not found or found[0].started_at <= datetime.now(UTC) - every

    async def _begin(self, *, dry_run: bool) -> int:
        """The id of a collection. Others are over, whether they could say so or not."""
        is_open = artifact_collection.c.finished_at.is_(None)
        begin = insert(artifact_collection).values(dry_run=dry_run).returning(artifact_collection.c.collection_id)
        async with self._engine.begin() as connection:
            await connection.execute(
                update(artifact_collection).where(is_open).values(finished_at=func.clock_timestamp())
            )
            return int((await connection.execute(begin)).scalar_one())

    async def _end(self, collection_id: int, report: dict[str, Any] | Null) -> Collection:
        is_it = artifact_collection.c.collection_id == collection_id
        end = update(artifact_collection).where(is_it).values(report=report, finished_at=func.clock_timestamp())
        async with self._engine.begin() as connection:
            return Collection(*(await connection.execute(end.returning(artifact_collection))).one())

    async def _archive_metrics(self, *, dry_run: bool) -> dict[str, Any]:
        """Its part of the report; artifacts do not wait for a metric store that is away. Any: JSON."""
        try:
            archived = await self._metrics.archive(dry_run=dry_run)
        except Overloaded:
            raise
        except PlatformError as error:
            _log.warning("metrics were not archived: %s", error)
            return {"archived_runs": 0, "archived_points": 0, "not_archived": error.message}
        return {"archived_runs": archived.runs, "archived_points": archived.points, "not_archived": None}

    async def _collect(self, require_alone: Callable[[], Awaitable[None]], *, dry_run: bool) -> dict[str, Any]:
        """The report. Any: JSON."""
        checkpoints, logs = await self._expire(dry_run=dry_run)
        consoles, gone_until = await self._expire_consoles(dry_run=dry_run)
        digests = [digest async for digest in referred_digests(self._engine)]
        collector = Collector(self._store.objects, lambda: digests, self._retention.grace.total_seconds())
        collecting = asyncio.get_running_loop().run_in_executor(None, partial(collector.collect, dry_run=dry_run))
        try:
            while not (await asyncio.wait([collecting], timeout=ALONE_EVERY_S))[0]:
                await require_alone()
        finally:  # of two that remove blobs one could take what the other has just pardoned
            collector.give_up()
            await asyncio.wait([collecting])
            collecting.exception()  # it counts as seen: what is raised here tells more
        collected = collecting.result()
        if not dry_run:
            await self._guard.measured(_by_experiment(collected))
            await measure_versions(self._engine, self._store)
        expired = {"expired_checkpoints": checkpoints, "expired_logs": logs + consoles, GONE_UNTIL: gone_until}
        return asdict(collected) | expired

    async def _expire(self, *, dry_run: bool) -> tuple[int, int]:
        """Removes checkpoints and logs of pipeline runs that are past their time; how many folders each."""
        children = await asyncio.to_thread(self._store.list, PIPELINES)
        run_ids = [child.path for child in children if child.is_dir]
        checkpoints = logs = 0
        for start in range(0, len(run_ids), BATCH):
            batch = run_ids[start : start + BATCH]
            checkpoints += await self._remove(
                await self._ended(batch, self._retention.checkpoints), "checkpoints", dry_run
            )
            logs += await self._remove(await self._ended(batch, self._retention.logs), "logs", dry_run)
        return checkpoints, logs

    async def _ended(self, run_ids: list[str], age: timedelta) -> list[str]:
        """Those of the pipeline runs that ended so long ago, and that no run under way goes on from."""
        earlier = (
            select(pipeline_run.c.resumed_from.label("run_id"))
            .where(pipeline_run.c.finished_at.is_(None), pipeline_run.c.resumed_from.is_not(None))
            .cte("earlier", recursive=True)
        )
        before = select(pipeline_run.c.resumed_from).where(
            pipeline_run.c.run_id == earlier.c.run_id, pipeline_run.c.resumed_from.is_not(None)
        )
        needed = earlier.union(before)
        query = select(pipeline_run.c.run_id).where(
            pipeline_run.c.run_id.in_(run_ids),
            pipeline_run.c.finished_at <= func.now() - age,
            pipeline_run.c.run_id.not_in(select(needed.c.run_id)),
        )
        async with self._engine.connect() as connection:
            return list((await connection.execute(query)).scalars())

    async def _remove(self, run_ids: list[str], name: str, dry_run: bool) -> int:
        removed = 0
        for run_id in run_ids:
            folder = f"{PIPELINES}/{run_id}/{name}"
            if await asyncio.to_thread(self._store.list, folder):
                removed += 1
                if not dry_run:
                    await asyncio.to_thread(self._store.delete, folder)
        return removed

    async def _expire_consoles(self, *, dry_run: bool) -> tuple[int, str]:
        """Removes consoles of runs that ended so long ago; how many, and until when runs have ended that have none."""
        until = datetime.now(UTC) - self._retention.logs
        since = await self._gone_until()
        removed, gone_until, after = 0, until, ""
        while True:
            query = (
                select(run.c.run_id, run.c.experiment_id, run.c.artifact_uri, run.c.ended_at)
                .where(run.c.run_id > after, run.c.ended_at <= until)
                .order_by(run.c.run_id)
                .limit(BATCH)
            )
            if since is not None:
                query = query.where(run.c.ended_at >= since)
            # The transaction ends before the files are looked at: servers do not let it idle.
            async with self._engine.connect() as connection:
                rows = (await connection.execute(query)).all()
            for row in rows:
                path = served_path(row.artifact_uri)
                if path is None or not await asyncio.to_thread(self._store.list, f"{path}/{CONSOLE}"):
                    continue
                owner = Owner(str(row.experiment_id), row.run_id)
                if await self._guard.hold_on(owner) or await self._guard.hold_on(owner_of(path)):
                    gone_until = min(gone_until, row.ended_at)  # it goes when the hold is lifted
                    continue
                removed += 1
                if not dry_run:
                    await asyncio.to_thread(self._store.delete, f"{path}/{CONSOLE}")
            if len(rows) < BATCH:
                return removed, gone_until.isoformat()
            after = rows[-1].run_id

    async def _gone_until(self) -> datetime | None:
        """Runs that had ended by then have no console any more; None: nobody knows. A day less, for late ends."""
        last = await self.last(finished=True)
        known = (last[0].report or {}).get(GONE_UNTIL) if last else None
        return None if known is None else datetime.fromisoformat(known) - timedelta(days=1)


def _by_experiment(collected: Collected) -> dict[int, int]:
    return {int(name): usage.size for name, usage in collected.usage.items() if name.isascii() and name.isdecimal()}
