"""Strings that processes on both sides of a Ray call must agree on."""

from __future__ import annotations

NAMESPACE = "mlplat"

METRIC_SHARD = "metric-shard-0"
REGISTRY_COORDINATOR = "registry-coordinator"
PIPELINE_SCHEDULER = "pipeline-scheduler"
RUN_EXECUTOR = "run-executor-0"

#: Detached actors in the order in which bring-up creates them.
ACTOR_NAMES = (METRIC_SHARD, REGISTRY_COORDINATOR, RUN_EXECUTOR, PIPELINE_SCHEDULER)

SERVE_APP = "mlplat"
GATEWAY_DEPLOYMENT = "Gateway"
