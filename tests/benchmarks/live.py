"""Area ``live``: how soon those who watch a run know what happened to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import httpx
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

import mlplat
from mlplat.db.engine import open_engine
from mlplat.http.live.hub import POLL_S
from mlplat.pipelines.machine import Changes
from mlplat.pipelines.model import WHOLE_STEP, Attempt, AttemptState
from mlplat.pipelines.spec import PipelineSpec
from mlplat.pipelines.store import PipelineStore
from mlplat.pipelines.transitions import Transition, TransitionWriter
from mlplat.sdk.live import EventParser
from tests.benchmarks.result import Result, percentile
from tests.platform import Platform, eventually

WATCHERS = 50
CHANGES = 200
PER_SECOND = 20


def run(platform: Platform) -> Iterator[Result]:
    """Yields the figures, on a running platform."""
    spec = PipelineSpec.model_validate({"name": "live", "steps": {"wait": {"approval": {}}}})
    handle = mlplat.submit(spec, url=platform.url)
    eventually(lambda: handle.status()["steps"]["wait"]["state"] == "QUEUED")  # its executor has nothing to do now
    floor, latencies = asyncio.run(_measure(platform, handle.run_id))
    handle._client.post(f"/api/v1/pipeline-runs/{handle.run_id}/cancel", {"by": "benchmark"})
    name = f"{WATCHERS} watchers, {PER_SECOND} changes a second: from before the commit to the watcher"
    yield Result(f"{name}, median", percentile(latencies, 0.5) * 1e3, "ms", percentile(floor, 0.5) * 1e3)
    yield Result(f"{name}, p99", percentile(latencies, 0.99) * 1e3, "ms", percentile(floor, 0.99) * 1e3, "<= 1000")


async def _measure(platform: Platform, run_id: str) -> tuple[list[float], list[float]]:
    """Seconds until a loop that polls the database alone sees each change, and until the watchers do."""
    engine = open_engine(platform.config.postgres_url, "benchmark", pool_size=4)
    first = (await PipelineStore(engine).get_run(run_id)).seq
    times: dict[int, float] = {}
    last, watching = first + CHANGES, asyncio.Semaphore(0)
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=WATCHERS)) as client:
        url = f"{platform.url}/api/v1/pipeline-runs/{run_id}/events?logs=none"
        watchers = [asyncio.create_task(_watch(client, url, times, last, watching)) for _ in range(WATCHERS)]
        for _ in watchers:
            await watching.acquire()
        floor = asyncio.create_task(_poll(engine, run_id, times, last))
        await _write(engine, run_id, first, times)
        async with asyncio.timeout(60):
            found = await asyncio.gather(*watchers)
            bare = await floor
    await engine.dispose()
    return bare, [latency for latencies in found for latency in latencies]


async def _write(engine: AsyncEngine, run_id: str, first: int, times: dict[int, float]) -> None:
    epoch = (await PipelineStore(engine).get_run(run_id)).epoch
    writer = TransitionWriter(engine, "benchmark")
    begun = time.perf_counter()
    for number in range(1, CHANGES + 1):
        await asyncio.sleep(max(0.0, begun + number / PER_SECOND - time.perf_counter()))
        times[first + number] = time.perf_counter()
        entry = Attempt(
            "wait", WHOLE_STEP, number, AttemptState.RUNNING, datetime.now(UTC), progress={"done": 0.5, "text": ""},
            seq=first + number,
        )  # fmt: skip
        await writer.write(Transition.of(run_id, epoch, Changes(first + number, [], [entry], None)))
    await writer.close()


async def _watch(
    client: httpx.AsyncClient, url: str, times: dict[int, float], last: int, watching: asyncio.Semaphore
) -> list[float]:
    parser, latencies = EventParser(), list[float]()
    async with client.stream("GET", url) as response:
        async for chunk in response.aiter_bytes():
            for event in parser.feed(chunk):
                if event is not None and event.kind == "snapshot":
                    watching.release()
                elif event is not None and event.kind == "change":
                    now = time.perf_counter()
                    latencies += [now - times[last - CHANGES + row["attempt"]] for row in event.data["attempts"]]
                    if event.number == last:
                        return latencies
    raise AssertionError("the stream ended early")


async def _poll(engine: AsyncEngine, run_id: str, times: dict[int, float], last: int) -> list[float]:
    seen, latencies = last - CHANGES, list[float]()
    query = text("SELECT seq FROM pipeline_run WHERE run_id = :run_id")
    async with engine.connect() as plain:
        connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
        while seen < last:
            seq = (await connection.execute(query, {"run_id": run_id})).scalar_one()
            now = time.perf_counter()
            latencies += [now - times[number] for number in range(seen + 1, seq + 1)]
            seen = seq
            await asyncio.sleep(POLL_S)
    return latencies
