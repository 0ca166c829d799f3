"""MLflow's experiment endpoints."""

from __future__ import annotations

import msgspec

from mlplat.errors import InvalidInput
from mlplat.http.mlflow.endpoint import Answer, Endpoint, check_limit, require, token_page, wire_pairs
from mlplat.http.services import Services
from mlplat.tracking.model import Experiment, ViewType, parse_experiment_id, to_ms

MAX_PAGE = 50_000


class Tag(msgspec.Struct):
    """A key and a value; a value that is absent counts as empty."""

    key: str
    value: str = ""


class Create(msgspec.Struct):
    """experiments/create"""

    name: str = ""
    artifact_location: str | None = None
    tags: list[Tag] = []


class ById(msgspec.Struct):
    """Requests that name one experiment."""

    experiment_id: str = ""


class ByName(msgspec.Struct):
    """experiments/get-by-name"""

    experiment_name: str = ""


class Search(msgspec.Struct):
    """experiments/search"""

    max_results: int | None = None
    page_token: str | None = None
    filter: str = ""
    order_by: list[str] = []
    view_type: str | int | None = None


class Update(msgspec.Struct):
    """experiments/update"""

    experiment_id: str = ""
    new_name: str = ""


class SetTag(msgspec.Struct):
    """experiments/set-experiment-tag and delete-experiment-tag"""

    experiment_id: str = ""
    key: str = ""
    value: str = ""


def view_type(value: str | int | None) -> ViewType:
    """The view that a name or number selects.

    Raises:
        InvalidInput: neither.
    """
    if value is None:
        return ViewType.ACTIVE_ONLY
    numbered = {"1": ViewType.ACTIVE_ONLY, "2": ViewType.DELETED_ONLY, "3": ViewType.ALL}
    try:
        return numbered.get(str(value)) or ViewType(str(value))
    except ValueError as error:
        raise InvalidInput(f"Invalid view type {value!r}. Valid ones are {', '.join(ViewType)}.") from error


def wire_experiment(experiment: Experiment) -> Answer:
    """An experiment as MLflow writes it."""
    answer: Answer = {
        "experiment_id": str(experiment.experiment_id),
        "name": experiment.name,
        "artifact_location": experiment.artifact_location,
        "lifecycle_stage": "deleted" if experiment.deleted else "active",
        "creation_time": to_ms(experiment.created_at),
        "last_update_time": to_ms(experiment.updated_at),
    }
    if experiment.tags:
        answer["tags"] = wire_pairs(experiment.tags)
    return answer


def _id(text: str) -> int:
    return parse_experiment_id(require("experiment_id", text))


async def create(services: Services, request: Create) -> Answer:
    """POST experiments/create"""
    tags = {tag.key: tag.value for tag in request.tags}
    name = require("name", request.name)
    return {"experiment_id": str(await services.experiments.create(name, request.artifact_location, tags))}


async def get(services: Services, request: ById) -> Answer:
    """GET experiments/get"""
    return {"experiment": wire_experiment(await services.experiments.get(_id(request.experiment_id)))}


async def get_by_name(services: Services, request: ByName) -> Answer:
    """GET experiments/get-by-name"""
    name = require("experiment_name", request.experiment_name)
    return {"experiment": wire_experiment(await services.experiments.get_by_name(name))}


async def search(services: Services, request: Search) -> Answer:
    """POST and GET experiments/search"""
    if request.max_results is None:
        raise InvalidInput("Missing value for required parameter 'max_results'. See the API docs for more information.")
    found, token = await services.experiments.search(
        request.filter, request.order_by, view_type(request.view_type), check_limit(request.max_results, MAX_PAGE),
        request.page_token,
    )  # fmt: skip
    return token_page("experiments", [wire_experiment(experiment) for experiment in found], token)


async def update(services: Services, request: Update) -> Answer:
    """POST experiments/update"""
    await services.experiments.rename(_id(request.experiment_id), require("new_name", request.new_name))
    return {}


async def delete(services: Services, request: ById) -> Answer:
    """POST experiments/delete"""
    await services.experiments.set_deleted(_id(request.experiment_id), True)
    return {}


async def restore(services: Services, request: ById) -> Answer:
    """POST experiments/restore"""
    await services.experiments.set_deleted(_id(request.experiment_id), False)
    return {}


async def set_tag(services: Services, request: SetTag) -> Answer:
    """POST experiments/set-experiment-tag"""
    await services.experiments.set_tag(_id(request.experiment_id), require("key", request.key), request.value)
    return {}


async def delete_tag(services: Services, request: SetTag) -> Answer:
    """POST experiments/delete-experiment-tag"""
    await services.experiments.delete_tag(_id(request.experiment_id), require("key", request.key))
    return {}


ENDPOINTS = (
    Endpoint(("POST",), "experiments/create", Create, create),
    Endpoint(("GET",), "experiments/get", ById, get),
    Endpoint(("GET",), "experiments/get-by-name", ByName, get_by_name),
    Endpoint(("POST", "GET"), "experiments/search", Search, search),
    Endpoint(("POST",), "experiments/update", Update, update),
    Endpoint(("POST",), "experiments/delete", ById, delete),
    Endpoint(("POST",), "experiments/restore", ById, restore),
    Endpoint(("POST",), "experiments/set-experiment-tag", SetTag, set_tag),
    Endpoint(("POST",), "experiments/delete-experiment-tag", SetTag, delete_tag),
)
