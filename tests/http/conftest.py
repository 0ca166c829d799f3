"""The real ASGI app over in-process services: everything of the platform but the hop through Ray."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat import __version__
from mlplat.artifacts.store import ArtifactStore
from mlplat.db.engine import open_engine, open_sync_engine
from mlplat.db.lease import LeaseKeeper
from mlplat.execution.attempt import find_import_problems
from mlplat.http.app import create_app
from mlplat.http.services import Services
from mlplat.metrics.queries import Statement
from mlplat.metrics.service import MetricService
from mlplat.pipelines.scheduling import SchedulerService
from mlplat.pipelines.store import PipelineStore
from mlplat.registry.service import RegistryService
from mlplat.registry.store import RegistryStore
from mlplat.settings import embedded_postgres_url
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.runs import RunStore
from tests.contract.chdb import new_service

#: Long enough that a slow machine loses no lease during the session.
TTL_S = 600.0
LOOPBACK = ("127.0.0.1", 1234)


class Metrics:
    """One shard, answering tables."""

    def __init__(self, service: MetricService) -> None:
        self.append = service.append
        self._service = service

    async def query(self, statement: Statement) -> pa.Table:
        """Rows of a read."""
        with pa.ipc.open_stream(await self._service.query(statement)) as reader:
            return reader.read_all()


@dataclass
class Executor:
    """Takes every run and never moves it."""

    name: str = "executor"
    runs: dict[str, int] = field(default_factory=dict)

    async def assign(self, run_id: str, epoch: int) -> None:
        """Remembers the run."""
        self.runs[run_id] = epoch

    async def owned(self) -> Mapping[str, int]:
        """What it was given."""
        return self.runs


@dataclass
class Actors:
    """The rows that the status page shows."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    async def actors(self) -> list[dict[str, Any]]:
        """One row per actor."""
        return self.rows


@dataclass(frozen=True)
class Stack:
    """The services behind the app, for tests that prepare or look at what the API does not show."""

    app: FastAPI
    engine: AsyncEngine
    services: Services
    executor: Executor
    actors: Actors
    artifact_folder: Path

    def client(self, peer: tuple[str, int] = LOOPBACK) -> httpx.AsyncClient:
        """A client whose requests come from ``peer``. Errors in the app arrive as the answers they are turned into."""
        transport = httpx.ASGITransport(app=self.app, client=peer, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://mlplat")


async def _check_imports(names: Sequence[str]) -> Mapping[str, str]:
    return find_import_problems(names)


@pytest.fixture(scope="session")
async def stack(
    template_url: str, state_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    """One app on a database of its own, for the whole session; tests use names of their own."""
    admin, database = embedded_postgres_url(state_dir), f"http_{uuid.uuid4().hex[:12]}"
    template = template_url.partition("?")[0].rpartition("/")[2]
    sync_engine = open_sync_engine(admin, "tests")
    with sync_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"CREATE DATABASE {database} TEMPLATE {template}"))
    sync_engine.dispose()
    engine = open_engine(admin.replace("/mlplat?", f"/{database}?"), "tests", pool_size=12)
    folder = tmp_path_factory.mktemp("artifacts")
    metrics = new_service(engine, f"http-{database}", ttl_s=TTL_S)
    registry = RegistryService(engine, LeaseKeeper(engine, "registry", "holder", TTL_S))
    executor, actors = Executor(), Actors()
    scheduler = SchedulerService(engine, LeaseKeeper(engine, "scheduler", "holder", TTL_S), [executor], _check_imports)
    experiments = ExperimentStore(engine, "mlflow-artifacts:")
    await experiments.ensure_default()
    await metrics.start()
    await registry.start()
    await scheduler.start()
    services = Services(
        experiments=experiments,
        runs=RunStore(engine),
        metrics=Metrics(metrics),
        registry=RegistryStore(engine),
        registry_writer=registry,
        pipelines=PipelineStore(engine),
        scheduler=scheduler,
        artifacts=ArtifactStore(f"file://{folder}"),
        status=actors,
    )
    yield Stack(create_app(services, __version__), engine, services, executor, actors, folder)
    await scheduler.stop()
    await registry.stop()
    await metrics.stop()
    await engine.dispose()


@pytest.fixture
async def http(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    """A client on this machine."""
    async with stack.client() as client:
        yield client
