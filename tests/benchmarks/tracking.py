"""Area ``tracking``: metric ingestion and runs over MLflow's REST API."""

from __future__ import annotations

import time
from collections.abc import Iterator

from sqlalchemy import text

from mlplat.db.engine import open_sync_engine
from mlplat.metrics.model import Point, encode, points_table
from mlplat.sdk.client import API, Client
from tests.benchmarks.load import run_load
from tests.benchmarks.result import Result, percentile
from tests.platform import Platform

POINTS = 1_000
BATCHES = 400
SINGLES = 500
RUNS = 400


def run(platform: Platform) -> Iterator[Result]:
    """Yields the figures, on a running platform."""
    client = Client(platform.url)
    experiment_id = client.post(f"{API}/experiments/create", {"name": f"bench-{time.time_ns()}"})["experiment_id"]

    def new_run() -> str:
        body = {"experiment_id": experiment_id, "start_time": 1}
        return str(client.post(f"{API}/runs/create", body)["run"]["info"]["run_id"])

    def batch(run_id: str, number: int) -> dict[str, object]:
        metrics = [
            {"key": f"m{i % 20}", "value": i * 0.5, "timestamp": 1, "step": number * POINTS + i} for i in range(POINTS)
        ]
        return {"run_id": run_id, "metrics": metrics}

    floor = _log_rows_per_second(platform)
    for clients in (1, 8):
        run_id = new_run()
        load = run_load(
            platform.url,
            [("POST", f"{API}/runs/log-batch", batch(run_id, number)) for number in range(BATCHES)],
            clients,
        )
        yield Result(f"log-batch of {POINTS}, {clients} clients", load.rate * POINTS, "points/s", floor * POINTS)
        yield Result(f"log-batch of {POINTS}, {clients} clients, p99", percentile(load.latencies_ms, 0.99), "ms")
    run_id = new_run()
    single = [
        ("POST", f"{API}/runs/log-metric", {"run_id": run_id, "key": "m", "value": 1.0, "timestamp": 1, "step": step})
        for step in range(SINGLES)
    ]
    load = run_load(platform.url, single, 1)
    yield Result("single log-metric, p50", percentile(load.latencies_ms, 0.5), "ms", 1000 / floor)
    yield Result("single log-metric, p99", percentile(load.latencies_ms, 0.99), "ms", 1000 / floor)
    create = [("POST", f"{API}/runs/create", {"experiment_id": experiment_id, "start_time": 1})] * RUNS
    yield Result("create-run, 8 clients", run_load(platform.url, create, 8).rate, "runs/s", floor)


def _log_rows_per_second(platform: Platform) -> float:
    """Durable one-row commits a second on one connection, each row a batch as the log keeps it."""
    points = [Point(f"m{i % 20}", i * 0.5, 1, i) for i in range(POINTS)]
    body = encode(points_table(1, "0" * 32, points), "zstd")
    engine = open_sync_engine(platform.config.postgres_url, "bench")
    with engine.connect() as connection:
        connection.execute(text("CREATE TEMP TABLE bench_log (seq bigserial PRIMARY KEY, body bytea)"))
        connection.commit()
        began = time.perf_counter()
        for _ in range(SINGLES):
            connection.execute(text("INSERT INTO bench_log (body) VALUES (:body)"), {"body": body})
            connection.commit()
        seconds = time.perf_counter() - began
    engine.dispose()
    return SINGLES / seconds
