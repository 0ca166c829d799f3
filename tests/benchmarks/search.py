"""Area ``search``: one experiment of 100,000 runs with 20 metrics, 10 params and 3 tags each."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pyarrow as pa
from sqlalchemy import text

from mlplat.db.engine import open_sync_engine
from mlplat.metrics.model import SCHEMA, encode
from mlplat.sdk.client import API, Client
from tests.benchmarks.load import run_load
from tests.benchmarks.result import Result, percentile
from tests.platform import Platform

RUNS = 100_000
METRICS = 20
PAGE = 100
REQUESTS = 60
#: Runs that one request steps over on the way to page 500: 499 pages in a few steps.
STRIDE = 4_990
RUNS_PER_BATCH = 5_000
BOUND = {"p50": "<= 100", "p99": "<= 500"}

#: Name → (filter, order_by). ``m0`` … are uniform in 0..1, ``m19`` has few values, half of the runs have ``m18``.
SEARCHES: dict[str, tuple[str, list[str]]] = {
    "no filter": ("", []),
    "param, 1 in 10": ("params.p0 = '7'", []),
    "param as number, 1 in 100": ("params.p1 > 0.99", []),
    "tag, 1 in 50": ("tags.team = 'team-7'", []),
    "metric, 6 in 10": ("metrics.m1 > 0.4", []),
    "order by metric": ("", ["metrics.m1 DESC"]),
    "metric, param and tag, order by metric": (
        "metrics.m2 < 0.5 AND params.p1 < 0.5 AND tags.team != 'team-7'",
        ["metrics.m1"],
    ),
}
DEEP = ("no filter", "metric, 6 in 10", "order by metric")


def run(platform: Platform) -> Iterator[Result]:
    """Yields the figures, on a running platform."""
    client = Client(platform.url)
    name = f"bench-{time.time_ns()}"
    experiment_id = str(client.post(f"{API}/experiments/create", {"name": name})["experiment_id"])
    began = time.perf_counter()
    load_runs(platform.config.postgres_url, int(experiment_id))
    with httpx.Client(base_url=platform.url, timeout=60, trust_env=False) as http:
        for batch in metric_batches(int(experiment_id)):
            http.post("/api/v1/metrics", content=batch).raise_for_status()
        http.post(f"{API}/runs/search", json=request(experiment_id, "no filter")).raise_for_status()
        yield Result(f"load {RUNS:,} runs", time.perf_counter() - began, "s")
        deep = {name: deep_token(http, experiment_id, name) for name in DEEP}
    floor = page_floor_ms(platform.config.postgres_url, int(experiment_id))
    wanted = [(name, None, 1) for name in SEARCHES] + [(name, token, 500) for name, token in deep.items()]
    for name, token, page in wanted:
        body = request(experiment_id, name) | ({"page_token": token} if token else {})
        load = run_load(platform.url, [("POST", f"{API}/runs/search", body)] * REQUESTS, 1)
        for what, fraction in (("p50", 0.5), ("p99", 0.99)):
            latency = percentile(load.latencies_ms, fraction)
            yield Result(f"{name}, page {page}, {what}", latency, "ms", floor, BOUND[what])


def request(experiment_id: str, name: str, page: int = PAGE) -> dict[str, object]:
    """The body of a search."""
    filter_text, order_by = SEARCHES[name]
    return {"experiment_ids": [experiment_id], "filter": filter_text, "order_by": order_by, "max_results": page}


def deep_token(http: httpx.Client, experiment_id: str, name: str) -> str:
    """The token of page 500, reached in long strides: a token does not depend on the size of the pages."""
    token: dict[str, str] = {}
    for _ in range(499 * PAGE // STRIDE):
        answer = http.post(f"{API}/runs/search", json=request(experiment_id, name, STRIDE) | token)
        answer.raise_for_status()
        token = {"page_token": answer.json()["next_page_token"]}
    return token["page_token"]


def run_id(number: int) -> str:
    """The id of the n-th run; Postgres computes the same."""
    return hashlib.md5(str(number).encode()).hexdigest()


def load_runs(postgres_url: str, experiment_id: int) -> None:
    """Runs, params and tags, made by Postgres itself."""
    statements = (
        "INSERT INTO run (run_id, experiment_id, name, status, user_id, artifact_uri, started_at, ended_at) "
        "SELECT md5(i::text), :experiment, 'run-' || i, CASE i % 3 WHEN 0 THEN 'FAILED' ELSE 'FINISHED' END, 'ann', "
        "'mlflow-artifacts:/bench/' || md5(i::text) || '/artifacts', to_timestamp(1700000000 + i), "
        "to_timestamp(1700000060 + i) FROM generate_series(0, :runs - 1) i",
        # p0, p2, …: ten values; p1, p3, …: numbers with six digits
        "INSERT INTO run_param (run_id, key, value) SELECT md5(i::text), 'p' || k, "
        "CASE k % 2 WHEN 0 THEN (abs(hashint8(i * 16 + k)) % 10)::text "
        "ELSE round((abs(hashint8(i * 16 + k)) % 1000000) / 1e6, 6)::text END "
        "FROM generate_series(0, :runs - 1) i, generate_series(0, 9) k WHERE :experiment > 0",
        "INSERT INTO run_tag (run_id, key, value) SELECT md5(i::text), key, value "
        "FROM generate_series(0, :runs - 1) i, LATERAL (VALUES ('team', 'team-' || i % 50), ('mlflow.user', 'ann'), "
        "('mlflow.runName', 'run-' || i)) AS tag (key, value) WHERE :experiment > 0",
    )
    engine = open_sync_engine(postgres_url, "bench")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SET statement_timeout = 0"))
        for statement in statements:
            connection.execute(text(statement), {"experiment": experiment_id, "runs": RUNS})
        for table in ("run", "run_param", "run_tag"):
            connection.execute(text(f"VACUUM ANALYZE {table}"))
    engine.dispose()


def metric_batches(experiment_id: int) -> Iterator[bytes]:
    """Every run's metrics, one point each, as Arrow batches of many runs."""
    random = np.random.default_rng(7)
    for first in range(0, RUNS, RUNS_PER_BATCH):
        ids = [run_id(number) for number in range(first, first + RUNS_PER_BATCH)]
        values = random.random((METRICS, RUNS_PER_BATCH))
        values[:, ::97] = np.nan
        values[19] = np.round(values[19] * 5)
        kept = np.ones((METRICS, RUNS_PER_BATCH), dtype=bool)
        kept[18] = random.random(RUNS_PER_BATCH) < 0.5
        points = int(kept.sum())
        columns = {
            "experiment_id": pa.array(np.full(points, experiment_id)),
            "run_id": pa.array(np.tile(np.array(ids), METRICS)[kept.ravel()].tolist()),
            "key": pa.array(np.repeat([f"m{key}" for key in range(METRICS)], RUNS_PER_BATCH)[kept.ravel()].tolist()),
            "step": pa.array(np.full(points, 10)),
            "timestamp": pa.array(np.full(points, 1_700_000_000_000)),
            "value": pa.array(values.ravel()[kept.ravel()], from_pandas=False),
        }
        yield encode(pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA))


def page_floor_ms(postgres_url: str, experiment_id: int) -> float:
    """The median time of bare SQL for a page: the newest runs with their params and tags."""
    query = text(
        "WITH page AS (SELECT * FROM run WHERE experiment_id = :experiment AND NOT deleted "
        "ORDER BY started_at DESC, run_id LIMIT :page) "
        "SELECT page.*, (SELECT json_object_agg(key, value)::text FROM run_param p WHERE p.run_id = page.run_id), "
        "(SELECT json_object_agg(key, value)::text FROM run_tag t WHERE t.run_id = page.run_id) FROM page"
    )
    engine = open_sync_engine(postgres_url, "bench")
    seconds: list[float] = []
    with engine.connect() as connection:
        for _ in range(REQUESTS):
            began = time.perf_counter()
            connection.execute(query, {"experiment": experiment_id, "page": PAGE}).all()
            seconds.append(time.perf_counter() - began)
    engine.dispose()
    return percentile(seconds, 0.5) * 1000
