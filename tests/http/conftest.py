"""The real ASGI app over in-process services: everything of the platform but the hop through Ray."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import mlflow as mlflow_module
import pyarrow as pa
import pytest
import uvicorn
from fastapi import FastAPI
from mlflow import MlflowClient
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat import __version__
from mlplat.artifacts.store import ArtifactStore
from mlplat.db.lease import LeaseKeeper
from mlplat.db.reader import Reader
from mlplat.events.log import EventLog
from mlplat.http.app import create_app
from mlplat.http.services import Services
from mlplat.lineage.keeper import LineageKeeper
from mlplat.lineage.records import RunRecords
from mlplat.lineage.store import LineageStore
from mlplat.metrics.queries import Statement
from mlplat.metrics.service import MetricService
from mlplat.pipelines.automation.store import AutomationStore
from mlplat.pipelines.model import Assignment
from mlplat.pipelines.scheduling import SchedulerService
from mlplat.pipelines.store import PipelineStore
from mlplat.registry.frozen import FrozenFiles
from mlplat.registry.history_store import RegistryHistory
from mlplat.registry.move_store import MoveStore
from mlplat.registry.service import RegistryService
from mlplat.registry.store import RegistryStore
from mlplat.sdk.filesystem import ArtifactFileSystem
from mlplat.sdk.process import this_process
from mlplat.steps.functions import try_imports
from mlplat.storage.guard import StorageGuard
from mlplat.storage.model import Retention
from mlplat.storage.upkeep import Upkeep
from mlplat.tracking.datasets import DatasetStore
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.heartbeats import HeartbeatStore
from mlplat.tracking.lifecycle import Lifecycle
from mlplat.tracking.logged_models import LoggedModelStore
from mlplat.tracking.model import RunUpdate
from mlplat.tracking.runs import RunStore, write_update
from mlplat.webhooks.addresses import Targets
from mlplat.webhooks.sender import Sender
from mlplat.webhooks.service import Webhooks
from mlplat.webhooks.store import WebhookStore
from tests.contract.chdb import as_table, new_service, unique
from tests.databases import Databases
from tests.http.served import Served

#: Long enough that a slow machine loses no lease during the session.
TTL_S = 600.0
LOOPBACK = ("127.0.0.1", 1234)


class Metrics:
    """One shard, answering tables."""

    def __init__(self, service: MetricService) -> None:
        self.reconcile = service.reconcile
        self.archive = service.archive
        self._service = service

    async def append(self, batch: bytes, update: RunUpdate | None = None) -> int:
        """As the shard's actor does."""
        return await self._service.append(batch, None if update is None else partial(write_update, new=update))

    async def query(self, statement: Statement) -> pa.Table:
        """Rows of a read."""
        return as_table(await self._service.query(statement))


@dataclass
class Executor:
    """Takes every run and never moves it."""

    name: str = "executor"
    runs: dict[str, int] = field(default_factory=dict)

    async def assign(self, assignments: Sequence[Assignment]) -> None:
        """Remembers the runs."""
        for assignment in assignments:
            self.runs[assignment.run_id] = assignment.epoch

    async def poke(self) -> None:
        """Nothing to look at."""

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
        return httpx.AsyncClient(transport=transport, base_url="http://localhost")


class Imports:
    """Imports in this process."""

    def is_known(self, names: Sequence[str]) -> bool:
        """Never: every submission looks."""
        return not names

    async def check(self, names: Sequence[str]) -> Mapping[str, str]:
        """Names that cannot be imported, with the reason."""
        return try_imports(names).problems


@asynccontextmanager
async def open_stack(databases: Databases, folder: Path) -> AsyncIterator[Stack]:
    """An app on a database of its own, with its artifacts in ``folder``."""
    async with databases.open(pool_size=12) as engine:
        metrics = new_service(engine, unique("http"), ttl_s=TTL_S, artifacts_url=f"file://{folder}")
        port = Metrics(metrics)
        registry = RegistryService(engine, LeaseKeeper(engine, "registry", "holder", TTL_S), port.query)
        executor, actors = Executor(), Actors()
        leader = LeaseKeeper(engine, "scheduler", "holder", TTL_S)
        scheduler = SchedulerService(engine, leader, [executor], Imports(), max_active_runs=10_000)
        experiments = ExperimentStore(engine, "mlflow-artifacts:")
        await experiments.ensure_default()
        for service in (metrics, registry, scheduler):
            await service.start()
        artifacts = ArtifactStore(f"file://{folder}")
        reader = Reader(engine.url.render_as_string(hide_password=False), "tests", 4)
        records = RunRecords(engine, artifacts, port.query)
        guard = StorageGuard(engine)
        services = Services(
            experiments=experiments,
            runs=RunStore(engine),
            heartbeats=HeartbeatStore(engine),
            datasets=DatasetStore(engine),
            logged_models=LoggedModelStore(engine),
            lifecycle=Lifecycle.build(engine, artifacts, port, LineageKeeper(records), guard, "mlflow-artifacts:"),
            lineage=LineageStore(records),
            metrics=port,
            registry=RegistryStore(engine, reader),
            registry_history=RegistryHistory(engine),
            moves=MoveStore(engine),
            frozen=FrozenFiles(artifacts),
            events=EventLog(engine),
            webhooks=Webhooks(WebhookStore(engine), Sender(Targets.parse(["127.0.0.1"]))),
            registry_writer=registry,
            pipelines=PipelineStore(engine),
            automation=AutomationStore(engine),
            scheduler=scheduler,
            artifacts=artifacts,
            direct_artifacts=True,
            guard=guard,
            upkeep=Upkeep(engine, artifacts, guard, port, Retention(every=None)),
            status=actors,
        )
        yield Stack(create_app(services, __version__), engine, services, executor, actors, folder)
        for service in (scheduler, registry, metrics):
            await service.stop()
        await reader.close()


@pytest.fixture(scope="session")
async def stack(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """One app for the whole session; tests use names of their own."""
    # A folder of its own around the store: tests look there for what got out of it.
    async with open_stack(databases, tmp_path_factory.mktemp("artifacts") / "store") as stack:
        yield stack


async def _serve(databases: Databases, folder: Path, listener: socket.socket, ready: Future[uvicorn.Server]) -> None:
    try:
        async with open_stack(databases, folder) as stack:
            server = uvicorn.Server(uvicorn.Config(stack.app, log_level="warning", lifespan="off"))
            ready.set_result(server)
            await server.serve(sockets=[listener])
    except BaseException as error:
        if not ready.done():
            ready.set_exception(error)
        raise


@pytest.fixture(scope="session")
def server_url(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app behind a real server on a free port, for clients that block: it has a thread and a loop of its own."""
    ready: Future[uvicorn.Server] = Future()
    # asyncio sends small packets at once only on sockets that say they are TCP: else a request takes 40 ms.
    tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    with tcp as listener, ThreadPoolExecutor(1) as thread:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        work = _serve(databases, tmp_path_factory.mktemp("served"), listener, ready)
        serving = thread.submit(asyncio.run, work)
        server = ready.result(timeout=60)
        # The socket listens already: a request that comes before the server waits for it.
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        serving.result(timeout=60)


@pytest.fixture
def mlflow_client(server_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[MlflowClient]:
    """The stock client; the fluent API uses the same server, and an experiment of this test's own."""
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    # Finding out what a model imports takes a process and many seconds; the client does without it then.
    monkeypatch.setenv("MLFLOW_REQUIREMENTS_INFERENCE_TIMEOUT", "1")
    monkeypatch.chdir(tmp_path)
    mlflow_module.set_tracking_uri(server_url)
    mlflow_module.set_experiment(unique("client"))
    yield MlflowClient(server_url)
    while mlflow_module.active_run() is not None:
        mlflow_module.end_run()


@pytest.fixture
def artifacts(server_url: str) -> ArtifactFileSystem:
    """Files of runs at that server."""
    return ArtifactFileSystem(url=server_url, retry_for_s=5)


@pytest.fixture
def run_root(server_url: str) -> str:
    """The folder of a new run there: its id."""
    body = {"experiment_id": "0", "start_time": 1_000}
    answer = httpx.post(f"{server_url}/api/2.0/mlflow/runs/create", json=body)
    return str(answer.json()["run"]["info"]["run_id"])


@pytest.fixture
async def http(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    """A client on this machine."""
    async with stack.client() as client:
        yield client


class MLflow:
    """MLflow's REST API under one prefix, answering JSON."""

    def __init__(self, http: httpx.AsyncClient, prefix: str = "/api") -> None:
        self.http = http
        self.prefix = f"{prefix}/2.0/mlflow/"

    async def call(self, method: str, path: str, /, **fields: Any) -> Any:
        """The answer of a call that succeeds."""
        response = await self.send(method, path, **fields)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/json"
        return response.json()

    async def send(self, method: str, path: str, /, **fields: Any) -> httpx.Response:
        """The response of any call: ``fields`` are the query of a GET, else the JSON body."""
        if method == "GET":
            return await self.http.get(self.prefix + path, params=fields)
        return await self.http.request(method, self.prefix + path, json=fields)

    async def raw(self, path: str, body: bytes | str) -> httpx.Response:
        """The response to a POST of exactly this body."""
        return await self.http.post(self.prefix + path, content=body, headers={"Content-Type": "application/json"})

    async def refused(self, status: int, code: str, message: str, method: str, path: str, /, **fields: Any) -> None:
        """Asserts that a call fails like this; ``message`` is a part of the message."""
        expect_error(await self.send(method, path, **fields), status, code, message)

    async def experiment(self, name: str | None = None) -> str:
        """A new experiment's id."""
        return str((await self.call("POST", "experiments/create", name=name or unique("experiment")))["experiment_id"])

    async def run(self, experiment_id: str = "0", **fields: Any) -> str:
        """A new run's id."""
        answer = await self.call("POST", "runs/create", experiment_id=experiment_id, start_time=1_000, **fields)
        return str(answer["run"]["info"]["run_id"])

    async def data(self, run_id: str) -> Any:
        """Params, tags and metrics of a run, each by key."""
        data = (await self.call("GET", "runs/get", run_id=run_id))["run"]["data"]
        return {kind: {entry["key"]: entry["value"] for entry in entries} for kind, entries in data.items()}


def expect_error(response: httpx.Response, status: int, code: str, message: str) -> None:
    """Asserts the one form that errors have."""
    assert (response.status_code, response.json().get("error_code")) == (status, code), response.text
    assert message in response.json()["message"]
    assert set(response.json()) == {"error_code", "message"}


@pytest.fixture
def mlflow(http: httpx.AsyncClient) -> MLflow:
    """MLflow's API as its client calls it."""
    return MLflow(http)


@pytest.fixture
async def served(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """The platform on a port, for the SDK of this test, which has a spool folder of its own."""
    served = Served(stack.app)
    await served.start()
    monkeypatch.setenv("MLPLAT_URL", served.url)
    monkeypatch.setenv("MLPLAT_SPOOL_DIR", str(tmp_path / "spool"))
    monkeypatch.setenv("MLPLAT_CAPTURE", "false")  # tests of recording have their own; here every point counts
    yield served
    await asyncio.to_thread(this_process().close)
    await served.stop()
