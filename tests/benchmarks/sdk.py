"""Area ``sdk``: what ``run.log`` costs its caller while the sender works, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import mlplat
from tests.benchmarks.result import Result, percentile
from tests.platform import Platform

TIGHT_CALLS = 200_000
PACED_CALLS = 5_000
PACE_S = 0.001
BOUND_US = 50


def run(platform: Platform) -> Iterator[Result]:
    """Yields the figures, on a running platform. The floor is ``list.append`` under a lock."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.sdk"],
        env=platform.environment | {"PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    for pace in ("tight loop", "1 kHz"):
        for name, fraction in (("p50", "0.5"), ("p99", "0.99"), ("p99.9", "0.999")):
            bound = f"<= {BOUND_US}" if name == "p99" else None
            floor = figures["floor"][pace][fraction]
            yield Result(f"run.log of 3 scalars, {pace}, {name}", figures["log"][pace][fraction], "µs", floor, bound)
    yield Result("points sent while the caller logs, and acknowledged", figures["rate"], "points/s")
    yield Result("points lost", figures["lost"], "points", bound="<= 0")


def _latencies(call: Callable[[int], object]) -> dict[str, dict[str, float]]:
    return {"tight loop": _measure(call, TIGHT_CALLS, 0.0), "1 kHz": _measure(call, PACED_CALLS, PACE_S)}


def _measure(call: Callable[[int], object], calls: int, pause_s: float) -> dict[str, float]:
    taken = [0] * calls
    for number in range(calls):
        began = time.perf_counter_ns()
        call(number)
        taken[number] = time.perf_counter_ns() - began
        if pause_s:
            time.sleep(pause_s)
    return {str(fraction): percentile(taken, fraction) / 1000 for fraction in (0.5, 0.99, 0.999)}


def _main() -> None:
    lock = threading.Lock()
    kept: list[object] = []

    def floor(number: int) -> None:
        with lock:
            kept.append((number, 0.1))

    figures: dict[str, object] = {"floor": _latencies(floor)}
    kept.clear()
    run = mlplat.start_run("benchmark")
    run.log({"warm": 0.0}, step=0)
    run.flush()
    began = time.perf_counter()
    figures["log"] = _latencies(lambda step: run.log({"loss": 0.1, "accuracy": 0.2, "rate": 0.3}, step=step))
    run.flush()
    seconds = time.perf_counter() - began
    finished = run.finish()
    figures["lost"] = finished.dropped_points + len(finished.refused)
    figures["rate"] = 3 * (TIGHT_CALLS + PACED_CALLS) / seconds
    print(json.dumps(figures))


if __name__ == "__main__":
    _main()
