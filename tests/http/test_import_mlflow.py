"""Importing from a real MLflow server."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import pytest

from mlplat.errors import NotFound, PlatformError
from mlplat.sdk import mlflow_import
from mlplat.sdk.archive_rows import run_files, run_pages
from mlplat.sdk.client import Client
from mlplat.sdk.import_target import Imported
from mlplat.sdk.mlflow_import import import_mlflow
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
        root = first["artifact_uri"].partition(":")[2].strip("/")
        source.upload_from(f"/api/2.0/mlflow-artifacts/artifacts/{root}/{path}", partial(io.BytesIO, content))
    dataset = {"name": "digits", "digest": "abc", "source_type": "local", "source": "{}"}
    source.post(f"{API}/runs/log-inputs", {"run_id": first["run_id"], "datasets": [{"dataset": dataset}]})
    source.post(f"{API}/runs/delete", {"run_id": child["run_id"]})
    return [first["run_id"], child["run_id"]]


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
        runs[run_id]["histories"] = {key: _history(client, run_id, key) for key in keys}
    return runs


async def test_an_import_is_equal_in_everything_and_happens_once(
    client: Client, source: Client, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_import, "HISTORY_PAGE", 100)
    name = unique("experiment")
    run_ids = await asyncio.to_thread(_fill, source, name)
    (imported,) = await asyncio.to_thread(_import, client, source, name)
    assert (imported.runs, imported.points, imported.artifacts, imported.renamed) == (2, 252, 3, {})
    assert (imported.datasets, imported.left_out) == (1, [])
    there = (await asyncio.to_thread(source.get, f"{API}/experiments/get-by-name", experiment_name=name))["experiment"]
    here = (await asyncio.to_thread(client.get, f"{API}/experiments/get-by-name", experiment_name=name))["experiment"]
    for key in ("lifecycle_stage", "creation_time", "last_update_time", "tags"):
        assert here[key] == there[key]
    before = await asyncio.to_thread(_comparable, source, there["experiment_id"])
    assert await asyncio.to_thread(_comparable, client, here["experiment_id"]) == before
    assert set(before) == set(run_ids)
    root = stack.artifact_folder / here["experiment_id"] / run_ids[0] / "artifacts"
    assert {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()} == {
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
