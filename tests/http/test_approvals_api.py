"""Policies, requests and refusals over HTTP, from the shell, and for MLflow's client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import mlflow as stock
import pytest
from mlflow.exceptions import MlflowException
from typer.testing import CliRunner

from mlplat.cli import app
from mlplat.errors import Conflict, InvalidInput, PermissionDenied
from mlplat.sdk.client import Client
from tests.contract.chdb import unique
from tests.http.conftest import MLflow, expect_error

DENIED = "PERMISSION_DENIED"
POLICY: dict[str, Any] = {
    "roles": {"leads": ["ann", "bob"]},
    "managed_by": "leads",
    "stages": {"Production": {"approvals": 1, "role": "leads", "from": ["Staging"]}},
    "aliases": {"champion": {"role": "leads"}},
}


@pytest.fixture
async def name(http: httpx.AsyncClient, mlflow: MLflow) -> str:
    """A protected model with two versions; its name needs escaping."""
    name = unique("Modèle 2 %")
    await mlflow.call("POST", "registered-models/create", name=name)
    for _ in range(2):
        await mlflow.call("POST", "model-versions/create", name=name, source="s3://bucket/m")
    response = await http.put(f"/api/v1/models/{name}/policy", json={"policy": POLICY, "by": "ann"})
    assert response.json() == POLICY
    return name


async def post(http: httpx.AsyncClient, name: str, path: str, **body: Any) -> httpx.Response:
    return await http.post(f"/api/v1/models/{name}/{path}", json=body)


async def test_a_move_is_asked_for_approved_and_made(http: httpx.AsyncClient, name: str) -> None:
    await post(http, name, "versions/1/stage", stage="Staging", by="zoe")
    response = await post(http, name, "versions/1/stage", stage="Production", by="ann")
    expect_error(response, 403, DENIED, "needs 1 approval(s) by leads: ask for them with `mlplat models request 'Mod")
    made = (await post(http, name, "requests", version=1, stage="Production", by="zoe", reason="new")).json()
    assert (made["state"], made["before"], made["needed"], made["role"]) == ("OPEN", "Staging", 1, "leads")
    waiting = (await http.get("/api/v1/approvals", params={"decider": "ann"})).json()
    assert made["id"] in [item["id"] for item in waiting]
    expect_error(await post(http, name, f"requests/{made['id']}/approve", by="zoe"), 403, DENIED, "zoe's own")
    expect_error(await post(http, name, f"requests/{made['id']}/approve"), 403, DENIED, "not of the role leads")
    done = (await post(http, name, f"requests/{made['id']}/approve", by="ann", reason="good")).json()
    assert done["state"] == "APPROVED"
    assert [(word["by"], word["approve"], word["reason"]) for word in done["decisions"]] == [("ann", True, "good")]
    version = (await http.get(f"/api/v1/models/{name}/versions/1")).json()
    assert version["stage"] == "Production"
    response = await post(http, name, f"requests/{made['id']}/approve", by="bob")
    expect_error(response, 409, "RESOURCE_CONFLICT", "approved already")
    found = (await http.get(f"/api/v1/models/{name}/requests", params={"state": "APPROVED"})).json()
    assert found == [(await http.get(f"/api/v1/models/{name}/requests/{made['id']}")).json()]


async def test_a_request_is_rejected_with_a_reason_or_withdrawn(http: httpx.AsyncClient, name: str) -> None:
    policy = {**POLICY, "aliases": {"champion": {"approvals": 1, "role": "leads"}}}
    await http.put(f"/api/v1/models/{name}/policy", json={"policy": policy, "by": "bob"})
    first = (await post(http, name, "requests", version=1, alias="champion", by="zoe")).json()
    response = await post(http, name, f"requests/{first['id']}/reject", by="ann")
    expect_error(response, 400, "INVALID_PARAMETER_VALUE", "say why")
    done = (await post(http, name, f"requests/{first['id']}/reject", by="ann", reason="no")).json()
    assert (done["state"], done["decisions"][0]["reason"]) == ("REJECTED", "no")
    second = (await post(http, name, "requests", version=1, alias="champion", by="zoe")).json()
    expect_error(await post(http, name, f"requests/{second['id']}/withdraw", by="ann"), 403, DENIED, "is zoe's")
    assert (await post(http, name, f"requests/{second['id']}/withdraw", by="zoe")).json()["state"] == "WITHDRAWN"
    assert (await http.get(f"/api/v1/models/{name}/aliases")).json()["aliases"] == {}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("PUT", "policy", {"policy": {"stages": {"Prod": {}}}}, 400),
        ("PUT", "policy", {"policy": {"aliases": {"latest": {}}}, "by": "ann"}, 400),
        ("PUT", "policy", {"policy": {}, "by": "zoe"}, 403),
        ("PUT", "policy", {"policy": {}}, 403),
        ("POST", "requests", {"version": 1, "by": "zoe"}, 400),
        ("POST", "requests", {"version": 1, "stage": "Production", "alias": "a", "by": "zoe"}, 400),
        ("POST", "requests", {"version": 0, "stage": "Production", "by": "zoe"}, 400),
        ("POST", "requests", {"version": 9, "stage": "Production", "by": "zoe"}, 404),
        ("POST", "requests", {"version": 1, "stage": "Archived", "by": "zoe"}, 400),
        ("POST", "requests", {"version": 1, "stage": "Production", "by": "zoe"}, 403),
        ("POST", "requests/999999999/approve", {"by": "ann"}, 404),
        ("POST", "requests/x/approve", {"by": "ann"}, 400),
        ("POST", "aliases", {"moves": [{"alias": "champion", "version": 1}], "by": "zoe"}, 403),
        ("POST", "aliases/champion/rollback", {"by": "zoe"}, 403),
    ],
)
async def test_what_cannot_be_is_refused_and_changes_nothing(
    http: httpx.AsyncClient, name: str, method: str, path: str, body: dict[str, Any], status: int
) -> None:
    response = await http.request(method, f"/api/v1/models/{name}/{path}", json=body)
    assert response.status_code == status, response.text
    assert (await http.get(f"/api/v1/models/{name}/policy")).json() == POLICY
    assert (await http.get(f"/api/v1/models/{name}/requests")).json() == []
    assert (await http.get(f"/api/v1/models/{name}/aliases")).json()["aliases"] == {}


async def test_what_is_not_there_is_not_found(http: httpx.AsyncClient) -> None:
    for path in ("policy", "requests", "requests/1"):
        expect_error(await http.get(f"/api/v1/models/nobody/{path}"), 404, "RESOURCE_DOES_NOT_EXIST", "nobody")
    assert (await http.get("/api/v1/models/nobody/refusals")).json() == []


async def test_mlflows_client_cannot_get_around_a_policy(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client, native, name = stock.MlflowClient(server_url), Client(server_url), unique("model")

    def use() -> list[dict[str, Any]]:
        client.create_registered_model(name)
        client.create_model_version(name, "s3://bucket/m")
        native.put(f"/api/v1/models/{name}/policy", {"policy": POLICY, "by": "ann"})
        client.transition_model_version_stage(name, "1", "Staging")
        with pytest.raises(MlflowException, match="needs 1 approval") as refused:
            client.transition_model_version_stage(name, "1", "Production")
        assert refused.value.error_code == DENIED
        with pytest.raises(MlflowException, match="protected"):
            client.set_registered_model_alias(name, "champion", "1")
        with pytest.raises(MlflowException, match="manages this model"):
            client.delete_registered_model(name)
        with pytest.raises(MlflowException, match="manages this model"):
            client.rename_registered_model(name, unique("other"))
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "x")
        client.set_registered_model_alias(name, "champion", "1")
        with pytest.raises(MlflowException, match="cannot be deleted while it has the protected alias champion"):
            client.delete_model_version(name, "1")
        found: list[dict[str, Any]] = native.get(f"/api/v1/models/{name}/refusals")
        return found

    refused = await asyncio.to_thread(use)
    assert [item["commands"][0]["kind"] for item in refused] == [
        "DeleteVersion", "RenameModel", "DeleteModel", "SetAlias", "SetStage",
    ]  # fmt: skip
    assert [item["by"] for item in refused] == ["ann", "", "", "", ""]


async def test_the_commands(server_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLPLAT_URL", server_url)
    monkeypatch.setenv("COLUMNS", "300")
    name, client, file = unique("model"), Client(server_url), tmp_path / "policy.yaml"

    def run(user: str, *arguments: str) -> str:
        monkeypatch.setenv("LOGNAME", user)
        result = CliRunner().invoke(app, ["models", *arguments])
        if result.exception is not None:
            raise result.exception
        return result.output

    def use() -> None:
        client.post("/api/2.0/mlflow/registered-models/create", {"name": name})
        client.post("/api/2.0/mlflow/model-versions/create", {"name": name, "source": "s3://b/m"})
        assert "everything is free" in run("ann", "policy", name)
        for text, problem in (
            ("a: [", "while parsing"),
            ("- 1", "expected a policy"),
            ("stages: {Prod: {}}", "stages"),
        ):
            file.write_text(text)
            with pytest.raises(InvalidInput, match=problem):
                run("ann", "policy", name, "--set", str(file))
        file.write_text(
            "{roles: {leads: [ann, bob]}, managed_by: leads, stages: {Production: {approvals: 1, role: leads}}}"
        )
        assert "approvals: 1" in run("ann", "policy", name, "--set", str(file))
        with pytest.raises(PermissionDenied, match="mlplat models request"):
            run("ann", "stage", name, "1", "Production")
        told = run("ann", "request", name, "1", "--stage", "production", "--reason", "new")
        number = told.split()[1].rstrip(":")
        assert "version 1: None → Production, needs 1 of leads" in told
        assert number in run("bob", "requests", "--mine")
        assert f"{number} " not in run("ann", "requests", "--mine")
        assert "is approved" in run("bob", "approve", name, number)
        with pytest.raises(Conflict):
            run("bob", "reject", name, number, "--reason", "no")
        assert "1 of" not in run("ann", "requests", name)
        assert "bob" in run("ann", "requests", name, "--state", "all")
        assert "needs 1 approval" in run("ann", "refusals", name)
        assert "everything is free" in run("bob", "policy", name, "--clear")

    await asyncio.to_thread(use)
