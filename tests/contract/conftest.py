"""Stores shared by the contract tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlplat.metrics.store import MetricStore
from tests.clickhouse import ClickHouse
from tests.contract.chdb import chdb_url


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
