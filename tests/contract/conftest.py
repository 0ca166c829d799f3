"""Stores shared by the contract tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.artifacts.store import ArtifactStore
from mlplat.metrics.store import MetricStore
from tests.clickhouse import ClickHouse
from tests.contract.chdb import abandon, chdb_url, new_service, unique
from tests.contract.lifecycle import Shard, World
from tests.contract.pipelines import Pipelines


@pytest.fixture
async def world(engine: AsyncEngine, tmp_path: Path) -> AsyncIterator[World]:
    """Empty stores of this test's own, but for the metric store, which all share."""
    service = new_service(engine, unique("shard"), artifacts_url=f"file://{tmp_path}")
    await service.start()
    yield World(engine, Shard(service), ArtifactStore(f"file://{tmp_path}"), tmp_path)
    await abandon(service)


@pytest.fixture
async def pipelines(engine: AsyncEngine) -> AsyncIterator[Pipelines]:
    """Empty stores of pipeline runs."""
    pipelines = await Pipelines.open(engine)
    yield pipelines
    await pipelines.close()


@pytest.fixture(scope="session")
def clickhouse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouse]:
    """The session's ClickHouse server."""
    server = ClickHouse(tmp_path_factory.mktemp("clickhouse"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session", params=["chdb", "clickhouse"])
def metric_url(request: pytest.FixtureRequest) -> str:
    """A metric store with its tables: once in this process, once behind HTTP."""
    if request.param == "chdb":
        return chdb_url()
    server: ClickHouse = request.getfixturevalue("clickhouse")
    url = f"{server.url}/metrics_of_tests"
    MetricStore(url).create_tables()
    return url


@pytest.fixture(scope="session")
def metric_store(metric_url: str) -> Iterator[MetricStore]:
    """A store object that tests share."""
    store = MetricStore(metric_url)
    yield store
    store.close()
