"""NVIDIA GPUs by NVML. A machine without a driver has none."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pynvml


class Gpus:
    """The GPUs of this node. One object per process."""

    def __init__(self) -> None:
        self._handles: dict[int, Any] = {}
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError:
            return
        handles = {index: _try(pynvml.nvmlDeviceGetHandleByIndex, index) for index in range(count)}
        self._handles = {index: handle for index, handle in handles.items() if handle is not None}

    def describe(self) -> list[dict[str, Any]]:
        """``{index, name, uuid, memory_bytes, driver}`` of each."""
        driver = _try(pynvml.nvmlSystemGetDriverVersion)
        return [
            {
                "index": index,
                "name": _try(pynvml.nvmlDeviceGetName, handle),
                "uuid": _try(pynvml.nvmlDeviceGetUUID, handle),
                "memory_bytes": _memory(handle)[1],
                "driver": driver,
            }
            for index, handle in self._handles.items()
        ]

    def cuda_version(self) -> str | None:
        """The highest CUDA version that the driver supports, such as ``12.4``."""
        number = _try(pynvml.nvmlSystemGetCudaDriverVersion) if self._handles else None
        return None if number is None else f"{number // 1000}.{number % 1000 // 10}"

    def read(self) -> dict[str, float]:
        """Utilization and memory (percent, MB), power (W, percent of its limit) and temperature (°C) of each."""
        values: dict[str, float | None] = {}
        for index, handle in self._handles.items():
            used, total = _memory(handle)
            utilization = _try(pynvml.nvmlDeviceGetUtilizationRates, handle)
            power, limit = (
                _try(pynvml.nvmlDeviceGetPowerUsage, handle),
                _try(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle),
            )
            values |= {
                f"gpu_{index}_utilization_percentage": None if utilization is None else float(utilization.gpu),
                f"gpu_{index}_memory_usage_megabytes": None if used is None else used / 1e6,
                f"gpu_{index}_memory_usage_percentage": used / total * 100 if used is not None and total else None,
                f"gpu_{index}_power_usage_watts": None if power is None else power / 1000,
                f"gpu_{index}_power_usage_percentage": power / limit * 100 if power is not None and limit else None,
                f"gpu_{index}_temperature_celsius": _try(
                    pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU
                ),
            }
        return {key: float(value) for key, value in values.items() if value is not None}


@cache
def gpus() -> Gpus:
    """This process' view of the GPUs."""
    return Gpus()


def _memory(handle: Any) -> tuple[int | None, int | None]:
    memory = _try(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return (None, None) if memory is None else (int(memory.used), int(memory.total))


def _try(call: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers; None for what this device or driver does not support."""
    try:
        return call(*arguments)
    except pynvml.NVMLError:
        return None
