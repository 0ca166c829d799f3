"""Stores with runs in them, for the tests of purge, move and import."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.artifacts.store import ArtifactStore
from mlplat.lineage.keeper import LineageKeeper
from mlplat.lineage.records import RunRecords
from mlplat.metrics import changes
from mlplat.metrics.model import Point
from mlplat.metrics.queries import Statement
from mlplat.metrics.service import MetricService
from mlplat.storage.guard import StorageGuard
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.lifecycle import Lifecycle
from mlplat.tracking.runs import RunStore
from tests.contract.chdb import as_table, batch, unique

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Shard:
    """A metric shard that can be told to be away."""

    def __init__(self, service: MetricService) -> None:
        self.service = service
        self.away: Exception | None = None

    async def query(self, statement: Statement) -> pa.Table:
        """Rows of a read."""
        return as_table(await self.service.query(statement))

    async def reconcile(self, run_ids: Sequence[str]) -> int:
        """Bytes freed."""
        if self.away is not None:
            raise self.away
        return await self.service.reconcile(run_ids)


@dataclass
class World:
    """The stores, with shorthands."""

    engine: AsyncEngine
    shard: Shard
    artifacts: ArtifactStore
    folder: Path

    def __post_init__(self) -> None:
        self.experiments = ExperimentStore(self.engine, "mlflow-artifacts:")
        self.runs = RunStore(self.engine)
        self.records = RunRecords(self.engine, self.artifacts, self.shard.query)
        keeper = LineageKeeper(self.records)
        self.lifecycle = Lifecycle.build(
            self.engine, self.artifacts, self.shard, keeper, StorageGuard(self.engine), "mlflow-artifacts:"
        )

    async def experiment(self) -> int:
        """A new experiment, with an id that no other test's has: they share a metric store."""
        await self.execute(
            "SELECT setval(pg_get_serial_sequence('experiment', 'experiment_id'), :id)", id=random.getrandbits(30)
        )
        return await self.experiments.create(unique("experiment"), None, {})

    async def run(
        self, experiment_id: int, *, parent: str | None = None, points: int = 3, deleted: bool = False
    ) -> str:
        """A new run with a param, points of ``loss`` and a file of 100 bytes."""
        run_id = unique("run")
        tags = {"mlflow.parentRunId": parent} if parent else {}
        found = await self.runs.create(run_id, experiment_id, None, "me", NOW, tags)
        await self.runs.log(run_id, {"rate": "0.1"}, {})
        if points:
            await self.log(run_id, points)
        self.artifacts.write(f"{found.artifact_uri.removeprefix('mlflow-artifacts:/')}/file.bin", [b"x" * 100])
        if deleted:
            await self.runs.set_deleted(run_id, True)
        return run_id

    async def log(self, run_id: str, points: int, start: int = 0) -> None:
        """Points of ``loss``: the value is the step."""
        rows = [Point("loss", float(step), 1_000 + step, step) for step in range(start, start + points)]
        await self.shard.service.append(batch(run_id, rows))

    async def stored(self, run_id: str) -> int:
        """Rows that the metric store keeps of a run, in all its tables."""
        return sum((await self.shard.query(changes.stored_rows([run_id])))["rows"].to_pylist())

    async def found_by_metric(self, experiment_id: int) -> set[str]:
        """The runs that a search by metric finds in an experiment."""
        query = "SELECT DISTINCT run_id FROM metric_latest WHERE experiment_id = {e:Int64} AND key = 'loss'"
        table = await self.shard.query(Statement(query, {"e": experiment_id}))
        return set(table["run_id"].to_pylist())

    async def execute(self, statement: str, **values: object) -> None:
        """SQL, for what no method does."""
        async with self.engine.begin() as connection:
            await connection.execute(text(statement), values)

    async def count(self, table: str) -> int:
        """Rows of a table."""
        async with self.engine.connect() as connection:
            return int((await connection.execute(text(f"SELECT count(*) FROM {table}"))).scalar_one())

    def files(self) -> list[str]:
        """Paths of all artifacts."""
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())
