"""Writers in a process of their own: ``python -m tests.faults.writer PLAN``. Each notes what was acknowledged.

The plan is JSON: url, ledger (a file), shared_run, writers (number, run and path of each). They write
until stdin closes; then each brings its last request to an end.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import ray

from mlplat.errors import Overloaded, PlatformError, Unavailable
from mlplat.metrics.model import ARROW, Point, encode, points_table
from mlplat.runtime import METRIC_SHARD, NAMESPACE
from mlplat.sdk.client import Client
from mlplat.sdk.metrics import best_sender

#: A pause after each request: with it, eight writers leave the machine some time to recover in.
PACE_S = 0.02
BATCH_POINTS = 20
#: A request is repeated for so long; the platform must be back within this time.
PATIENCE_S = 60.0
REQUEST_TIMEOUT_S = 30.0
EPOCH_MS = 1_700_000_000_000
RETRIED_STATUS = {408, 429, 502, 503, 504}


@dataclass
class Entry:
    """One request: points ``step … step + count - 1`` of a key, and a param. Times are this machine's monotonic clock.

    ``done`` is None when the outcome is unknown. A failure reads ``503 Retry-After``, ``ConnectError`` and so on.
    """

    writer: int
    kind: str
    run: str
    key: str
    step: int
    count: int
    param: str | None
    sent: float
    done: float | None = None
    failures: list[str] = field(default_factory=list)

    def points(self) -> list[Point]:
        """The points it carries; they follow from its fields."""
        return [point_at(self.key, step) for step in range(self.step, self.step + self.count)]


class Failed(Exception):
    """The request may succeed when it is sent again."""


def point_at(key: str, step: int) -> Point:
    """The one point that may be logged there."""
    return Point(key, step / 8, EPOCH_MS + step, step)


Send = Callable[[Entry], None]


def http_send(url: str) -> Send:
    """Sends by MLflow's log-batch and log-metric, and by the native API's Arrow batches."""
    http = httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S, trust_env=False)

    def send(entry: Entry) -> None:
        try:
            answer = http.post(**_request(entry))
        except httpx.TransportError as error:
            raise Failed(type(error).__name__) from error
        if answer.is_success:
            return
        ours = answer.headers.get("content-type", "").startswith("application/json")
        # HAProxy's own "no replica there" is a 500 without our JSON.
        if answer.status_code in RETRIED_STATUS or (answer.status_code == 500 and not ours):
            raise Failed(f"{answer.status_code}{' Retry-After' if 'retry-after' in answer.headers else ''}")
        raise RuntimeError(f"{entry.kind} was answered {answer.status_code}: {answer.text}")

    return send


def _request(entry: Entry) -> dict[str, Any]:
    if entry.kind == "arrow":
        body = encode(points_table(entry.run, entry.points()))
        return {"url": "/api/v1/metrics", "content": body, "headers": {"Content-Type": ARROW}}
    metrics = [point._asdict() for point in entry.points()]
    if entry.kind == "point":
        return {"url": "/api/2.0/mlflow/runs/log-metric", "json": {"run_id": entry.run, **metrics[0]}}
    params = [{"key": entry.param, "value": entry.param}]
    return {
        "url": "/api/2.0/mlflow/runs/log-batch",
        "json": {"run_id": entry.run, "metrics": metrics, "params": params},
    }


def actor_send(url: str) -> Send:
    """Sends straight to the shard's actor, as the SDK does inside the cluster."""
    ray.get_actor(METRIC_SHARD, namespace=NAMESPACE)  # else the SDK would take HTTP
    deliver = best_sender(Client(url))

    def send(entry: Entry) -> None:
        try:
            deliver(encode(points_table(entry.run, entry.points())))
        except (Unavailable, Overloaded) as error:
            raise Failed(type(error).__name__) from error
        except PlatformError as error:
            raise RuntimeError(f"the shard refused: {error}") from error

    return send


@dataclass
class Writer:
    """One client that writes one request after another, to a run of its own and to one that all share."""

    number: int
    runs: Sequence[str]
    kinds: Sequence[str]
    send: Send
    patience_s: float

    def write(self, stop: threading.Event, note: Callable[[Entry], None]) -> None:
        """Writes until ``stop``, noting every request once its outcome is settled."""
        step = 0
        for number in range(1_000_000_000):
            if stop.is_set():
                return
            kind = self.kinds[number % len(self.kinds)]
            count = 1 if kind == "point" else BATCH_POINTS
            param = f"p{self.number}-{number}" if kind == "batch" else None
            run = self.runs[number // len(self.kinds) % len(self.runs)]
            entry = Entry(self.number, kind, run, f"{kind}-{self.number}", step, count, param, time.monotonic())
            self._settle(entry)
            note(entry)
            step += count
            stop.wait(PACE_S)

    def _settle(self, entry: Entry) -> None:
        deadline = entry.sent + self.patience_s
        while entry.done is None:
            try:
                self.send(entry)
                entry.done = time.monotonic()
            except Failed as failure:
                entry.failures.append(str(failure))
                if time.monotonic() > deadline:
                    return
                time.sleep(random.uniform(0.05, 0.5))


def main() -> None:
    """Runs the plan's writers."""
    plan = json.loads(sys.argv[1])
    stop, lock = threading.Event(), threading.Lock()
    if any(path == "actor" for _number, _run, path in plan["writers"]):
        ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    with open(plan["ledger"], "w", buffering=1) as ledger:  # noqa: PTH123 - line buffering

        def note(entry: Entry) -> None:
            with lock:
                ledger.write(json.dumps(asdict(entry)) + "\n")

        def run(number: int, run_id: str, path: str) -> None:
            send = (actor_send if path == "actor" else http_send)(plan["url"])
            kinds = ["actor"] if path == "actor" else ["batch", "point", "arrow"]
            # The impatient never ask twice: what became of their failures is unknown, but must be whole.
            patience = 0.0 if path == "impatient" else PATIENCE_S
            try:
                Writer(number, [run_id, plan["shared_run"]], kinds, send, patience).write(stop, note)
            except Exception as error:
                with lock:
                    ledger.write(json.dumps({"defect": f"writer {number}: {type(error).__name__}: {error}"}) + "\n")

        threads = [threading.Thread(target=run, args=tuple(writer)) for writer in plan["writers"]]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        stop.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
