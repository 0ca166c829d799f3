"""Area ``registry``: reads, searches and alias moves over HTTP, in a registry of a million versions."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator, Sequence
from urllib.parse import quote, urlencode

import httpx
import numpy as np
import pyarrow as pa
from sqlalchemy import Engine, text

from mlplat.db.engine import open_sync_engine
from mlplat.metrics.model import SCHEMA, encode
from mlplat.sdk.client import API, Client
from tests.benchmarks.load import Load, Request, run_load
from tests.benchmarks.result import Result, percentile
from tests.platform import Platform

MODELS, VERSIONS = 10_000, 100
READS, WARM_UP = 20_000, 2_000
MOVES = 1_000
CONNECTIONS = 16
SEARCHES, PAGE = 60, 100
MODELS_PER_BATCH = 200
#: What is searched for, and the filter. ``accuracy`` is uniform in 0..1.
FILTERS = {
    "tag, 1 in 100": "tags.team = 'team-7'",
    "tag + metric, 1 in 200": "tags.team = 'team-7' AND metrics.accuracy > 0.5",
    "tag + metric, 1 in 1,000": "tags.team = 'team-7' AND metrics.accuracy > 0.9",
}
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
        yield Result("a run and a metric for each version", _load_runs(platform, engine, prefix), "s")
        page_floor = _tagged(engine)
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
    yield from _searches(platform, page_floor)
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


def _searches(platform: Platform, floor_ms: float) -> Iterator[Result]:
    """Page 1, one request at a time."""
    for what, filter_text in FILTERS.items():
        url = f"{API}/model-versions/search?{urlencode({'filter': filter_text, 'max_results': PAGE})}"
        run_load(platform.url, [("GET", url, None)] * 3, 1)
        load = run_load(platform.url, [("GET", url, None)] * SEARCHES, 1)
        yield Result(f"search by {what}, page 1, p50", _p(load, 0.5), "ms", floor_ms, "<= 200")
        yield Result(f"search by {what}, page 1, p99", _p(load, 0.99), "ms", floor_ms, "<= 200")


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


def _load_runs(platform: Platform, engine: Engine, prefix: str) -> float:
    """The runs that the versions name, by SQL, and their metric ``accuracy``; returns the seconds that it took."""
    began = time.perf_counter()
    created = Client(platform.url).post(f"{API}/experiments/create", {"name": f"{prefix}runs"})
    experiment = int(created["experiment_id"])
    added = (
        "INSERT INTO run (run_id, experiment_id, name, status, user_id, artifact_uri, started_at) "
        "SELECT run_id, :experiment, 'run', 'FINISHED', '', 'mlflow-artifacts:/bench', now() FROM model_version "
        "WHERE name LIKE :mine ON CONFLICT DO NOTHING"
    )
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text(added), {"experiment": experiment, "mine": f"{prefix}%"})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SET statement_timeout = 0"))
        connection.execute(text("VACUUM ANALYZE model_version, model_version_tag, run"))
    numbers = np.random.default_rng(7)
    with httpx.Client(base_url=platform.url, timeout=60, trust_env=False) as http:
        for first in range(0, MODELS, MODELS_PER_BATCH):
            ids = [_run_id(m, v) for m in range(first, first + MODELS_PER_BATCH) for v in range(1, VERSIONS + 1)]
            http.post("/api/v1/metrics", content=_batch(experiment, ids, numbers)).raise_for_status()
        http.get(f"{API}/model-versions/search", params={"filter": FILTERS["tag + metric, 1 in 200"], "max_results": 1})
    return time.perf_counter() - began


def _run_id(model: int, version: int) -> str:
    """As ``_load`` names the runs of versions."""
    return hashlib.md5(f"{model}-{version}".encode()).hexdigest()


def _batch(experiment: int, ids: list[str], numbers: np.random.Generator) -> bytes:
    points = len(ids)
    columns = {
        "experiment_id": pa.array(np.full(points, experiment)),
        "run_id": pa.array(ids),
        "key": pa.array(["accuracy"] * points),
        "step": pa.array(np.zeros(points, dtype=np.int64)),
        "timestamp": pa.array(np.full(points, 1_700_000_000_000)),
        "value": pa.array(numbers.random(points)),
    }
    return encode(pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA))


def _tagged(engine: Engine) -> float:
    """The median milliseconds of bare SQL for a page of versions with a tag."""
    query = text(
        "SELECT v.* FROM model_version v JOIN model_version_tag t USING (name, version) "
        "WHERE t.key = 'team' AND t.value = 'team-7' ORDER BY v.updated_at DESC LIMIT :page"
    )
    latencies = list[float]()
    with engine.connect() as connection:
        for _ in range(SEARCHES):
            began = time.perf_counter()
            connection.execute(query, {"page": PAGE}).all()
            latencies.append((time.perf_counter() - began) * 1000)
    return percentile(latencies, 0.5)


def _lookups(engine: Engine, names: Sequence[str]) -> Load:
    """The same lookup on one connection, straight to Postgres."""
    latencies = list[float]()
    with engine.connect() as connection:
        for name in names:
            began = time.perf_counter()
            connection.execute(text(_LOOKUP), {"name": name}).all()
            latencies.append((time.perf_counter() - began) * 1000)
    return Load(len(names) / (sum(latencies) / 1000), latencies, [])
