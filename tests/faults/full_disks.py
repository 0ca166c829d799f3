"""Faults of disks that fill up. Each strikes a platform at work, proves that it did, and is over when it returns."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import httpx
import psycopg

from cluster.postgres import EmbeddedPostgres
from cluster.postgres_keeper import MIN_FREE_BYTES
from mlplat.sdk.client import Client
from tests.faults.disks import MIB
from tests.faults.ledger import new_run
from tests.faults.stage import RECOVERY_S, Disks, Stage, keeper_of, lag, rows
from tests.platform import Platform, eventually

#: One request of tags, as random text: about so much of the database's disk, and again as much of its log.
TAGS, TAG_CHARACTERS = 100, 4_000
FLOOD_BYTES = 24 * MIB
NO_SPACE = "No space left on device"


def _disks(stage: Stage) -> Disks:
    assert stage.disks is not None
    return stage.disks


class _Flood:
    """Writes much to a run of its own, until it is refused; ``check`` finds everything that was acknowledged."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._run = new_run(Client(platform.url))
        self._tags: dict[str, str] = {}

    def until_refused(self) -> httpx.Response:
        """The refusal, when it says when to come back."""
        answer: httpx.Response = eventually(self._write, RECOVERY_S, "a write is refused")
        assert answer.headers.get("Retry-After") == "1", answer.text
        return answer

    def check(self) -> int:
        """Bytes that were acknowledged, all of which are there."""
        found = Client(self._platform.url).get("/api/2.0/mlflow/runs/get", run_id=self._run)["run"]["data"]["tags"]
        there = {tag["key"]: tag["value"] for tag in found}
        lost = [key for key, value in self._tags.items() if there.get(key) != value]
        assert not lost, f"{len(lost)} tags are lost"
        return sum(map(len, self._tags.values()))

    def _write(self) -> httpx.Response | None:
        number = len(self._tags)
        tags = {f"t{number + index}": random.randbytes(TAG_CHARACTERS // 2).hex() for index in range(TAGS)}
        body = {"run_id": self._run, "tags": [{"key": key, "value": value} for key, value in tags.items()]}
        url = f"{self._platform.url}/api/2.0/mlflow/runs/log-batch"
        try:
            answer = httpx.post(url, json=body, timeout=30, trust_env=False)
        except httpx.TransportError:  # what became of it is unknown: the next one says
            return None
        if answer.is_success:
            self._tags |= tags
            return None
        return answer if answer.status_code in {429, 503} else None


def postgres_disk_fills_up(stage: Stage) -> str:
    """Little room is left: writes are refused, reads and leases go on."""
    disk, flood = _disks(stage).postgres, _Flood(stage.platform)
    server = EmbeddedPostgres(stage.platform.state_dir)
    before = _processes(stage.platform)
    disk.fill(MIN_FREE_BYTES + FLOOD_BYTES)
    try:
        refused = flood.until_refused()
        assert refused.status_code == 503, refused.text
        assert "disk is nearly full" in refused.text, refused.text
        written = flood.check()
        _reads_go_on(stage)
        _leases_go_on(server)
        assert stage.platform.status()["postgres"]["health"].startswith("read-only")
        left = disk.free_bytes
    finally:
        disk.free()
    stage.writers.progress()
    assert _processes(stage.platform) == before, "nothing has died of it"
    return f"{written / MIB:.0f} MiB written, then 503 with {left / MIB:.0f} MiB left, reads went on"


def _processes(platform: Platform) -> dict[str, int]:
    names = ("metric-shard-0", "pipeline-scheduler", "registry-coordinator", "run-executor-0")
    pids = {name: row["pid"] for name, row in rows(platform).items() if name in names}
    server = EmbeddedPostgres(platform.state_dir).pid()
    assert server is not None
    return pids | {"postgres": server}


def _reads_go_on(stage: Stage) -> None:
    """A run, what was logged last, a curve that the shard reads, a search."""
    client, entry = Client(stage.platform.url), stage.writers.entries()[-1]
    run: dict[str, Any] = client.get("/api/2.0/mlflow/runs/get", run_id=entry.run)["run"]
    assert entry.key in {metric["key"] for metric in run["data"]["metrics"]}
    history = client.get("/api/2.0/mlflow/metrics/get-history", run_id=entry.run, metric_key=entry.key)
    assert entry.step in {point["step"] for point in history["metrics"]}
    found = client.post("/api/2.0/mlflow/runs/search", {"experiment_ids": ["0"], "filter": "metrics.`http` < 0"})
    assert not found.get("runs")


def _leases_go_on(server: EmbeddedPostgres) -> None:
    """Every lease is renewed, so nobody has to start over."""
    with _connect(server) as connection:

        def leases() -> dict[str, float]:
            found = connection.execute("SELECT name, extract(epoch FROM until)::float8 FROM lease WHERE until > now()")
            return dict(found.fetchall())

        before = leases()
        assert before
        eventually(
            lambda: all(until > before.get(name, 0) for name, until in leases().items()),
            RECOVERY_S,
            "all leases are renewed",
        )


def _connect(server: EmbeddedPostgres) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(
        host=str(server.socket_dir), user="postgres", dbname="mlplat", autocommit=True, connect_timeout=10
    )


def postgres_disk_full_at_once(stage: Stage) -> str:
    """The last byte goes before anybody looks: the server finds no room for rows, then none for its own log."""
    disk, flood = _disks(stage).postgres, _Flood(stage.platform)
    server, keeper = EmbeddedPostgres(stage.platform.state_dir), keeper_of(stage.platform)
    keeper.suspend()
    try:
        disk.fill()
        refused = flood.until_refused()
        assert "disk is full" in refused.text, refused.text
        before = _spend_log(server)
        said = server.log.read_text(errors="replace").count(NO_SPACE)
        assert said
    finally:
        keeper.resume()
    try:
        _stays_away(stage.platform)
    finally:
        disk.free()
    # Its main process may live on, if there was room again by the time at which it recovered.
    after = eventually(lambda: _answers(server) and server.pid(), RECOVERY_S, "Postgres is back")
    stage.writers.progress()
    flood.check()
    return f"{NO_SPACE!r} × {said}, a write got 503, pid {before} panicked, {after} is back"


def _spend_log(server: EmbeddedPostgres) -> int:
    """Has the server begin new segments of its log until it panics for want of room; returns its pid."""
    pid = server.pid()
    assert pid is not None
    panics = server.log.read_text(errors="replace").count("PANIC")

    def has_panicked() -> bool:
        with suppress(psycopg.Error), _connect(server) as connection:
            connection.execute("SELECT pg_logical_emit_message(false, 'fault', 'x'), pg_switch_wal()")
        return server.log.read_text(errors="replace").count("PANIC") > panics

    eventually(has_panicked, RECOVERY_S, "Postgres finds no room for its log")
    return pid


def _answers(server: EmbeddedPostgres) -> bool:
    with suppress(psycopg.Error), _connect(server) as connection:
        return connection.execute("SELECT 1").fetchone() == (1,)
    return False


def _stays_away(platform: Platform) -> None:
    """Without room there is no service, and the answer says when to ask again."""
    url = f"{platform.url}/api/2.0/mlflow/experiments/get?experiment_id=0"

    def refused() -> bool:
        answer = httpx.get(url, timeout=30, trust_env=False)
        return answer.status_code == 503 and answer.headers.get("Retry-After") == "1"

    eventually(refused, RECOVERY_S, "a read is refused")


def metrics_disk_full(stage: Stage) -> str:
    """The metric store has no room: acknowledgements go on and the log grows, and drains when there is room."""
    disk = _disks(stage).metrics
    disk.fill()
    try:
        why = eventually(lambda: _why_behind(stage.platform), RECOVERY_S, "the metric store finds no room")
        stage.writers.progress(20)
        behind = lag(stage.platform)
        assert _why_behind(stage.platform)
    finally:
        disk.free()
    eventually(lambda: not _why_behind(stage.platform), RECOVERY_S, "the log drains")
    eventually(lambda: 0 <= lag(stage.platform) < behind / 2, RECOVERY_S, "the log is short again")
    return f"{behind} groups behind ({why})"


def _why_behind(platform: Platform) -> str:
    """What the shard says of its last vain attempt to move points on; empty when that went well."""
    return str(rows(platform).get("metric-shard-0", {}).get("lag", "")).partition(": ")[2]
