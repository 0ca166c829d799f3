"""/api/v1/model-versions, and the command that uses it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from mlplat.cli import app
from mlplat.errors import InvalidInput
from mlplat.sdk.client import Client
from tests.contract.chdb import unique
from tests.http.conftest import MLflow, expect_error

INVALID = "INVALID_PARAMETER_VALUE"
URL = "/api/v1/model-versions"


async def _search(http: httpx.AsyncClient, filter_text: str, *orders: str, **query: Any) -> dict[str, Any]:
    response = await http.get(URL, params={"filter": filter_text, "order_by": list(orders), **query})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def test_versions_are_found_by_what_their_runs_measured(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    names = [unique("m") for _ in range(2)]
    experiment = await mlflow.experiment()
    for name, accuracy in zip(names, (0.95, 0.5), strict=True):
        run_id = await mlflow.run(experiment)
        for step in range(2):
            metric = {"key": "accuracy", "value": accuracy - step * 0.3, "timestamp": 1, "step": 1 - step}
            await mlflow.call("POST", "runs/log-metric", run_id=run_id, **metric)
        await mlflow.call("POST", "runs/log-parameter", run_id=run_id, key="lr", value="0.01")
        dataset = {"name": "mnist", "digest": unique("d"), "source_type": "local", "source": "{}"}
        tags = [{"key": "mlflow.data.context", "value": "training"}]
        inputs = [{"dataset": dataset, "tags": tags}]
        await mlflow.call("POST", "runs/log-inputs", run_id=run_id, datasets=inputs)
        await mlflow.call("POST", "registered-models/create", name=name)
        for _ in range(2):
            await mlflow.call("POST", "model-versions/create", name=name, source="s3://b/m", run_id=run_id)
        await mlflow.call("POST", "registered-models/alias", name=name, alias="champion", version="1")
    mine, (good, bad) = f"name IN ('{names[0]}', '{names[1]}')", names
    for filter_text, versions in (
        ("metrics.accuracy > 0.9", [(good, 1), (good, 2)]), ("min(metrics.accuracy) < 0.3", [(bad, 1), (bad, 2)]),
        ("max(metrics.accuracy) <= 0.5 AND alias = 'champion'", [(bad, 1)]),
        (f"dataset.digest = '{dataset['digest']}'", [(bad, 1), (bad, 2)]),
        ("dataset.name = 'mnist' AND alias IS NULL AND params.lr < 0.1 AND metrics.accuracy > 0.9", [(good, 2)]),
        ("dataset.context != 'training'", []),
        ("params.lr = '0.01' AND NOT metrics.accuracy > 0.9", [(bad, 1), (bad, 2)]),
        ("metrics.accuracy > 0.9 OR alias = 'champion'", [(good, 1), (good, 2), (bad, 1)]),
    ):  # fmt: skip
        found = await _search(http, f"{mine} AND ({filter_text})", "version_number")
        rows = [(version["name"], version["version"]) for version in found["versions"]]
        assert sorted(rows) == sorted(versions), filter_text


async def test_pages_follow_one_another(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    name = unique("m")
    await mlflow.call("POST", "registered-models/create", name=name)
    for semantic in ("1.2.0", "1.10.0", "2.0.0"):
        body = {"name": name, "source": "s3://b/m", "semantic_version": semantic}
        await mlflow.call("POST", "model-versions/create", **body)
    mine = f"name = '{name}' AND semantic_version = '>=1'"
    first = await _search(http, mine, "semantic_version ASC", limit=2)
    assert [version["semantic_version"] for version in first["versions"]] == ["1.2.0", "1.10.0"]
    assert first["versions"][0]["stage"] == "None"
    rest = await _search(http, mine, "semantic_version ASC", limit=2, page_token=first["next_page_token"])
    assert ([version["version"] for version in rest["versions"]], rest["next_page_token"]) == ([3], None)
    assert await _search(http, "name = 'nobody'") == {"versions": [], "next_page_token": None}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"filter": "name"}, "Invalid filter string"),
        ({"filter": "x" * 20_001}, "filter"),
        ({"filter": "semantic_version = 'new'"}, "Invalid version range"),
        ({"order_by": "alias"}, "many of 'alias'"),
        ({"order_by": ["name", "name DESC"]}, "duplicate fields"),
        ({"order_by": ["name"] * 11}, "order_by"),
        ({"limit": 0}, "limit"),
        ({"limit": 10_001}, "limit"),
        ({"page_token": "1"}, "Invalid page token"),
    ],
)
async def test_a_malformed_search_is_refused(http: httpx.AsyncClient, query: dict[str, Any], message: str) -> None:
    expect_error(await http.get(URL, params=query), 400, INVALID, message)


async def test_the_command_shows_pages_as_one(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPLAT_URL", server_url)
    monkeypatch.setattr("mlplat.cli.model_search.PAGE", 2)
    name, client = unique("[red]m"), Client(server_url)

    def run(*arguments: str) -> list[str]:
        result = CliRunner().invoke(app, ["models", "search", *arguments])
        if result.exception is not None:
            raise result.exception
        return result.output.splitlines()

    def use() -> None:
        client.post("/api/2.0/mlflow/registered-models/create", {"name": name})
        for _ in range(5):
            client.post("/api/2.0/mlflow/model-versions/create", {"name": name, "source": "s3://b/m"})
        shown = run(f"name = '{name}' AND version_number > 2", "--order-by", "semantic_version ASC")
        assert [line.split()[:3] for line in shown[1:]] == [
            [name, "3", "1.0.2"], [name, "4", "1.0.3"], [name, "5", "1.0.4"],
        ]  # fmt: skip
        shown = run(f"name = '{name}'", "--limit", "3")
        assert [line.split()[1] for line in shown[1:4]] == ["5", "4", "3"]
        assert shown[4:] == ["There are more than 3; see --limit."]
        assert len(run(f"name = '{name}'", "--limit", "5")) == 6
        with pytest.raises(InvalidInput, match="Invalid filter string"):
            run("nonsense")

    await asyncio.to_thread(use)
