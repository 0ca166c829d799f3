"""How batches of metric points reach the platform: to the shard's actor from inside its Ray cluster, else over HTTP."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from mlplat.errors import PlatformError
from mlplat.metrics.model import ARROW
from mlplat.runtime import METRIC_SHARD, NAMESPACE
from mlplat.sdk.client import Client

ACTOR_TIMEOUT_S = 10.0

#: Returns when the points of an Arrow IPC stream are durable.
Send = Callable[[bytes], None]


def http_sender(client: Client) -> Send:
    """Sends batches to the HTTP API."""

    def send(batch: bytes) -> None:
        client.post_bytes("/api/v1/metrics", batch, ARROW)

    return send


def best_sender(client: Client) -> Send:
    """Straight to the shard's actor inside the platform's own Ray cluster; over HTTP elsewhere, and when it is away."""
    over_http = http_sender(client)

    def send(batch: bytes) -> None:
        ray: Any = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return over_http(batch)
        try:
            shard = ray.get_actor(METRIC_SHARD, namespace=NAMESPACE)
            ray.get(shard.append.remote(batch), timeout=ACTOR_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PlatformError):
                raise error.cause from None
            return over_http(batch)
        except (ValueError, ray.exceptions.RayError):  # no such actor, restarting, or too slow
            return over_http(batch)
        return None

    return send
