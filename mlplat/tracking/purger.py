"""Purging: deleted runs and experiments leave all three stores for good.

Order: mark the runs in Postgres, keep the lineage of the model versions that came from them, remove their
artifacts, remove their rows (and note the runs for the metric store in the same transaction), remove their
points. The marks and the notes survive a crash at any point, and the next purge finishes first what an earlier
one began. Active runs are never touched: only deleted ones are marked, and marked ones cannot be restored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

from sqlalchemy import ColumnElement, Table, and_, delete, exists, func, literal_column, or_, select, union_all, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.artifacts.model import served_path
from mlplat.artifacts.store import ArtifactStore
from mlplat.db.removals import removing
from mlplat.db.tables import experiment, logged_model, metadata, model_version, run, run_import
from mlplat.errors import InvalidInput
from mlplat.metrics import changes
from mlplat.storage.guard import StorageGuard
from mlplat.storage.model import Owner, owner_of
from mlplat.tracking.metric_outbox import MetricOutbox, MetricStorePort, note
from mlplat.tracking.model import DEFAULT_EXPERIMENT_ID
from mlplat.tracking.purge import DeletedRun, Holders, Kept, PurgeReport, Scope, run_folder, split

MAX_RUNS = 1_000
#: An import that nobody went on with for so long was given up.
ABANDONED_IMPORT = timedelta(days=1)
_RUN_COLUMNS = (run.c.run_id, run.c.experiment_id, run.c.artifact_uri)


class LineagePort(Protocol):
    """Keeps what model versions came from."""

    async def keep_runs(self, run_ids: Sequence[str]) -> None:
        """Before the runs are removed; repeats are harmless."""
        ...

    async def keep_models(self, connection: AsyncConnection, experiment_id: int) -> None:
        """Before the logged models of an experiment are removed, in that transaction."""
        ...


class Purger:
    """One purge runs at a time, whoever asks."""

    def __init__(
        self,
        engine: AsyncEngine,
        artifacts: ArtifactStore,
        metrics: MetricStorePort,
        outbox: MetricOutbox,
        lineage: LineagePort,
        guard: StorageGuard,
    ) -> None:
        self._guard = guard
        self._engine = engine
        self._artifacts = artifacts
        self._metrics = metrics
        self._outbox = outbox
        self._lineage = lineage

    async def purge(
        self, scope: Scope, *, limit: int = MAX_RUNS, after: str = "", dry_run: bool = False
    ) -> PurgeReport:
        """Removes at most ``limit`` runs behind run id ``after``, and after the last of them the experiments.

        Raises:
            InvalidInput: a run that was asked for by id is not deleted. Nothing was removed.
            Overloaded: another purge, or a backup, is under way.
            Unavailable: a store is away. What was begun is finished by the next purge.
        """
        report = PurgeReport()
        if dry_run:
            await self._sweep(scope, report, limit, after, dry_run=True)
            return report
        async with removing(self._engine):
            await self._check_named(scope, report)
            await self._finish_begun(report)
            await self._sweep(scope, report, limit, after, dry_run=False)
        return report

    async def _sweep(self, scope: Scope, report: PurgeReport, limit: int, after: str, *, dry_run: bool) -> None:
        if dry_run:
            await self._check_named(scope, report)
        holders = await self._holders()
        found = await self._find_runs(scope, limit + 1, after)
        page = found[:limit]
        runs, kept = split(page, holders)
        runs, on_hold = await self._split_held(runs)
        kept += on_hold
        report.kept += kept
        if dry_run:
            await self._measure(runs, report)
        else:
            await self._remove(await self._mark(runs), report)
        if len(found) > limit:
            report.next = page[-1].run_id
        elif scope.run_ids is None:
            kept_ids = {each.id for each in kept}
            held = {each.experiment_id for each in page if each.run_id in kept_ids}
            await self._sweep_experiments(scope, report, holders, held, dry_run=dry_run)

    async def _check_named(self, scope: Scope, report: PurgeReport) -> None:
        if not scope.run_ids:
            return
        async with self._engine.connect() as connection:
            query = select(run.c.run_id, run.c.deleted).where(run.c.run_id.in_(scope.run_ids))
            deleted = {row.run_id: row.deleted for row in await connection.execute(query)}
        active = sorted(run_id for run_id, is_deleted in deleted.items() if not is_deleted)
        if active:
            raise InvalidInput(f"The run {active[0]} is active; only deleted runs can be purged. Delete it first.")
        report.missing += sorted(set(scope.run_ids) - set(deleted))

    async def _split_held(self, runs: Sequence[DeletedRun]) -> tuple[list[DeletedRun], list[Kept]]:
        """The runs to remove, and those that stay because of a legal hold."""
        taken: list[DeletedRun] = []
        kept: list[Kept] = []
        for each in runs:
            hold = await self._guard.hold_on(Owner(str(each.experiment_id), each.run_id), fresh=not taken and not kept)
            if hold is None:  # the run may have left a held experiment, its files have not
                hold = await self._guard.hold_on(owner_of(served_path(each.artifact_uri) or ""))
            if hold is None:
                taken.append(each)
            else:
                kept.append(Kept("run", each.run_id, f"legal hold on {hold.subject}: {hold.reason}"))
        return taken, kept

    async def _holders(self) -> Holders:
        async with self._engine.connect() as connection:
            query = select(model_version.c.name, model_version.c.version, model_version.c.artifact_uri)
            rows = (await connection.execute(query)).all()
        return Holders((f"model version {row.name} {row.version}", row.artifact_uri) for row in rows)

    async def _find_runs(self, scope: Scope, limit: int, after: str) -> list[DeletedRun]:
        query = (
            select(*_RUN_COLUMNS)
            .join(experiment, experiment.c.experiment_id == run.c.experiment_id)
            .where(_is_old(run, scope.older_than), _in_scope(scope), run.c.run_id > after)
            .order_by(run.c.run_id)
            .limit(limit)
        )
        if scope.run_ids is not None:
            query = query.where(run.c.run_id.in_(scope.run_ids))
        async with self._engine.connect() as connection:
            return [DeletedRun(*row) for row in await connection.execute(query)]

    async def _mark(self, runs: Sequence[DeletedRun]) -> list[DeletedRun]:
        """Those of the runs that are still deleted, from now on for good."""
        statement = (
            update(run)
            .where(run.c.run_id.in_([candidate.run_id for candidate in runs]), run.c.deleted)
            .values(purge_started_at=func.clock_timestamp())
        )
        async with self._engine.begin() as connection:
            return [DeletedRun(*row) for row in await connection.execute(statement.returning(*_RUN_COLUMNS))]

    async def _finish_begun(self, report: PurgeReport) -> None:
        query = select(*_RUN_COLUMNS).where(run.c.deleted, run.c.purge_started_at.is_not(None)).limit(MAX_RUNS)
        while True:
            async with self._engine.connect() as connection:
                runs = [DeletedRun(*row) for row in await connection.execute(query)]
            if not runs:
                break
            await self._remove(runs, report)
        report.metric_bytes += await self._outbox.settle()

    async def _measure(self, runs: Sequence[DeletedRun], report: PurgeReport) -> None:
        run_ids = [each.run_id for each in runs]
        report.runs += len(runs)
        report.postgres_bytes += await self._row_bytes(run_ids)
        for each in runs:
            await self._measure_artifacts(each, report)
        if run_ids:
            table = await self._metrics.query(changes.stored_rows(run_ids))
            report.metric_bytes += sum(table["bytes"].to_pylist())

    async def _measure_artifacts(self, each: DeletedRun, report: PurgeReport) -> str | None:
        """The folder of the run in the artifact store, None when its artifacts live elsewhere."""
        path = served_path(each.artifact_uri)
        if path is None:
            report.kept.append(Kept("artifacts", each.run_id, f"they live at {each.artifact_uri}"))
            return None
        folder = run_folder(path, each.run_id)
        files, size = await asyncio.to_thread(self._artifacts.usage, folder)
        report.artifact_files += files
        report.artifact_bytes += size
        return folder

    async def _remove(self, runs: Sequence[DeletedRun], report: PurgeReport) -> None:
        """Removes marked runs from the three stores, artifacts first."""
        if not runs:
            return
        await self._lineage.keep_runs([each.run_id for each in runs])
        for each in runs:
            folder = await self._measure_artifacts(each, report)
            if folder is not None:
                await asyncio.to_thread(self._artifacts.delete, folder)
        run_ids = [each.run_id for each in runs]
        report.postgres_bytes += await self._row_bytes(run_ids)
        async with self._engine.begin() as connection:
            await connection.execute(delete(run_import).where(run_import.c.run_id.in_(run_ids)))
            await connection.execute(delete(run).where(run.c.run_id.in_(run_ids)))
            await note(connection, run_ids)
        report.metric_bytes += await self._outbox.settle()
        report.runs += len(runs)

    async def _row_bytes(self, run_ids: Sequence[str]) -> int:
        """Bytes of the runs' rows in every table that belongs to runs, without indexes."""
        if not run_ids:
            return 0
        parts = union_all(
            *(
                select(func.sum(func.pg_column_size(literal_column(table.name))).label("bytes"))
                .select_from(table)
                .where(column.in_(run_ids))
                for table, column in _RUN_TABLES
            )
        ).subquery()
        async with self._engine.connect() as connection:
            return int((await connection.execute(select(func.sum(parts.c.bytes)))).scalar_one() or 0)

    async def _sweep_experiments(
        self, scope: Scope, report: PurgeReport, holders: Holders, held: set[int], *, dry_run: bool
    ) -> None:
        """Removes deleted experiments that have no run left, in a dry run: none but those that would be removed."""
        left = run.c.experiment_id == experiment.c.experiment_id
        if dry_run:
            left &= ~_is_old(run, scope.older_than)
        begun = experiment.c.purge_started_at.is_not(None)
        query = select(experiment.c.experiment_id, experiment.c.artifact_location).where(
            begun | (_is_old(experiment, scope.older_than) & _in_scope(scope)),
            experiment.c.experiment_id.not_in([DEFAULT_EXPERIMENT_ID, *held]),
            ~exists().where(left),
        )
        async with self._engine.connect() as connection:
            found = [(row.experiment_id, row.artifact_location) for row in await connection.execute(query)]
        for experiment_id, location in found:
            version = holders.of(location)
            hold = await self._guard.hold_on(Owner(str(experiment_id)))
            if hold is not None:
                report.kept.append(Kept("experiment", str(experiment_id), f"legal hold: {hold.reason}"))
            elif version is not None:
                report.kept.append(Kept("experiment", str(experiment_id), f"{version} uses its artifacts"))
            elif dry_run or await self._remove_experiment(experiment_id, location):
                report.experiments += 1

    async def _remove_experiment(self, experiment_id: int, location: str) -> bool:
        """False when it was restored meanwhile."""
        is_it = experiment.c.experiment_id == experiment_id
        mark = update(experiment).where(is_it, experiment.c.deleted).values(purge_started_at=func.clock_timestamp())
        root = f"{location.rstrip('/')}/"
        elsewhere = or_(
            exists().where(func.starts_with(run.c.artifact_uri, root)),
            exists().where(
                func.starts_with(logged_model.c.artifact_location, root), logged_model.c.experiment_id != experiment_id
            ),
        )
        async with self._engine.begin() as connection:
            if not (await connection.execute(mark)).rowcount:
                return False
            is_shared = bool((await connection.execute(select(elsewhere))).scalar_one())
        path = served_path(location)
        # A folder of the experiment's own, in which no run or model that moved keeps its artifacts.
        if path is not None and not is_shared and path.rpartition("/")[2] == str(experiment_id):
            await asyncio.to_thread(self._artifacts.delete, path)
        async with self._engine.begin() as connection:
            await self._lineage.keep_models(connection, experiment_id)
            await connection.execute(
                delete(experiment).where(is_it, ~exists().where(run.c.experiment_id == experiment_id))
            )
        return True


def _is_old(table: Table, older_than: timedelta) -> ColumnElement[bool]:
    return and_(table.c.deleted, table.c.deleted_at <= func.now() - older_than, table.c.purge_started_at.is_(None))


def _in_scope(scope: Scope) -> ColumnElement[bool]:
    """Of the experiment: named, or when nothing is, not in the middle of an import."""
    if scope.experiment_ids is not None:
        return experiment.c.experiment_id.in_(scope.experiment_ids)
    return or_(~experiment.c.importing, experiment.c.deleted_at < func.now() - ABANDONED_IMPORT)


def _tables_of_runs() -> list[tuple[Table, ColumnElement[str]]]:
    """``run`` and the tables whose rows go with a run, each with the column that names it."""
    found: list[tuple[Table, ColumnElement[str]]] = [(run, run.c.run_id)]
    for table in metadata.sorted_tables:
        found += [(table, key.parent) for key in table.foreign_keys if key.references(run)]
    return found


_RUN_TABLES = _tables_of_runs()
