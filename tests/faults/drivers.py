"""What only a driver of the cluster can do to a platform. Called in processes of their own."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any

import ray

from actors.lifecycle import PLATFORM_ENV
from mlplat.execution.attendant import Notice
from mlplat.runtime import NAMESPACE


def join() -> None:
    """Joins the cluster that this process' environment names."""
    ray.init(address=os.environ["RAY_ADDRESS"], namespace=NAMESPACE, runtime_env=PLATFORM_ENV, log_to_driver=False)


def say_again(executor: str, labels: list[str]) -> int:
    """Says of each attempt, twice and out of order, that it has begun and how far it is; returns how often."""
    join()
    actor: Any = ray.get_actor(executor, namespace=NAMESPACE)
    at = datetime.now(UTC)
    notices = [
        Notice(label, at, "nowhere", progress)
        for label in [*labels, *reversed(labels)]
        for progress in ({"done": 0.9, "text": "late"}, None, {"done": 0.1, "text": "later"}, None)
    ]
    ray.get([actor.notice.remote(notice) for notice in notices], timeout=60)
    return len(notices)
