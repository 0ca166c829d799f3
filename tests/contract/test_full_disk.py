"""A Postgres whose disk is nearly full: it is read, drained and kept, and takes nothing new."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine

from cluster.postgres import EmbeddedPostgres
from mlplat.db.engine import why_away
from mlplat.db.lease import acquire, release, renew
from mlplat.errors import Unavailable
from mlplat.metrics.model import Point
from mlplat.metrics.service import MetricService
from tests.contract.chdb import abandon, as_table, batch, new_run, new_service, stored_points, unique
from tests.contract.waiting import until


@asynccontextmanager
async def read_only(postgres: EmbeddedPostgres, engine: AsyncEngine) -> AsyncIterator[None]:
    """The server as its keeper leaves it when there is little room."""

    async def shows(expected: str) -> bool:
        async with engine.connect() as connection:
            return (await connection.execute(text("SHOW default_transaction_read_only"))).scalar() == expected

    postgres.allow_writes(False)
    try:
        assert not postgres.takes_writes
        await until(lambda: shows("on"))
        yield
    finally:
        postgres.allow_writes(True)
        await until(lambda: shows("off"))
    assert postgres.takes_writes


@pytest.fixture
async def service(engine: AsyncEngine) -> AsyncIterator[MetricService]:
    service = new_service(engine, unique("shard"))
    await service.start()
    yield service
    await abandon(service)


async def test_points_are_refused_and_those_before_stay(
    postgres: EmbeddedPostgres, engine: AsyncEngine, service: MetricService
) -> None:
    run = await new_run(engine)
    assert await service.append(batch(run, [Point("m", 1.0, 1, 1)])) == 1
    async with read_only(postgres, engine):
        with pytest.raises(Unavailable, match="its disk is nearly full"):
            await service.append(batch(run, [Point("m", 2.0, 2, 2)]))
        assert as_table(await service.query(stored_points(run)))["n"].to_pylist() == [1], "the log drains meanwhile"
        assert service.stats()["lag_groups"] == 0
    assert await service.append(batch(run, [Point("m", 3.0, 3, 3)])) == 1, "the same process goes on"
    assert as_table(await service.query(stored_points(run)))["n"].to_pylist() == [2]


async def test_other_writes_are_refused_and_say_why(postgres: EmbeddedPostgres, engine: AsyncEngine) -> None:
    async with read_only(postgres, engine):
        with pytest.raises(OperationalError) as refused:
            await new_run(engine)
        assert "its disk is nearly full" in why_away(refused.value)
    await new_run(engine)


async def test_leases_are_kept(postgres: EmbeddedPostgres, engine: AsyncEngine) -> None:
    name = unique("lease")
    async with read_only(postgres, engine):
        held = await renew(engine, await acquire(engine, name, "one"))
        assert held.epoch == 1
        await release(engine, held)
        assert (await acquire(engine, name, "two")).epoch == 2
