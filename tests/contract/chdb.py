"""The one chDB path of the test process, services over a metric store, and data for them."""

from __future__ import annotations

import asyncio
import atexit
import random
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache

import pyarrow as pa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.lease import LeaseKeeper
from mlplat.db.tables import experiment, run
from mlplat.metrics.archive import ArchiveFiles
from mlplat.metrics.model import Point, encode, points_table, with_experiments
from mlplat.metrics.queries import Statement
from mlplat.metrics.service import MetricService
from mlplat.metrics.store import MetricStore


@cache
def chdb_url() -> str:
    """The URL of a chDB with its tables that stays open until the process ends: there is one path per process."""
    folder = tempfile.mkdtemp(prefix="mlt-chdb-", dir="/tmp")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    store = MetricStore(f"chdb://{folder}/chdb")
    store.create_tables()
    atexit.register(store.close)
    return f"chdb://{folder}/chdb"


@cache
def archive_url() -> str:
    """The artifact store with the archived points of those tests that ask for no other."""
    folder = tempfile.mkdtemp(prefix="mlt-archive-", dir="/tmp")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return f"file://{folder}"


def new_service(
    engine: AsyncEngine,
    shard: str,
    holder: str = "holder",
    ttl_s: float = 60.0,
    url: str | None = None,
    artifacts_url: str | None = None,
) -> MetricService:
    """A metric shard with a store object of its own, by default on chDB; ``await start()`` it."""
    return service_on(engine, MetricStore(url or chdb_url()), shard, holder, ttl_s, artifacts_url)


def service_on(
    engine: AsyncEngine,
    store: MetricStore,
    shard: str,
    holder: str = "holder",
    ttl_s: float = 60.0,
    artifacts_url: str | None = None,
) -> MetricService:
    """A metric shard on a store; ``await start()`` it."""
    lease = LeaseKeeper(engine, shard, holder, ttl_s)
    return MetricService(engine, store, lease, shard, ArchiveFiles(artifacts_url or archive_url()))


async def abandon(service: MetricService) -> None:
    """Ends a service as ``kill -9`` would: nothing is flushed and no lease is given back."""
    tasks = [service._flusher, service._commits._loop_task, service._lease._task]
    for task in tasks:
        if task is not None:
            task.cancel()
    await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)
    await service._log.disconnect()


def unique(prefix: str) -> str:
    """A name that no other test uses."""
    return f"{prefix}-{uuid.uuid4().hex[:10]}"


def unique_number() -> int:
    """An experiment id that no other test uses."""
    return random.getrandbits(50)


def batch(run_id: str, points: Iterable[Point]) -> bytes:
    """A batch as clients send it."""
    return encode(points_table(run_id, points))


def stored(experiment_id: int, run_id: str, points: Iterable[Point]) -> pa.Table:
    """Points as the metric store takes them."""
    return with_experiments(points_table(run_id, points), {run_id: experiment_id})


async def new_run(engine: AsyncEngine, experiment_id: int = 1) -> str:
    """A run that points may be written to."""
    run_id = unique("run")
    now = datetime.now(UTC)
    new_experiment = insert(experiment).values(
        experiment_id=experiment_id, name=str(experiment_id), artifact_location="x", created_at=now, updated_at=now
    )
    async with engine.begin() as connection:
        await connection.execute(new_experiment.on_conflict_do_nothing())
        await connection.execute(
            insert(run).values(run_id=run_id, experiment_id=experiment_id, name=run_id, status="RUNNING", user_id="",
                               artifact_uri="x", started_at=now)
        )  # fmt: skip
    return run_id


def as_table(body: bytes) -> pa.Table:
    """What a shard answered."""
    with pa.ipc.open_stream(body) as reader:
        return reader.read_all()


def stored_points(run_id: str) -> Statement:
    """Rows ``(n, stored)``: how many points the store shows of a run, and how many rows it keeps for them."""
    return Statement(
        "SELECT (SELECT count() FROM metric_points FINAL WHERE run_id = {run_id:String}) AS n, "
        "(SELECT count() FROM metric_points WHERE run_id = {run_id:String}) AS stored",
        {"run_id": run_id},
    )
