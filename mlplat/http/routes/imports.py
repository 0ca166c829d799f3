"""/api/v1/imports: bringing in an experiment from elsewhere, hidden until all of it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from mlplat.http.bodies import decode_request
from mlplat.http.mlflow.endpoint import parse_double
from mlplat.http.services import Services
from mlplat.tracking.import_ids import MODELS, RUNS, Assigned
from mlplat.tracking.imported import ImportedModel, ImportedRun, InputLink, ModelLink
from mlplat.tracking.imports import NewExperiment
from mlplat.tracking.inputs import Dataset
from mlplat.tracking.logged_model import LoggedModelStatus, ModelMetric
from mlplat.tracking.model import RunStatus, from_ms, parse_experiment_id

_Id = Annotated[str, Field(min_length=1, max_length=250)]
_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


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


class Ids(BaseModel):
    """Runs and logged models."""

    run_ids: list[_Id] = Field(default=[], max_length=10_000)
    model_ids: list[_Id] = Field(default=[], max_length=10_000)


class FindIds(Ids):
    """Runs and logged models of a source."""

    origin: str


class AssignedId(BaseModel):
    """The id that a run or model of the source has here."""

    source_id: str
    new_id: str
    complete: bool


class AssignedIds(BaseModel):
    """Ids in the order in which they were asked for."""

    runs: list[AssignedId]
    models: list[AssignedId]


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


class WireModel(msgspec.Struct):
    """A logged model of an import, under its id here. Times are in ms since 1970."""

    model_id: str
    name: str
    status: LoggedModelStatus
    created_at: int
    updated_at: int
    model_type: str | None = None
    source_run_id: str | None = None
    deleted: bool = False
    artifact_uri: str | None = None
    params: dict[str, str] = {}
    tags: dict[str, str] = {}


class WireModels(msgspec.Struct):
    """imports/{id}/models"""

    models: list[WireModel]


class WirePoint(msgspec.Struct):
    """A metric point of a logged model."""

    model_id: str
    run_id: str
    key: str
    value: float | str
    timestamp: _Int64
    step: _Int64
    dataset_name: str | None = None
    dataset_digest: str | None = None


class WirePoints(msgspec.Struct):
    """imports/{id}/model-metrics"""

    metrics: list[WirePoint]


class WireDatasets(msgspec.Struct):
    """imports/{id}/datasets"""

    datasets: list[Dataset]


class WireLink(msgspec.Struct):
    """A model that a run read or made."""

    run_id: str
    direction: str
    model_id: str
    step: _Int64 = 0


class WireLinks(msgspec.Struct):
    """imports/{id}/links"""

    inputs: list[InputLink] = []
    models: list[WireLink] = []


class ArtifactUris(BaseModel):
    """Where the artifacts of runs or models go, in their order."""

    artifact_uris: list[str]


class MissingIds(BaseModel):
    """What was referred to and does not exist; the references were left out."""

    missing: list[str]


class Done(BaseModel):
    """Nothing to say."""


def router(services: Services) -> APIRouter:
    """Importing."""
    api = APIRouter(prefix="/api/v1/imports", tags=["lifecycle"])
    imports = services.lifecycle.imports

    @api.post("")
    async def begin(request: BeginImport) -> ImportAnswer:
        """Begins an import, or finds the one of this origin."""
        wanted = parse_experiment_id(request.experiment_id) if request.experiment_id is not None else None
        new = NewExperiment(
            request.origin, request.name, wanted, from_ms(request.created_at), from_ms(request.updated_at),
            request.tags,
        )  # fmt: skip
        begun = await imports.begin(new)
        return ImportAnswer(experiment_id=str(begun.experiment_id), name=begun.name, complete=begun.complete)

    @api.post("/find")
    async def find(request: FindIds) -> AssignedIds:
        """The ids that runs and models of an origin were given, as far as they were."""
        runs = await imports.find(request.origin, RUNS, request.run_ids)
        return _assigned(runs, await imports.find(request.origin, MODELS, request.model_ids))

    @api.post("/{experiment_id}/ids")
    async def assign(experiment_id: str, request: Ids) -> AssignedIds:
        """The ids that runs and models of the source get here: their own where they are free."""
        target = parse_experiment_id(experiment_id)
        runs = await imports.assign(target, RUNS, request.run_ids)
        return _assigned(runs, await imports.assign(target, MODELS, request.model_ids))

    _add_rows(api, services)

    @api.post("/{experiment_id}/complete")
    async def complete(experiment_id: str, request: Ids) -> Done:
        """Notes that these runs and models have arrived with points and artifacts."""
        target = parse_experiment_id(experiment_id)
        await imports.complete(target, RUNS, request.run_ids)
        await imports.complete(target, MODELS, request.model_ids)
        return Done()

    @api.post("/{experiment_id}/finish")
    async def finish(experiment_id: str) -> Done:
        """Shows the experiment, when all its runs and models have arrived."""
        await imports.finish(parse_experiment_id(experiment_id))
        return Done()

    return api


def _add_rows(api: APIRouter, services: Services) -> None:
    rows = services.lifecycle.import_rows

    @api.post("/{experiment_id}/runs")
    async def put_runs(experiment_id: str, request: Request) -> ArtifactUris:
        """Creates runs with their params and tags: `{"runs": [{run_id, name, status, started_at, …}]}`."""
        runs = [_run(each) for each in (await decode_request(request, WireRuns)).runs]
        return ArtifactUris(artifact_uris=await rows.put_runs(parse_experiment_id(experiment_id), runs))

    @api.post("/{experiment_id}/models")
    async def put_models(experiment_id: str, request: Request) -> ArtifactUris:
        """Creates logged models with their params and tags: `{"models": [{model_id, name, status, …}]}`."""
        models = [_model(each) for each in (await decode_request(request, WireModels)).models]
        return ArtifactUris(artifact_uris=await rows.put_models(parse_experiment_id(experiment_id), models))

    @api.post("/{experiment_id}/model-metrics")
    async def put_model_metrics(experiment_id: str, request: Request) -> MissingIds:
        """Adds metric points to logged models; answers the runs that they name and that do not exist."""
        points = [_point(each) for each in (await decode_request(request, WirePoints)).metrics]
        return MissingIds(missing=await rows.put_model_metrics(parse_experiment_id(experiment_id), points))

    @api.post("/{experiment_id}/datasets")
    async def put_datasets(experiment_id: str, request: Request) -> Done:
        """Adds datasets: `{"datasets": [{name, digest, source_type, source, schema, profile}]}`."""
        datasets = (await decode_request(request, WireDatasets)).datasets
        await rows.put_datasets(parse_experiment_id(experiment_id), datasets)
        return Done()

    @api.post("/{experiment_id}/links")
    async def put_links(experiment_id: str, request: Request) -> MissingIds:
        """Links runs to what went into them and came out of them: `{"inputs": [{run_id, name, digest, tags}],
        "models": [{run_id, direction, model_id, step}]}`. Answers the models that do not exist."""
        links = await decode_request(request, WireLinks)
        models = [ModelLink(**msgspec.structs.asdict(link)) for link in links.models]
        return MissingIds(missing=await rows.put_links(parse_experiment_id(experiment_id), links.inputs, models))


def _assigned(runs: Sequence[Assigned], models: Sequence[Assigned]) -> AssignedIds:
    return AssignedIds(
        runs=[AssignedId(**asdict(each)) for each in runs], models=[AssignedId(**asdict(each)) for each in models]
    )


def _run(run: WireRun) -> ImportedRun:
    ended_at = from_ms(run.ended_at) if run.ended_at is not None else None
    return ImportedRun(
        run.run_id, run.name, run.status, run.user_id, from_ms(run.started_at), ended_at, run.deleted,
        run.artifact_uri, run.params, run.tags,
    )  # fmt: skip


def _model(model: WireModel) -> ImportedModel:
    return ImportedModel(
        model.model_id, model.name, model.status, model.model_type, model.source_run_id, from_ms(model.created_at),
        from_ms(model.updated_at), model.deleted, model.artifact_uri, model.params, model.tags,
    )  # fmt: skip


def _point(point: WirePoint) -> ModelMetric:
    return ModelMetric(
        point.model_id, point.run_id, point.key, parse_double("value", point.value), point.timestamp, point.step,
        point.dataset_name, point.dataset_digest,
    )  # fmt: skip
