"""Points of old runs leave the metric store for a Parquet file each, and are there again for whoever reads them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.artifacts.store import ArtifactStore
from mlplat.db.lease import LeaseKeeper
from mlplat.db.removals import removing
from mlplat.errors import Corrupted, Overloaded, Unavailable
from mlplat.metrics import changes, queries
from mlplat.metrics.archive import ArchiveFiles, archive_path
from mlplat.metrics.curves import CurveRequest, RunOrigin, read_curves
from mlplat.metrics.downsample import Axis, Buckets, Ends, Selection, bucketed, overview, whole
from mlplat.metrics.model import Archived, Point
from mlplat.metrics.queries import Statement
from mlplat.metrics.service import MetricService
from mlplat.metrics.store import MetricStore
from mlplat.tracking.purge import Scope
from tests.contract.chdb import abandon, as_table, batch, new_run, stored_points, unique
from tests.contract.lifecycle import World

POINTS = [
    *(Point("loss", 1.0 / (step + 1), 1_000 + step, step) for step in range(40)),
    *(Point("loss", -0.0 if step % 2 else math.inf, 900, -step) for step in range(1, 6)),
    *(Point("nan", math.nan, 7, step) for step in range(9)),
    *(Point("nan", value, 7, 3) for value in (1.5, -math.inf)),
    Point("sys/ü ж", 1e-300, 1, 2**62),
]


@dataclass
class Shard:
    """A shard on the metric store, with an archive of its own."""

    engine: AsyncEngine
    url: str
    folder: Path
    name: str = field(default_factory=lambda: unique("shard"))
    files: ArchiveFiles | None = None

    async def start(self) -> None:
        """Starts it, or another one in its place."""
        self.store = MetricStore(self.url)
        files = self.files or ArchiveFiles(f"file://{self.folder}")
        lease = LeaseKeeper(self.engine, self.name, unique("holder"), 60.0)
        self.service = MetricService(self.engine, self.store, lease, self.name, files)
        await self.service.start()

    async def die(self) -> None:
        """As by ``kill -9``."""
        await abandon(self.service)
        async with self.engine.begin() as connection:
            await connection.execute(text("DELETE FROM lease WHERE name = :name"), {"name": self.name})

    async def run(self, points: Sequence[Point] = tuple(POINTS)) -> str:
        """A run with points."""
        run_id = await new_run(self.engine)
        await self.service.append(batch(run_id, points))
        return run_id

    async def rows(self, run_id: str) -> list[tuple[object, ...]]:
        """All points of a run, as somebody reads them."""
        table = as_table(await self.service.query(queries.points_of([run_id], 10_000)))
        return [tuple(row.values()) for row in table.to_pylist()]

    def in_store(self, run_id: str) -> int:
        """Points that the metric store has of a run."""
        return int(self.store.query(stored_points(run_id))["n"][0].as_py())

    async def recorded(self, run_id: str) -> tuple[int, bool]:
        """How many points were archived, and whether the run is hot."""
        query = text("SELECT points, hot_since IS NOT NULL FROM metric_archive WHERE run_id = :run")
        async with self.engine.connect() as connection:
            points, is_hot = (await connection.execute(query, {"run": run_id})).one()
            return points, is_hot


@pytest.fixture
async def shard(engine: AsyncEngine, metric_url: str, tmp_path: Path) -> AsyncIterator[Shard]:
    shard = Shard(engine, metric_url, tmp_path)
    await shard.start()
    yield shard
    await abandon(shard.service)


def _same(left: Iterable[object], right: Iterable[object]) -> bool:
    return repr(list(left)) == repr(list(right))  # NaN is not equal to itself, and both zeros are equal


@pytest.mark.parametrize("page", [7, 200_000])
async def test_points_leave_the_store_and_are_back_when_they_are_read(
    shard: Shard, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlplat.metrics.archiver.PAGE_POINTS", page)
    run_id, other = await shard.run(), await shard.run()
    before, last = await shard.rows(run_id), shard.store.query(queries.latest([run_id])).to_pylist()
    assert len(before) == len(POINTS)
    assert await shard.service.archive([run_id]) == Archived(1, len(POINTS))
    assert (shard.in_store(run_id), shard.in_store(other)) == (0, len(POINTS))
    assert await shard.recorded(run_id) == (len(POINTS), False)
    assert _same(shard.store.query(queries.latest([run_id])).to_pylist(), last), "what runs are searched by stays"
    assert _same(await shard.rows(run_id), before)
    assert await shard.recorded(run_id) == (len(POINTS), True)
    assert shard.in_store(run_id) == len(POINTS)


async def test_every_kind_of_read_finds_archived_points(shard: Shard) -> None:
    run_id = await shard.run()
    request = CurveRequest([RunOrigin(run_id, 0)], ["*"], Axis.STEP, None, None, 5)

    async def query(statement: Statement) -> pa.Table:
        return as_table(await shard.service.query(statement))

    async def answers() -> list[object]:
        reads = (
            queries.history(run_id, "loss", 100), queries.histories([run_id], "nan", 100),
            queries.sampled_histories([run_id], "loss", 5, None), queries.points_of([run_id], 1_000),
        )  # fmt: skip
        found: list[object] = []
        for read in reads:
            await shard.service.archive([run_id])
            found.append((await query(read)).to_pylist())
        await shard.service.archive([run_id])
        curves = await read_curves(query, request)
        return [*found, [(c.key, c.exact, c.steps.to_pylist(), c.values.to_pylist()) for c in curves.curves]]

    archived = await answers()
    assert shard.in_store(run_id) == len(POINTS)
    hot = [(await query(queries.history(run_id, "loss", 100))).to_pylist(), (await read_curves(query, request)).curves]
    assert _same([archived[0]], [hot[0]])
    assert len(hot[1]) == 3
    assert all(archived)


async def test_the_file_is_for_everybody(shard: Shard) -> None:
    run_id = await shard.run()
    await shard.service.archive([run_id])
    path = shard.folder / "copy.parquet"
    path.write_bytes(b"".join(ArtifactStore(f"file://{shard.folder}").read(archive_path(run_id))))
    frame = pd.read_parquet(path)
    assert list(frame.columns) == ["run_id", "key", "step", "timestamp", "value"]
    assert len(frame) == len(POINTS)
    assert set(frame["run_id"]) == {run_id}
    assert frame.loc[frame["key"] == "loss", "value"].max() == math.inf


async def test_points_that_come_late_join_the_others(shard: Shard) -> None:
    run_id = await shard.run()
    await shard.service.archive([run_id])
    late = Point("loss", 3.0, 9_999, 99)
    await shard.service.append(batch(run_id, [late]))
    assert len(await shard.rows(run_id)) == len(POINTS) + 1
    await shard.service.append(batch(run_id, [late._replace(step=100)]))
    assert await shard.service.archive([run_id]) == Archived(1, len(POINTS) + 2)
    assert shard.in_store(run_id) == 0
    assert len(await shard.rows(run_id)) == len(POINTS) + 2


class _Meddled(ArchiveFiles):
    """The real archive, and something that happens once a file is written."""

    meddle = staticmethod(lambda: None)

    def write(self, run_id: str, pages: Iterable[pa.Table]) -> tuple[int, int]:
        """Writes, then meddles."""
        written = super().write(run_id, pages)
        self.meddle()
        return written


async def test_points_that_come_while_a_run_is_archived_are_not_lost(
    engine: AsyncEngine, metric_url: str, tmp_path: Path
) -> None:
    files = _Meddled(f"file://{tmp_path}")
    shard = Shard(engine, metric_url, tmp_path, files=files)
    await shard.start()
    try:
        run_id = await shard.run()
        loop = asyncio.get_running_loop()

        async def log() -> None:
            await shard.service.append(batch(run_id, [Point("loss", 3.0, 9_999, 99)]))
            await shard.service.barrier()

        files.meddle = lambda: asyncio.run_coroutine_threadsafe(log(), loop).result(30)
        assert await shard.service.archive([run_id]) == Archived(0, 0)
        assert shard.in_store(run_id) == len(POINTS) + 1
        files.meddle = lambda: None
        assert await shard.service.archive([run_id]) == Archived(1, len(POINTS) + 1)
        assert len(await shard.rows(run_id)) == len(POINTS) + 1
    finally:
        await abandon(shard.service)


@pytest.mark.parametrize("broken", ["_export", "_drop", "insert_points"])
async def test_a_shard_may_die_at_any_step(shard: Shard, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = await shard.run()
    before = await shard.rows(run_id)
    if broken == "insert_points":  # in the middle of coming back
        await shard.service.archive([run_id])

    def die(*_arguments: object) -> None:
        raise Unavailable("killed here")

    with monkeypatch.context() as patched:
        patched.setattr(shard.store if broken == "insert_points" else shard.service._archiver, broken, die)
        with pytest.raises(Unavailable, match="killed here"):
            await (shard.rows(run_id) if broken == "insert_points" else shard.service.archive([run_id]))
    await shard.die()
    await shard.start()
    assert _same(await shard.rows(run_id), before)
    assert await shard.service.archive([run_id]) == Archived(1, len(POINTS))
    assert shard.in_store(run_id) == 0
    assert _same(await shard.rows(run_id), before)


async def test_who_reads_meanwhile_sees_all_points(shard: Shard) -> None:
    run_ids = [await shard.run() for _ in range(3)]
    done = asyncio.Event()
    reads = 0

    async def read(run_id: str) -> None:
        nonlocal reads
        while not done.is_set():
            assert len(await shard.rows(run_id)) == len(POINTS)
            reads += 1

    async def move() -> int:
        moved = 0
        for _ in range(8):
            moved += (await shard.service.archive(run_ids)).runs
            await asyncio.sleep(0)
        done.set()
        return moved

    async with asyncio.TaskGroup() as tasks:
        moving = tasks.create_task(move())
        for run_id in run_ids:
            tasks.create_task(read(run_id))
    assert moving.result() > 0
    assert reads > 0


async def test_runs_without_points_have_no_file(shard: Shard) -> None:
    run_id = await new_run(shard.engine)
    assert await shard.service.archive([run_id]) == Archived(0, 0)
    assert await shard.recorded(run_id) == (0, False)
    assert not ArtifactStore(f"file://{shard.folder}").has(archive_path(run_id))
    assert await shard.rows(run_id) == []


async def test_a_damaged_file_is_named(shard: Shard) -> None:
    damaged, gone = await shard.run(), await shard.run()
    await shard.service.archive([damaged, gone])
    store = ArtifactStore(f"file://{shard.folder}")
    store.write(archive_path(damaged), [b"PAR1 this is none"])
    store.delete(archive_path(gone))
    for run_id in (damaged, gone):
        with pytest.raises(Corrupted, match=run_id):
            await shard.rows(run_id)
        with pytest.raises(Corrupted, match=run_id):
            await shard.service.archive([run_id])


async def test_nothing_is_archived_while_somebody_removes_or_backs_up(shard: Shard) -> None:
    run_id = await shard.run()
    async with removing(shard.engine):
        with pytest.raises(Overloaded):
            await shard.service.archive([run_id])
    assert shard.in_store(run_id) == len(POINTS)


async def test_a_purge_takes_the_archived_points_along(world: World) -> None:
    experiment_id = await world.experiment()
    run_id, kept = await world.run(experiment_id), await world.run(experiment_id)
    await world.shard.service.archive([run_id, kept])
    assert world.artifacts.has(archive_path(run_id))
    await world.runs.set_deleted(run_id, True)
    report = await world.lifecycle.purger.purge(Scope())
    assert report.runs == 1
    assert not world.artifacts.has(archive_path(run_id))
    assert world.artifacts.has(archive_path(kept))
    assert await world.count("metric_archive") == 1
    assert await world.stored(run_id) == 0


async def test_a_run_that_moves_keeps_its_archived_points(world: World) -> None:
    home, target = await world.experiment(), await world.experiment()
    run_id = await world.run(home)
    await world.shard.service.archive([run_id])
    await world.lifecycle.mover.move([run_id], target, with_children=False)
    found = (await world.shard.query(queries.history(run_id, "loss", 10))).to_pylist()
    assert [row["value"] for row in found] == [0.0, 1.0, 2.0]
    rows = await world.shard.query(
        Statement("SELECT DISTINCT experiment_id FROM metric_points WHERE run_id = {run:String}", {"run": run_id})
    )
    assert rows["experiment_id"].to_pylist() == [target]


def test_all_statements_that_read_points_say_so() -> None:
    """Else they would not see archived ones."""
    selection = Selection(["r"], [0], ["k"], Axis.STEP)
    reads = [
        queries.history("r", "k", 1), queries.histories(["r"], "k", 1), queries.points_of(["r"], 1),
        queries.sampled_histories(["r"], "k", 1, None), overview(selection), whole(selection, 1),
        bucketed(selection, Buckets(0, 1, 2), Ends((0, 1), (0, 1))),
    ]  # fmt: skip
    assert all(statement.reads_points and "metric_points" in statement.sql for statement in reads)
    others = [queries.latest(["r"]), queries.summaries(["r"], 1), queries.series(["r"], ["k"], 1)]
    assert not any(statement.reads_points or "metric_points" in statement.sql for statement in others)
    assert not changes.stored_rows(["r"]).reads_points, "an estimate brings nothing back"
