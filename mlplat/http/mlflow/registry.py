"""MLflow's model registry endpoints: reads from Postgres, changes through the coordinator."""

from __future__ import annotations

from typing import Any

import msgspec

from mlplat.http.intact import require_intact
from mlplat.http.mlflow.endpoint import (
    Answer,
    Endpoint,
    caller,
    check_limit,
    request_id,
    require,
    token_page,
    wire_pairs,
)
from mlplat.http.mlflow.experiments import Tag
from mlplat.http.mlflow.model_sources import resolve_source
from mlplat.http.services import Services
from mlplat.registry import search
from mlplat.registry.model import (
    SEMANTIC_VERSION_TAG,
    Command,
    CreateModel,
    CreateVersion,
    DeleteAlias,
    DeleteModel,
    DeleteVersion,
    ModelVersion,
    Origin,
    RegisteredModel,
    RenameModel,
    SetAlias,
    SetModelTag,
    SetStage,
    SetVersionTag,
    UpdateModel,
    UpdateVersion,
    parse_stage,
    parse_version,
)
from mlplat.registry.semver import is_range, parse_range
from mlplat.tracking.model import to_ms

MAX_MODELS_PAGE = 1_000
MAX_VERSIONS_PAGE = 200_000


class Model(msgspec.Struct):
    """Requests that name a model."""

    name: str = ""


class CreateModelRequest(Model):
    """registered-models/create"""

    tags: list[Tag] = []
    description: str = ""


class Rename(Model):
    """registered-models/rename"""

    new_name: str = ""


class Describe(Model):
    """registered-models/update"""

    description: str = ""


class Search(msgspec.Struct):
    """registered-models/search and model-versions/search"""

    filter: str = ""
    max_results: int | None = None
    order_by: list[str] = []
    page_token: str | None = None


class ModelTag(Model):
    """registered-models/set-tag and delete-tag"""

    key: str = ""
    value: str = ""


class Alias(Model):
    """registered-models/alias"""

    alias: str = ""
    version: str = ""


class CreateVersionRequest(Model):
    """model-versions/create"""

    source: str = ""
    run_id: str | None = None
    tags: list[Tag] = []
    run_link: str | None = None
    description: str = ""
    #: Not MLflow's: imports keep the numbers of versions. It must be later than all before.
    version: str | None = None
    #: Not MLflow's: such as 2.0.0, or which number of it grows (major, minor or patch); by default by comparison.
    semantic_version: str | None = None


class Version(Model):
    """Requests that name a version."""

    version: str = ""


class DescribeVersion(Version):
    """model-versions/update"""

    description: str = ""


class LatestVersions(Model):
    """registered-models/get-latest-versions"""

    stages: list[str] = []


class TransitionStage(Version):
    """model-versions/transition-stage"""

    stage: str = ""
    archive_existing_versions: bool = False


class VersionTag(Version):
    """model-versions/set-tag and delete-tag"""

    key: str = ""
    value: str = ""


def wire_version(version: ModelVersion) -> Answer:
    """A version as MLflow writes it."""
    answer: Answer = {
        "name": version.name,
        "version": str(version.version),
        "creation_timestamp": to_ms(version.created_at),
        "last_updated_timestamp": to_ms(version.updated_at),
        "current_stage": version.stage,
        "description": version.description,
        "source": version.source,
        "run_id": version.run_id or "",
        "status": "READY",
    }
    optional: Answer = {
        "user_id": version.user_id,
        "run_link": version.run_link,
        "aliases": version.aliases,
        "tags": wire_pairs(version.tags | {SEMANTIC_VERSION_TAG: str(version.semantic)}),
    }
    return answer | {key: value for key, value in optional.items() if value}


def wire_model(model: RegisteredModel) -> Answer:
    """A model as MLflow writes it."""
    answer: Answer = {
        "name": model.name,
        "creation_timestamp": to_ms(model.created_at),
        "last_updated_timestamp": to_ms(model.updated_at),
    }
    optional: Answer = {
        "description": model.description,
        "latest_versions": [wire_version(version) for version in model.latest],
        "aliases": [{"alias": alias, "version": str(version)} for alias, version in model.aliases.items()],
        "tags": wire_pairs(model.tags),
    }
    return answer | {key: value for key, value in optional.items() if value}


async def _execute(services: Services, command: Command) -> dict[str, Any]:
    [answer] = await services.registry_writer.execute(request_id.get(), [command], Origin(caller.get()))
    return answer


async def _model_answer(services: Services, name: str) -> Answer:
    return {"registered_model": wire_model(await services.registry.get_model(name))}


async def _version_answer(services: Services, name: str, version: int) -> Answer:
    return {"model_version": wire_version(await services.registry.get_version(name, version))}


def _name(request: Model) -> str:
    return require("name", request.name)


async def create_model(services: Services, request: CreateModelRequest) -> Answer:
    """POST registered-models/create"""
    tags = {tag.key: tag.value for tag in request.tags}
    await _execute(services, CreateModel(_name(request), request.description, tags))
    return await _model_answer(services, request.name)


async def get_model(services: Services, request: Model) -> Answer:
    """GET registered-models/get"""
    return await _model_answer(services, _name(request))


async def rename_model(services: Services, request: Rename) -> Answer:
    """POST registered-models/rename"""
    await _execute(services, RenameModel(_name(request), require("new_name", request.new_name)))
    return await _model_answer(services, request.new_name)


async def update_model(services: Services, request: Describe) -> Answer:
    """PATCH registered-models/update"""
    await _execute(services, UpdateModel(_name(request), request.description))
    return await _model_answer(services, request.name)


async def delete_model(services: Services, request: Model) -> Answer:
    """DELETE registered-models/delete"""
    await _execute(services, DeleteModel(_name(request)))
    return {}


async def search_models(services: Services, request: Search) -> Answer:
    """GET registered-models/search"""
    limit = check_limit(100 if request.max_results is None else request.max_results, MAX_MODELS_PAGE)
    found = await search.search_models(services.registry, request.filter, request.order_by, limit, request.page_token)
    return token_page("registered_models", [wire_model(model) for model in found.models], found.next_token)


async def set_model_tag(services: Services, request: ModelTag) -> Answer:
    """POST registered-models/set-tag"""
    await _execute(services, SetModelTag(_name(request), require("key", request.key), request.value))
    return {}


async def delete_model_tag(services: Services, request: ModelTag) -> Answer:
    """DELETE registered-models/delete-tag"""
    await _execute(services, SetModelTag(_name(request), require("key", request.key), None))
    return {}


async def set_alias(services: Services, request: Alias) -> Answer:
    """POST registered-models/alias"""
    version = parse_version(require("version", request.version))
    await _execute(services, SetAlias(_name(request), require("alias", request.alias), version))
    return {}


async def get_by_alias(services: Services, request: Alias) -> Answer:
    """GET registered-models/alias"""
    version = await services.registry.get_by_alias(_name(request), require("alias", request.alias))
    return {"model_version": wire_version(version)}


async def delete_alias(services: Services, request: Alias) -> Answer:
    """DELETE registered-models/alias"""
    await _execute(services, DeleteAlias(_name(request), require("alias", request.alias)))
    return {}


async def get_latest_versions(services: Services, request: LatestVersions) -> Answer:
    """GET and POST registered-models/get-latest-versions; a stage may be a range of semantic versions

    So ``models:/digits/^1.2`` loads with MLflow's client, which takes what is no number for a stage.
    """
    ranges = [parse_range(stage) for stage in request.stages if is_range(stage)]
    stages = [parse_stage(stage) for stage in request.stages if not is_range(stage)]
    latest = (await services.registry.get_model(_name(request))).latest
    found = [version for version in latest if version.stage in stages or not request.stages]
    for wanted in ranges:
        found += await services.registry.list_versions(request.name, wanted, 1)
    return {"model_versions": [wire_version(version) for version in found]} if found else {}


async def transition_stage(services: Services, request: TransitionStage) -> Answer:
    """POST model-versions/transition-stage"""
    version, stage = parse_version(request.version), parse_stage(require("stage", request.stage))
    await _execute(services, SetStage(_name(request), version, stage, request.archive_existing_versions))
    return await _version_answer(services, request.name, version)


async def create_version(services: Services, request: CreateVersionRequest) -> Answer:
    """POST model-versions/create"""
    source = await resolve_source(services, require("source", request.source), request.run_id)
    frozen = await services.frozen.freeze(source.artifact_uri)
    command = CreateVersion(
        _name(request), request.source, source.artifact_uri, request.run_id, request.run_link, request.description,
        caller.get(),
        # Copies of a version bring its tags along.
        {tag.key: tag.value for tag in request.tags if tag.key != SEMANTIC_VERSION_TAG},
        parse_version(request.version) if request.version else None, source.run_id, request.semantic_version,
        await source.signature(services), None if frozen is None else frozen.digest,
        None if frozen is None else frozen.stamp, None if frozen is None else frozen.size,
    )  # fmt: skip
    answer = await _execute(services, command)
    return await _version_answer(services, request.name, answer["version"])


async def get_version(services: Services, request: Version) -> Answer:
    """GET model-versions/get"""
    return await _version_answer(services, _name(request), parse_version(request.version))


async def update_version(services: Services, request: DescribeVersion) -> Answer:
    """PATCH model-versions/update"""
    version = parse_version(request.version)
    await _execute(services, UpdateVersion(_name(request), version, request.description))
    return await _version_answer(services, request.name, version)


async def delete_version(services: Services, request: Version) -> Answer:
    """DELETE model-versions/delete"""
    await _execute(services, DeleteVersion(_name(request), parse_version(request.version)))
    return {}


async def search_versions(services: Services, request: Search) -> Answer:
    """GET model-versions/search"""
    limit = check_limit(10_000 if request.max_results is None else request.max_results, MAX_VERSIONS_PAGE)
    found = await search.search_versions(
        services.registry, services.metrics, request.filter, request.order_by, limit, request.page_token
    )
    return token_page("model_versions", [wire_version(version) for version in found.versions], found.next_token)


async def set_version_tag(services: Services, request: VersionTag) -> Answer:
    """POST model-versions/set-tag"""
    key = require("key", request.key)
    await _execute(services, SetVersionTag(_name(request), parse_version(request.version), key, request.value))
    return {}


async def delete_version_tag(services: Services, request: VersionTag) -> Answer:
    """DELETE model-versions/delete-tag"""
    key = require("key", request.key)
    await _execute(services, SetVersionTag(_name(request), parse_version(request.version), key, None))
    return {}


async def get_download_uri(services: Services, request: Version) -> Answer:
    """GET model-versions/get-download-uri, with which every load begins: files that were changed are refused here"""
    version = await services.registry.get_version(_name(request), parse_version(request.version))
    await require_intact(services, version)
    return {"artifact_uri": version.artifact_uri}


ENDPOINTS = (
    Endpoint(("POST",), "registered-models/create", CreateModelRequest, create_model),
    Endpoint(("GET",), "registered-models/get", Model, get_model),
    Endpoint(("POST",), "registered-models/rename", Rename, rename_model),
    Endpoint(("PATCH",), "registered-models/update", Describe, update_model),
    Endpoint(("DELETE",), "registered-models/delete", Model, delete_model),
    Endpoint(("GET",), "registered-models/search", Search, search_models),
    Endpoint(("POST",), "registered-models/set-tag", ModelTag, set_model_tag),
    Endpoint(("DELETE",), "registered-models/delete-tag", ModelTag, delete_model_tag),
    Endpoint(("GET", "POST"), "registered-models/get-latest-versions", LatestVersions, get_latest_versions),
    Endpoint(("POST",), "registered-models/alias", Alias, set_alias),
    Endpoint(("GET",), "registered-models/alias", Alias, get_by_alias),
    Endpoint(("DELETE",), "registered-models/alias", Alias, delete_alias),
    Endpoint(("POST",), "model-versions/create", CreateVersionRequest, create_version),
    Endpoint(("GET",), "model-versions/get", Version, get_version),
    Endpoint(("PATCH",), "model-versions/update", DescribeVersion, update_version),
    Endpoint(("DELETE",), "model-versions/delete", Version, delete_version),
    Endpoint(("GET",), "model-versions/search", Search, search_versions),
    Endpoint(("POST",), "model-versions/transition-stage", TransitionStage, transition_stage),
    Endpoint(("POST",), "model-versions/set-tag", VersionTag, set_version_tag),
    Endpoint(("DELETE",), "model-versions/delete-tag", VersionTag, delete_version_tag),
    Endpoint(("GET",), "model-versions/get-download-uri", Version, get_download_uri),
)
