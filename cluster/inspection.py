"""What is known of a running platform."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from actors.handles import ClusterStatus
from cluster.connection import connect, living_record
from cluster.credentials import client_environment
from cluster.postgres import EmbeddedPostgres
from cluster.postgres_keeper import POSTGRES_KEEPER
from mlplat.errors import BringUpError
from mlplat.runtime import NAMESPACE
from mlplat.settings import Settings

KEEPER_TIMEOUT_S = 2


def status(settings: Settings) -> list[dict[str, Any]]:
    """One row per actor: actor, node, pid, restarts, health, lag.

    Raises:
        BringUpError: the platform is not running.
    """
    record = living_record(settings)
    if record is None:
        raise BringUpError("the platform is not running; start it with: mlplat up")
    connect(record)
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
    record = living_record(settings)
    if record is None:
        raise BringUpError("the platform is not running; start it with: mlplat up")
    found = {"MLPLAT_URL": record.http_url, "MLFLOW_TRACKING_URI": record.http_url}
    if record.head_pids:
        found |= client_environment(settings.state_dir)
    # `ray job submit` reads this one; Ray drivers take the cluster's own address from mlplat status.
    if record.dashboard_url:
        found["RAY_API_SERVER_ADDRESS"] = record.dashboard_url
    return found
