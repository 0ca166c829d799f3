"""Purging and moving over HTTP and by the command."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from typer.testing import CliRunner, Result

from mlplat.cli import app, lifecycle
from mlplat.errors import PlatformError
from mlplat.sdk.client import Client
from mlplat.sdk.lifecycle import move_runs
from tests.contract.chdb import unique
from tests.http.conftest import MLflow, Stack, expect_error
from tests.http.serving import served


async def _found(mlflow: MLflow, experiment_id: str, filter_text: str) -> list[str]:
    answer = await mlflow.call("POST", "runs/search", experiment_ids=[experiment_id], filter=filter_text)
    return [run["info"]["run_id"] for run in answer.get("runs", ())]


async def test_a_moved_run_is_found_where_it_is(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    old, new = await mlflow.experiment(), await mlflow.experiment()
    run_id = await mlflow.run(old)
    await mlflow.call("POST", "runs/log-metric", run_id=run_id, key="loss", value=0.5, timestamp=1, step=1)
    uri = (await mlflow.call("GET", "runs/get", run_id=run_id))["run"]["info"]["artifact_uri"]
    answer = await http.post("/api/v1/runs/move", json={"run_ids": [run_id], "experiment_id": new})
    assert answer.json() == {"run_ids": [run_id]}
    for filter_text in ("metrics.loss < 1", ""):
        assert await _found(mlflow, new, filter_text) == [run_id]
        assert await _found(mlflow, old, filter_text) == []
    run = (await mlflow.call("GET", "runs/get", run_id=run_id))["run"]
    assert (run["info"]["experiment_id"], run["info"]["artifact_uri"]) == (new, uri)
    assert [metric["value"] for metric in run["data"]["metrics"]] == [0.5]


async def test_a_purged_run_is_gone_and_its_id_is_free(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    experiment = await mlflow.experiment()
    run_id = await mlflow.run(experiment)
    await mlflow.call("POST", "runs/log-metric", run_id=run_id, key="loss", value=0.5, timestamp=1, step=1)
    body: dict[str, Any] = {"runs": [run_id]}
    expect_error(await http.post("/api/v1/purge", json=body), 400, "INVALID_PARAMETER_VALUE", "is active")
    await mlflow.call("POST", "runs/delete", run_id=run_id)
    dry = (await http.post("/api/v1/purge", json=body | {"dry_run": True})).json()
    assert (dry["runs"], dry["metric_bytes"] > 0, dry["postgres_bytes"] > 0) == (1, True, True)
    assert (await http.post("/api/v1/purge", json=body | {"older_than": "1d"})).json()["runs"] == 0
    done = (await http.post("/api/v1/purge", json=body)).json()
    assert (done["runs"], done["kept"], done["next"]) == (1, [], None)
    await mlflow.refused(404, "RESOURCE_DOES_NOT_EXIST", run_id, "GET", "runs/get", run_id=run_id)
    again = (await http.post("/api/v1/purge", json=body)).json()
    assert (again["runs"], again["missing"]) == (0, [run_id])


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("purge", {"older_than": "soon"}, "not a time span"),
        ("purge", {"limit": 0}, "limit"),
        ("purge", {"limit": 1001}, "limit"),
        ("purge", {"runs": ["x"] * 1001}, "runs"),
        ("runs/move", {"run_ids": [], "experiment_id": "0"}, "run_ids"),
        ("runs/move", {"run_ids": ["x"], "experiment_id": "abc"}, "Invalid experiment ID"),
        ("runs/move", {"run_ids": ["x"]}, "experiment_id"),
        ("metrics/read", {"run_ids": []}, "run_ids"),
        ("metrics/read", {"run_ids": ["x"], "limit": 10**9}, "limit"),
        ("metrics/read", {"run_ids": ["x"], "after": ["x", "k", 2**64, 0, "0.0"]}, "after"),
        ("metrics/read", {"run_ids": ["x"], "after": ["x", "k", 0, 0, "many"]}, "after"),
        ("imports", {"origin": "", "name": "x", "created_at": 0, "updated_at": 0}, "origin"),
        ("imports", {"origin": "x", "name": " ", "created_at": 0, "updated_at": 0}, "experiment name"),
        ("imports", {"origin": "x", "name": "x", "created_at": -1, "updated_at": 0}, "Invalid time"),
    ],
)
async def test_bad_requests_are_refused(http: httpx.AsyncClient, path: str, body: dict[str, Any], message: str) -> None:
    expect_error(await http.post(f"/api/v1/{path}", json=body), 400, "INVALID_PARAMETER_VALUE", message)


async def test_an_unknown_experiment_is_not_found(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    body = {"experiments": ["no such experiment"]}
    expect_error(await http.post("/api/v1/purge", json=body), 404, "RESOURCE_DOES_NOT_EXIST", "no such experiment")
    moving = {"run_ids": [await mlflow.run()], "experiment_id": "999999999"}
    expect_error(await http.post("/api/v1/runs/move", json=moving), 404, "RESOURCE_DOES_NOT_EXIST", "999999999")


async def test_the_command_moves_purges_exports_and_imports(
    stack: Stack, mlflow: MLflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [unique("experiment"), unique("experiment")]
    first, _second = [await mlflow.experiment(name) for name in names]
    run_id, other = await mlflow.run(first), await mlflow.run(first)
    await mlflow.call("POST", "runs/log-metric", run_id=run_id, key="loss", value=0.5, timestamp=1, step=1)
    monkeypatch.setattr(lifecycle.console, "width", 200)
    async with served(stack.app) as url:
        monkeypatch.setenv("MLPLAT_URL", url)

        async def mlplat(*arguments: str) -> Result:
            return await asyncio.to_thread(CliRunner().invoke, app, arguments)

        async def says(text: str, *arguments: str) -> None:
            result = await mlplat(*arguments)
            assert (result.exit_code, text in result.output) == (0, True), result.output

        await says(f"1 runs are in experiment {names[1]}", "move", run_id, "--to", names[1])
        assert await asyncio.to_thread(move_runs, [other, run_id], names[1]) == sorted([other, run_id])
        archive = str(tmp_path / "x.tar")
        counts = "2 runs, 1 points, 0 datasets, 0 logged models, 0 artifacts"
        await says(counts, "export", names[1], archive)
        await says(counts, "import", archive, "--name", f"{names[1]}-copy")
        await says("was imported before; nothing changed", "import", archive, "--name", f"{names[1]}-copy")
        await mlflow.call("POST", "runs/delete", run_id=run_id)
        scope = ("purge", "--older-than", "0s", "--experiment", names[1])
        await says("would be removed", *scope, "--dry-run")
        await says("1 runs, 0 experiments", *scope)
        await says(f"no run {run_id}", "purge", "--run", run_id)
        refused = await mlplat("purge")
        assert isinstance(refused.exception, PlatformError)
        assert "--older-than 30d" in str(refused.exception)


async def test_points_are_read_in_pages_with_nan_and_infinities(stack: Stack, mlflow: MLflow) -> None:
    runs = [await mlflow.run() for _ in range(2)]
    for run_id in runs:
        points = [
            {"key": "m", "value": value, "timestamp": 5, "step": step}
            for step in range(2)
            for value in ("NaN", "Infinity", "-Infinity", 0.5)
        ]
        await mlflow.call("POST", "runs/log-batch", run_id=run_id, metrics=points)
    async with served(stack.app) as url:
        client = Client(url)
        whole = await asyncio.to_thread(_read_all, client, runs, 100)
        assert len(whole) == 16
        for size in (1, 3, 16):
            assert await asyncio.to_thread(_read_all, client, runs, size) == whole


def _read_all(client: Client, run_ids: list[str], limit: int) -> list[str]:
    rows: list[str] = []
    body: dict[str, Any] = {"run_ids": run_ids, "limit": limit}
    while True:
        with pa.ipc.open_stream(client.post_for_bytes("/api/v1/metrics/read", body)) as reader:
            page = reader.read_all().to_pylist()
        rows += [repr(row) for row in page]
        if len(page) < limit:
            return rows
        body["after"] = [*list(page[-1].values())[:4], str(page[-1]["value"])]
