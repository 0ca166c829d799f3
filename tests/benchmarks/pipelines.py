"""Area ``pipelines``: what durable orchestration costs over plain Ray tasks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime

import mlplat
from mlplat.pipelines.spec import PipelineSpec
from tests.benchmarks.result import Result
from tests.platform import Platform

CHAIN = 50
FAN = 200
SUBMISSIONS = 40

_BARE = """
import ray, time
ray.init(address="{address}", log_to_driver=False)
@ray.remote(num_cpus={cpus})
def step(_previous):
    return 1
ray.get([step.remote(0) for _ in range(8)])
began = time.perf_counter()
ref = 0
for _ in range({chain}):
    ref = step.remote(ref)
ray.get(ref)
print(time.perf_counter() - began)
began = time.perf_counter()
ray.get([step.remote(0) for _ in range({fan})])
print(time.perf_counter() - began)
"""


def run(platform: Platform) -> Iterator[Result]:
    """Yields the figures, on a running platform with warm workers."""
    chain, fan = _bare_tasks(platform)
    warm = PipelineSpec.model_validate(_fan_out(8))
    mlplat.submit(warm, url=platform.url).wait(60)
    yield Result(f"chain of {CHAIN}", _seconds(platform, _chain(CHAIN)), "s", chain)
    yield Result(f"fan-out of {FAN}", _seconds(platform, _fan_out(FAN)), "s", fan)
    began = time.perf_counter()
    spec = PipelineSpec.model_validate(_chain(3))
    handles = [mlplat.submit(spec, url=platform.url) for _ in range(SUBMISSIONS)]
    yield Result(f"{SUBMISSIONS} submissions of 3 steps, accepted", time.perf_counter() - began, "s")
    for handle in handles:
        assert handle.wait(120)["state"] == "SUCCEEDED"
    yield Result(
        f"{SUBMISSIONS} submissions of 3 steps, done", time.perf_counter() - began, "s", chain * 3 * SUBMISSIONS / CHAIN
    )


def _seconds(platform: Platform, document: dict[str, object]) -> float:
    """From the start of the run to its end, by the platform's own clock."""
    status = mlplat.submit(PipelineSpec.model_validate(document), url=platform.url).wait(300)
    assert status["state"] == "SUCCEEDED", status["error"]
    started, finished = (datetime.fromisoformat(status[key]) for key in ("started_at", "finished_at"))
    return (finished - started).total_seconds()


def _chain(length: int) -> dict[str, object]:
    steps = {
        f"s{number}": {
            "uses": "builtins:int",
            "needs": [f"s{number - 1}"] if number else [],
            "resources": {"cpus": 0.1},
        }
        for number in range(length)
    }
    return {"name": "chain", "steps": steps}


def _fan_out(width: int) -> dict[str, object]:
    step = {"uses": "builtins:int", "foreach": list(range(width))}
    return {"name": "fan", "steps": {"fan": step}}


def _bare_tasks(platform: Platform) -> tuple[float, float]:
    code = _BARE.format(address=platform.ray_environment["RAY_ADDRESS"], chain=CHAIN, fan=FAN, cpus=1)
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | platform.ray_environment, capture_output=True, text=True,
        timeout=120, check=True, cwd=platform.state_dir,
    )  # fmt: skip
    chain, fan = (float(line) for line in done.stdout.split()[-2:])
    return chain, fan
