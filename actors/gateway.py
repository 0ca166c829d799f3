"""Gateway: the HTTP API as a Ray Serve deployment. Stateless; any replica may die."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.schema import LoggingConfig

from actors.handles import ClusterStatus, MetricShardClient, RegistryClient, SchedulerClient
from actors.lifecycle import PLATFORM_ENV, spare_garbage_collection
from mlplat import __version__
from mlplat.artifacts.store import ArtifactStore
from mlplat.db.engine import open_engine
from mlplat.db.reader import Reader
from mlplat.events.log import EventLog
from mlplat.http.app import create_app
from mlplat.http.services import Services
from mlplat.lineage.keeper import LineageKeeper
from mlplat.lineage.records import RunRecords
from mlplat.lineage.store import LineageStore
from mlplat.pipelines.automation.store import AutomationStore
from mlplat.pipelines.store import PipelineStore
from mlplat.registry.frozen import FrozenFiles
from mlplat.registry.history_store import RegistryHistory
from mlplat.registry.move_store import MoveStore
from mlplat.registry.store import RegistryStore
from mlplat.runtime import ARTIFACT_ROOT, GATEWAY_DEPLOYMENT
from mlplat.settings import PlatformConfig
from mlplat.storage.guard import StorageGuard
from mlplat.storage.model import Retention
from mlplat.storage.upkeep import Upkeep
from mlplat.tracking.datasets import DatasetStore
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.heartbeats import HeartbeatStore
from mlplat.tracking.lifecycle import Lifecycle
from mlplat.tracking.logged_models import LoggedModelStore
from mlplat.tracking.runs import RunStore
from mlplat.webhooks.addresses import Targets
from mlplat.webhooks.sender import Sender
from mlplat.webhooks.service import Webhooks
from mlplat.webhooks.store import WebhookStore

POOL_SIZE = 16
READERS = 8
MAX_ONGOING_REQUESTS = 400


def gateway(config: PlatformConfig, replicas: int = 1) -> Any:
    """The Serve application."""

    def build() -> FastAPI:
        engine = open_engine(config.postgres_url, "gateway", POOL_SIZE)
        metrics, artifacts = MetricShardClient(), ArtifactStore(config.artifacts_url)
        records = RunRecords(engine, artifacts, metrics.query)
        guard = StorageGuard(engine)
        services = Services(
            experiments=ExperimentStore(engine, ARTIFACT_ROOT),
            runs=RunStore(engine),
            heartbeats=HeartbeatStore(engine),
            datasets=DatasetStore(engine),
            logged_models=LoggedModelStore(engine),
            lifecycle=Lifecycle.build(engine, artifacts, metrics, LineageKeeper(records), guard, ARTIFACT_ROOT),
            lineage=LineageStore(records),
            metrics=metrics,
            registry=RegistryStore(engine, Reader(config.postgres_url, "gateway reads", READERS)),
            registry_history=RegistryHistory(engine),
            moves=MoveStore(engine),
            frozen=FrozenFiles(artifacts),
            events=EventLog(engine),
            webhooks=Webhooks(WebhookStore(engine), Sender(Targets.parse(config.webhook_private_targets))),
            registry_writer=RegistryClient(),
            pipelines=PipelineStore(engine),
            automation=AutomationStore(engine),
            scheduler=SchedulerClient(),
            artifacts=artifacts,
            direct_artifacts=config.artifacts_direct,
            guard=guard,
            upkeep=Upkeep(engine, artifacts, guard, metrics, _retention(config)),
            status=ClusterStatus(config.executors),
        )
        app = create_app(services, __version__)
        spare_garbage_collection()
        return app

    # Ray's stubs say deployment(class) gives a decorator; given a class it gives the deployment.
    deployment: Any = serve.deployment(
        serve.ingress(build)(),
        name=GATEWAY_DEPLOYMENT,
        num_replicas=replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=5,
        health_check_period_s=2,
        health_check_timeout_s=10,
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        ray_actor_options={"num_cpus": 0, "runtime_env": PLATFORM_ENV},
    )
    return deployment.bind()


def _retention(config: PlatformConfig) -> Retention:
    return Retention(
        timedelta(days=config.keep_checkpoints_days),
        timedelta(days=config.keep_logs_days),
        timedelta(days=config.hot_metrics_days),
        timedelta(hours=config.collect_grace_hours),
        timedelta(hours=config.collect_every_hours) if config.collect_every_hours else None,
    )
