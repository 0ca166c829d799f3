"""MLflow's logged-model endpoints."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import msgspec

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
    wire_pairs,
)
from mlplat.http.mlflow.experiments import Tag
from mlplat.http.mlflow.listing import list_files
from mlplat.http.services import Services
from mlplat.tracking.logged_model import WIRE_STATUS, LoggedModel, LoggedModelStatus, ModelMetric, NewModel
from mlplat.tracking.logged_model_search import DatasetRef, ModelOrder, ModelQuery, search_models
from mlplat.tracking.model import parse_experiment_id, to_ms

DEFAULT_PAGE = 100
#: Larger pages may be asked for, and are cut: clients go on with the token.
MAX_PAGE = 1_000
#: A model's id follows from its request, so that a repeated request finds the model it made.
MODEL_ID_SPACE = uuid.UUID("6d6c706c-6174-4d6f-8465-6c2d69642d31")
#: A status may be sent by its wire name, its plain name or its number.
_STATUSES = {
    **{name: status for status, name in WIRE_STATUS.items()},
    **{status.value: status for status in LoggedModelStatus},
    **{str(number): status for number, status in enumerate(LoggedModelStatus, start=1)},
}


class Create(msgspec.Struct):
    """POST logged-models"""

    experiment_id: str = ""
    name: str | None = None
    model_type: str | None = None
    source_run_id: str | None = None
    params: list[Tag] = []
    tags: list[Tag] = []


class ById(msgspec.Struct):
    """Requests that name one model."""

    model_id: str = ""


class Get(ById):
    """GET logged-models/{model_id}"""

    allow_deleted: bool | str = False


class Finalize(ById):
    """PATCH logged-models/{model_id}"""

    status: str | int = ""


class LogParams(ById):
    """POST logged-models/{model_id}/params"""

    params: list[Tag] = msgspec.field(default_factory=list)


class SetTags(ById):
    """PATCH logged-models/{model_id}/tags"""

    tags: list[Tag] = msgspec.field(default_factory=list)


class DeleteTag(ById):
    """DELETE logged-models/{model_id}/tags/{key}"""

    key: str = ""


class OnDataset(msgspec.Struct):
    """A dataset that a search is confined to."""

    dataset_name: str = ""
    dataset_digest: str | None = None


class OrderKey(OnDataset):
    """One key of a search's order."""

    field_name: str = ""
    ascending: bool = True


class Search(msgspec.Struct):
    """POST logged-models/search"""

    experiment_ids: list[str] = []
    filter: str = ""
    datasets: list[OnDataset] = []
    max_results: int | None = None
    order_by: list[OrderKey] = []
    page_token: str | None = None


class ListFiles(ById):
    """GET logged-models/{model_id}/artifacts/directories"""

    artifact_directory_path: str = ""
    page_token: str | None = None
    #: Not MLflow's: exports take the files of deleted models along.
    allow_deleted: bool | str = False


def wire_metric(metric: ModelMetric) -> Answer:
    """A model's metric point as MLflow writes it."""
    answer: Answer = {
        "key": metric.key,
        "value": wire_double(metric.value),
        "timestamp": metric.timestamp,
        "step": metric.step,
        "model_id": metric.model_id,
        "run_id": metric.run_id,
    }
    optional = {"dataset_name": metric.dataset_name, "dataset_digest": metric.dataset_digest}
    return answer | {key: value for key, value in optional.items() if value is not None}


def wire_model(model: LoggedModel) -> Answer:
    """A logged model as MLflow writes it; what is empty is absent."""
    info: Answer = {
        "model_id": model.model_id,
        "experiment_id": str(model.experiment_id),
        "name": model.name,
        "creation_timestamp_ms": to_ms(model.created_at),
        "last_updated_timestamp_ms": to_ms(model.updated_at),
        "artifact_uri": model.artifact_location,
        "status": WIRE_STATUS[model.status],
    }
    optional: Answer = {
        "model_type": model.model_type,
        "source_run_id": model.source_run_id,
        "tags": wire_pairs(model.tags),
    }
    data: Answer = {"params": wire_pairs(model.params), "metrics": [wire_metric(metric) for metric in model.metrics]}
    return {
        "info": info | {key: value for key, value in optional.items() if value},
        "data": {key: value for key, value in data.items() if value},
    }


def _unique_params(params: Sequence[Tag]) -> dict[str, str]:
    unique: dict[str, str] = {}
    for param in params:
        if unique.setdefault(param.key, param.value) != param.value:
            raise InvalidInput(f"Duplicate parameter keys have been submitted: {param.key!r}.")
    return unique


async def create(services: Services, request: Create) -> Answer:
    """POST logged-models"""
    new = NewModel(
        experiment_id=parse_experiment_id(require("experiment_id", request.experiment_id)),
        name=request.name or None,
        model_type=request.model_type or None,
        source_run_id=request.source_run_id or None,
        params=_unique_params(request.params),
        tags={tag.key: tag.value for tag in request.tags},
    )
    model_id = f"m-{uuid.uuid5(MODEL_ID_SPACE, request_id.get()).hex}"
    return {"model": wire_model(await services.logged_models.create(model_id, new))}


async def get(services: Services, request: Get) -> Answer:
    """GET logged-models/{model_id}"""
    model = await services.logged_models.get(request.model_id, allow_deleted=_is_true(request.allow_deleted))
    return {"model": wire_model(model)}


def _is_true(value: bool | str) -> bool:
    return str(value).lower() == "true"


async def finalize(services: Services, request: Finalize) -> Answer:
    """PATCH logged-models/{model_id}"""
    sent = str(request.status)
    status = _STATUSES.get(sent)
    if status is None:
        valid = ", ".join(WIRE_STATUS.values())
        raise InvalidInput(f"Unknown model status: {sent[:100]!r}. Valid ones are {valid}.")
    return {"model": wire_model(await services.logged_models.finalize(request.model_id, status))}


async def delete(services: Services, request: ById) -> Answer:
    """DELETE logged-models/{model_id}"""
    await services.logged_models.delete(request.model_id)
    return {}


async def log_params(services: Services, request: LogParams) -> Answer:
    """POST logged-models/{model_id}/params"""
    await services.logged_models.log_params(request.model_id, _unique_params(request.params))
    return {}


async def set_tags(services: Services, request: SetTags) -> Answer:
    """PATCH logged-models/{model_id}/tags"""
    await services.logged_models.set_tags(request.model_id, {tag.key: tag.value for tag in request.tags})
    return {}


async def delete_tag(services: Services, request: DeleteTag) -> Answer:
    """DELETE logged-models/{model_id}/tags/{key}"""
    await services.logged_models.delete_tag(request.model_id, request.key)
    return {}


def _dataset(request: OnDataset) -> DatasetRef | None:
    if not request.dataset_name:
        return None
    return DatasetRef(request.dataset_name, request.dataset_digest or None)


def _datasets(requests: Sequence[OnDataset]) -> list[DatasetRef]:
    found = [_dataset(request) for request in requests]
    known = [dataset for dataset in found if dataset is not None]
    if len(known) < len(found):
        raise InvalidInput("`dataset_name` in the `datasets` clause must be specified.")
    return known


async def search(services: Services, request: Search) -> Answer:
    """POST logged-models/search"""
    wanted = DEFAULT_PAGE if request.max_results is None else request.max_results
    limit, offset = min(check_limit(wanted, 2**31 - 1), MAX_PAGE), page_offset(request.page_token)
    query = ModelQuery(
        [parse_experiment_id(value) for value in request.experiment_ids],
        request.filter,
        _datasets(request.datasets),
        [ModelOrder(require("field_name", key.field_name), key.ascending, _dataset(key)) for key in request.order_by],
    )
    found = await search_models(services.logged_models, query, limit + 1, offset)
    return paged("models", [wire_model(model) for model in found], limit, offset)


async def list_directory(services: Services, request: ListFiles) -> Answer:
    """GET logged-models/{model_id}/artifacts/directories"""
    model = await services.logged_models.get(request.model_id, allow_deleted=_is_true(request.allow_deleted))
    return await list_files(services, model.artifact_location, request.artifact_directory_path, request.page_token)


ENDPOINTS = (
    Endpoint(("POST",), "logged-models", Create, create),
    Endpoint(("POST",), "logged-models/search", Search, search),
    Endpoint(("GET",), "logged-models/{model_id}", Get, get),
    Endpoint(("PATCH",), "logged-models/{model_id}", Finalize, finalize),
    Endpoint(("DELETE",), "logged-models/{model_id}", ById, delete),
    Endpoint(("POST",), "logged-models/{model_id}/params", LogParams, log_params),
    Endpoint(("PATCH",), "logged-models/{model_id}/tags", SetTags, set_tags),
    Endpoint(("DELETE",), "logged-models/{model_id}/tags/{key:path}", DeleteTag, delete_tag),
    Endpoint(("GET",), "logged-models/{model_id}/artifacts/directories", ListFiles, list_directory),
)
