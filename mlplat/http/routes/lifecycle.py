"""/api/v1: purging, moving, and reading in bulk."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from fastapi.responses import Response
from pydantic import BaseModel, Field

from mlplat.errors import InvalidInput
from mlplat.http.mlflow.endpoint import token_page, wire_double
from mlplat.http.routes.curves import Double
from mlplat.http.services import Services
from mlplat.metrics import queries
from mlplat.metrics.changes import MAX_RUN_IDS
from mlplat.metrics.model import ARROW, encode
from mlplat.tracking.logged_model import LoggedModel, LoggedModelStatus
from mlplat.tracking.model import parse_experiment_id, to_ms
from mlplat.tracking.moves import MAX_RUNS as MAX_MOVED
from mlplat.tracking.purge import Scope, parse_age
from mlplat.tracking.purger import MAX_RUNS as MAX_PURGED

MAX_POINTS = 500_000
MAX_PAGE = 10_000
_Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Page = Annotated[int, Query(ge=1, le=MAX_PAGE)]
_RunId = Annotated[str, Field(min_length=1, max_length=250)]


class PurgeRequest(BaseModel):
    """Which deleted things to remove: all of them, unless narrowed."""

    older_than: str = Field(default="0s", description="Deleted for at least so long: 90s, 45m, 12h, 30d, 2w.")
    experiments: list[str] | None = Field(
        default=None,
        max_length=100,
        description="Names. A deleted one goes as a whole; an active one loses its deleted runs.",
    )
    runs: Annotated[list[_RunId], Field(max_length=MAX_PURGED)] | None = None
    dry_run: bool = False
    limit: int = Field(default=MAX_PURGED, ge=1, le=MAX_PURGED, description="Runs in one call.")
    after: str = Field(default="", max_length=250, description="`next` of the call before.")


class KeptItem(BaseModel):
    """Something deleted that stays."""

    kind: str
    id: str
    reason: str


class PurgeAnswer(BaseModel):
    """What was removed, or in a dry run would be. Bytes are exact for artifacts, estimates elsewhere."""

    runs: int
    experiments: int
    artifact_files: int
    artifact_bytes: int
    metric_bytes: int
    postgres_bytes: int
    kept: list[KeptItem]
    missing: list[str]
    next: str | None


class MoveRequest(BaseModel):
    """Runs and the experiment they go to."""

    run_ids: list[_RunId] = Field(min_length=1, max_length=MAX_MOVED)
    experiment_id: str
    with_children: bool = False


class MoveAnswer(BaseModel):
    """The runs that are in the experiment now."""

    run_ids: list[str]


class PointsRequest(BaseModel):
    """A page of points; ``after`` is the last row of the page before."""

    run_ids: list[_RunId] = Field(min_length=1, max_length=MAX_RUN_IDS)
    limit: int = Field(default=100_000, ge=1, le=MAX_POINTS)
    after: tuple[str, str, _Int64, _Int64, float] | None = None


class ModelRow(BaseModel):
    """A logged model. Times are in ms since 1970."""

    model_id: str
    name: str
    status: LoggedModelStatus
    model_type: str | None
    source_run_id: str | None
    created_at: int
    updated_at: int
    deleted: bool
    artifact_uri: str
    params: dict[str, str]
    tags: dict[str, str]


class ModelsPage(BaseModel):
    """Logged models by id; `next_page_token` is there when there may be more."""

    models: list[ModelRow] = []
    next_page_token: str | None = None


class ModelPoint(BaseModel):
    """A metric point of a logged model, and the run that measured it."""

    model_id: str
    run_id: str
    key: str
    value: Double
    timestamp: int
    step: int
    dataset_name: str | None
    dataset_digest: str | None


class ModelMetricsPage(BaseModel):
    """Points by model; `next_page_token` is there when there may be more."""

    metrics: list[ModelPoint] = []
    next_page_token: str | None = None


def router(services: Services) -> APIRouter:
    """Everything that happens to experiments and runs beyond logging."""
    api = APIRouter(prefix="/api/v1", tags=["lifecycle"])

    @api.post("/purge")
    async def purge(request: PurgeRequest) -> PurgeAnswer:
        """Removes deleted runs and experiments for good: rows, points and artifacts. Call again while `next` is set."""
        scope = await _scope(services, request)
        report = await services.lifecycle.purger.purge(
            scope, limit=request.limit, after=request.after, dry_run=request.dry_run
        )
        return PurgeAnswer(**asdict(report))

    @api.post("/runs/move")
    async def move(request: MoveRequest) -> MoveAnswer:
        """Moves runs to another experiment, all of them or none. Their artifacts stay where they are."""
        experiment_id = parse_experiment_id(request.experiment_id)
        moved = await services.lifecycle.mover.move(request.run_ids, experiment_id, with_children=request.with_children)
        return MoveAnswer(run_ids=moved)

    @api.post("/metrics/read", response_class=Response)
    async def read_points(request: PointsRequest) -> Response:
        """Points of runs as an Arrow IPC stream with the columns run_id, key, step, timestamp (ms) and value, in this
        order. A page that has `limit` rows has another one behind it."""
        table = await services.metrics.query(queries.points_of(request.run_ids, request.limit, request.after))
        return Response(encode(table, "zstd"), media_type=ARROW)

    _add_models(api, services)
    return api


def _add_models(api: APIRouter, services: Services) -> None:
    @api.get("/experiments/{experiment_id}/logged-models", response_model=ModelsPage)
    async def models(experiment_id: str, max_results: _Page = 1_000, page_token: str = "") -> Response:
        """A page of all logged models of an experiment, deleted ones too, without their metrics."""
        found = (await services.experiments.get(parse_experiment_id(experiment_id))).experiment_id
        rows = await services.logged_models.of_experiment(found, max_results, page_token)
        token = rows[-1].model_id if len(rows) == max_results else None
        return _page("models", [_model(row) for row in rows], token)

    @api.get("/experiments/{experiment_id}/logged-model-metrics", response_model=ModelMetricsPage)
    async def model_metrics(experiment_id: str, max_results: _Page = 10_000, page_token: str = "") -> Response:
        """A page of the metric points of all logged models of an experiment, deleted ones too."""
        found = (await services.experiments.get(parse_experiment_id(experiment_id))).experiment_id
        after = _point_token(page_token)
        rows = await services.logged_models.points_of_experiment(found, max_results, after)
        token = f"{rows[-1].model_id}:{rows[-1].identity.hex()}" if len(rows) == max_results else None
        return _page("metrics", [asdict(row) | {"value": wire_double(row.value)} for row in rows], token)


def _page(name: str, rows: list[dict[str, Any]], token: str | None) -> Response:
    return Response(msgspec.json.encode(token_page(name, rows, token)), media_type="application/json")


def _model(model: LoggedModel) -> dict[str, Any]:
    return {
        "model_id": model.model_id,
        "name": model.name,
        "status": model.status,
        "model_type": model.model_type,
        "source_run_id": model.source_run_id,
        "created_at": to_ms(model.created_at),
        "updated_at": to_ms(model.updated_at),
        "deleted": model.deleted,
        "artifact_uri": model.artifact_location,
        "params": model.params,
        "tags": model.tags,
    }


def _point_token(token: str) -> tuple[str, bytes]:
    model_id, _colon, digest = token.rpartition(":")
    try:
        return model_id, bytes.fromhex(digest)
    except ValueError as error:
        raise InvalidInput(f"Invalid page token: {token[:100]!r}") from error


async def _scope(services: Services, request: PurgeRequest) -> Scope:
    named: Any = None
    if request.experiments is not None:
        named = tuple([(await services.experiments.get_by_name(name)).experiment_id for name in request.experiments])
    runs = tuple(request.runs) if request.runs is not None else None
    return Scope(parse_age(request.older_than), runs, named)
