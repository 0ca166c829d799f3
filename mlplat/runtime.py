"""Strings that processes on both sides of a Ray call must agree on."""

from __future__ import annotations

NAMESPACE = "mlplat"
#: Where clients of MLflow's protocol send their files: through the Gateway.
ARTIFACT_ROOT = "mlflow-artifacts:"

METRIC_SHARD = "metric-shard-0"
REGISTRY_COORDINATOR = "registry-coordinator"
PIPELINE_SCHEDULER = "pipeline-scheduler"


def executor_names(count: int) -> list[str]:
    """The run executors of a platform that has that many."""
    return [f"run-executor-{number}" for number in range(count)]


def actor_names(executors: int) -> list[str]:
    """Detached actors in the order in which bring-up creates them."""
    return [METRIC_SHARD, REGISTRY_COORDINATOR, *executor_names(executors), PIPELINE_SCHEDULER]


SERVE_APP = "mlplat"
GATEWAY_DEPLOYMENT = "Gateway"
