"""MLflow's endpoints that write to a run: metrics, params and tags."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mlplat.errors import InvalidInput
from mlplat.http.mlflow.endpoint import Answer, Endpoint, parse_double, require
from mlplat.http.mlflow.experiments import Tag
from mlplat.http.mlflow.runs import ById, run_id_of
from mlplat.http.services import Services
from mlplat.metrics.model import Point, encode, points_table
from mlplat.tracking.model import (
    MAX_BATCH_METRICS,
    MAX_BATCH_PARAMS,
    MAX_BATCH_TAGS,
    MAX_BATCH_TOTAL,
    check_key,
    from_ms,
    unique_params,
)


class Metric(msgspec.Struct):
    """One point on the wire. Required fields are checked by hand, to answer as MLflow does."""

    key: str = ""
    value: float | str | None = None
    timestamp: int | None = None
    step: int = 0


class LogMetric(ById):
    """runs/log-metric"""

    key: str = ""
    value: float | str | None = None
    timestamp: int | None = None
    step: int = 0


class LogPair(ById):
    """runs/log-parameter, set-tag and delete-tag"""

    key: str = ""
    value: str = ""


class LogBatch(ById):
    """runs/log-batch"""

    metrics: list[Metric] = msgspec.field(default_factory=list)
    params: list[Tag] = msgspec.field(default_factory=list)
    tags: list[Tag] = msgspec.field(default_factory=list)


def _points(metrics: Sequence[Metric | LogMetric]) -> list[Point]:
    points = []
    for metric in metrics:
        check_key("metric", metric.key)
        value = parse_double("value", metric.value)
        if metric.timestamp is None:
            raise InvalidInput("Missing value for required parameter 'timestamp'.")
        from_ms(metric.timestamp)
        if not -(2**63) <= metric.step < 2**63:
            raise InvalidInput(f"Invalid value {metric.step} for parameter 'step' supplied: out of range.")
        points.append(Point(metric.key, value, metric.timestamp, metric.step))
    return points


async def _append(services: Services, experiment_id: int, run_id: str, points: list[Point]) -> None:
    if points:
        await services.metrics.append(encode(points_table(experiment_id, run_id, points)))


async def log_metric(services: Services, request: LogMetric) -> Answer:
    """POST runs/log-metric"""
    run_id = run_id_of(request)
    points = _points([request])
    ref = await services.runs.require_active(run_id)
    await _append(services, ref.experiment_id, run_id, points)
    return {}


async def log_parameter(services: Services, request: LogPair) -> Answer:
    """POST runs/log-parameter"""
    await services.runs.log(run_id_of(request), unique_params([(request.key, request.value)]), {})
    return {}


async def set_tag(services: Services, request: LogPair) -> Answer:
    """POST runs/set-tag"""
    check_key("tag", request.key)
    await services.runs.log(run_id_of(request), {}, {request.key: request.value})
    return {}


async def delete_tag(services: Services, request: LogPair) -> Answer:
    """POST runs/delete-tag"""
    await services.runs.delete_tag(run_id_of(request), require("key", request.key))
    return {}


async def log_batch(services: Services, request: LogBatch) -> Answer:
    """POST runs/log-batch"""
    run_id = run_id_of(request)
    counts = (len(request.metrics), len(request.params), len(request.tags))
    for what, count, limit in zip(
        ("metrics", "params", "tags", "metrics, params and tags"),
        (*counts, sum(counts)),
        (MAX_BATCH_METRICS, MAX_BATCH_PARAMS, MAX_BATCH_TAGS, MAX_BATCH_TOTAL),
        strict=True,
    ):
        if count > limit:
            raise InvalidInput(f"A batch logging request can contain at most {limit} {what}. Got {count}.")
    points = _points(request.metrics)
    params = unique_params([(param.key, param.value) for param in request.params])
    for tag in request.tags:
        check_key("tag", tag.key)
    ref = await services.runs.log(run_id, params, {tag.key: tag.value for tag in request.tags})
    await _append(services, ref.experiment_id, run_id, points)
    return {}


ENDPOINTS = (
    Endpoint(("POST",), "runs/log-metric", LogMetric, log_metric),
    Endpoint(("POST",), "runs/log-parameter", LogPair, log_parameter),
    Endpoint(("POST",), "runs/set-tag", LogPair, set_tag),
    Endpoint(("POST",), "runs/delete-tag", LogPair, delete_tag),
    Endpoint(("POST",), "runs/log-batch", LogBatch, log_batch),
)
