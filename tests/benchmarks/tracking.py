"""Area ``tracking``: metric ingestion and runs over MLflow's REST API, and metrics straight from the cluster."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

from sqlalchemy import text

from mlplat.db.engine import open_sync_engine
from mlplat.metrics.model import Point, encode, points_table
from mlplat.metrics.record import pack
from mlplat.sdk.client import API, Client
from tests.benchmarks import fleet, in_cluster
from tests.benchmarks.load import Request, run_load, start_load
from tests.benchmarks.result import Result, percentile
from tests.platform import Platform

POINTS = 1_000
KEYS = 20
BATCHES = 1_600
SINGLES = 1_000
RUNS = 1_200
READS = 150
OFFERED = 200
SECONDS = 6


def run(platform: Platform) -> Iterator[Result]:
    """Yields the figures, on a running platform."""
    client = Client(platform.url)
    experiment_id = client.post(f"{API}/experiments/create", {"name": f"bench-{time.time_ns()}"})["experiment_id"]

    def new_run() -> str:
        body = {"experiment_id": experiment_id, "start_time": 1}
        return str(client.post(f"{API}/runs/create", body)["run"]["info"]["run_id"])

    floor = log_rows_per_second(platform)
    yield from _batches(platform, new_run, floor)
    yield from _singles(platform, new_run(), floor)
    create: list[Request] = [("POST", f"{API}/runs/create", {"experiment_id": experiment_id, "start_time": 1})] * RUNS
    yield Result("create-run, 8 clients", run_load(platform.url, create, 8).rate, "runs/s", floor, ">= 500")
    yield from _reads_while_writing(platform, new_run)
    yield from in_cluster.run(platform)
    yield from fleet.run(platform)


def batches(run_ids: list[str], count: int) -> list[Request]:
    """``count`` log-batch requests that take turns with the runs, as MLflow's client writes them."""
    requests: list[Request] = []
    for number in range(count):
        metrics = [
            {
                "key": f"m{i % KEYS}",
                "value": random.random(),
                "timestamp": 1_700_000_000_000 + number,
                "step": number * POINTS + i,
            }
            for i in range(POINTS)
        ]
        requests.append(
            ("POST", f"{API}/runs/log-batch", {"run_id": run_ids[number % len(run_ids)], "metrics": metrics})
        )
    return requests


def _batches(platform: Platform, new_run: Callable[[], str], floor: float) -> Iterator[Result]:
    for clients, bound in ((1, None), (8, ">= 400000")):
        load = run_load(platform.url, batches([new_run() for _ in range(clients)], BATCHES // (9 - clients)), clients)
        name = f"log-batch of {POINTS}, {clients} client{'s'[: clients > 1]}"
        yield Result(name, load.rate * POINTS, "points/s", floor * POINTS, bound)
        yield Result(f"{name}, p99", percentile(load.latencies_ms, 0.99), "ms")
    load = run_load(platform.url, batches([new_run() for _ in range(8)], OFFERED * SECONDS), 32, OFFERED)
    name = f"log-batch at {OFFERED * POINTS:,} points/s offered"
    yield Result(f"{name}: taken", load.rate * POINTS, "points/s")
    yield Result(f"{name}: p99", percentile(load.latencies_ms, 0.99), "ms", 1000 / floor, "<= 50")


def _singles(platform: Platform, run_id: str, floor: float) -> Iterator[Result]:
    single: list[Request] = [
        ("POST", f"{API}/runs/log-metric", {"run_id": run_id, "key": "m", "value": 1.0, "timestamp": 1, "step": step})
        for step in range(SINGLES)
    ]
    load = run_load(platform.url, single, 1)
    yield Result("single log-metric, p50", percentile(load.latencies_ms, 0.5), "ms", 1000 / floor, "<= 4")
    yield Result("single log-metric, p99", percentile(load.latencies_ms, 0.99), "ms", 1000 / floor, "<= 20")


def _reads_while_writing(platform: Platform, new_run: Callable[[], str]) -> Iterator[Result]:
    """runs/get of runs that are being written, four writers at half of what they could write."""
    run_ids = [new_run() for _ in range(4)]
    run_load(platform.url, batches(run_ids, 8), 4)
    get: list[Request] = [("GET", f"{API}/runs/get?run_id={run_ids[0]}", None)] * READS
    idle = percentile(run_load(platform.url, get, 1).latencies_ms, 0.5)
    yield Result("runs/get, idle, p50", idle, "ms")
    writing = start_load(platform.url, batches(run_ids, 100 * SECONDS), 4, 100)
    busy = run_load(platform.url, get, 1).latencies_ms
    writing()
    yield Result("runs/get while 4 writers write, p50", percentile(busy, 0.5), "ms", idle, f"<= {2 * idle:.1f}")
    yield Result("runs/get while 4 writers write, p99", percentile(busy, 0.99), "ms", idle, "<= 100")


def log_rows_per_second(platform: Platform) -> float:
    """Durable one-row commits a second on one connection, each row a batch as the log keeps it."""
    points = [Point(f"m{i % KEYS}", random.random(), 1, i) for i in range(POINTS)]
    body = pack([encode(points_table("0" * 32, points))])
    engine = open_sync_engine(platform.config.postgres_url, "bench")
    with engine.connect() as connection:
        connection.execute(text("CREATE TABLE bench_log (seq bigserial PRIMARY KEY, body bytea STORAGE EXTERNAL)"))
        connection.commit()
        began = time.perf_counter()
        for _ in range(SINGLES):
            connection.execute(text("INSERT INTO bench_log (body) VALUES (:body)"), {"body": body})
            connection.commit()
        seconds = time.perf_counter() - began
        connection.execute(text("DROP TABLE bench_log"))
        connection.commit()
    engine.dispose()
    return SINGLES / seconds
