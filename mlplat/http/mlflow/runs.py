"""MLflow's run and artifact-listing endpoints."""

from __future__ import annotations

import asyncio

import msgspec

from mlplat.artifacts.model import safe_path
from mlplat.errors import InvalidInput
from mlplat.http.mlflow.endpoint import (
    Answer,
    Endpoint,
    check_limit,
    page_offset,
    paged,
    request_id,
    require,
    wire_double,
)
from mlplat.http.mlflow.experiments import Tag, view_type
from mlplat.http.services import Services
from mlplat.tracking.model import (
    Run,
    RunStatus,
    from_ms,
    parse_experiment_id,
    run_id_for,
    to_ms,
)
from mlplat.tracking.run_search import FoundRun, search_runs, with_metrics

MAX_PAGE = 50_000


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

    status: str | None = None
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


class SearchLoggedModels(msgspec.Struct):
    """logged-models/search"""

    experiment_ids: list[str] = []


class ListArtifacts(ById):
    """artifacts/list"""

    path: str = ""


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
    status = RunStatus(request.status) if request.status in set(RunStatus) else None
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
    limit, offset = check_limit(request.max_results, MAX_PAGE), page_offset(request.page_token)
    found = await search_runs(
        services.runs, services.metrics, [parse_experiment_id(value) for value in request.experiment_ids],
        request.filter, request.order_by, view_type(request.run_view_type), limit + 1, offset,
    )  # fmt: skip
    return paged("runs", [wire_run(run) for run in found], limit, offset)


async def list_artifacts(services: Services, request: ListArtifacts) -> Answer:
    """GET artifacts/list"""
    run = await services.runs.get(run_id_of(request))
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
    Endpoint(("POST",), "runs/search", Search, search),
    Endpoint(("GET",), "artifacts/list", ListArtifacts, list_artifacts),
    Endpoint(("POST",), "logged-models/search", SearchLoggedModels, search_logged_models),
)
