"""``up``, ``down`` and ``status``, and what they say when something is in the way."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from mlflow import MlflowClient
from sqlalchemy import text

from cluster.postgres import EmbeddedPostgres
from mlplat.db.engine import open_sync_engine
from mlplat.db.migrate import migrate
from mlplat.settings import embedded_postgres_url
from tests.platform import MLPLAT, Platform, clean_environment, eventually


@pytest.fixture
def empty() -> Iterator[Platform]:
    """A platform that was never started; nothing of it may be left."""
    with tempfile.TemporaryDirectory(prefix="mlt-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        fresh = Platform(Path(folder))
        try:
            yield fresh
        finally:
            if fresh.processes():
                fresh.run("down")
            assert not fresh.processes()


def _refused(platform: Platform, *arguments: str) -> str:
    done = platform.run(*arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_second_up_finds_the_first(platform: Platform) -> None:
    before = platform.status()
    assert platform.url in platform.mlplat("up")
    after = platform.status()
    assert {name: row["pid"] for name, row in before.items()} == {name: row["pid"] for name, row in after.items()}


def test_status_is_one_table(platform: Platform) -> None:
    lines = platform.mlplat("status").splitlines()
    assert lines[0].split() == ["actor", "node", "pid", "restarts", "health", "lag"]
    names = {"metric-shard-0", "registry-coordinator", "run-executor-0", "pipeline-scheduler", "gateway", "postgres"}
    assert {line.split()[0] for line in lines[1:]} == names
    assert all(row["health"] == "ok" for row in platform.status().values())


def test_the_actors_run_at_nice_0_and_steps_do_not(platform: Platform) -> None:
    for name, row in platform.status().items():
        assert psutil.Process(row["pid"]).nice() == 0, name


@pytest.mark.parametrize("setting", ["fsync", "synchronous_commit", "full_page_writes"])
def test_postgres_makes_commits_durable(platform: Platform, setting: str) -> None:
    engine = open_sync_engine(platform.config.postgres_url, "tests")
    try:
        with engine.connect() as connection:
            assert connection.execute(text(f"SHOW {setting}")).scalar() == "on"
    finally:
        engine.dispose()


def test_the_api_listens_on_loopback_only(platform: Platform) -> None:
    listening = set()
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr:
            address, port = connection.laddr
            if port == platform.http_port:
                listening.add(address)
    assert listening == {"127.0.0.1"}


def test_data_survives_down_a_half_finished_up_and_a_sudden_death(platform: Platform, client: MlflowClient) -> None:
    experiment = client.create_experiment(f"durable-{os.urandom(4).hex()}")
    run_id = client.create_run(experiment).info.run_id
    for step in range(10):
        client.log_metric(run_id, "loss", float(step), step=step)
    client.log_dict(run_id, {"kept": True}, "kept.json")

    def check() -> None:
        assert [point.value for point in client.get_metric_history(run_id, "loss")] == [float(n) for n in range(10)]
        assert [entry.path for entry in client.list_artifacts(run_id)] == ["kept.json"]

    assert "mlplat is down" in platform.mlplat("down")
    assert not [process for process in platform.processes() if process.status() != psutil.STATUS_ZOMBIE]
    assert "not running" in _refused(platform, "status")
    assert "was not running" in platform.mlplat("down")
    _start_and_interrupt(platform)
    platform.mlplat("up")
    check()

    client.log_metric(run_id, "loss", 10.0, step=10)
    victims = platform.processes()
    for process in victims:
        with suppress(psutil.NoSuchProcess):  # children end with their parents
            process.kill()
    psutil.wait_procs(victims, timeout=10)
    assert (platform.state_dir / "platform.json").exists()  # of a platform that is no more
    platform.mlplat("up")
    assert len(client.get_metric_history(run_id, "loss")) == 11


def _start_and_interrupt(platform: Platform) -> None:
    """Kills ``mlplat up`` when Ray runs and the actors do not yet."""
    starting = subprocess.Popen(
        [str(MLPLAT), "up"], env=platform.environment, cwd=platform.state_dir,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    eventually((platform.state_dir / "platform.json").exists, 60, "Ray has started")
    starting.kill()
    starting.wait(10)


def test_a_busy_port_is_named(empty: Platform) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", empty.http_port))
        taken.listen()
        line = _refused(empty, "up")
    assert f"port {empty.http_port} (HTTP API) is taken by process {os.getpid()}" in line
    assert "MLPLAT_HTTP_PORT=" in line
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", empty.dashboard_port))
        taken.listen()
        line = _refused(empty, "up")
    assert f"port {empty.dashboard_port} (Ray dashboard) is taken" in line


def test_a_newer_schema_is_refused(empty: Platform) -> None:
    server = EmbeddedPostgres(empty.state_dir)
    server.start()
    url = embedded_postgres_url(empty.state_dir)
    migrate(url)
    engine = open_sync_engine(url, "tests")
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    line = _refused(empty, "up")
    assert "schema '9999'" in line
    assert "newer mlplat" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_named() -> None:
    with tempfile.TemporaryDirectory(prefix="mlt-", dir="/tmp") as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=755", "tmpfs", folder], check=False)
        if mounted.returncode:
            pytest.skip("this machine does not allow mounts")
        try:
            small = Platform(Path(folder))
            assert "is full: " in _refused(small, "up")
            (small.state_dir / "filler").write_bytes(b"0" * (3 * 1024 * 1024))
            assert "is full: " in _refused(small, "up")
        finally:
            subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("MLPLAT_HTTP_PORT", "many", "MLPLAT_HTTP_PORT: "),
        ("MLPLAT_POSTGRES_URL", "mysql://x", "MLPLAT_POSTGRES_URL: "),
        ("MLPLAT_CLICKHOUSE_URL", "clickhouse://me:pw@127.0.0.1:1", "at 127.0.0.1:1 does not answer: "),
        ("MLPLAT_STATE_DIR", "/dev/null/state", "/dev/null"),
        ("MLPLAT_RAY_ADDRESS", "127.0.0.1:1", "no Ray cluster answers"),
    ],
)
def test_a_bad_setting_is_one_line(empty: Platform, name: str, value: str, expected: str) -> None:
    bad = Platform(empty.state_dir, empty.http_port, empty.dashboard_port, {name: value})
    assert expected in _refused(bad, "up")


def test_nobody_answers_is_one_line(empty: Platform) -> None:
    done = subprocess.run(
        [str(MLPLAT), "version"],
        env=clean_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{empty.url}/health", trust_env=False)
    assert "not running" in _refused(empty, "status")
