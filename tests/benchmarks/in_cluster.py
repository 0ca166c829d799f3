"""Metrics from inside the cluster: Arrow batches straight to the shard's actor, and their way into the store."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pyarrow as pa
import ray

from mlplat.metrics.model import columns_table, concat, encode, with_experiments
from mlplat.metrics.queries import Statement
from mlplat.metrics.schema import VERSIONS
from mlplat.metrics.store import MetricStore
from mlplat.runtime import METRIC_SHARD, NAMESPACE
from mlplat.sdk.client import API, Client
from tests.benchmarks.result import Result
from tests.platform import ROOT, Platform

PRODUCERS = 4
BATCH = 10_000
KEYS = 10
SECONDS = 6
IN_FLIGHT = 4
BODIES = 64
RAW_POINTS = 100_000
RAW_INSERTS = 12


def run(platform: Platform) -> Iterator[Result]:
    """Yields the figures, on a running platform."""
    raw = float(_script("raw", timeout_s=120))
    client = Client(platform.url)
    run_ids = [
        client.post(f"{API}/runs/create", {"experiment_id": "0", "start_time": 1})["run"]["info"]["run_id"]
        for _ in range(PRODUCERS)
    ]
    found = json.loads(_script("produce", json.dumps(run_ids), timeout_s=240, **platform.ray_environment))
    name = f"in-cluster, {BATCH:,} points a batch, {PRODUCERS} producers with {IN_FLIGHT} under way"
    yield Result(f"{name}: acknowledged", found["acknowledged"], "points/s", raw, ">= 2000000")
    yield Result(f"{name}: drained, beside the producers", found["drained"], "points/s", raw)
    left = f"{name}: the {found['left'] / 1e6:.1f} M points left, drained"
    yield Result(left, found["left_drained"], "points/s", raw, f">= {raw / 2:.0f}")
    yield Result(f"{name}: shard's memory before", found["rss_before_mb"], "MB")
    yield Result(f"{name}: shard's memory at most", found["rss_peak_mb"], "MB", found["rss_before_mb"], "<= 1500")
    assert found["counted"] == found["sent"], found


def batch(run_id: str, number: int) -> pa.Table:
    """``BATCH`` points of a run; batches of different numbers have different points."""
    chosen = random.Random(number)
    return columns_table(
        run_id,
        [f"m{i % KEYS}" for i in range(BATCH)],
        [number * BATCH + i for i in range(BATCH)],
        [1_700_000_000_000] * BATCH,
        [chosen.random() for _ in range(BATCH)],
    )


def _script(*arguments: str, timeout_s: float, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.in_cluster", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _raw() -> float:
    """Points a second that chDB takes, in large inserts, with nothing else to do."""
    folder = tempfile.mkdtemp(prefix="mlb-raw-", dir="/tmp")
    try:
        store = MetricStore(f"chdb://{folder}/chdb")
        store._call("command", VERSIONS[0][0])
        per_insert = RAW_POINTS // BATCH
        tables = [
            with_experiments(concat([batch(f"{b:032}", n * per_insert + b) for b in range(per_insert)]),
                             {f"{b:032}": 1 for b in range(per_insert)})
            for n in range(RAW_INSERTS)
        ]  # fmt: skip
        store._call("insert_arrow", "metric_points", tables[0])
        began = time.perf_counter()
        for table in tables[1:]:
            store._call("insert_arrow", "metric_points", table)
        seconds = time.perf_counter() - began
        store.close()
    finally:
        shutil.rmtree(folder)
    return RAW_POINTS * (RAW_INSERTS - 1) / seconds


class _Producer:
    """Keeps ``IN_FLIGHT`` batches of one run on their way, as a sender that never waits for a single answer does."""

    def __init__(self, run_id: str) -> None:
        self._shard: Any = ray.get_actor(METRIC_SHARD, namespace=NAMESPACE)
        self._bodies = [encode(batch(run_id, number)) for number in range(BODIES)]

    def ready(self) -> bool:
        """Answers when the batches are made."""
        return bool(self._bodies)

    def produce(self, deadline: float) -> int:
        """Sends until the deadline; returns how many batches were acknowledged."""
        sent = acknowledged = 0
        under_way: list[Any] = []
        while time.time() < deadline or under_way:
            while time.time() < deadline and len(under_way) < IN_FLIGHT:
                under_way.append(self._shard.append.remote(self._bodies[sent % BODIES]))
                sent += 1
            done, under_way = ray.wait(under_way, num_returns=1)
            ray.get(done)
            acknowledged += len(done)
        return acknowledged


def _produce(run_ids: list[str]) -> dict[str, float]:
    """The producers, and the drain behind them."""
    ray.init(namespace=NAMESPACE, log_to_driver=False)
    shard: Any = ray.get_actor(METRIC_SHARD, namespace=NAMESPACE)
    stats = shard.stats
    process = psutil.Process(ray.get(shard.health.remote())["pid"])
    producer_class: Any = ray.remote(num_cpus=0.5)(_Producer)
    producers = [producer_class.remote(run_id) for run_id in run_ids]
    ray.get([producer.ready.remote() for producer in producers])
    before = ray.get(stats.remote())["flushed_points"]
    rss_before = peak = process.memory_info().rss
    began = time.time()
    sending = [producer.produce.remote(began + SECONDS) for producer in producers]
    while len(ray.wait(sending, num_returns=len(sending), timeout=0.1)[0]) < len(sending):
        peak = max(peak, process.memory_info().rss)
    acknowledged_at, sent = time.time(), ray.get(sending)
    left = sum(sent) * BATCH - (ray.get(stats.remote())["flushed_points"] - before)
    while ray.get(stats.remote())["lag_groups"]:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.02)
    drained_at = time.time()
    query = Statement("SELECT count() AS n FROM metric_points FINAL WHERE run_id IN {r:Array(String)}", {"r": run_ids})
    with pa.ipc.open_stream(ray.get(shard.query.remote(query))) as reader:
        counted = reader.read_all()["n"][0].as_py()
    return {
        "acknowledged": sum(sent) * BATCH / (acknowledged_at - began),
        "drained": sum(sent) * BATCH / (drained_at - began),
        "left": left,
        "left_drained": left / (drained_at - acknowledged_at),
        "rss_before_mb": rss_before / 1e6,
        "rss_peak_mb": peak / 1e6,
        "sent": sum(min(batches, BODIES) for batches in sent) * BATCH,
        "counted": counted,
    }


if __name__ == "__main__":
    print(json.dumps(_produce(json.loads(sys.argv[2]))) if sys.argv[1] == "produce" else _raw())
