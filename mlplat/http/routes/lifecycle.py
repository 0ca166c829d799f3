"""/api/v1: purging, moving, reading points in bulk, and importing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from mlplat.http.bodies import decode_request
from mlplat.http.services import Services
from mlplat.metrics import queries
from mlplat.metrics.model import ARROW, encode
from mlplat.metrics.reconcile import MAX_RUN_IDS
from mlplat.tracking.import_rows import ImportedRun
from mlplat.tracking.imports import NewExperiment
from mlplat.tracking.model import RunStatus, from_ms, parse_experiment_id
from mlplat.tracking.moves import MAX_RUNS as MAX_MOVED
from mlplat.tracking.purge import Scope, parse_age
from mlplat.tracking.purger import MAX_RUNS as MAX_PURGED

MAX_POINTS = 500_000
_Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
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


class BeginImport(BaseModel):
    """The experiment that an import creates."""

    origin: str = Field(description="What is imported. The same origin again goes on with the same import.")
    name: str
    experiment_id: str | None = Field(default=None, description="Kept when it is free.")
    created_at: int = Field(description="ms since 1970")
    updated_at: int
    tags: dict[str, str] = {}


class ImportAnswer(BaseModel):
    """An import's experiment, hidden until the import is complete."""

    experiment_id: str
    name: str
    complete: bool


class RunIds(BaseModel):
    """Runs."""

    run_ids: list[_RunId] = Field(max_length=10_000)


class AssignedId(BaseModel):
    """The id that a run of the source has here."""

    source_id: str
    run_id: str
    complete: bool


class WireRun(msgspec.Struct):
    """A run of an import, under its id here. Times are in ms since 1970."""

    run_id: str
    name: str
    status: RunStatus
    started_at: int
    user_id: str = ""
    ended_at: int | None = None
    deleted: bool = False
    artifact_uri: str | None = None
    params: dict[str, str] = {}
    tags: dict[str, str] = {}


class WireRuns(msgspec.Struct):
    """imports/{id}/runs"""

    runs: list[WireRun]


class ArtifactUris(BaseModel):
    """Where the runs keep their artifacts, in the order of the request."""

    artifact_uris: list[str]


class Done(BaseModel):
    """Nothing else to say."""


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

    _add_imports(api, services)
    return api


def _add_imports(api: APIRouter, services: Services) -> None:
    imports = services.lifecycle.imports

    @api.post("/imports")
    async def begin(request: BeginImport) -> ImportAnswer:
        """Begins an import, or finds the one of this origin."""
        wanted = parse_experiment_id(request.experiment_id) if request.experiment_id is not None else None
        new = NewExperiment(
            request.origin, request.name, wanted, from_ms(request.created_at), from_ms(request.updated_at),
            request.tags,
        )  # fmt: skip
        begun = await imports.begin(new)
        return ImportAnswer(experiment_id=str(begun.experiment_id), name=begun.name, complete=begun.complete)

    @api.post("/imports/{experiment_id}/ids")
    async def assign(experiment_id: str, request: RunIds) -> list[AssignedId]:
        """The ids that runs of the source get here: their own where they are free."""
        assigned = await imports.assign(parse_experiment_id(experiment_id), request.run_ids)
        return [AssignedId(**asdict(each)) for each in assigned]

    @api.post("/imports/{experiment_id}/runs")
    async def put_runs(experiment_id: str, request: Request) -> ArtifactUris:
        """Creates runs with their params and tags: `{"runs": [{run_id, name, status, started_at, …}]}`."""
        runs = [_imported(each) for each in (await decode_request(request, WireRuns)).runs]
        return ArtifactUris(artifact_uris=await imports.put_runs(parse_experiment_id(experiment_id), runs))

    @api.post("/imports/{experiment_id}/complete")
    async def complete(experiment_id: str, request: RunIds) -> Done:
        """Notes that these runs have arrived with points and artifacts."""
        await imports.complete(parse_experiment_id(experiment_id), request.run_ids)
        return Done()

    @api.post("/imports/{experiment_id}/finish")
    async def finish(experiment_id: str) -> Done:
        """Shows the experiment, when all its runs have arrived."""
        await imports.finish(parse_experiment_id(experiment_id))
        return Done()


async def _scope(services: Services, request: PurgeRequest) -> Scope:
    named: Any = None
    if request.experiments is not None:
        named = tuple([(await services.experiments.get_by_name(name)).experiment_id for name in request.experiments])
    runs = tuple(request.runs) if request.runs is not None else None
    return Scope(parse_age(request.older_than), runs, named)


def _imported(run: WireRun) -> ImportedRun:
    ended_at = from_ms(run.ended_at) if run.ended_at is not None else None
    return ImportedRun(
        run.run_id, run.name, run.status, run.user_id, from_ms(run.started_at), ended_at, run.deleted,
        run.artifact_uri, run.params, run.tags,
    )  # fmt: skip
