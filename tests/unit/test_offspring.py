"""Processes that an attempt leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mlplat.execution.offspring import Offspring
from tests.platform import eventually

#: Starts another one, in a session of its own, tells its pid in a file, and ends or stays.
_PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1] + ".partial", "w").write(str(child.pid))
import os; os.replace(sys.argv[1] + ".partial", sys.argv[1])
time.sleep(float(sys.argv[2]))
"""


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("parent_stays", [True, False], ids=["with its parent", "an orphan"])
def test_children_of_children_end_too(tmp_path: Path, parent_stays: bool) -> None:
    offspring, told = Offspring(), tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(told), "600" if parent_stays else "0"])
    eventually(told.exists, 60)
    if not parent_stays:
        assert parent.wait(60) == 0
    grandchild = int(told.read_text())
    assert alive(grandchild)
    assert offspring.end() == 1 + parent_stays
    assert not alive(grandchild)
    assert not alive(parent.pid)
    assert offspring.end() == 0


def test_what_ran_before_stays() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as earlier:
        eventually(lambda: _seconds_old(earlier.pid) > 0.1, 60)
        offspring = Offspring()
        assert offspring.end() == 0
        assert alive(earlier.pid)
        earlier.communicate(b"\n")
    assert earlier.returncode == 0


def _seconds_old(pid: int) -> float:
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
