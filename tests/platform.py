"""A real platform for tests: its own state folder, its own ports, started and stopped by the product's own commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster.credentials import client_environment
from cluster.ports import free_port
from mlplat.settings import PlatformConfig, Settings

ROOT = Path(__file__).resolve().parent.parent
MLPLAT = Path(sys.executable).with_name("mlplat")
#: Logical CPUs of the test cluster: more than the machine has, so that tests do not wait for one another.
NUM_CPUS = 4
OBJECT_STORE_BYTES = 120 * 1024 * 1024
#: Between two looks at a condition: what is asked often has less time for its work.
FIRST_PAUSE_S, LAST_PAUSE_S = 0.02, 0.3


def clean_environment() -> dict[str, str]:
    """This process' environment without settings that would reach another platform."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MLPLAT_", "RAY_", "MLFLOW_"))}


@dataclass
class Platform:
    """A platform of the tests. ``http_port`` and the state folder are nobody else's."""

    state_dir: Path
    http_port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Base URL of the HTTP API."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def settings(self) -> Settings:
        """Its settings."""
        return Settings(
            state_dir=self.state_dir,
            http_port=self.http_port,
            dashboard_port=self.dashboard_port,
            num_cpus=NUM_CPUS,
            object_store_bytes=OBJECT_STORE_BYTES,
        )

    @property
    def config(self) -> PlatformConfig:
        """What its actors were given."""
        return self.settings.config

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which commands reach this platform and no other."""
        return clean_environment() | {
            "MLPLAT_STATE_DIR": str(self.state_dir),
            "MLPLAT_HTTP_PORT": str(self.http_port),
            "MLPLAT_DASHBOARD_PORT": str(self.dashboard_port),
            "MLPLAT_NUM_CPUS": str(NUM_CPUS),
            "MLPLAT_OBJECT_STORE_BYTES": str(OBJECT_STORE_BYTES),
            "MLPLAT_WEBHOOK_PRIVATE_TARGETS": "127.0.0.1",
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            **self.extra,
        }

    def run(self, *arguments: str, timeout_s: float = 120, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Runs ``mlplat`` with these arguments, whatever its exit code."""
        return subprocess.run(
            [str(MLPLAT), *arguments],
            env=self.environment,
            cwd=cwd or self.state_dir,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def mlplat(self, *arguments: str, timeout_s: float = 120, cwd: Path | None = None) -> str:
        """Runs ``mlplat`` and returns its stdout; fails the test when it fails."""
        done = self.run(*arguments, timeout_s=timeout_s, cwd=cwd)
        assert done.returncode == 0, f"mlplat {' '.join(arguments)} → {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def python(self, code: str, timeout_s: float = 120, **extra: str) -> str:
        """Runs Python code that reaches this platform, outside of this process; returns its stdout."""
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=self.environment | extra,
            cwd=self.state_dir,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def status(self) -> dict[str, dict[str, Any]]:
        """The rows of ``mlplat status`` by actor."""
        return {row["actor"]: row for row in json.loads(self.mlplat("status", "--json"))}

    @property
    def ray_environment(self) -> dict[str, str]:
        """What a process needs to join its Ray cluster as a driver."""
        record = json.loads((self.state_dir / "platform.json").read_text())
        return client_environment(self.state_dir) | {"RAY_ADDRESS": record["ray_address"]}

    def processes(self) -> list[psutil.Process]:
        """Everything that this platform runs."""
        marker = str(self.state_dir)
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter(["cmdline"]):
            if any(marker in part for part in process.info["cmdline"] or ()):
                try:
                    found |= {child.pid: child for child in (process, *process.children(recursive=True))}
                except psutil.NoSuchProcess:
                    continue
        return list(found.values())

    def left_over(self) -> list[psutil.Process]:
        """What still runs after ``mlplat down``."""
        return [process for process in self.processes() if process.status() != psutil.STATUS_ZOMBIE]


def eventually(condition: Callable[[], Any], timeout_s: float = 30, what: str = "") -> Any:
    """The first true value of ``condition``, which is asked again and again until the deadline."""
    deadline, pause_s = time.monotonic() + timeout_s, FIRST_PAUSE_S
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what or condition}"
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, LAST_PAUSE_S)
