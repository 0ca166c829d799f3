"""What an attempt's process has started, and must not leave behind when the attempt does not succeed."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

#: Processes may start others while they are looked for.
LOOKS = 5
REAP_S = 2.0
#: The kernel tells the start of a process in ticks of this length.
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PR_SET_CHILD_SUBREAPER = 36


class Offspring:
    """Processes that this one, or one of them, starts from now on, in sessions of their own too."""

    def __init__(self) -> None:
        _adopt_orphans()
        self._began = _now()

    def end(self) -> int:
        """Kills what is left of them; returns how many there were."""
        killed: dict[int, psutil.Process] = {}
        for _look in range(LOOKS):
            found = [process for process in psutil.Process().children(recursive=True) if self._is_ours(process)]
            if not found:
                break
            for process in found:
                with suppress(psutil.Error):
                    process.kill()
                    killed[process.pid] = process
            psutil.wait_procs(found, timeout=REAP_S)
        return len(killed)

    def _is_ours(self, process: psutil.Process) -> bool:
        started = _start_of(process.pid)
        return started is not None and started >= self._began - 2 * _TICK_S


def _now() -> float:
    """Seconds since the machine was started, as the kernel counts them for processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _start_of(pid: int) -> float | None:
    """When the process began; None when it is over."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19]) * _TICK_S


@cache
def _adopt_orphans() -> None:
    """What this process' children leave behind becomes its child, and can be found."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
