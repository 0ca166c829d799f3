"""Importing from a real MLflow server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from mlplat.artifacts.model import proxied_path
from mlplat.artifacts.store import ArtifactStore
from mlplat.cli import app, lifecycle
from mlplat.errors import NotFound, PlatformError
from mlplat.sdk import mlflow_import
from mlplat.sdk.archive_rows import run_files, run_pages
from mlplat.sdk.client import Client
from mlplat.sdk.import_target import Imported
from mlplat.sdk.listing import pairs
from mlplat.sdk.mlflow_import import import_mlflow
from mlplat.sdk.mlflow_registry import IMPORTED_TAG, ImportedRegistry, import_registry
from mlplat.sdk.transfer import put_at_once
from tests.contract.chdb import unique
from tests.http.conftest import Stack
from tests.http.mlflow_server import mlflow_server
from tests.http.serving import served

API = "/api/2.0/mlflow"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of an MLflow server."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield Client(url, retry_for_s=30)


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[Client]:
    async with served(stack.app) as url:
        yield Client(url, retry_for_s=5)


def _fill(source: Client, name: str) -> list[str]:
    """Two runs, one of them a child and deleted; histories longer than a page, NaN, repeated steps, files."""
    body = {"name": name, "tags": [{"key": "owner", "value": "me"}]}
    experiment_id = source.post(f"{API}/experiments/create", body)["experiment_id"]
    create = {"experiment_id": experiment_id, "start_time": 1_700_000_000_123, "user_id": "ann"}
    first = source.post(f"{API}/runs/create", create | {"run_name": "first"})["run"]["info"]
    tags = [{"key": "mlflow.parentRunId", "value": first["run_id"]}]
    child = source.post(f"{API}/runs/create", create | {"run_name": "child", "tags": tags})["run"]["info"]
    points = [{"key": "loss", "value": 1 / (s + 1), "timestamp": 1_000 + s, "step": s} for s in range(250)]
    points += [
        {"key": "loss", "value": 9.0, "timestamp": 5, "step": 0},
        {"key": "b/c", "value": "NaN", "timestamp": 7, "step": -1},
    ]
    params = [{"key": "rate", "value": "0.1"}, {"key": "empty", "value": ""}]
    source.post(f"{API}/runs/log-batch", {"run_id": first["run_id"], "metrics": points, "params": params})
    source.post(f"{API}/runs/update", {"run_id": first["run_id"], "status": "FINISHED", "end_time": 1_700_000_001_456})
    for path, content in (("model/MLmodel", b"flavors: {}"), ("big ä.bin", bytes(range(256)) * 8192), ("void", b"")):
        put_at_once(source, f"{proxied_path(first['artifact_uri'])}/{path}", content)
    tags = [{"key": "mlflow.data.context", "value": "train"}]
    dataset = {"name": "digits", "digest": "abc", "source_type": "local", "source": "{}", "schema": "[]"}
    source.post(f"{API}/runs/log-inputs", {"run_id": first["run_id"], "datasets": [{"dataset": dataset, "tags": tags}]})
    source.post(f"{API}/runs/delete", {"run_id": child["run_id"]})
    return [first["run_id"], child["run_id"]]


def _add_models(source: Client, experiment_id: str, run_id: str) -> list[str]:
    """Two logged models that the run made, with points and files; the second is deleted."""
    models = []
    for step, name in enumerate(("kept", "dropped")):
        new = {"experiment_id": experiment_id, "name": name, "model_type": "tree", "source_run_id": run_id}
        pairs = {"params": [{"key": "depth", "value": "3"}], "tags": [{"key": "t", "value": name}]}
        model = source.post(f"{API}/logged-models", new | pairs)["model"]["info"]
        models.append(model["model_id"])
        put_at_once(source, f"{proxied_path(model['artifact_uri'])}/MLmodel", name.encode())
        source.post(f"{API}/runs/outputs", {"run_id": run_id, "models": [{"model_id": models[-1], "step": step}]})
    point = {"run_id": run_id, "key": "score", "value": 0.5, "timestamp": 5, "step": 3, "model_id": models[0]}
    source.post(f"{API}/runs/log-metric", point | {"dataset_name": "digits", "dataset_digest": "abc"})
    with httpx.Client(base_url=source.url, trust_env=False) as http:
        ready = {"model_id": models[0], "status": "LOGGED_MODEL_READY"}
        http.request("PATCH", f"{API}/logged-models/{models[0]}", json=ready).raise_for_status()
        http.request("DELETE", f"{API}/logged-models/{models[1]}", json={"model_id": models[1]}).raise_for_status()
    return models


def _logged_models(client: Client, experiment_id: str) -> list[dict[str, Any]]:
    """The active logged models of an experiment, but for where their files are."""
    models = client.post(f"{API}/logged-models/search", {"experiment_ids": [experiment_id]}).get("models", [])
    for model in models:
        del model["info"]["artifact_uri"], model["info"]["experiment_id"]
        model["info"].pop("creator_id", None)
        model["info"]["status"] = str(model["info"]["status"])
    return sorted(models, key=str)


def _import(client: Client, source: Client, *names: str) -> list[Imported]:
    return list(import_mlflow(client, source.url, names))


INFO = ("run_name", "status", "user_id", "start_time", "end_time", "lifecycle_stage")


def _history(client: Client, run_id: str, key: str) -> list[tuple[int, int, str]]:
    answer = client.get(f"{API}/metrics/get-history", run_id=run_id, metric_key=key)
    return sorted((point["timestamp"], point["step"], str(point["value"])) for point in answer["metrics"])


def _comparable(client: Client, experiment_id: str) -> dict[str, Any]:
    """All runs with what they say, but for where they are."""
    runs: dict[str, Any] = {}
    for run in (run for page in run_pages(client, experiment_id) for run in page):
        run_id, data = run["info"]["run_id"], run["data"]
        runs[run_id] = {key: run["info"].get(key) for key in INFO}
        for kind in ("params", "tags"):
            runs[run_id][kind] = {entry["key"]: entry["value"] for entry in data.get(kind, ())}
        keys = [metric["key"] for metric in data.get("metrics", ())]
        runs[run_id]["inputs"], runs[run_id]["outputs"] = run.get("inputs", {}), run.get("outputs", {})
        runs[run_id]["histories"] = {key: _history(client, run_id, key) for key in keys}
    return runs


async def test_an_import_is_equal_in_everything_and_happens_once(
    client: Client, source: Client, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_import, "HISTORY_PAGE", 100)
    name = unique("experiment")
    run_ids = await asyncio.to_thread(_fill, source, name)
    there = (await asyncio.to_thread(source.get, f"{API}/experiments/get-by-name", experiment_name=name))["experiment"]
    kept, dropped = await asyncio.to_thread(_add_models, source, there["experiment_id"], run_ids[0])
    (imported,) = await asyncio.to_thread(_import, client, source, name)
    assert (imported.runs, imported.points, imported.artifacts, imported.renamed) == (2, 253, 4, {})
    assert (imported.datasets, imported.models, imported.renamed_models) == (1, 2, {})
    assert imported.left_out == [f"files of the deleted logged model {dropped}: MLflow hides them"]
    here = (await asyncio.to_thread(client.get, f"{API}/experiments/get-by-name", experiment_name=name))["experiment"]
    for key in ("lifecycle_stage", "creation_time", "last_update_time", "tags"):
        assert here[key] == there[key]
    before = await asyncio.to_thread(_comparable, source, there["experiment_id"])
    assert await asyncio.to_thread(_comparable, client, here["experiment_id"]) == before
    assert set(before) == set(run_ids)
    models = await asyncio.to_thread(_logged_models, source, there["experiment_id"])
    assert await asyncio.to_thread(_logged_models, client, here["experiment_id"]) == models
    assert [model["info"]["model_id"] for model in models] == [kept]
    gone = await asyncio.to_thread(client.get, f"{API}/logged-models/{dropped}", allow_deleted="true")
    assert gone["model"]["info"]["name"] == "dropped"
    store = ArtifactStore(f"file://{stack.artifact_folder}")
    assert b"".join(store.read(f"{here['experiment_id']}/models/{kept}/artifacts/MLmodel")) == b"kept"
    root = f"{here['experiment_id']}/{run_ids[0]}/artifacts"
    assert {file.path: b"".join(store.read(f"{root}/{file.path}")) for file in store.files(root)} == {
        "model/MLmodel": b"flavors: {}", "big ä.bin": bytes(range(256)) * 8192, "void": b"",
    }  # fmt: skip
    (again,) = await asyncio.to_thread(_import, client, source, name)
    assert (again.already_there, again.experiment_id) == (True, imported.experiment_id)


async def test_an_import_that_breaks_off_goes_on_with_the_runs_that_lack(
    client: Client, source: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_import, "RUNS_TOGETHER", 1)
    name = unique("experiment")
    run_ids = await asyncio.to_thread(_fill, source, name)
    seen: list[str] = []

    def broken(where: Client, run_id: str) -> list[str]:
        seen.append(run_id)
        if len(seen) == 2:
            raise PlatformError("the line went dead")
        return run_files(where, run_id)

    monkeypatch.setattr("mlplat.sdk.mlflow_import.run_files", broken)
    with pytest.raises(PlatformError, match="went dead"):
        await asyncio.to_thread(_import, client, source, name)
    found = await asyncio.to_thread(client.get, f"{API}/experiments/get-by-name", experiment_name=name)
    assert found["experiment"]["lifecycle_stage"] == "deleted"
    (imported,) = await asyncio.to_thread(_import, client, source, name)
    assert seen[2:] == [seen[1]]  # the first one had arrived
    assert imported.runs == 1
    assert set(await asyncio.to_thread(_comparable, client, imported.experiment_id)) == set(run_ids)


async def test_names_that_are_taken_get_the_servers_name_behind(client: Client, source: Client) -> None:
    name = unique("experiment")
    await asyncio.to_thread(_fill, source, name)
    await asyncio.to_thread(client.post, f"{API}/experiments/create", {"name": name})
    (imported,) = await asyncio.to_thread(_import, client, source, name)
    assert imported.experiment == f"{name} (from 127.0.0.1)"
    (again,) = await asyncio.to_thread(_import, client, source, name)
    assert (again.experiment, again.already_there) == (imported.experiment, True)


async def test_an_experiment_that_is_not_there_is_an_error(client: Client, source: Client) -> None:
    with pytest.raises(NotFound, match="no such experiment"):
        await asyncio.to_thread(_import, client, source, "no such experiment")


def _register(source: Client, name: str, run: dict[str, Any], model_id: str, stranger: str) -> None:
    """Versions 1 and 3 to 6 (2 is deleted): by run, logged model and URI, elsewhere, of a stranger; aliases, stage."""
    tags = [{"key": "team", "value": "vision"}]
    source.post(f"{API}/registered-models/create", {"name": name, "description": "all of it", "tags": tags})
    sources = [
        f"runs:/{run['run_id']}/model", f"runs:/{run['run_id']}/model", f"models:/{model_id}",
        f"{run['artifact_uri']}/model", "s3://bucket/model", f"runs:/{stranger}/model",
    ]  # fmt: skip
    for number, uri in enumerate(sources, start=1):
        body = {"name": name, "source": uri, "description": f"no. {number}", "tags": tags}
        body |= {"run_id": run["run_id"]} if number < 5 else {"run_id": stranger} if number == 6 else {}
        body |= {"model_id": model_id} if uri.startswith("models:") else {}
        semantic = {"key": "mlplat.semantic_version", "value": "3.1.0"}
        body |= {"tags": [*tags, semantic]} if number == 3 else {}
        source.post(f"{API}/model-versions/create", body)
    source.post(f"{API}/registered-models/alias", {"name": name, "alias": "champion", "version": "3"})
    source.post(f"{API}/registered-models/alias", {"name": name, "alias": "lost", "version": "6"})
    stage = {"name": name, "version": "4", "stage": "Production", "archive_existing_versions": False}
    source.post(f"{API}/model-versions/transition-stage", stage)
    with httpx.Client(base_url=source.url, trust_env=False) as http:
        body = {"name": name, "version": "2"}
        http.request("DELETE", f"{API}/model-versions/delete", json=body).raise_for_status()


def _registered(client: Client, name: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    model = client.get(f"{API}/registered-models/get", name=name)["registered_model"]
    answer = client.get(f"{API}/model-versions/search", filter=f"name='{name}'")
    return model, {version["version"]: version for version in answer["model_versions"]}


async def test_registered_models_come_with_versions_aliases_and_what_was_left_out(
    client: Client, source: Client
) -> None:
    experiment, name = unique("experiment"), unique("model")
    run_id = (await asyncio.to_thread(_fill, source, experiment))[0]
    run = (await asyncio.to_thread(source.get, f"{API}/runs/get", run_id=run_id))["run"]["info"]
    model_id = (await asyncio.to_thread(_add_models, source, run["experiment_id"], run_id))[0]
    await asyncio.to_thread(_import, client, source, experiment)
    created = await asyncio.to_thread(source.post, f"{API}/runs/create", {"experiment_id": "0", "start_time": 1})
    stranger = created["run"]["info"]["run_id"]
    await asyncio.to_thread(_register, source, name, run, model_id, stranger)
    prompt = {"name": unique("prompt"), "tags": [{"key": "mlflow.prompt.is_prompt", "value": "true"}]}
    await asyncio.to_thread(source.post, f"{API}/registered-models/create", prompt)
    imported = await asyncio.to_thread(import_registry, client, source.url)
    assert (imported.models, imported.versions, imported.renamed) == (1, 4, {})
    assert imported.left_out == [
        f"version 6 of registered model {name}: its run {stranger} was not imported",
        f"alias lost of registered model {name}: Model Version (name={name}, version=6) not found",
        f"prompt {prompt['name']}",
    ]
    model, versions = await asyncio.to_thread(_registered, client, name)
    assert (model["description"], model["aliases"]) == ("all of it", [{"alias": "champion", "version": "3"}])
    tags = {tag["key"]: tag["value"] for tag in model["tags"]}
    assert tags == {"team": "vision", IMPORTED_TAG: f"mlflow:{source.url}:{name}"}
    assert {number: version["source"] for number, version in versions.items()} == {
        "1": f"runs:/{run_id}/model", "3": f"models:/{model_id}", "4": f"runs:/{run_id}/model", "5": "s3://bucket/model",
    }  # fmt: skip
    assert [versions[number]["description"] for number in "1345"] == ["no. 1", "no. 3", "no. 4", "no. 5"]
    assert (versions["4"]["run_id"], versions["5"]["run_id"]) == (run_id, "")
    assert {"key": "team", "value": "vision"} in versions["3"]["tags"]
    semantic = {number: pairs(version["tags"])["mlplat.semantic_version"] for number, version in versions.items()}
    assert semantic == {"1": "1.0.0", "3": "3.1.0", "4": "3.1.1", "5": "3.1.2"}
    assert {number: version["current_stage"] for number, version in versions.items()} == {
        "1": "None", "3": "None", "4": "Production", "5": "None",
    }  # fmt: skip
    # Again: nothing changes, but a version that is new comes.
    new = {"name": name, "source": f"runs:/{run_id}/model", "run_id": run_id}
    await asyncio.to_thread(source.post, f"{API}/model-versions/create", new)
    again = await asyncio.to_thread(import_registry, client, source.url)
    assert (again.models, again.versions) == (0, 1)
    found, later = await asyncio.to_thread(_registered, client, name)
    assert {number: version for number, version in later.items() if number != "7"} == versions
    assert (found["tags"], found["aliases"]) == (model["tags"], model["aliases"])


async def test_a_model_whose_name_or_number_is_taken_is_told(client: Client, source: Client) -> None:
    name = unique("model")

    def fill(where: Client, number: int) -> None:
        where.post(f"{API}/registered-models/create", {"name": name})
        for _ in range(number):
            where.post(f"{API}/model-versions/create", {"name": name, "source": "s3://bucket/model"})

    await asyncio.to_thread(fill, source, 1)
    await asyncio.to_thread(fill, client, 1)
    imported: ImportedRegistry = await asyncio.to_thread(import_registry, client, source.url)
    here = f"{name} (from 127.0.0.1)"
    assert imported.renamed[name] == here
    # Somebody adds a version here, and somebody else one of the same number there.
    for where, model in ((client, here), (source, name)):
        version = {"name": model, "source": "s3://bucket/other"}
        await asyncio.to_thread(where.post, f"{API}/model-versions/create", version)
    again = await asyncio.to_thread(import_registry, client, source.url)
    assert again.renamed[name] == here
    assert f"version 2 of registered model {name}: the number is taken here" in again.left_out
    _model, versions = await asyncio.to_thread(_registered, client, here)
    assert set(versions) == {"1", "2"}


async def test_the_command_names_everything_that_stays_behind(
    client: Client, source: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, name = unique("experiment"), unique("model")
    run_id = (await asyncio.to_thread(_fill, source, experiment))[0]
    body = {"name": name}
    await asyncio.to_thread(source.post, f"{API}/registered-models/create", {"name": name})
    await asyncio.to_thread(
        source.post, f"{API}/model-versions/create", body | {"source": f"runs:/{run_id}/model", "run_id": run_id}
    )
    monkeypatch.setenv("MLPLAT_URL", client.url)
    monkeypatch.setattr(lifecycle.console, "width", 200)

    async def says(*arguments: str) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, app, ["import-mlflow", source.url, *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    output = await says("--experiment", experiment)
    assert "2 runs, 252 points, 1 datasets, 0 logged models, 3 artifacts" in output
    assert "registry" not in output
    output = await says("--experiment", experiment, "--registry")
    assert "was imported before; nothing changed" in output
    assert "registry:" in output
    _model, versions = await asyncio.to_thread(_registered, client, name)
    assert versions["1"]["source"] == f"runs:/{run_id}/model"
    stage = {"name": name, "version": "2", "stage": "Staging", "archive_existing_versions": False}
    await asyncio.to_thread(source.post, f"{API}/model-versions/create", body | {"source": "s3://b/m"})
    await asyncio.to_thread(source.post, f"{API}/model-versions/transition-stage", stage)
    await says("--experiment", experiment, "--registry")
    # Another stage there, and what is here stays.
    await asyncio.to_thread(source.post, f"{API}/model-versions/transition-stage", stage | {"stage": "Archived"})
    output = await says("--experiment", experiment, "--registry")
    assert f"stage Archived of version 2 of registered model {name}: it is in Staging here" in output
