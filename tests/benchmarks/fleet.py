"""Ten thousand experiments, each with a writer: no error, and every acknowledged point is there once."""

from __future__ import annotations

import time
from collections.abc import Iterator

from mlplat.sdk.client import API
from tests.benchmarks.load import Request, run_load
from tests.benchmarks.result import Result, percentile
from tests.platform import Platform

EXPERIMENTS = 10_000
ROUNDS = 2
POINTS = 5
CLIENTS = 64


def run(platform: Platform) -> Iterator[Result]:
    """Yields the figures, on a running platform."""
    name = f"fleet-{time.time_ns()}"
    create: list[Request] = [
        ("POST", f"{API}/experiments/create", {"name": f"{name}-{number}"}) for number in range(EXPERIMENTS)
    ]
    made = run_load(platform.url, create, CLIENTS, keep_answers=True)
    start: list[Request] = [
        ("POST", f"{API}/runs/create", {"experiment_id": answer["experiment_id"], "start_time": 1})
        for answer in made.answers
    ]
    started = run_load(platform.url, start, CLIENTS, keep_answers=True)
    run_ids = [answer["run"]["info"]["run_id"] for answer in started.answers]
    log: list[Request] = [
        ("POST", f"{API}/runs/log-batch", {"run_id": run_id, "metrics": _points(turn)})
        for turn in range(ROUNDS)
        for run_id in run_ids
    ]
    load = run_load(platform.url, log, CLIENTS)  # fails if one request is refused
    label = f"{EXPERIMENTS:,} experiments with writers"
    yield Result(f"{label}: requests", load.rate, "req/s")
    yield Result(f"{label}: p99", percentile(load.latencies_ms, 0.99), "ms")
    read: list[Request] = [
        ("GET", f"{API}/metrics/get-history?run_id={run_id}&metric_key=m", None) for run_id in run_ids[::10]
    ]
    found = [len(answer.get("metrics", [])) for answer in run_load(platform.url, read, 8, keep_answers=True).answers]
    wrong = sum(count != ROUNDS * POINTS for count in found)
    yield Result(f"{label}: histories of {len(found):,} with a point too few or too many", wrong, "runs", bound="<= 0")


def _points(turn: int) -> list[dict[str, object]]:
    return [{"key": "m", "value": index / 2, "timestamp": 1, "step": turn * POINTS + index} for index in range(POINTS)]
