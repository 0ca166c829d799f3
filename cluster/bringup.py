"""``up``, ``down`` and ``status``. Each may be repeated, interrupted and repeated again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import httpx
import ray
from filelock import FileLock, Timeout
from ray import cloudpickle, serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from sqlalchemy.exc import SQLAlchemyError

import actors
import cluster
from actors.executor import RunExecutor
from actors.gateway import ARTIFACT_ROOT, gateway
from actors.handles import ClusterStatus
from actors.lifecycle import PLATFORM_ENV, get_or_create
from actors.metric_shard import MetricShard
from actors.registry_coordinator import RegistryCoordinator
from actors.scheduler import PipelineScheduler
from cluster.credentials import client_environment
from cluster.disk import plain_disk_errors, require_space
from cluster.ports import is_listening, require_free
from cluster.postgres import EmbeddedPostgres
from cluster.postgres_keeper import POSTGRES_KEEPER, PostgresKeeper
from cluster.ray_head import RayHead, find_processes, start_head, stop_processes, temp_dir
from cluster.state import ClusterRecord, read_record, remove_record, write_record
from mlplat.artifacts.store import ArtifactStore
from mlplat.db.engine import open_engine
from mlplat.db.migrate import migrate
from mlplat.errors import BringUpError, Unavailable
from mlplat.metrics.store import MetricStore
from mlplat.runtime import (
    METRIC_SHARD,
    NAMESPACE,
    PIPELINE_SCHEDULER,
    REGISTRY_COORDINATOR,
    SERVE_APP,
    actor_names,
    executor_names,
)
from mlplat.settings import PlatformConfig, Settings
from mlplat.tracking.experiments import ExperimentStore

LOCK_TIMEOUT_S = 120
STOP_LOOKS = 3
HEALTH_TIMEOUT_S = 60
STOP_TIMEOUT_S = 15
KEEPER_TIMEOUT_S = 2
Say = Callable[[str], None]


def up(settings: Settings, *, dashboard: bool, say: Say) -> ClusterRecord:
    """Starts what is not running yet and returns when everything answers.

    Raises:
        BringUpError: something prevents it; one line says what and what to do.
    """
    with _exclusive(settings), _plain_errors(settings):
        record = _reach_running(settings, say)
        if record is None:
            record = _start_engines(settings, dashboard, say)
            _connect(record)
        try:
            # A platform that runs keeps its port, whatever the settings say by now.
            config = replace(settings.config, http_url=record.http_url)
            _deploy(config, say)
            if settings.postgres_url is None:
                get_or_create(PostgresKeeper, POSTGRES_KEEPER, config.state_dir)
            asyncio.run(_wait_healthy(config))
        finally:
            ray.shutdown()
        done = ClusterRecord(record.ray_address, record.dashboard_url, record.http_url, record.head_pids, "ready")
        write_record(settings.state_dir, done)
        return done


def down(settings: Settings, *, say: Say) -> bool:
    """Stops the platform and leaves its data. Returns False when nothing was running."""
    with _exclusive(settings), _plain_errors(settings):
        record = _living_record(settings)
        if record is not None:
            say("stopping the actors")
            _stop_actors(record, settings.executors)
        leftovers = find_processes(temp_dir(settings.state_dir))
        if leftovers:
            say("stopping Ray")
        for _look in range(STOP_LOOKS):  # a process that is just being started shows up in the next look
            stop_processes(leftovers)
            if not (again := find_processes(temp_dir(settings.state_dir))):
                break
            leftovers = again
        embedded = settings.postgres_url is None and EmbeddedPostgres(settings.state_dir)
        was_running = record is not None or bool(leftovers) or bool(embedded and embedded.is_running())
        if embedded:
            embedded.stop()
        remove_record(settings.state_dir)
        return was_running


def status(settings: Settings) -> list[dict[str, Any]]:
    """One row per actor: actor, node, pid, restarts, health, lag.

    Raises:
        BringUpError: the platform is not running.
    """
    record = _living_record(settings)
    if record is None:
        raise BringUpError("the platform is not running; start it with: mlplat up")
    _connect(record)
    try:
        rows = asyncio.run(ClusterStatus(settings.executors).actors())
        if settings.postgres_url is None:
            rows.append(_postgres_row(settings))
    finally:
        ray.shutdown()
    return rows


def _postgres_row(settings: Settings) -> dict[str, Any]:
    server = EmbeddedPostgres(settings.state_dir)
    pid, restarts, health = server.pid(), 0, "ok" if server.takes_writes else "read-only: the disk is nearly full"
    with suppress(ValueError, RayError):
        keeper: Any = ray.get_actor(POSTGRES_KEEPER, namespace=NAMESPACE)
        restarts = ray.get(keeper.restarts.remote(), timeout=KEEPER_TIMEOUT_S)
    return {
        "actor": "postgres", "node": "127.0.0.1", "pid": pid, "restarts": restarts,
        "health": health if pid else "down", "lag": "-",
    }  # fmt: skip


def environment(settings: Settings) -> dict[str, str]:
    """What other programs need to find this platform.

    Raises:
        BringUpError: the platform is not running.
    """
    record = _living_record(settings)
    if record is None:
        raise BringUpError("the platform is not running; start it with: mlplat up")
    found = {"MLPLAT_URL": record.http_url, "MLFLOW_TRACKING_URI": record.http_url}
    if record.head_pids:
        found |= client_environment(settings.state_dir)
    # `ray job submit` reads this one; Ray drivers take the cluster's own address from mlplat status.
    if record.dashboard_url:
        found["RAY_API_SERVER_ADDRESS"] = record.dashboard_url
    return found


@contextmanager
def _exclusive(settings: Settings) -> Iterator[None]:
    lock = FileLock(settings.state_dir / "bringup.lock")
    try:
        with lock.acquire(timeout=LOCK_TIMEOUT_S):
            yield
    except Timeout as error:
        raise BringUpError(
            f"another mlplat up or down has been at work in {settings.state_dir} for {LOCK_TIMEOUT_S} s"
        ) from error


@contextmanager
def _plain_errors(settings: Settings) -> Iterator[None]:
    """What commonly goes wrong with a disk or a database, in one line each."""
    try:
        with plain_disk_errors(settings.state_dir):
            yield
    except SQLAlchemyError as error:
        first_line = str(getattr(error, "orig", error)).splitlines()[0]
        raise BringUpError(f"Postgres refused: {first_line}") from error


def _living_record(settings: Settings) -> ClusterRecord | None:
    """The recorded cluster if it still answers; a record of dead processes counts as none."""
    record = read_record(settings.state_dir)
    if record is None:
        return None
    host, _colon, port = record.ray_address.rpartition(":")
    return record if is_listening(int(port), host) else None


def _reach_running(settings: Settings, say: Say) -> ClusterRecord | None:
    """Connects to the platform that runs, or returns None; what only half lives is stopped first."""
    record = _living_record(settings)
    if record is None:
        return None
    if settings.postgres_url is None:
        EmbeddedPostgres(settings.state_dir).start()
    try:
        _connect(record)
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
    ArtifactStore(settings.config.artifacts_url).check_writable()
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


def _connect(record: ClusterRecord) -> None:
    try:
        # Everything that bring-up creates inherits nice 0, Serve's own actors included.
        ray.init(
            address=record.ray_address, namespace=NAMESPACE, runtime_env=PLATFORM_ENV, log_to_driver=False,
            logging_level=logging.ERROR, configure_logging=False,
        )  # fmt: skip
    except (ConnectionError, RuntimeError) as error:
        raise BringUpError(f"Ray at {record.ray_address} refused: {str(error).splitlines()[0]}") from error


def _deploy(config: PlatformConfig, say: Say) -> None:
    """Creates the actors and the Gateway; what exists already is left alone."""
    # By value: a file actors.py in a user's folder would shadow ours on the workers.
    for package in (actors, cluster):
        cloudpickle.register_pickle_by_value(package)  # type: ignore[no-untyped-call]  # Ray's copy has no types
    say("starting the actors")
    get_or_create(MetricShard, METRIC_SHARD, config, METRIC_SHARD)
    get_or_create(RegistryCoordinator, REGISTRY_COORDINATOR, config, REGISTRY_COORDINATOR)
    executors = executor_names(config.executors)
    for name in executors:
        get_or_create(RunExecutor, name, config, name)
    get_or_create(PipelineScheduler, PIPELINE_SCHEDULER, config, PIPELINE_SCHEDULER, executors)
    port = int(config.http_url.rpartition(":")[2])
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port), proxy_location="HeadOnly")
    applications = serve.status().applications
    if SERVE_APP not in applications:
        say("starting the Gateway")
        serve.run(gateway(config), name=SERVE_APP, route_prefix="/")


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


def _stop_actors(record: ClusterRecord, executors: int) -> None:
    """Lets every actor finish what it holds. Whatever cannot be asked loses nothing: truth is in the stores."""
    with suppress(BringUpError):
        _connect(record)
        with suppress(ValueError):
            ray.kill(ray.get_actor(POSTGRES_KEEPER, namespace=NAMESPACE))
        for name in reversed(actor_names(executors)):
            with suppress(ValueError, RayError):
                actor: Any = ray.get_actor(name, namespace=NAMESPACE)
                ray.get(actor.stop.remote(), timeout=STOP_TIMEOUT_S)
                ray.kill(actor)
        if not record.head_pids:
            serve.delete(SERVE_APP)
    ray.shutdown()
