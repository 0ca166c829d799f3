"""Further nodes of a test's cluster, on loopback: joined, and lost with everything that runs on them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from cluster.ports import free_port
from cluster.ray_head import temp_dir
from tests.platform import Platform, clean_environment

START_TIMEOUT_S = 120
OBJECT_STORE_BYTES = 80 * 1024 * 1024


@dataclass(frozen=True)
class Node:
    """A node that has joined; ``pid`` is its raylet's."""

    pid: int

    def processes(self) -> list[psutil.Process]:
        """Its raylet, and everything that this has started."""
        with suppress(psutil.NoSuchProcess):
            raylet = psutil.Process(self.pid)
            return [raylet, *raylet.children(recursive=True)]
        return []

    def kill(self) -> int:
        """``kill -9`` of all of it at once; returns how many processes that were."""
        found = self.processes()
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(found, timeout=30)
        return len(found)


@contextmanager
def joined(platform: Platform, resources: Mapping[str, float], environment: Mapping[str, str]) -> Iterator[Node]:
    """A further node with these resources, until it is killed, at the latest at the end.

    It has no CPUs: nothing comes to it that does not ask for what it has.
    """
    before = _raylets(platform)
    command = [
        *(sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--node-ip-address=127.0.0.1", "--num-cpus=0"),
        *(f"--address={platform.ray_environment['RAY_ADDRESS']}", f"--resources={json.dumps(dict(resources))}"),
        *(f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats", "--log-color=false"),
        *(f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"),
    ]
    own = {name: value for name, value in platform.ray_environment.items() if name != "RAY_ADDRESS"}
    started = subprocess.run(
        command, env=clean_environment() | own | {"RAY_TMPDIR": str(temp_dir(platform.state_dir))} | dict(environment),
        cwd=platform.state_dir, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False,
    )  # fmt: skip
    assert started.returncode == 0, f"{started.stdout}\n{started.stderr}"
    [pid] = _raylets(platform) - before
    node = Node(pid)
    try:
        yield node
    finally:
        node.kill()


def _raylets(platform: Platform) -> set[int]:
    found = set()
    for process in platform.processes():
        with suppress(psutil.NoSuchProcess):
            if process.name() == "raylet":
                found.add(process.pid)
    return found
