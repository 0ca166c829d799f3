"""MLflow's run, metric and artifact-listing endpoints."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

import msgspec

from mlplat.artifacts.model import safe_path
from mlplat.errors import InvalidInput
from mlplat.http.mlflow.endpoint import (
    Answer,
    Endpoint,
    check_limit,
    page_offset,
    paged,
    parse_double,
    request_id,
    require,
    wire_double,
)
from mlplat.http.mlflow.experiments import Tag, view_type
from mlplat.http.services import Services
from mlplat.metrics import queries
from mlplat.metrics.model import Point, encode, points_table
from mlplat.tracking.model import (
    MAX_BATCH_METRICS,
    MAX_BATCH_PARAMS,
    MAX_BATCH_TAGS,
    MAX_BATCH_TOTAL,
    Run,
    RunStatus,
    check_key,
    from_ms,
    parse_experiment_id,
    to_ms,
    unique_params,
)
from mlplat.tracking.run_search import FoundRun, search_runs, with_metrics

MAX_PAGE = 50_000
#: A run's id follows from its request, so that a repeated request finds the run it made.
RUN_ID_SPACE = uuid.UUID("6d6c706c-6174-4a72-8a75-6e2d69642d31")
MAX_HISTORY = 1_000_000


class Metric(msgspec.Struct):
    """One point on the wire. Required fields are checked by hand, to answer as MLflow does."""

    key: str = ""
    value: float | str | None = None
    timestamp: int | None = None
    step: int = 0


class Create(msgspec.Struct):
    """runs/create"""

    experiment_id: str = "0"
    user_id: str = ""
    run_name: str | None = None
    start_time: int | None = None
    tags: list[Tag] = []


class ById(msgspec.Struct):
    """Requests that name one run; ``run_uuid`` is its older name."""

    run_id: str = ""
    run_uuid: str = ""


class Update(ById):
    """runs/update"""

    status: str | None = None
    end_time: int | None = None
    run_name: str | None = None


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

    metrics: list[Metric] = []
    params: list[Tag] = []
    tags: list[Tag] = []


class Search(msgspec.Struct):
    """runs/search"""

    experiment_ids: list[str] = []
    filter: str = ""
    run_view_type: str | int | None = None
    max_results: int = 1000
    order_by: list[str] = []
    page_token: str | None = None


class History(ById):
    """metrics/get-history"""

    metric_key: str = ""
    max_results: int = MAX_HISTORY
    page_token: str | None = None


class SearchLoggedModels(msgspec.Struct):
    """logged-models/search"""

    experiment_ids: list[str] = []


class ListArtifacts(ById):
    """artifacts/list"""

    path: str = ""


def _id(request: ById) -> str:
    return require("run_id", request.run_id or request.run_uuid)


def wire_info(run: Run) -> Answer:
    """A run's info as MLflow writes it."""
    info: Answer = {
        "run_id": run.run_id,
        "run_uuid": run.run_id,
        "run_name": run.name,
        "experiment_id": str(run.experiment_id),
        "user_id": run.user_id,
        "status": run.status,
        "start_time": to_ms(run.started_at),
        "artifact_uri": run.artifact_uri,
        "lifecycle_stage": "deleted" if run.deleted else "active",
    }
    if run.ended_at is not None:
        info["end_time"] = to_ms(run.ended_at)
    return info


def wire_run(found: FoundRun) -> Answer:
    """A run as MLflow writes it; empty lists are absent."""
    data: Answer = {}
    if found.metrics:
        data["metrics"] = [
            {"key": point.key, "value": wire_double(point.value), "timestamp": point.timestamp, "step": point.step}
            for point in found.metrics
        ]
    if found.run.params:
        data["params"] = [{"key": key, "value": value} for key, value in found.run.params.items()]
    if found.run.tags:
        data["tags"] = [{"key": key, "value": value} for key, value in found.run.tags.items()]
    return {"info": wire_info(found.run), "data": data, "inputs": {}, "outputs": {}}


async def create(services: Services, request: Create) -> Answer:
    """POST runs/create"""
    started_at = from_ms(request.start_time or 0)
    tags = {tag.key: tag.value for tag in request.tags}
    experiment_id = parse_experiment_id(request.experiment_id)
    run_id = uuid.uuid5(RUN_ID_SPACE, request_id.get()).hex
    run = await services.runs.create(run_id, experiment_id, request.run_name, request.user_id, started_at, tags)
    return {"run": wire_run(FoundRun(run, []))}


async def get(services: Services, request: ById) -> Answer:
    """GET runs/get"""
    run = await services.runs.get(_id(request))
    return {"run": wire_run((await with_metrics(services.metrics, [run]))[0])}


async def update(services: Services, request: Update) -> Answer:
    """POST runs/update"""
    # MLflow ignores a status it does not know.
    status = RunStatus(request.status) if request.status in set(RunStatus) else None
    ended_at = from_ms(request.end_time) if request.end_time is not None else None
    run = await services.runs.update(_id(request), status, ended_at, request.run_name)
    return {"run_info": wire_info(run)}


async def delete(services: Services, request: ById) -> Answer:
    """POST runs/delete"""
    await services.runs.set_deleted(_id(request), True)
    return {}


async def restore(services: Services, request: ById) -> Answer:
    """POST runs/restore"""
    await services.runs.set_deleted(_id(request), False)
    return {}


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
    run_id = _id(request)
    points = _points([request])
    ref = await services.runs.require_active(run_id)
    await _append(services, ref.experiment_id, run_id, points)
    return {}


async def log_parameter(services: Services, request: LogPair) -> Answer:
    """POST runs/log-parameter"""
    await services.runs.log(_id(request), unique_params([(request.key, request.value)]), {})
    return {}


async def set_tag(services: Services, request: LogPair) -> Answer:
    """POST runs/set-tag"""
    check_key("tag", request.key)
    await services.runs.log(_id(request), {}, {request.key: request.value})
    return {}


async def delete_tag(services: Services, request: LogPair) -> Answer:
    """POST runs/delete-tag"""
    await services.runs.delete_tag(_id(request), require("key", request.key))
    return {}


async def log_batch(services: Services, request: LogBatch) -> Answer:
    """POST runs/log-batch"""
    run_id = _id(request)
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


async def search(services: Services, request: Search) -> Answer:
    """POST runs/search"""
    limit, offset = check_limit(request.max_results, MAX_PAGE), page_offset(request.page_token)
    found = await search_runs(
        services.runs, services.metrics, [parse_experiment_id(value) for value in request.experiment_ids],
        request.filter, request.order_by, view_type(request.run_view_type), limit + 1, offset,
    )  # fmt: skip
    return paged("runs", [wire_run(run) for run in found], limit, offset)


async def get_history(services: Services, request: History) -> Answer:
    """GET metrics/get-history"""
    run_id = _id(request)
    key = require("metric_key", request.metric_key)
    limit = check_limit(request.max_results, MAX_HISTORY)
    await services.runs.get(run_id)
    table = await services.metrics.query(queries.history(run_id, key, limit + 1, _after(request.page_token)))
    rows = table.to_pylist()
    answer: Answer = {}
    if rows:
        answer["metrics"] = [
            {"key": key, "value": wire_double(row["value"]), "timestamp": row["timestamp"], "step": row["step"]}
            for row in rows[:limit]
        ]
    if len(rows) > limit:
        last = rows[limit - 1]
        answer["next_page_token"] = f"{last['timestamp']}:{last['step']}:{float(last['value']).hex()}"
    return answer


def _after(token: str | None) -> tuple[int, int, float] | None:
    if not token:
        return None
    try:
        timestamp, step, value = token.split(":")
        return int(timestamp), int(step), float.fromhex(value)
    except (ValueError, OverflowError) as error:
        raise InvalidInput(f"Invalid page token: {token[:100]!r}") from error


async def list_artifacts(services: Services, request: ListArtifacts) -> Answer:
    """GET artifacts/list"""
    run = await services.runs.get(_id(request))
    path = safe_path(request.path)
    answer: Answer = {"root_uri": run.artifact_uri}
    root = artifact_root(run.artifact_uri)
    entries = await asyncio.to_thread(services.artifacts.list, f"{root}/{path}" if path else root)
    if entries:
        answer["files"] = [
            {"path": f"{path}/{entry.path}" if path else entry.path, "is_dir": entry.is_dir}
            | ({} if entry.size is None else {"file_size": entry.size})
            for entry in entries
        ]
    return answer


def artifact_root(artifact_uri: str) -> str:
    """Path in the artifact store of a URI behind the proxy.

    Raises:
        InvalidInput: the artifacts live elsewhere.
    """
    scheme, _colon, path = artifact_uri.partition(":")
    if scheme != "mlflow-artifacts":
        raise InvalidInput(f"The artifacts live at {artifact_uri}, which this platform does not serve.")
    return safe_path(path.lstrip("/"))


async def search_logged_models(_services: Services, _request: SearchLoggedModels) -> Answer:
    """POST logged-models/search: always empty, because this API does not create logged models yet.

    The client asks whenever it lists a run's artifacts, and takes anything but an answer as a failure.
    """
    return {}


ENDPOINTS = (
    Endpoint(("POST",), "runs/create", Create, create),
    Endpoint(("GET",), "runs/get", ById, get),
    Endpoint(("POST",), "runs/update", Update, update),
    Endpoint(("POST",), "runs/delete", ById, delete),
    Endpoint(("POST",), "runs/restore", ById, restore),
    Endpoint(("POST",), "runs/log-metric", LogMetric, log_metric),
    Endpoint(("POST",), "runs/log-parameter", LogPair, log_parameter),
    Endpoint(("POST",), "runs/set-tag", LogPair, set_tag),
    Endpoint(("POST",), "runs/delete-tag", LogPair, delete_tag),
    Endpoint(("POST",), "runs/log-batch", LogBatch, log_batch),
    Endpoint(("POST",), "runs/search", Search, search),
    Endpoint(("GET",), "metrics/get-history", History, get_history),
    Endpoint(("GET",), "artifacts/list", ListArtifacts, list_artifacts),
    Endpoint(("POST",), "logged-models/search", SearchLoggedModels, search_logged_models),
)
