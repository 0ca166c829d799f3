"""Area ``registry``: reads, searches and alias moves over HTTP, in a registry of a million versions."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from urllib.parse import quote

from sqlalchemy import Engine, text

from mlplat.db.engine import open_sync_engine
from mlplat.sdk.client import API
from tests.benchmarks.load import Load, Request, run_load
from tests.benchmarks.result import Result, percentile
from tests.platform import Platform

MODELS, VERSIONS = 10_000, 100
READS, WARM_UP = 20_000, 2_000
MOVES = 1_000
CONNECTIONS = 16
_LOOKUP = (
    "SELECT v.* FROM model_version v JOIN model_alias a USING (name, version) "
    "WHERE a.name = :name AND a.alias = 'champion'"
)


def run(platform: Platform) -> Iterator[Result]:
    """Yields the figures, on a running platform."""
    engine = open_sync_engine(platform.config.postgres_url, "bench")
    try:
        prefix = f"bench-{time.time_ns()}-"
        yield Result("1,000,000 versions of 10,000 models, loaded by SQL", _load(engine, prefix), "s")
        names = [f"{prefix}{random.randrange(MODELS)}" for _ in range(READS)]
        floor = _lookups(engine, names)
    finally:
        engine.dispose()
    aliases = [("GET", f"{API}/registered-models/alias?name={name}&alias=champion", None) for name in names]
    yield from _reads("get by alias", platform, aliases, floor)
    numbers = [("GET", f"{API}/model-versions/get?name={name}&version={_number()}", None) for name in names]
    yield from _reads("get by number", platform, numbers, floor)
    spec = quote("^1.0")
    ranges = [("GET", f"/api/v1/models/{name}/versions/{spec}", None) for name in names[: READS // 4]]
    load = run_load(platform.url, ranges, CONNECTIONS)
    yield Result(f"get by range, {CONNECTIONS} connections", load.rate, "req/s", floor.rate)
    moves = [
        ("POST", f"{API}/registered-models/alias", {"name": name, "alias": "champion", "version": str(_number())})
        for name in names[:MOVES]
    ]
    load = run_load(platform.url, moves, 4)
    yield Result("set alias, 4 connections", load.rate, "req/s", floor.rate)
    yield Result("set alias, p99", percentile(load.latencies_ms, 0.99), "ms", _p(floor, 0.99), "<= 50")


def _reads(what: str, platform: Platform, requests: Sequence[Request], floor: Load) -> Iterator[Result]:
    run_load(platform.url, requests[:WARM_UP], CONNECTIONS)
    load = run_load(platform.url, requests, CONNECTIONS)
    yield Result(f"{what}, {CONNECTIONS} connections", load.rate, "req/s", floor.rate, ">= 2500")
    yield Result(f"{what}, p50", _p(load, 0.5), "ms", _p(floor, 0.5), "<= 8")
    yield Result(f"{what}, p99", _p(load, 0.99), "ms", _p(floor, 0.99), "<= 40")


def _number() -> int:
    return random.randint(1, VERSIONS)


def _p(load: Load, fraction: float) -> float:
    return percentile(load.latencies_ms, fraction)


def _load(engine: Engine, prefix: str) -> float:
    """Models with versions, a tag each, and the alias ``champion``; returns the seconds that it took."""
    began = time.perf_counter()
    options = {"prefix": prefix, "models": MODELS, "versions": VERSIONS}
    with engine.begin() as connection:
        for statement in (
            "SET LOCAL statement_timeout = 0",
            "INSERT INTO registered_model (name, last_version, last_semantic, created_at, updated_at) "
            "SELECT CAST(:prefix AS text) || m, :versions, ARRAY[1, 0, :versions - 1], now(), now() "
            "FROM generate_series(0, :models - 1) AS m",
            "INSERT INTO model_version "
            "(name, version, source, artifact_uri, run_id, semantic, bump, bump_reason, created_at, updated_at) "
            "SELECT CAST(:prefix AS text) || m, v, 's3://bucket/m', 's3://bucket/m', md5(m || '-' || v), "
            "ARRAY[1, 0, v - 1], 'patch', 'no other signature, data or code is known', now(), now() "
            "FROM generate_series(0, :models - 1) AS m, generate_series(1, :versions) AS v",
            "INSERT INTO model_version_tag SELECT CAST(:prefix AS text) || m, v, 'team', 'team-' || (m + v) % 100 "
            "FROM generate_series(0, :models - 1) AS m, generate_series(1, :versions) AS v",
            "INSERT INTO model_alias SELECT CAST(:prefix AS text) || m, 'champion', 1 + m % :versions "
            "FROM generate_series(0, :models - 1) AS m",
            "ANALYZE registered_model, model_version, model_version_tag, model_alias",
        ):
            connection.execute(text(statement), options)
    return time.perf_counter() - began


def _lookups(engine: Engine, names: Sequence[str]) -> Load:
    """The same lookup on one connection, straight to Postgres."""
    latencies = list[float]()
    with engine.connect() as connection:
        for name in names:
            began = time.perf_counter()
            connection.execute(text(_LOOKUP), {"name": name}).all()
            latencies.append((time.perf_counter() - began) * 1000)
    return Load(len(names) / (sum(latencies) / 1000), latencies, [])
