"""Area ``registry``: reads and alias moves over MLflow's REST API."""

from __future__ import annotations

import time
from collections.abc import Iterator

from sqlalchemy import text

from mlplat.db.engine import open_sync_engine
from mlplat.sdk.client import API, Client
from tests.benchmarks.load import run_load
from tests.benchmarks.result import Result, percentile
from tests.platform import Platform

READS = 3_000
MOVES = 300


def run(platform: Platform) -> Iterator[Result]:
    """Yields the figures, on a running platform."""
    client = Client(platform.url)
    name = f"bench-{time.time_ns()}"
    client.post(f"{API}/registered-models/create", {"name": name})
    for _ in range(2):
        client.post(f"{API}/model-versions/create", {"name": name, "source": "s3://elsewhere/model"})
    client.post(f"{API}/registered-models/alias", {"name": name, "alias": "champion", "version": "1"})
    floor = _selects_per_second(platform, name)
    read = [("GET", f"{API}/registered-models/alias?name={name}&alias=champion", None)] * READS
    load = run_load(platform.url, read, 16)
    yield Result("get by alias, 16 connections", load.rate, "req/s", floor)
    yield Result("get by alias, p50", percentile(load.latencies_ms, 0.5), "ms", 1000 / floor)
    yield Result("get by alias, p99", percentile(load.latencies_ms, 0.99), "ms", 1000 / floor)
    moves = [
        ("POST", f"{API}/registered-models/alias", {"name": name, "alias": "champion", "version": str(1 + number % 2)})
        for number in range(MOVES)
    ]
    load = run_load(platform.url, moves, 4)
    yield Result("set alias, 4 connections", load.rate, "req/s", floor)
    yield Result("set alias, p99", percentile(load.latencies_ms, 0.99), "ms", 1000 / floor)


def _selects_per_second(platform: Platform, name: str) -> float:
    """The same lookup on one connection, straight to Postgres."""
    engine = open_sync_engine(platform.config.postgres_url, "bench")
    query = text(
        "SELECT v.* FROM model_version v JOIN model_alias a USING (name, version) "
        "WHERE a.name = :name AND a.alias = :alias"
    )
    with engine.connect() as connection:
        began = time.perf_counter()
        for _ in range(READS):
            connection.execute(query, {"name": name, "alias": "champion"}).all()
        seconds = time.perf_counter() - began
    engine.dispose()
    return READS / seconds
