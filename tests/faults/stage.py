"""The faults of the metric path. Each strikes a platform at work, proves that it did, and is over when it returns."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from cluster.postgres import EmbeddedPostgres
from tests.clickhouse import ClickHouse, RemoteStore
from tests.faults.disks import SmallDisk
from tests.faults.ledger import Writers
from tests.faults.proxy import FaultProxy
from tests.platform import Platform, eventually

SLOW_S = 0.3
SLOW_CHUNKS = 6
RECOVERY_S = 120
AWAY_S, CATCH_UP_S = 180, 300
#: The shard's cache and queue have bounds of 128 and 64 MiB; the rest is the process itself and what is under way.
MEMORY_CAP_BYTES = 1024 * 1024 * 1024
#: What it may still grow once its cache is full: what the log holds must not be in memory, too.
MEMORY_DRIFT_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True)
class Disks:
    """Small disks of a platform, under the data of its embedded engines."""

    postgres: SmallDisk
    metrics: SmallDisk
    artifacts: SmallDisk


@dataclass(frozen=True)
class Stage:
    """A platform and writers at work; ``remote`` where its metric store is a ClickHouse server."""

    platform: Platform
    writers: Writers
    remote: RemoteStore | None = None
    disks: Disks | None = None

    @property
    def clickhouse(self) -> ClickHouse:
        """The metric store's server."""
        assert self.remote is not None
        return self.remote.server

    @property
    def proxy(self) -> FaultProxy:
        """What lies between the shard and the server."""
        assert self.remote is not None
        return self.remote.proxy


#: Strikes; returns what proves that it fired.
Fault = Callable[[Stage], str]


def rows(platform: Platform) -> dict[str, dict[str, Any]]:
    """The status page by actor, empty while nobody answers."""
    try:
        answer = httpx.get(f"{platform.url}/api/v1/status", timeout=10, trust_env=False)
        return {row["actor"]: row for row in answer.json()} if answer.status_code == 200 else {}
    except (httpx.HTTPError, ValueError):
        return {}


def kill_actor(platform: Platform, actor: str) -> tuple[int, int]:
    """``kill -9`` of an actor's process; returns its pid and its successor's."""
    pid: int = eventually(lambda: rows(platform).get(actor, {}).get("pid"), RECOVERY_S, f"{actor} has a pid")
    os.kill(pid, signal.SIGKILL)

    def successor() -> int | None:
        row = rows(platform).get(actor, {})
        return row["pid"] if row.get("health") == "ok" and row["pid"] != pid else None

    return pid, eventually(successor, RECOVERY_S, f"{actor} is back")


def lag(platform: Platform) -> int:
    """Groups that the shard has committed and not moved on, -1 when it does not say."""
    said = str(rows(platform).get("metric-shard-0", {}).get("lag", "-")).partition(" ")[0]
    return int(said) if said.isdecimal() else -1


def shard_killed(stage: Stage) -> str:
    """The process that acknowledges dies."""
    before, after = kill_actor(stage.platform, "metric-shard-0")
    return f"pid {before} became {after}"


def gateway_killed(stage: Stage) -> str:
    """The process that answers HTTP dies."""
    before, after = kill_actor(stage.platform, "gateway")
    return f"pid {before} became {after}"


def postgres_killed(stage: Stage) -> str:
    """The database dies and is started again by the platform."""
    server = EmbeddedPostgres(stage.platform.state_dir)
    before = _kill_postgres(server)
    return f"pid {before} became {_postgres_is_back(server, before)}"


def postgres_killed_with_its_keeper(stage: Stage) -> str:
    """The database dies, and so does what would start it again."""
    server, keeper = EmbeddedPostgres(stage.platform.state_dir), keeper_of(stage.platform)
    keeper.kill()
    before = _kill_postgres(server)
    after = _postgres_is_back(server, before)
    eventually(lambda: keeper_of(stage.platform).pid != keeper.pid, RECOVERY_S, "the keeper is back")
    return f"pid {before} became {after}"


def postgres_down(stage: Stage) -> str:
    """The database stays away until a request was refused, with the time after which to ask again."""
    server, keeper = EmbeddedPostgres(stage.platform.state_dir), keeper_of(stage.platform)
    keeper.suspend()
    try:
        before = _kill_postgres(server)
        refused = eventually(partial(_refused, stage.platform), RECOVERY_S, "a request is refused")
        assert refused == (503, "1"), refused
    finally:
        keeper.resume()
    return f"pid {before} became {_postgres_is_back(server, before)}, meanwhile {refused[0]}"


def _kill_postgres(server: EmbeddedPostgres) -> int:
    pid = server.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def _postgres_is_back(server: EmbeddedPostgres, before: int) -> int:
    def successor() -> int | None:
        pid = server.pid()
        return pid if pid != before else None

    pid: int = eventually(successor, RECOVERY_S, "Postgres is back")
    return pid


def keeper_of(platform: Platform) -> psutil.Process:
    """What starts the database again when it dies."""

    def find() -> psutil.Process | None:
        found = [process for process in platform.processes() if "ray::PostgresKeeper" in _command(process)]
        return found[0] if found else None

    keeper: psutil.Process = eventually(find, RECOVERY_S, "the keeper runs")
    return keeper


def _refused(platform: Platform) -> tuple[int, str | None] | None:
    answer = _read(platform, timeout_s=30)
    return None if answer.is_success else (answer.status_code, answer.headers.get("Retry-After"))


def _read(platform: Platform, timeout_s: float) -> httpx.Response:
    """A request that needs Postgres."""
    url = f"{platform.url}/api/2.0/mlflow/experiments/get?experiment_id=0"
    return httpx.get(url, timeout=timeout_s, trust_env=False)


def postgres_backend_killed(stage: Stage) -> str:
    """One connection's process dies; Postgres then ends all others and recovers."""
    server = EmbeddedPostgres(stage.platform.state_dir)

    def recoveries() -> int:
        return server.log.read_text(errors="replace").count("all server processes terminated; reinitializing")

    before = recoveries()

    def backend() -> psutil.Process | None:
        children = psutil.Process(server.pid()).children()
        return next((child for child in children if _command(child).startswith("postgres: postgres mlplat")), None)

    victim = eventually(backend, RECOVERY_S, "somebody is connected")
    victim.kill()
    eventually(lambda: recoveries() > before, RECOVERY_S, "Postgres recovers")
    return f"backend {victim.pid} gone, Postgres recovered"


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def postgres_frozen(stage: Stage) -> str:
    """The database and its connections stop, until a request has waited for them; then they go on."""
    server = EmbeddedPostgres(stage.platform.state_dir)
    main = psutil.Process(server.pid())
    family = [main, *main.children(recursive=True)]
    for process in family:
        with suppress(psutil.NoSuchProcess):  # connections come and go
            process.suspend()
    try:
        with pytest.raises(httpx.ReadTimeout):
            _read(stage.platform, timeout_s=2)
    finally:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.resume()
    return f"{len(family)} processes stopped, a request got no answer in 2 s"


def clickhouse_killed(stage: Stage) -> str:
    """The metric store is down for a while; acknowledgements go on and the log grows."""
    stage.clickhouse.kill()
    stage.writers.progress()
    behind = eventually(lambda: max(lag(stage.platform), 0), RECOVERY_S, "the log has grown")
    stage.clickhouse.start()
    return f"{behind} groups behind"


def clickhouse_away_for_minutes(stage: Stage) -> str:
    """The metric store is away for long, and the shard dies meanwhile: what it leaves has to be read from the log."""
    first: int = rows(stage.platform)["metric-shard-0"]["pid"]
    before, halfway, largest = rss(first), 0, 0
    stage.clickhouse.kill()
    gone_until = time.monotonic() + AWAY_S
    while time.monotonic() < gone_until:
        stage.writers.progress()
        largest = max(largest, rss(first))
        if time.monotonic() < gone_until - AWAY_S / 2:
            halfway = largest
    behind, log_bytes = lag(stage.platform), _log_bytes(stage.platform)
    assert behind > 0
    told = f"{before >> 20} MiB became {halfway >> 20} and {largest >> 20}, {behind} groups behind"
    assert largest < MEMORY_CAP_BYTES, told
    assert largest - halfway < MEMORY_DRIFT_BYTES, told
    _pid, second = kill_actor(stage.platform, "metric-shard-0")
    stage.clickhouse.start()
    began, largest_after = time.monotonic(), 0

    def caught_up() -> bool:
        nonlocal largest_after
        largest_after = max(largest_after, rss(second))
        return 0 <= lag(stage.platform) < behind / 10

    eventually(caught_up, CATCH_UP_S, "the log is short again")
    assert largest_after < MEMORY_CAP_BYTES
    return (
        f"{AWAY_S} s away, {behind} groups behind and {log_bytes >> 20} MiB of log, the shard's memory "
        f"{before >> 20} MiB, {halfway >> 20} after half of it, at most {largest >> 20}; "
        f"another shard caught up in {time.monotonic() - began:.0f} s "
        f"with {largest_after >> 20} MiB"
    )


def rss(pid: int) -> int:
    """Bytes of memory that the process has."""
    return int(psutil.Process(pid).memory_info().rss)


def _log_bytes(platform: Platform) -> int:
    """What the log takes in Postgres."""
    server = EmbeddedPostgres(platform.state_dir)
    with psycopg.connect(host=str(server.socket_dir), user="postgres", dbname="mlplat", connect_timeout=10) as database:
        found = database.execute(
            "SELECT sum(pg_total_relation_size(relid))::bigint FROM pg_partition_tree('metric_log')"
        ).fetchone()
    assert found is not None
    return int(found[0])


def clickhouse_frozen(stage: Stage) -> str:
    """The metric store neither answers nor hangs up."""
    stage.clickhouse.freeze()
    try:
        stage.writers.progress()
        behind = eventually(lambda: max(lag(stage.platform), 0), RECOVERY_S, "the log has grown")
    finally:
        stage.clickhouse.thaw()
    return f"{behind} groups behind"


def clickhouse_slow(stage: Stage) -> str:
    """Everything to and from the metric store takes its time."""
    before = stage.proxy.delayed
    stage.proxy.slow_down(SLOW_S)
    try:
        stage.writers.progress()
        eventually(lambda: stage.proxy.delayed >= before + SLOW_CHUNKS, RECOVERY_S, "enough was slowed down")
    finally:
        stage.proxy.heal()
    return f"{stage.proxy.delayed - before} chunks took {SLOW_S:g} s more"


def clickhouse_answers_lost(stage: Stage) -> str:
    """Inserts happen, and the shard never hears of it: it sends the same points again."""
    before = stage.proxy.answers_lost
    stage.proxy.lose_answers()
    try:
        lost = eventually(lambda: stage.proxy.answers_lost - before, RECOVERY_S, "an answer was lost")
        stage.writers.progress(1)
    finally:
        stage.proxy.heal()
    return f"{lost} answers lost"


def clickhouse_connections_cut(stage: Stage) -> str:
    """Open connections to the metric store break in the middle of whatever they do."""
    return f"{eventually(stage.proxy.cut_all, RECOVERY_S, 'a connection was open')} connections reset"
