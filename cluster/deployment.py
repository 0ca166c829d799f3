"""What runs on Ray: the long-lived actors, and the Gateway on Serve.

Loading this module loads all that these run, which takes seconds.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import ray
from ray import cloudpickle, serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions

import actors
import cluster
from actors.executor import RunExecutor
from actors.gateway import gateway
from actors.lifecycle import get_or_create
from actors.metric_shard import MetricShard
from actors.registry_coordinator import RegistryCoordinator
from actors.scheduler import PipelineScheduler
from cluster.connection import Say
from mlplat.runtime import METRIC_SHARD, PIPELINE_SCHEDULER, REGISTRY_COORDINATOR, SERVE_APP, executor_names
from mlplat.settings import PlatformConfig

#: Under which Serve keeps its controller, in a namespace of its own.
SERVE_CONTROLLER = ("SERVE_CONTROLLER_ACTOR", "serve")
LOOK_S = 0.05


def deploy(config: PlatformConfig, say: Say) -> None:
    """Creates the actors and the Gateway; what exists already is left alone. The proxies may still be starting."""
    # By value: a file actors.py in a user's folder would shadow ours on the workers.
    for package in (actors, cluster):
        cloudpickle.register_pickle_by_value(package)  # type: ignore[no-untyped-call]  # Ray's copy has no types
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(_start_serve, int(config.http_url.rpartition(":")[2]))
        say("starting the actors")
        _create_actors(config)
        _wait_for_controller(serving)
        if SERVE_APP not in serve.status().applications:
            say("starting the Gateway")
            serve.run(gateway(config), name=SERVE_APP, route_prefix="/")
        with suppress(RayError, TimeoutError):  # Serve itself replaces a proxy that is slow to start, or dies
            serving.result()


def _start_serve(port: int) -> None:
    """Returns when Serve's proxies are ready. The Gateway needs only the controller, and starts meanwhile."""
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port), proxy_location="HeadOnly")


def _wait_for_controller(serving: Future[None]) -> None:
    """Returns when Serve's controller exists; raises what kept Serve from starting."""
    name, namespace = SERVE_CONTROLLER
    while not serving.done():
        try:
            ray.get_actor(name, namespace=namespace)
        except ValueError:
            time.sleep(LOOK_S)
        else:
            return
    serving.result()


def _create_actors(config: PlatformConfig) -> None:
    get_or_create(MetricShard, METRIC_SHARD, config, METRIC_SHARD)
    get_or_create(RegistryCoordinator, REGISTRY_COORDINATOR, config, REGISTRY_COORDINATOR)
    executors = executor_names(config.executors)
    for name in executors:
        get_or_create(RunExecutor, name, config, name)
    get_or_create(PipelineScheduler, PIPELINE_SCHEDULER, config, PIPELINE_SCHEDULER, executors)
