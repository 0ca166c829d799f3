"""Area ``curves``: long and many curves, runs with many metrics, runs side by side."""

from __future__ import annotations

import asyncio
import math
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import httpx

from mlplat.metrics import queries
from mlplat.metrics.model import ARROW, Point, encode, points_table, with_experiments
from mlplat.metrics.queries import Statement
from mlplat.metrics.store import MetricStore
from mlplat.sdk.client import API
from tests.benchmarks.result import Result
from tests.platform import Platform

LONG = 1_000_000
RUNS = 10
CURVES = 10
CURVE_POINTS = 10_000
MANY_KEYS = 10_000
COMPARED = 20
BATCH = 100_000
REPEATS = 7


def run(platform: Platform) -> Iterator[Result]:
    """Yields the figures, on a running platform. The floors are asked of a chDB in this process."""
    with tempfile.TemporaryDirectory(prefix="mlb-", dir="/tmp") as folder:
        store = MetricStore(f"chdb://{folder}/chdb")
        store.create_tables()
        yield from asyncio.run(_run(platform.url, store))
        store.close()


async def _run(url: str, store: MetricStore) -> list[Result]:
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        return await measure(http, store)


async def measure(http: httpx.AsyncClient, store: MetricStore, mirrored: bool = True) -> list[Result]:
    """The figures of the API behind ``http``.

    Args:
        http: a client of the platform.
        store: what the bare queries are asked of.
        mirrored: False when the platform's own points are in ``store`` already.
    """
    data = Data(http, store if mirrored else None, await _experiment(http))
    results = []
    [long] = await data.fill(1, ["loss"], LONG)
    for axis in ("step", "relative"):
        body = {"run_ids": [long], "keys": ["loss"], "axis": axis, "buckets": 1000}
        spent = await _median(partial(_post, http, "/api/v1/metrics/curves", body))
        floor = _bare(store, [long], LONG // 1000)
        results.append(Result(f"curve of {LONG} points over {axis}, 1000 buckets", spent, "ms", floor, "<= 150"))
    runs = await data.fill(RUNS, [f"m{number}" for number in range(CURVES)], CURVE_POINTS)
    for buckets, accept in ((200, "application/json"), (1000, ARROW), (1000, "application/json")):
        body = {"run_ids": runs, "keys": ["*"], "buckets": buckets}
        spent = await _median(partial(_post, http, "/api/v1/metrics/curves", body, accept))
        floor = _bare(store, runs, CURVE_POINTS // buckets)
        form = "Arrow" if accept == ARROW else "JSON"
        name = f"{RUNS} runs × {CURVES} curves of {CURVE_POINTS} points, {buckets} buckets, {form}"
        results.append(Result(name, spent, "ms", floor, "<= 200"))
    [wide] = await data.fill(1, [f"k{number}" for number in range(MANY_KEYS)], 1)
    floor = _timed(store, queries.latest([wide]))
    for path in (f"/api/v1/runs/{wide}/metrics", f"{API}/runs/get?run_id={wide}"):
        spent = await _median(partial(_get, http, path))
        results.append(Result(f"GET {path.split('?')[0].replace(wide, '…')}, {MANY_KEYS} keys", spent, "ms", floor,
                              "<= 300"))  # fmt: skip
    compared = await data.fill(COMPARED, [f"m{number}" for number in range(50)], 10)
    spent = await _median(partial(_post, http, "/api/v1/runs/compare", {"run_ids": compared}))
    floor = _timed(store, queries.summaries(compared, 100_000))
    results.append(Result(f"compare of {COMPARED} runs with 50 metrics", spent, "ms", floor))
    spent = await _median(partial(_get, http, f"{API}/metrics/get-history?run_id={long}&metric_key=loss"), 3)
    floor = _timed(store, queries.history(long, "loss", LONG))
    results.append(Result(f"whole history of {LONG} points", spent, "ms", floor))
    return results


@dataclass(frozen=True)
class Data:
    """Fills runs with points, on the platform and in the mirror that the floors are asked of."""

    http: httpx.AsyncClient
    mirror: MetricStore | None
    experiment: int

    async def fill(self, runs: int, keys: Sequence[str], points: int) -> list[str]:
        """New runs with so many points of each key."""
        return [await self._fill_one(keys, points) for _ in range(runs)]

    async def _fill_one(self, keys: Sequence[str], points: int) -> str:
        body = {"experiment_id": str(self.experiment), "start_time": 1_000}
        run_id = str((await _post(self.http, f"{API}/runs/create", body)).json()["run"]["info"]["run_id"])
        rows = [
            Point(key, math.sin(step / 50) + step % 7, 1_000 + 10 * step, step)
            for key in keys
            for step in range(points)
        ]
        for first in range(0, len(rows), BATCH):
            table = points_table(run_id, rows[first : first + BATCH])
            answer = await self.http.post("/api/v1/metrics", content=encode(table))
            answer.raise_for_status()
            if self.mirror is not None:
                self.mirror.insert(with_experiments(table, {run_id: self.experiment}))
        return run_id


async def _experiment(http: httpx.AsyncClient) -> int:
    answer = await _post(http, f"{API}/experiments/create", {"name": f"bench-{time.time_ns()}"})
    return int(answer.json()["experiment_id"])


async def _post(http: httpx.AsyncClient, path: str, body: object, accept: str = "application/json") -> httpx.Response:
    answer = await http.post(path, json=body, headers={"Accept": accept})
    answer.raise_for_status()
    return answer


async def _get(http: httpx.AsyncClient, path: str) -> httpx.Response:
    answer = await http.get(path)
    answer.raise_for_status()
    return answer


async def _median(call: Callable[[], Awaitable[object]], repeats: int = REPEATS) -> float:
    """Milliseconds of a call, after one that warms up."""
    await call()
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        await call()
        spent.append((time.perf_counter() - began) * 1000)
    return statistics.median(spent)


def _bare(store: MetricStore, run_ids: Sequence[str], width: int) -> float:
    """Milliseconds of the simplest query with buckets: their extremes and nothing else."""
    sql = """
        SELECT run_id, key, intDiv(step, {width:Int64}) AS bucket, min(value), max(value) FROM metric_points
        WHERE run_id IN {run_ids:Array(String)} GROUP BY run_id, key, bucket
        """
    return _timed(store, Statement(sql, {"run_ids": list(run_ids), "width": width}))


def _timed(store: MetricStore, statement: Statement) -> float:
    spent = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        store.query(statement)
        spent.append((time.perf_counter() - began) * 1000)
    return statistics.median(spent)
