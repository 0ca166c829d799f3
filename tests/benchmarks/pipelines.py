"""Area ``pipelines``: durable orchestration beside plain Ray tasks, and beside Ray tasks with a durable row each."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import mlplat
from mlplat.pipelines.spec import PipelineSpec
from mlplat.sdk.client import Client
from tests.benchmarks.load import Load, run_load
from tests.benchmarks.pipeline_scale import concurrency, ticks
from tests.benchmarks.result import Result, percentile
from tests.platform import Platform, eventually

CHAIN = 50
FAN = 1_000
LAYERS = WIDTH = 10
SUBMISSIONS = 200
BURST = 500
#: Each figure is the best of so many, as the peers' were.
ROUNDS = 3
RUNS = "/api/v1/pipeline-runs"


def run(platform: Platform) -> Iterator[Result]:
    """Yields the figures, on a running platform with warm workers."""
    bare = floors(platform)
    for document in (fan_out(40), chain(10)):
        _seconds(platform, document)
    for name, document, bound in (
        (f"chain of {CHAIN}", chain(CHAIN), 0.25),
        (f"fan-out and fan-in of {FAN:,}", fan_in(FAN), 2.0),
        (f"{LAYERS} all-to-all layers of {WIDTH}", layers(LAYERS, WIDTH), 0.3),
    ):
        seconds = min(_seconds(platform, document) for _ in range(ROUNDS))
        plain, durable = bare[name.partition(" of")[0].partition(" and")[0]]
        yield Result(name, seconds, "s", durable, bound=f"<= {bound}")
        yield Result(f"{name}: plain Ray tasks", plain, "s")
    yield from _submissions(platform, bare["submissions"])
    yield from concurrency(platform)
    yield from ticks()


def _submissions(platform: Platform, floor: tuple[float, float]) -> Iterator[Result]:
    document = chain(3)
    single = _submit(platform, document, 200, clients=1)
    yield Result("one submission, p50", percentile(single.latencies_ms, 0.5), "ms", bound="<= 20")
    yield Result("one submission, p99", percentile(single.latencies_ms, 0.99), "ms", bound="<= 100")
    _all_done(platform, single)
    rounds = []
    for _round in range(ROUNDS):
        load = _submit(platform, document, SUBMISSIONS, clients=16)
        rounds.append((_all_done(platform, load), SUBMISSIONS / load.rate))
    best = min(rounds)
    yield Result(f"{SUBMISSIONS} submissions of 3 steps, accepted", best[1], "s", bound="<= 1.0")
    yield Result(f"{SUBMISSIONS} submissions of 3 steps, all done", best[0], "s", floor[1], bound="<= 2.5")
    yield Result(f"{SUBMISSIONS} × 3 plain Ray tasks", floor[0], "s")
    burst = _submit(platform, document, BURST, clients=BURST)
    yield Result(f"{BURST} submissions in one instant, p50", percentile(burst.latencies_ms, 0.5), "ms", bound="<= 500")
    yield Result(f"{BURST} submissions in one instant, accepted", len(burst.answers), "runs", bound=f">= {BURST}")
    _all_done(platform, burst)


def _submit(platform: Platform, document: dict[str, Any], count: int, clients: int) -> Load:
    spec = PipelineSpec.model_validate(document).to_json()
    bodies = [{"spec": spec, "idempotency_key": uuid.uuid4().hex, "submitted_by": "bench"} for _ in range(count)]
    return run_load(platform.url, [("POST", RUNS, body) for body in bodies], clients, keep_answers=True)


def _all_done(platform: Platform, load: Load) -> float:
    """Seconds from the first acceptance to the last end."""
    client = Client(platform.url)
    ours = {answer["run_id"] for answer in load.answers}

    def ended() -> list[dict[str, Any]] | None:
        runs = [run for run in client.get(RUNS, limit=1000) if run["run_id"] in ours]
        return runs if all(run["finished_at"] for run in runs) else None

    runs = eventually(ended, 120, "all runs are over")
    assert all(run["state"] == "SUCCEEDED" for run in runs)
    began = min(datetime.fromisoformat(run["created_at"]) for run in runs)
    return (max(datetime.fromisoformat(run["finished_at"]) for run in runs) - began).total_seconds()


def _seconds(platform: Platform, document: dict[str, Any]) -> float:
    """From the start of the run to its end, by the platform's own clock."""
    status = mlplat.submit(PipelineSpec.model_validate(document), url=platform.url).wait(300)
    assert status["state"] == "SUCCEEDED", status["error"]
    started, finished = (datetime.fromisoformat(status[key]) for key in ("started_at", "finished_at"))
    return (finished - started).total_seconds()


def chain(length: int) -> dict[str, Any]:
    """Steps that wait for one another."""
    steps = {
        f"s{number}": {"uses": "builtins:int", "needs": [f"s{number - 1}"] if number else []}
        for number in range(length)
    }
    return {"name": "chain", "steps": steps}


def fan_out(width: int) -> dict[str, Any]:
    """One step with many items."""
    return {"name": "fan", "steps": {"fan": {"uses": "builtins:int", "foreach": list(range(width))}}}


def fan_in(width: int) -> dict[str, Any]:
    """One step with many items, and one that takes all their outputs."""
    fan = fan_out(width)["steps"]["fan"]
    return {
        "name": "fan-in",
        "steps": {"fan": fan, "join": {"uses": "builtins:dict", "with": {"all": "${{ steps.fan.output }}"}}},
    }


def layers(depth: int, width: int) -> dict[str, Any]:
    """Layers of steps, each of which needs the whole layer before it."""
    steps = {
        f"l{layer}_{number}": {
            "uses": "builtins:int",
            "needs": [f"l{layer - 1}_{other}" for other in range(width)] if layer else [],
        }
        for layer in range(depth)
        for number in range(width)
    }
    return {"name": "layers", "steps": steps}


def floors(platform: Platform) -> dict[str, tuple[float, float]]:
    """Seconds of plain Ray tasks, and of Ray tasks with one fenced, group-committed row per transition."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.pipeline_floor", platform.config.postgres_url],
        env=os.environ | platform.ray_environment, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    found: dict[str, tuple[float, float]] = {}
    for line in done.stdout.splitlines():
        name, plain, durable = line.split("\t")
        found[name] = float(plain), float(durable)
    return found
