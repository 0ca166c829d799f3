"""The Ray head of an embedded platform: started as processes of its own, stopped by their pids."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.credentials import client_environment
from cluster.ports import free_port, is_listening, require_free
from mlplat.errors import BringUpError
from mlplat.settings import Settings

START_TIMEOUT_S = 90
# What is durable is in the stores by now, and Serve's own actors do not react to SIGTERM.
STOP_TIMEOUT_S = 2
#: Within this time a worker is used again for the next step; afterwards its memory is given back.
IDLE_WORKER_MS = 20_000
#: Bytes that Ray's folder may have. HAProxy's sockets bind it: 97 in all, of which Serve takes
#: ``/<node id>/metrics.sock``, 69, and ``/hap`` is ours. Ray's own sockets would allow 40.
MAX_TEMP_DIR_BYTES = 97 - 69 - len("/hap")


@dataclass(frozen=True)
class RayHead:
    """A running head."""

    address: str
    dashboard_url: str | None
    pids: list[int]


def temp_dir(state_dir: Path) -> Path:
    """Ray's folder for sockets and logs; under /tmp where the state folder's path is too long for sockets."""
    inside = state_dir / "ray"
    if len(os.fsencode(inside)) <= MAX_TEMP_DIR_BYTES:
        return inside
    return Path("/tmp") / f"mlplat-{hashlib.sha256(os.fsencode(state_dir)).hexdigest()[:10]}"  # noqa: S108


def start_head(settings: Settings, dashboard: bool) -> RayHead:
    """Starts a head on loopback and returns when it accepts drivers.

    Raises:
        BringUpError: a port is taken, or Ray did not start; the message ends with Ray's own words.
    """
    if dashboard:
        require_free(settings.dashboard_port, "Ray dashboard", "MLPLAT_DASHBOARD_PORT")
    state_dir = settings.state_dir
    folder = temp_dir(state_dir)
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [
        *(sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--node-ip-address=127.0.0.1"),
        *(f"--port={port}", f"--ray-client-server-port={free_port()}", f"--temp-dir={folder}"),
        "--no-monitor",  # an autoscaler, which one machine does not need: 50 MB and a process less to start
        *(f"--object-store-memory={settings.object_store_bytes}", "--disable-usage-stats"),
        *(f"--include-dashboard={str(dashboard).lower()}", "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-port={settings.dashboard_port}", f"--dashboard-agent-listen-port={free_port()}"),
        *(f"--min-worker-port={0}", f"--max-worker-port={0}", "--log-color=false"),
    ]
    if settings.num_cpus is not None:
        command.append(f"--num-cpus={settings.num_cpus}")
    log = state_dir / "ray-start.log"
    with log.open("w") as output:
        started = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=state_dir,
            env=_head_environment(settings, folder), timeout=START_TIMEOUT_S, check=False,
        )  # fmt: skip
    pids = find_processes(folder)
    if started.returncode != 0 or not is_listening(port):
        stop_processes(pids)
        raise BringUpError(f"Ray did not start: {_reason(log)} (log: {log})")
    url = f"http://127.0.0.1:{settings.dashboard_port}" if dashboard else None
    return RayHead(f"127.0.0.1:{port}", url, pids)


def find_processes(folder: Path) -> list[int]:
    """Pids of the Ray daemons whose session lies in ``folder``, with all their children."""
    marker = f"{folder}/session_"
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and any(marker in part for part in process.info["cmdline"] or ()):
            try:
                found |= {child.pid: child for child in (process, *process.children(recursive=True))}
            except psutil.NoSuchProcess:
                continue
    found.pop(os.getpid(), None)
    return sorted(found)


def stop_processes(pids: list[int]) -> None:
    """Asks these processes to end, and kills what is left after ``STOP_TIMEOUT_S``."""
    processes = []
    for pid in pids:
        try:
            processes.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    _signal(processes, "terminate")
    _gone, alive = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
    _signal(alive, "kill")
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)


def _signal(processes: list[psutil.Process], method: str) -> None:
    for process in processes:
        try:
            getattr(process, method)()
        except psutil.NoSuchProcess:
            continue


def _head_environment(settings: Settings, folder: Path) -> Mapping[str, str]:
    serve = folder / "hap"
    serve.mkdir(exist_ok=True)
    return (
        {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        | client_environment(settings.state_dir)
        | {
            "MLPLAT_URL": settings.local_url,  # for jobs and steps
            "RAY_TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Workers for the first driver, which is the bring-up: it runs no task, and its actors need other workers.
            "RAY_prestart_worker_first_driver": "0",
            # Ray would keep one idle worker per CPU for ever, with all that its last step imported.
            "RAY_num_workers_soft_limit": "0",
            "RAY_idle_worker_killing_time_threshold_ms": str(IDLE_WORKER_MS),
            # Whatever that threshold says, a look ends idle workers of actors whose creator has disconnected, which
            # is all of ours: by default five times a second, so that nearly every step would pay for a new process.
            "RAY_kill_idle_workers_interval_ms": str(IDLE_WORKER_MS),
            # The Python proxy costs seven times the CPU per request and piles up large bodies in memory.
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HAPROXY_NBTHREAD": "2",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(serve / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(serve / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(serve / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(serve),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(serve / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            # By default a proxy that needs more than half a minute, on a machine with much to do, has to start anew.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
            # By default Ray looks at its replicas ten times a second, and at counters of HAProxy that nobody reads.
            "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            # A batch of a thousand points passes in two pieces instead of six.
            "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
        }
    )


def _reason(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
    return (errors or lines or ["no message"])[-1]
