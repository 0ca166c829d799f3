"""Registered models of an MLflow server, for ``mlplat import-mlflow``.

Versions keep their numbers and stages, and point at the runs and logged models that were imported. What is here
already from an earlier import stays as it is, so a repeated import adds what is new. Times are those of
the import.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mlplat.errors import AlreadyExists, InvalidInput, NotFound
from mlplat.registry.model import MAX_NAME_LENGTH, PROMPT_TAG, SEMANTIC_VERSION_TAG
from mlplat.sdk.archive_files import Progress, no_progress
from mlplat.sdk.client import API, Client
from mlplat.sdk.listing import every, pairs
from mlplat.sdk.mlflow_import import origin_of, renamed, without_password

#: Tag of what was imported: where from.
IMPORTED_TAG = "mlplat.imported_from"
MODEL_PAGE = 1_000
VERSION_PAGE = 1_000
_RUN = re.compile(r"runs:/(?P<run_id>[^/]+)(?P<path>/.*)?\Z")
_LOGGED_MODEL = re.compile(r"models:/(?P<model_id>m-[^/]+)\Z")
_REFUSED = (AlreadyExists, InvalidInput, NotFound)


@dataclass
class ImportedRegistry:
    """What was added. ``renamed``: the names here of models whose own were taken."""

    models: int = 0
    versions: int = 0
    renamed: dict[str, str] = field(default_factory=dict)
    #: What could not be taken along, each with its name and why.
    left_out: list[str] = field(default_factory=list)


def import_registry(client: Client, source_url: str, progress: Progress = no_progress) -> ImportedRegistry:
    """Imports all registered models, after the experiments that their versions come from.

    Raises:
        Unavailable: the server or the platform is out of reach; run it again to go on.
    """
    source = Client(source_url)
    importer = _Importer(client, source)
    for model in _search(source, "registered-models", "registered_models", MODEL_PAGE):
        importer.take(model)
        progress("model versions", importer.result.versions, None)
    importer.result.left_out += [f"prompt {model['name']}" for model in _prompts(source)]
    return importer.result


def _search(source: Client, path: str, items: str, size: int, filter_: str | None = None) -> Iterator[dict[str, Any]]:
    get = partial(source.get, f"{API}/{path}/search", max_results=size, filter=filter_)
    return every(lambda page: get(**page), items)


def _prompts(source: Client) -> list[dict[str, Any]]:
    try:
        filter_ = f"tags.`{PROMPT_TAG}` = 'true'"
        return list(_search(source, "registered-models", "registered_models", MODEL_PAGE, filter_))
    except InvalidInput:  # a server that knows no prompts
        return []


class _LeftOut(Exception):
    """Why something cannot be taken along."""


class _Importer:
    def __init__(self, client: Client, source: Client) -> None:
        self.result = ImportedRegistry()
        self._client, self._source = client, source
        self._origins: dict[str, str] = {}
        self._here: dict[tuple[str, str], str] = {}

    def take(self, model: dict[str, Any]) -> None:
        """Imports a model with its versions and aliases, or what of it is not here yet."""
        found = self._find_or_create(model)
        if found is None:
            self.result.left_out.append(f"registered model {model['name']}: the name is taken here")
            return
        name = found["name"]
        if name != model["name"]:
            self.result.renamed[model["name"]] = name
        here = {version["version"]: version for version in _versions(self._client, name)}
        for version in sorted(_versions(self._source, model["name"]), key=lambda each: int(each["version"])):
            what = f"version {version['version']} of registered model {model['name']}"
            self._take_version(name, version, here, what)
        known = {entry["alias"]: entry["version"] for entry in found.get("aliases", ())}
        for entry in model.get("aliases", ()):
            self._take_alias(name, entry, known, f"alias {entry['alias']} of registered model {model['name']}")

    def _find_or_create(self, model: dict[str, Any]) -> dict[str, Any] | None:
        """The model that became of it here; None when its names are taken by others."""
        origin = f"mlflow:{without_password(self._source.url)}:{model['name']}"
        names = (model["name"], renamed(model["name"], self._source, MAX_NAME_LENGTH))
        known = {name: self._find(name) for name in names}
        for found in known.values():
            if found is not None and pairs(found.get("tags")).get(IMPORTED_TAG) == origin:
                return found
        tags = [*model.get("tags", ()), {"key": IMPORTED_TAG, "value": origin}]
        for name in (name for name, found in known.items() if found is None):
            body = {"name": name, "description": model.get("description", ""), "tags": tags}
            try:
                created: dict[str, Any] = self._client.post_once(f"{API}/registered-models/create", body)[
                    "registered_model"
                ]
            except AlreadyExists:  # somebody else was faster
                continue
            self.result.models += 1
            return created
        return None

    def _find(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self._client.get(f"{API}/registered-models/get", name=name)["registered_model"]
        except NotFound:
            return None
        return found

    def _take_version(self, name: str, version: dict[str, Any], here: dict[str, Any], what: str) -> None:
        origin = f"mlflow:{without_password(self._source.url)}:{version['name']}/{version['version']}"
        existing = here.get(version["version"])
        if existing is not None:
            if pairs(existing.get("tags")).get(IMPORTED_TAG) != origin:
                self.result.left_out.append(f"{what}: the number is taken here")
                return
            self._take_stage(name, version, existing.get("current_stage", "None"), what)
            return
        try:
            body = {
                "name": name,
                "version": version["version"],
                "source": self._source_here(version),
                "run_id": self._run_here(version.get("run_id")),
                "run_link": version.get("run_link"),
                "description": version.get("description", ""),
                "tags": [*version.get("tags", ()), {"key": IMPORTED_TAG, "value": origin}],
                # Of another platform of this kind.
                "semantic_version": pairs(version.get("tags")).get(SEMANTIC_VERSION_TAG),
            }
            self._client.post_once(f"{API}/model-versions/create", body)
        except (_LeftOut, *_REFUSED) as error:
            self.result.left_out.append(f"{what}: {error}")
            return
        here[version["version"]] = body
        self.result.versions += 1
        self._take_stage(name, version, "None", what)

    def _take_stage(self, name: str, version: dict[str, Any], here: str, what: str) -> None:
        stage = version.get("current_stage", "None")
        if stage in {here, "None"}:
            return
        if here != "None":
            self.result.left_out.append(f"stage {stage} of {what}: it is in {here} here")
            return
        body = {"name": name, "version": version["version"], "stage": stage}
        self._client.post_once(f"{API}/model-versions/transition-stage", body)

    def _take_alias(self, name: str, entry: dict[str, str], known: dict[str, str], what: str) -> None:
        there, here = str(entry["version"]), known.get(entry["alias"])
        if here is not None:
            if here != there:
                self.result.left_out.append(f"{what}: it points at version {here} here")
            return
        try:
            self._client.post_once(
                f"{API}/registered-models/alias", {"name": name, "alias": entry["alias"], "version": there}
            )
        except _REFUSED as error:
            self.result.left_out.append(f"{what}: {error}")

    def _source_here(self, version: dict[str, Any]) -> str:
        """Where the version's files are here.

        Raises:
            _LeftOut: what has them was not imported.
        """
        source, run_id = str(version.get("source", "")), version.get("run_id")
        logged, of_run = _LOGGED_MODEL.match(source), _RUN.match(source)
        if logged is not None:
            return f"models:/{self._id_here('model', logged['model_id'])}"
        if of_run is not None:
            return f"runs:/{self._id_here('run', of_run['run_id'])}{of_run['path'] or ''}"
        if run_id:
            root = self._run_there(run_id)["artifact_uri"].rstrip("/")
            if source == root or source.startswith(f"{root}/"):
                return f"runs:/{self._id_here('run', run_id)}{source.removeprefix(root)}"
        if source.startswith("mlflow-artifacts:"):
            raise _LeftOut(f"its files at {source} belong to no run that is here")
        return source

    def _run_here(self, run_id: str | None) -> str | None:
        """The run's id here; a run that is not here stays named as it was."""
        if not run_id:
            return None
        try:
            return self._id_here("run", run_id)
        except _LeftOut:
            return run_id

    def _id_here(self, kind: str, source_id: str) -> str:
        if (kind, source_id) not in self._here:
            self._here[kind, source_id] = self._look_up(kind, source_id)
        return self._here[kind, source_id]

    def _look_up(self, kind: str, source_id: str) -> str:
        there = self._run_there(source_id) if kind == "run" else self._model_there(source_id)
        try:
            body = {"origin": self._origin(there["experiment_id"]), f"{kind}_ids": [source_id]}
            found = self._client.post("/api/v1/imports/find", body)[f"{kind}s"]
        except NotFound:
            found = []
        if not found:
            raise _LeftOut(f"its {kind} {source_id} was not imported")
        return str(found[0]["new_id"])

    def _origin(self, experiment_id: str) -> str:
        if experiment_id not in self._origins:
            found = self._source.get(f"{API}/experiments/get", experiment_id=experiment_id)["experiment"]
            self._origins[experiment_id] = origin_of(self._source, found)
        return self._origins[experiment_id]

    def _run_there(self, run_id: str) -> dict[str, Any]:
        try:
            info: dict[str, Any] = self._source.get(f"{API}/runs/get", run_id=run_id)["run"]["info"]
        except NotFound:
            raise _LeftOut(f"its run {run_id} is gone") from None
        return info

    def _model_there(self, model_id: str) -> dict[str, Any]:
        try:
            path = f"{API}/logged-models/{model_id}"
            info: dict[str, Any] = self._source.get(path, allow_deleted="true")["model"]["info"]
        except NotFound:
            raise _LeftOut(f"its logged model {model_id} is gone") from None
        return info


def _versions(client: Client, name: str) -> list[dict[str, Any]]:
    """All versions of a model. A name with both kinds of quotes cannot be asked for."""
    quote = '"' if "'" in name else "'"
    return list(_search(client, "model-versions", "model_versions", VERSION_PAGE, f"name={quote}{name}{quote}"))
