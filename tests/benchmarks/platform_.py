"""Area ``platform``: how long the platform takes to start, what it weighs idle, and the demo."""

from __future__ import annotations

import time
from collections.abc import Iterator

from cluster.credentials import ensure_token
from cluster.ray_head import find_processes, start_head, stop_processes, temp_dir
from tests.benchmarks.result import Result
from tests.platform import Platform, eventually

SETTLE_S = 15
GIGABYTE = 1e9


def run(platform: Platform) -> Iterator[Result]:
    """Yields the figures. The platform is down before and after."""
    floor = _bare_ray(platform)
    began = time.monotonic()
    platform.mlplat("up")
    yield Result("up, first time (initdb included)", time.monotonic() - began, "s", floor, "<= 25")
    yield Result("idle memory after up, PSS", _idle_pss(platform) / GIGABYTE, "GB", None, "<= 2.0")
    platform.mlplat("down")
    began = time.monotonic()
    platform.mlplat("up")
    yield Result("up, again", time.monotonic() - began, "s", floor, "<= 25")
    platform.mlplat("down")
    began = time.monotonic()
    platform.mlplat("demo", timeout_s=300)
    yield Result("demo, platform down before", time.monotonic() - began, "s", floor, "<= 120")
    began = time.monotonic()
    platform.mlplat("demo", timeout_s=300)
    yield Result("demo, platform up before", time.monotonic() - began, "s", None, "<= 120")
    yield Result("idle memory after two demos, PSS", _idle_pss(platform, 90) / GIGABYTE, "GB", None, "<= 2.0")
    began = time.monotonic()
    platform.mlplat("down")
    yield Result("down", time.monotonic() - began, "s")


def _bare_ray(platform: Platform) -> float:
    """Seconds that ``ray start --head`` takes with the same options and nothing else."""
    ensure_token(platform.state_dir)
    began = time.monotonic()
    start_head(platform.settings, dashboard=True)
    seconds = time.monotonic() - began
    stop_processes(find_processes(temp_dir(platform.state_dir)))
    return seconds


def _idle_pss(platform: Platform, patience_s: float = SETTLE_S) -> int:
    """The smallest sum that was seen while the platform had nothing to do."""
    deadline = time.monotonic() + patience_s
    seen: list[int] = []

    def sample() -> bool:
        seen.append(sum(process.memory_full_info().pss for process in platform.processes() if process.is_running()))
        return time.monotonic() > deadline

    eventually(sample, patience_s + 30, "samples were taken")
    return min(seen)
