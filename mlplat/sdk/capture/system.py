"""System metrics of a node, under MLflow's names: one sampler per process, whatever the number of runs.

Gauges are averages over the interval; CPU figures are exact over it; network figures count from the
run's start. ``step`` counts intervals since the run's start, so it goes on when the run does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import psutil

from mlplat.metrics.model import Point
from mlplat.sdk.capture.gpus import gpus

_log = logging.getLogger(__name__)
SAMPLES_PER_POINT = 5
COUNTERS = ("network_receive_megabytes", "network_transmit_megabytes")


@dataclass(eq=False)
class Recipient:
    """A run that wants the metrics. ``prefix`` ends with a slash; ``started_ms`` is in ms since 1970."""

    prefix: str
    started_ms: int
    add_points: Callable[[list[Point]], None]
    base: dict[str, float] = field(default_factory=dict)

    def points(self, values: dict[str, float], interval_s: float, now_ms: int) -> list[Point]:
        """The values as points of this run."""
        step = max(0, int((now_ms - self.started_ms) / 1000 / interval_s))
        return [
            Point(self.prefix + key, round(value - self.base.get(key, 0.0), 3), now_ms, step)
            for key, value in values.items()
        ]


class Meter:
    """Reads the node and this process."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._cpu = self._cpu_times()

    def gauges(self) -> dict[str, float]:
        """What holds at this instant."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(os.sep)
        return {
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "process_memory_megabytes": self._process.memory_info().rss / 1e6,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
        } | gpus().read()

    def cpu(self) -> dict[str, float]:
        """Percent of all CPUs, and of one CPU by this process, since the last call."""
        old_times, old_own, old_at = self._cpu
        times, own, at = self._cpu = self._cpu_times()
        # The kernel corrects some of these downwards now and then.
        spent = {key: max(0.0, value - old_times[key]) for key, value in times.items()}
        total, idle = sum(spent.values()), spent["idle"] + spent.get("iowait", 0.0)
        values = {"process_cpu_percentage": (own - old_own) / (at - old_at) * 100} if at > old_at else {}
        return values | ({"cpu_utilization_percentage": (total - idle) / total * 100} if total > 0 else {})

    def counters(self) -> dict[str, float]:
        """Megabytes since the machine started."""
        network = psutil.net_io_counters()
        return (
            {}
            if network is None
            else dict(zip(COUNTERS, (network.bytes_recv / 1e6, network.bytes_sent / 1e6), strict=True))
        )

    def _cpu_times(self) -> tuple[dict[str, float], float, float]:
        """Seconds of the machine by kind, of this process, and of the clock."""
        times, own = psutil.cpu_times()._asdict(), self._process.cpu_times()
        for part in ("guest", "guest_nice"):  # the guests' time is part of the user's
            times.pop(part, None)
        return times, own.user + own.system, time.monotonic()


class Sampler:
    """Reads the node for all recipients, in a thread that lives while there is one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recipients: list[Recipient] = []
        self._stop = threading.Event()

    def open(self, recipient: Recipient, interval_s: float) -> None:
        """Starts giving the run metrics. The first run's interval counts for all that are open."""
        recipient.base = Meter().counters()
        with self._lock:
            self._recipients.append(recipient)
            if len(self._recipients) == 1:
                self._stop = threading.Event()
                threading.Thread(
                    target=self._run, args=(interval_s, self._stop), name="mlplat-system-metrics", daemon=True
                ).start()

    def close(self, recipient: Recipient) -> None:
        """Stops that; closing twice is fine."""
        with self._lock, contextlib.suppress(ValueError):
            self._recipients.remove(recipient)
            if not self._recipients:
                self._stop.set()

    def _run(self, interval_s: float, stop: threading.Event) -> None:
        meter, samples = Meter(), list[dict[str, float]]()
        while not stop.wait(interval_s / SAMPLES_PER_POINT):
            try:
                samples.append(meter.gauges())
                if len(samples) == SAMPLES_PER_POINT:
                    self._publish(average(samples) | meter.cpu() | meter.counters(), interval_s)
                    samples = []
            except Exception:  # a reading that fails must not end the others
                _log.debug("system metrics failed", exc_info=True)

    def _publish(self, values: dict[str, float], interval_s: float) -> None:
        now_ms = time.time_ns() // 1_000_000
        with self._lock:
            for recipient in self._recipients:
                recipient.add_points(recipient.points(values, interval_s, now_ms))


def average(samples: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each key over the samples that have it."""
    gathered: dict[str, list[float]] = {}
    for sample in samples:
        for key, value in sample.items():
            gathered.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in gathered.items()}


def sampler() -> Sampler:
    """This process' sampler; a forked child has one of its own."""
    return _sampler_of(os.getpid())


@lru_cache(maxsize=1)
def _sampler_of(_pid: int) -> Sampler:
    return Sampler()
