"""A second scheduler in a platform's cluster. Its functions are called in processes that join it as drivers."""

from __future__ import annotations

from typing import Any

import ray
from ray import cloudpickle

import actors
from actors.lifecycle import get_or_create
from actors.scheduler import PipelineScheduler
from mlplat.runtime import NAMESPACE, PIPELINE_SCHEDULER, executor_names
from mlplat.settings import Settings
from tests.faults.drivers import join

NAME = "rival-scheduler"
STOP_TIMEOUT_S = 60


def start() -> str:
    """Starts it; returns its identity, as the holder of a lease has it."""
    cloudpickle.register_pickle_by_value(actors)  # type: ignore[no-untyped-call]  # Ray's copy has no types
    join()
    config = Settings().config
    rival = get_or_create(PipelineScheduler, NAME, config, PIPELINE_SCHEDULER, executor_names(config.executors))
    return str(rival._actor_id.hex())


def end() -> None:
    """Lets it hand the lease back, and ends it."""
    join()
    rival: Any = ray.get_actor(NAME, namespace=NAMESPACE)
    ray.get(rival.stop.remote(), timeout=STOP_TIMEOUT_S)
    ray.kill(rival)
