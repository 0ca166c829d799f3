"""MLflow's endpoints that write to a run: metrics, params and tags."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mlplat.errors import InvalidInput
from mlplat.http.mlflow.endpoint import Answer, Endpoint, parse_double, require
from mlplat.http.mlflow.experiments import Tag
from mlplat.http.mlflow.model_metrics import attach_model_metrics, check_models
from mlplat.http.mlflow.runs import ById, run_id_of
from mlplat.http.services import Services
from mlplat.keys import check_key
from mlplat.metrics.model import Point, columns_table, encode, points_table
from mlplat.tracking.model import (
    MAX_BATCH_METRICS,
    MAX_BATCH_PARAMS,
    MAX_BATCH_TAGS,
    MAX_BATCH_TOTAL,
    RunUpdate,
    from_ms,
    unique_params,
)


class Metric(msgspec.Struct, gc=False):
    """One point on the wire. Required fields are checked by hand, to answer as MLflow does."""

    key: str = ""
    value: float | str | None = None
    timestamp: int | None = None
    step: int = 0
    model_id: str | None = None
    dataset_name: str | None = None
    dataset_digest: str | None = None


class LogMetric(ById):
    """runs/log-metric"""

    key: str = ""
    value: float | str | None = None
    timestamp: int | None = None
    step: int = 0
    model_id: str | None = None
    dataset_name: str | None = None
    dataset_digest: str | None = None


class LogPair(ById):
    """runs/log-parameter, set-tag and delete-tag"""

    key: str = ""
    value: str = ""


class LogBatch(ById):
    """runs/log-batch"""

    metrics: list[Metric] = msgspec.field(default_factory=list)
    params: list[Tag] = msgspec.field(default_factory=list)
    tags: list[Tag] = msgspec.field(default_factory=list)


def _metrics_batch(run_id: str, metrics: Sequence[Metric | LogMetric]) -> bytes:
    """The points as an Arrow batch. The shard checks the keys, which are few, and the times."""
    keys, steps = [metric.key for metric in metrics], [metric.step for metric in metrics]
    timestamps, values = [metric.timestamp for metric in metrics], [metric.value for metric in metrics]
    try:
        return encode(columns_table(run_id, keys, steps, timestamps, values))  # type: ignore[arg-type]  # None and text raise TypeError
    except (TypeError, OverflowError, UnicodeEncodeError):
        return _checked_batch(run_id, metrics)


def _checked_batch(run_id: str, metrics: Sequence[Metric | LogMetric]) -> bytes:
    """The same, point by point: for what is missing, written as text, or out of range."""
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
    return encode(points_table(run_id, points))


def _update(run_id: str, params: Sequence[Tag], tags: Sequence[Tag]) -> RunUpdate:
    for tag in tags:
        check_key("tag", tag.key)
    return RunUpdate(
        run_id,
        unique_params([(param.key, param.value) for param in params]),
        {tag.key: tag.value for tag in tags},
    )


async def log_metric(services: Services, request: LogMetric) -> Answer:
    """POST runs/log-metric"""
    run_id = run_id_of(request)
    batch = _metrics_batch(run_id, [request])
    of_models = [request] if request.model_id else []
    await check_models(services, of_models)
    await services.metrics.append(batch)
    await attach_model_metrics(services, run_id, of_models)
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
    """POST runs/log-batch: all of it or nothing."""
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
    update = _update(run_id, request.params, request.tags)
    if request.metrics:
        has_update = bool(update.params or update.tags)
        batch = _metrics_batch(run_id, request.metrics)
        of_models = [metric for metric in request.metrics if metric.model_id]
        await check_models(services, of_models)
        await services.metrics.append(batch, update if has_update else None)
        await attach_model_metrics(services, run_id, of_models)
    else:
        await services.runs.log(run_id, update.params, update.tags)
    return {}


ENDPOINTS = (
    Endpoint(("POST",), "runs/log-metric", LogMetric, log_metric),
    Endpoint(("POST",), "runs/log-parameter", LogPair, log_parameter),
    Endpoint(("POST",), "runs/set-tag", LogPair, set_tag),
    Endpoint(("POST",), "runs/delete-tag", LogPair, delete_tag),
    Endpoint(("POST",), "runs/log-batch", LogBatch, log_batch),
)
