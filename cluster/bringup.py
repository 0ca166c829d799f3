"""``up``: may be repeated, interrupted and repeated again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import ray

from actors.lifecycle import get_or_create
from cluster.connection import Say, connect, exclusive, living_record, plain_errors
from cluster.disk import require_space
from cluster.ports import is_listening, require_free
from cluster.postgres import EmbeddedPostgres
from cluster.postgres_keeper import POSTGRES_KEEPER, PostgresKeeper
from cluster.ray_head import RayHead, find_processes, start_head, stop_processes, temp_dir
from cluster.state import ClusterRecord, write_record
from cluster.unfinished import require_finished
from mlplat.artifacts.store import ArtifactStore
from mlplat.artifacts.upgrade import adopt_plain_files
from mlplat.db.engine import open_engine
from mlplat.db.migrate import migrate
from mlplat.errors import BringUpError, Unavailable
from mlplat.metrics.store import MetricStore
from mlplat.runtime import ARTIFACT_ROOT, actor_names
from mlplat.settings import PlatformConfig, Settings
from mlplat.tracking.experiments import ExperimentStore

HEALTH_TIMEOUT_S = 60


def up(settings: Settings, *, dashboard: bool, say: Say) -> ClusterRecord:
    """Starts what is not running yet and returns when everything answers.

    Raises:
        BringUpError: something prevents it; one line says what and what to do.
    """
    require_finished(settings.state_dir)  # who has the lock may be a restore
    with exclusive(settings), plain_errors(settings):
        require_finished(settings.state_dir)
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(_load_deployment)  # while the engines start
            record = _reach_running(settings, say)
            if record is None:
                record = _start_engines(settings, dashboard, say)
                connect(record)
        try:
            # A platform that runs keeps its port, whatever the settings say by now.
            config = replace(settings.config, http_url=record.http_url)
            loading.result()(config, say)
            if settings.postgres_url is None:
                get_or_create(PostgresKeeper, POSTGRES_KEEPER, config.state_dir)
            asyncio.run(_wait_healthy(config))
        finally:
            ray.shutdown()
        done = ClusterRecord(record.ray_address, record.dashboard_url, record.http_url, record.head_pids, "ready")
        write_record(settings.state_dir, done)
        return done


def _load_deployment() -> Callable[[PlatformConfig, Say], None]:
    """Loads what the actors and the Gateway run."""
    from cluster.deployment import deploy  # noqa: PLC0415  # seconds, which nothing else has to wait for

    return deploy


def _reach_running(settings: Settings, say: Say) -> ClusterRecord | None:
    """Connects to the platform that runs, or returns None; what only half lives is stopped first."""
    record = living_record(settings)
    if record is None:
        return None
    if settings.postgres_url is None:
        EmbeddedPostgres(settings.state_dir).start()
    try:
        connect(record)
    except BringUpError:
        if not record.head_pids:
            raise
        say("Ray does not answer; starting it again")
        return None  # starting it stops what is left of it
    return record


def _start_engines(settings: Settings, dashboard: bool, say: Say) -> ClusterRecord:
    """Postgres and Ray, side by side; nothing stays behind when one of them fails."""
    require_space(settings.state_dir)
    stop_processes(find_processes(temp_dir(settings.state_dir)))  # of a platform that was killed
    port = settings.http_port
    require_free(port, "HTTP API", "MLPLAT_HTTP_PORT")
    store = ArtifactStore(settings.config.artifacts_url)
    store.check_writable()
    store.prepare()
    if adopted := adopt_plain_files(store):
        say(f"{adopted} files of the artifact store have its new form")
    _prepare_metric_store(settings)
    say("starting Postgres and Ray")
    with ThreadPoolExecutor(1) as pool:
        preparing = pool.submit(_prepare_database, settings)
        try:
            head = _join(settings) if settings.ray_address else start_head(settings, dashboard)
        except BaseException:
            preparing.exception()
            _stop_postgres(settings)
            raise
        try:
            preparing.result()
        except BaseException:
            stop_processes(find_processes(temp_dir(settings.state_dir)))
            _stop_postgres(settings)
            raise
    record = ClusterRecord(head.address, head.dashboard_url, settings.local_url, head.pids, "starting")
    write_record(settings.state_dir, record)
    return record


def _prepare_metric_store(settings: Settings) -> None:
    """The tables of a ClickHouse server. The embedded engine belongs to its actor, which makes its own."""
    if settings.clickhouse_url is None:
        return
    store = MetricStore(settings.clickhouse_url)
    try:
        store.create_tables()
    except Unavailable as error:
        raise BringUpError(f"{error.message}. MLPLAT_CLICKHOUSE_URL names it.") from error
    finally:
        store.close()


def _join(settings: Settings) -> RayHead:
    address = settings.ray_address or ""
    host, _colon, port = address.rpartition(":")
    if not port.isdecimal() or not is_listening(int(port), host or "127.0.0.1", timeout_s=5):
        raise BringUpError(
            f"no Ray cluster answers at {address!r}; MLPLAT_RAY_ADDRESS must be host:port of a running head"
        )
    return RayHead(address, None, [])


def _prepare_database(settings: Settings) -> None:
    if settings.postgres_url is None:
        EmbeddedPostgres(settings.state_dir).start()
    migrate(settings.config.postgres_url)
    asyncio.run(_ensure_default_experiment(settings.config))


async def _ensure_default_experiment(config: PlatformConfig) -> None:
    engine = open_engine(config.postgres_url, "bring-up", pool_size=1)
    try:
        await ExperimentStore(engine, ARTIFACT_ROOT).ensure_default()
    finally:
        await engine.dispose()


def _stop_postgres(settings: Settings) -> None:
    if settings.postgres_url is None:
        EmbeddedPostgres(settings.state_dir).stop()


async def _wait_healthy(config: PlatformConfig) -> None:
    deadline = time.monotonic() + HEALTH_TIMEOUT_S
    problem = "nothing answered"
    async with httpx.AsyncClient(base_url=config.http_url, timeout=10, trust_env=False) as client:
        while time.monotonic() < deadline:
            problem = await _problem(client, actor_names(config.executors))
            if not problem:
                return
            await asyncio.sleep(0.1)
    raise BringUpError(
        f"the platform is not healthy after {HEALTH_TIMEOUT_S} s: {problem}. Logs: {config.state_dir}/ray"
    )


async def _problem(client: httpx.AsyncClient, names: Sequence[str]) -> str:
    try:
        answer = await client.get("/api/v1/status")
    except httpx.HTTPError as error:
        return f"the Gateway does not answer ({type(error).__name__})"
    if answer.status_code != 200:
        return f"the Gateway answers {answer.status_code}"
    rows = {row["actor"]: row for row in answer.json()}
    bad = [f"{name} is {rows[name]['health']}" for name in names if rows[name]["health"] != "ok"]
    return ", ".join(bad)
