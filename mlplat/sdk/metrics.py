"""Getting metric points out of the user's process without holding it up."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from mlplat.errors import Overloaded, PlatformError, Unavailable
from mlplat.metrics.model import Point, encode, points_table
from mlplat.runtime import METRIC_SHARD, NAMESPACE
from mlplat.sdk.client import Client

ARROW = "application/vnd.apache.arrow.stream"
MAX_BATCH = 10_000
MAX_BUFFERED = 1_000_000
ACTOR_TIMEOUT_S = 30.0
RETRY_FOR_S = 120.0

Send = Callable[[bytes], None]


def http_sender(client: Client) -> Send:
    """Sends batches to the HTTP API."""

    def send(batch: bytes) -> None:
        client.post_bytes("/api/v1/metrics", batch, ARROW)

    return send


def best_sender(client: Client) -> Send:
    """Straight to the shard's actor inside the platform's own Ray cluster, over HTTP elsewhere."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return http_sender(client)
    try:
        shard = ray.get_actor(METRIC_SHARD, namespace=NAMESPACE)
    except ValueError:
        return http_sender(client)

    def send(batch: bytes) -> None:
        try:
            ray.get(shard.append.remote(batch), timeout=ACTOR_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (
                cause if isinstance(cause, PlatformError) else PlatformError(f"the metric shard failed: {cause}")
            ) from None
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise Unavailable(f"the metric shard does not answer: {error}") from error

    return send


class PointBuffer:
    """Points of one run on their way: ``add`` never blocks; ``flush`` returns when all are acknowledged.

    Batches form by themselves: the next one is whatever arrived while the last one was on its way.

    A point may be sent twice (a retry after a lost answer); the platform stores it once.
    """

    def __init__(self, run_id: str, send: Send) -> None:
        self._run_id = run_id
        self._send = send
        self._points: list[Point] = []
        self._changed = threading.Condition()
        self._in_flight = 0
        self._closed = False
        self._error: PlatformError | None = None
        self.dropped = 0
        self._sender = threading.Thread(target=self._run, name=f"mlplat-metrics-{run_id[:8]}", daemon=True)
        self._sender.start()

    def add(self, points: list[Point]) -> None:
        """Takes points; when a million wait already, drops them and counts them in ``dropped``."""
        with self._changed:
            if len(self._points) + len(points) > MAX_BUFFERED:
                self.dropped += len(points)
                return
            self._points += points
            self._changed.notify_all()

    def flush(self, timeout_s: float = RETRY_FOR_S) -> None:
        """Waits until every point added so far is durable.

        Raises:
            PlatformError: the platform refused the points, or stayed away for ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while (self._points or self._in_flight) and self._error is None:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise Unavailable(f"{len(self._points) + self._in_flight} metric points are not acknowledged yet")
            error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Flushes and ends the sender."""
        try:
            self.flush()
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._points and not self._closed:
                    self._changed.wait()
                if self._closed and not self._points:
                    return
                batch, self._points = self._points[:MAX_BATCH], self._points[MAX_BATCH:]
                self._in_flight = len(batch)
            error = self._deliver(batch)
            with self._changed:
                self._in_flight = 0
                self._error = error or self._error
                self._changed.notify_all()

    def _deliver(self, batch: list[Point]) -> PlatformError | None:
        body = encode(points_table(self._run_id, batch))
        retries = Retrying(
            retry=retry_if_exception_type((Unavailable, Overloaded)),
            wait=wait_random_exponential(multiplier=0.1, max=2),
            stop=stop_after_delay(RETRY_FOR_S),
            reraise=True,
        )
        try:
            retries(self._send, body)
        except PlatformError as error:
            return error
        except Exception as error:  # whatever it is, it must not end the sender and leave flush() waiting
            return PlatformError(f"metric points were not sent: {type(error).__name__}: {error}")
        return None
