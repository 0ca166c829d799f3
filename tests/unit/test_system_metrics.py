"""System metrics: names, averages, one sampler for all runs."""

from __future__ import annotations

import threading
import time

import psutil
import pynvml
import pytest

from mlplat.metrics.model import Point
from mlplat.sdk.capture import system
from mlplat.sdk.capture.gpus import Gpus
from mlplat.sdk.capture.system import Meter, Recipient, Sampler, average, sampler

MLFLOW_KEYS = {
    "cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage",
    "disk_usage_percentage", "disk_usage_megabytes", "disk_available_megabytes",
    "network_receive_megabytes", "network_transmit_megabytes",
}  # fmt: skip


class Received:
    """Points of one run."""

    def __init__(self, wanted: int) -> None:
        self.points: list[Point] = []
        self.enough = threading.Event()
        self._wanted = wanted

    def add(self, points: list[Point]) -> None:
        self.points += points
        if len({point.timestamp for point in self.points}) >= self._wanted:
            self.enough.set()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mlplat-system-metrics"]


def test_a_meter_reads_what_mlflow_does() -> None:
    meter = Meter()
    enough = time.process_time() + 0.05
    while time.process_time() < enough:  # the clock of CPU times ticks a hundred times a second
        pass
    values = meter.gauges() | meter.cpu() | meter.counters()
    assert values.keys() >= MLFLOW_KEYS
    assert all(0 <= values[key] <= 100 for key in values if key.endswith("_percentage") and "process" not in key)
    assert values["process_memory_megabytes"] > 1
    assert values["process_cpu_percentage"] > 0


def test_times_that_go_backwards_leave_percentages_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = psutil.cpu_times()
    zero = now._replace(**dict.fromkeys(now._fields, 0.0))
    readings = iter(
        [
            zero._replace(user=10.0, idle=100.0, iowait=50.0, guest=5.0),
            zero._replace(user=13.0, idle=107.0, iowait=20.0, guest=7.0),
        ]
    )
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(readings))
    assert Meter().cpu()["cpu_utilization_percentage"] == pytest.approx(30.0)


def test_gpus_report_what_their_driver_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = pynvml.c_nvmlMemory_t(total=80_000_000_000, free=60_000_000_000, used=20_000_000_000)
    answers = {
        "nvmlInit": None, "nvmlDeviceGetCount": 1, "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetUtilizationRates": pynvml.c_nvmlUtilization_t(gpu=42, memory=7),
        "nvmlDeviceGetPowerUsage": 350_000, "nvmlDeviceGetEnforcedPowerLimit": 700_000,
        "nvmlDeviceGetName": "H100", "nvmlDeviceGetUUID": "GPU-1", "nvmlSystemGetDriverVersion": "550.1",
        "nvmlSystemGetCudaDriverVersion": 12_040,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *_arguments, answer=answer: answer)

    def refused(*_arguments: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetTemperature", refused)
    found = Gpus()
    assert found.read() == {
        "gpu_0_utilization_percentage": 42.0, "gpu_0_memory_usage_megabytes": 20_000.0,
        "gpu_0_memory_usage_percentage": 25.0, "gpu_0_power_usage_watts": 350.0, "gpu_0_power_usage_percentage": 50.0,
    }  # fmt: skip
    assert found.cuda_version() == "12.4"
    assert found.describe() == [
        {"index": 0, "name": "H100", "uuid": "GPU-1", "memory_bytes": 80_000_000_000, "driver": "550.1"}
    ]


def test_gauges_are_averaged_over_the_samples_that_have_them() -> None:
    assert average([{"a": 1.0, "b": 5.0}, {"a": 2.0}, {"a": 6.0}]) == {"a": 3.0, "b": 5.0}
    assert average([]) == {}


def test_points_count_from_the_runs_start() -> None:
    recipient = Recipient("system/node-1/", 1_000_000, lambda points: None, {"network_receive_megabytes": 5.0})
    points = recipient.points({"network_receive_megabytes": 7.5, "x": 1.23456}, 10.0, 1_025_000)
    assert points == [
        Point("system/node-1/network_receive_megabytes", 2.5, 1_025_000, 2),
        Point("system/node-1/x", 1.235, 1_025_000, 2),
    ]
    assert recipient.points({"x": 1.0}, 10.0, 900_000)[0].step == 0


def test_one_sampler_serves_all_runs_and_ends_with_the_last() -> None:
    own = Sampler()
    received = [Received(2), Received(2)]
    recipients = [Recipient("system/", time.time_ns() // 1_000_000, entry.add) for entry in received]
    before = len(threads())
    for recipient in recipients:
        own.open(recipient, 0.05)
    assert len(threads()) == before + 1
    for entry in received:
        assert entry.enough.wait(60)
    own.close(recipients[0])
    thread = threads()[-1]
    own.close(recipients[1])
    own.close(recipients[1])
    thread.join(60)
    assert not thread.is_alive()
    count = len(received[1].points)
    assert {point.key for point in received[1].points} >= {f"system/{key}" for key in MLFLOW_KEYS}
    again = Received(1)
    recipient = Recipient("system/", 0, again.add)
    own.open(recipient, 0.05)
    assert again.enough.wait(60)
    own.close(recipient)
    assert len(received[1].points) == count


def test_a_reading_that_fails_does_not_end_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([True] * 3)

    class Flaky(Meter):
        def gauges(self) -> dict[str, float]:
            if next(failures, False):
                raise OSError
            return super().gauges()

    monkeypatch.setattr(system, "Meter", Flaky)
    own, received = Sampler(), Received(1)
    recipient = Recipient("system/", 0, received.add)
    own.open(recipient, 0.05)
    assert received.enough.wait(60)
    own.close(recipient)


def test_a_process_has_one_sampler() -> None:
    assert sampler() is sampler()
