"""MLflow's run endpoints."""

from __future__ import annotations

import math
from dataclasses import asdict

import msgspec

from mlplat.http.mlflow.endpoint import (
    Answer,
    Endpoint,
    check_limit,
    request_id,
    require,
    token_page,
    wire_double,
    wire_pairs,
)
from mlplat.http.mlflow.experiments import Tag, view_type
from mlplat.http.services import Services
from mlplat.tracking.inputs import DatasetInput, RunLinks
from mlplat.tracking.model import Run, RunStatus, from_ms, parse_experiment_id, run_id_for, to_ms
from mlplat.tracking.run_search import FoundRun, MetricPoint, search_runs, with_metrics

MAX_PAGE = 50_000
#: A status may be sent by its number.
_STATUS_NUMBERS = {"1": "RUNNING", "2": "SCHEDULED", "3": "FINISHED", "4": "FAILED", "5": "KILLED"}


class Create(msgspec.Struct):
    """runs/create"""

    experiment_id: str = "0"
    user_id: str = ""
    run_name: str | None = None
    start_time: int | None = None
    tags: list[Tag] = []
    #: Not MLflow's: the client promises heartbeats from now on.
    heartbeat: bool = False


class ById(msgspec.Struct):
    """Requests that name one run; ``run_uuid`` is its older name."""

    run_id: str = ""
    run_uuid: str = ""


class Update(ById):
    """runs/update"""

    status: str | int | None = None
    end_time: int | None = None
    run_name: str | None = None
    #: Not MLflow's: when a process went on with the run; says nothing about a run that has ended since.
    resumed_at: int | None = None


class Search(msgspec.Struct):
    """runs/search"""

    experiment_ids: list[str] = []
    filter: str = ""
    run_view_type: str | int | None = None
    max_results: int = 1000
    order_by: list[str] = []
    page_token: str | None = None


def run_id_of(request: ById) -> str:
    """The run that a request names.

    Raises:
        InvalidInput: it names none.
    """
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
        data["metrics"] = [point if math.isfinite(point.value) else _wire_point(point) for point in found.metrics]
    if found.run.params:
        data["params"] = wire_pairs(found.run.params)
    if found.run.tags:
        data["tags"] = wire_pairs(found.run.tags)
    return {"info": wire_info(found.run), "data": data} | wire_links(found.run.links)


def wire_links(links: RunLinks) -> Answer:
    """A run's inputs and outputs as MLflow writes them."""
    inputs: Answer = {}
    if links.datasets:
        inputs["dataset_inputs"] = [_wire_input(one) for one in links.datasets]
    if links.model_inputs:
        inputs["model_inputs"] = [{"model_id": model_id} for model_id in links.model_inputs]
    outputs: Answer = {}
    if links.model_outputs:
        outputs["model_outputs"] = [{"model_id": out.model_id, "step": out.step} for out in links.model_outputs]
    return {"inputs": inputs, "outputs": outputs}


def _wire_input(one: DatasetInput) -> Answer:
    dataset = {key: value for key, value in asdict(one.dataset).items() if value is not None}
    if not one.tags:
        return {"dataset": dataset}
    return {"tags": wire_pairs(one.tags), "dataset": dataset}


def _wire_point(point: MetricPoint) -> Answer:
    return {"key": point.key, "value": wire_double(point.value), "timestamp": point.timestamp, "step": point.step}


async def create(services: Services, request: Create) -> Answer:
    """POST runs/create"""
    started_at = from_ms(request.start_time or 0)
    tags = {tag.key: tag.value for tag in request.tags}
    experiment_id = parse_experiment_id(request.experiment_id)
    run = await services.runs.create(
        run_id_for(request_id.get()), experiment_id, request.run_name, request.user_id, started_at, tags,
        beating=request.heartbeat,
    )  # fmt: skip
    return {"run": wire_run(FoundRun(run, []))}


async def get(services: Services, request: ById) -> Answer:
    """GET runs/get"""
    run = await services.runs.get(run_id_of(request))
    return {"run": wire_run((await with_metrics(services.metrics, [run]))[0])}


async def update(services: Services, request: Update) -> Answer:
    """POST runs/update"""
    # MLflow ignores a status it does not know.
    name = _STATUS_NUMBERS.get(str(request.status), request.status)
    status = RunStatus(name) if name in set(RunStatus) else None
    ended_at = from_ms(request.end_time) if request.end_time is not None else None
    resumed_at = from_ms(request.resumed_at) if request.resumed_at is not None else None
    run = await services.runs.update(run_id_of(request), status, ended_at, request.run_name, resumed_at=resumed_at)
    return {"run_info": wire_info(run)}


async def delete(services: Services, request: ById) -> Answer:
    """POST runs/delete"""
    await services.runs.set_deleted(run_id_of(request), True)
    return {}


async def restore(services: Services, request: ById) -> Answer:
    """POST runs/restore"""
    await services.runs.set_deleted(run_id_of(request), False)
    return {}


async def search(services: Services, request: Search) -> Answer:
    """POST runs/search"""
    page = await search_runs(
        services.runs, services.metrics, [parse_experiment_id(value) for value in request.experiment_ids],
        request.filter, request.order_by, view_type(request.run_view_type),
        check_limit(request.max_results, MAX_PAGE), request.page_token,
    )  # fmt: skip
    return token_page("runs", [wire_run(found) for found in page.runs], page.next_token)


ENDPOINTS = (
    Endpoint(("POST",), "runs/create", Create, create),
    Endpoint(("GET",), "runs/get", ById, get),
    Endpoint(("POST",), "runs/update", Update, update),
    Endpoint(("POST",), "runs/delete", ById, delete),
    Endpoint(("POST",), "runs/restore", ById, restore),
    Endpoint(("POST",), "runs/search", Search, search),
)
