"""/api/v1/models, and the commands that use it."""

from __future__ import annotations

import asyncio
import base64
import re
import shlex
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from typer.testing import CliRunner

from mlplat.cli import app
from mlplat.errors import Conflict, PlatformError
from mlplat.sdk.client import Client
from tests.contract.chdb import unique
from tests.http.conftest import MLflow, expect_error
from tests.platform import ROOT

INVALID = "INVALID_PARAMETER_VALUE"


@pytest.fixture
async def name(mlflow: MLflow) -> str:
    """A registered model with three versions; its name needs escaping."""
    name = unique("Modèle 1 %")
    await mlflow.call("POST", "registered-models/create", name=name)
    for _ in range(3):
        await mlflow.call("POST", "model-versions/create", name=name, source="s3://bucket/m")
    return name


async def move(http: httpx.AsyncClient, name: str, *moves: dict[str, Any], **fields: Any) -> httpx.Response:
    return await http.post(f"/api/v1/models/{name}/aliases", json={"moves": moves, **fields})


async def history(http: httpx.AsyncClient, name: str, **query: Any) -> list[dict[str, Any]]:
    response = await http.get(f"/api/v1/models/{name}/history", params=query)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()
    return found


async def test_aliases_move_together_with_a_reason(http: httpx.AsyncClient, name: str) -> None:
    response = await move(http, name, {"alias": "champion", "version": 1}, by="ann", reason="first")
    assert response.json() == {"name": name, "aliases": {"champion": 1}}
    swap = (
        {"alias": "previous", "version": 1, "expected_version": 0},
        {"alias": "champion", "version": 2, "expected_version": 1},
    )
    response = await move(http, name, *swap, by="bob", reason="better")
    assert response.json()["aliases"] == {"champion": 2, "previous": 1}
    expect_error(await move(http, name, *swap), 409, "RESOURCE_CONFLICT", "alias previous points at version 1")
    assert (await http.get(f"/api/v1/models/{name}/aliases")).json()["aliases"] == {"champion": 2, "previous": 1}
    told = await history(http, name, subject="alias")
    assert [(item["key"], item["before"], item["after"], item["by"], item["reason"]) for item in told] == [
        ("champion", "1", "2", "bob", "better"), ("previous", None, "1", "bob", "better"),
        ("champion", None, "1", "ann", "first"),
    ]  # fmt: skip
    assert told[0]["request_id"] == told[1]["request_id"] != told[2]["request_id"]
    assert await history(http, name, subject="alias", limit=1, before=told[0]["change_id"]) == told[1:2]
    assert await history(http, name, subject="alias", key="champion") == [told[0], told[2]]


async def test_a_repeated_request_is_one(http: httpx.AsyncClient, name: str) -> None:
    key = unique("key")
    url, body = f"/api/v1/models/{name}/aliases", {"moves": [{"alias": "a", "version": 1, "expected_version": 0}]}
    for _twice in range(2):
        response = await http.post(url, json=body, headers={"Idempotency-Key": key})
        assert response.status_code == 200, response.text
    assert len(await history(http, name, subject="alias")) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"moves": []}, "moves"),
        ({"moves": [{"alias": "a", "version": 0}]}, "version"),
        ({"moves": [{"alias": "a"}]}, "version"),
        ({"moves": [{"alias": "latest", "version": 1}]}, "reserved"),
        ({"moves": [{"alias": "v7", "version": 1}]}, "reserved"),
        ({"moves": [{"alias": "a b", "version": 1}]}, "Invalid alias name"),
        ({"moves": [{"alias": "a", "version": 1}, {"alias": "a", "version": 2}]}, "only once"),
        ({"moves": [{"alias": "a", "version": 1, "expected": 2}]}, "expected"),
        ({"moves": [{"alias": "a", "version": 1}], "reason": "x" * 3_000}, "reason"),
    ],
)
async def test_bad_moves_are_refused(http: httpx.AsyncClient, name: str, body: dict[str, Any], message: str) -> None:
    expect_error(await http.post(f"/api/v1/models/{name}/aliases", json=body), 400, INVALID, message)
    assert await history(http, name, subject="alias") == []


async def test_what_is_not_there_is_not_found(http: httpx.AsyncClient, name: str) -> None:
    missing = "RESOURCE_DOES_NOT_EXIST"
    expect_error(await move(http, name, {"alias": "a", "version": 9}), 404, missing, "version=9")
    expect_error(await move(http, "nobody", {"alias": "a", "version": 1}), 404, missing, "nobody")
    for path in ("aliases", "history", "at?time=2026-01-01T00:00:00Z"):
        expect_error(await http.get(f"/api/v1/models/nobody/{path}"), 404, missing, "nobody")


async def test_a_rollback_goes_back_and_forth(http: httpx.AsyncClient, name: str) -> None:
    url = f"/api/v1/models/{name}/aliases/champion/rollback"
    expect_error(await http.post(url, json={}), 400, INVALID, "alias champion not found")
    await move(http, name, {"alias": "champion", "version": 1})
    expect_error(await http.post(url, json={}), 400, INVALID, "did not exist before")
    await move(http, name, {"alias": "champion", "version": 3})
    done = await http.post(url, json={"by": "ann"})
    assert done.json() == {"name": name, "alias": "champion", "version": 1, "was": 3}
    [last] = await history(http, name, subject="alias", limit=1)
    assert (last["before"], last["after"], last["by"], last["reason"]) == ("3", "1", "ann", "rollback")
    assert (await http.post(url, json={})).json()["version"] == 3


async def test_stages_and_moments(http: httpx.AsyncClient, name: str) -> None:
    url = f"/api/v1/models/{name}/versions/1/stage"
    answer = await http.post(url, json={"stage": "Production", "by": "ann", "reason": "approved"})
    assert answer.json() == {"name": name, "version": 1, "stage": "Production"}
    then = datetime.now(UTC)
    await http.post(f"/api/v1/models/{name}/versions/2/stage", json={"stage": "Production", "archive_others": True})
    found = (await http.get(f"/api/v1/models/{name}/at", params={"time": then.isoformat()})).json()
    assert found["stages"] == {"1": "Production", "2": "None", "3": "None"}
    now = datetime.now(UTC).isoformat()
    found = (await http.get(f"/api/v1/models/{name}/at", params={"time": now})).json()
    assert found["stages"] == {"1": "Archived", "2": "Production", "3": "None"}
    [first] = [item for item in await history(http, name, subject="stage", key="1") if item["after"] == "Production"]
    assert (first["by"], first["reason"]) == ("ann", "approved")
    expect_error(await http.post(url, json={"stage": "live"}), 400, INVALID, "stage")
    expect_error(
        await http.get(f"/api/v1/models/{name}/at", params={"time": "2026-01-01T00:00:00"}), 400, INVALID, "zone"
    )


async def test_versions_are_found_by_whatever_tells_them(http: httpx.AsyncClient, mlflow: MLflow, name: str) -> None:
    body = {"name": name, "source": "s3://bucket/m", "semantic_version": "minor"}
    created = await mlflow.call("POST", "model-versions/create", **body)
    tag = {"key": "mlplat.semantic_version", "value": "1.1.0"}
    assert created["model_version"]["tags"] == [tag]
    await move(http, name, {"alias": "champion", "version": 2})
    await http.post(f"/api/v1/models/{name}/versions/1/stage", json={"stage": "Production"})
    url = f"/api/v1/models/{name}/versions"
    for spec, version in (
        ("2", 2), ("1.0.1", 2), ("^1", 4), ("~1.0", 3), ("<=1.0.1", 2), ("latest", 4), ("@champion", 2),
        ("production", 1),
    ):  # fmt: skip
        found = await http.get(f"{url}/{quote(spec, safe='')}")
        assert (found.status_code, found.json()["version"]) == (200, version), spec
    told = (await http.get(f"{url}/4")).json()
    assert (told["semantic_version"], told["bump"], told["bump_reason"]) == ("1.1.0", "minor", "set by hand")
    page = (await http.get(url, params={"range": "1.x", "limit": 2})).json()
    assert [item["semantic_version"] for item in page] == ["1.1.0", "1.0.2"]
    rest = (await http.get(url, params={"below": page[-1]["semantic_version"]})).json()
    assert [item["version"] for item in rest] == [2, 1]
    assert (await http.get(url, params={"range": "^7"})).json() == []
    missing = "RESOURCE_DOES_NOT_EXIST"
    for path, status, code, message in (
        (f"{url}/9", 404, missing, "version=9"), (f"{url}/^2", 404, missing, "no version from 2.0.0 up to"),
        (f"{url}/Staging", 404, missing, "no version in stage Staging"), (f"{url}/live", 400, INVALID, "stage: live"),
        (f"{url}/@nobody", 400, INVALID, "alias nobody not found"), (f"{url}/1.2.x.4", 400, INVALID, "version range"),
        (f"{url}?range=1||2", 400, INVALID, "version range"), (f"{url}?below=1.2", 400, INVALID, "semantic version"),
        ("/api/v1/models/nobody/versions", 404, missing, "nobody"),
        ("/api/v1/models/nobody/versions/^1", 404, missing, "nobody"),
    ):  # fmt: skip
        expect_error(await http.get(path), status, code, message)


async def test_a_semantic_version_is_given_once(mlflow: MLflow, name: str) -> None:
    async def create(semantic: str) -> str:
        body = {"name": name, "source": "s3://bucket/m", "semantic_version": semantic}
        return str((await mlflow.call("POST", "model-versions/create", **body))["model_version"]["version"])

    assert await create("7.0.0") == "4"
    for taken in ("7.0.0", "1.0.0"):
        message = f"has or had a version {taken} already"
        body = {"name": name, "source": "s3://bucket/m", "semantic_version": taken}
        await mlflow.refused(400, "RESOURCE_ALREADY_EXISTS", message, "POST", "model-versions/create", **body)
    for malformed in ("7", "v1.0.0", "Major", "1.0.0-rc1"):
        body = {"name": name, "source": "s3://bucket/m", "semantic_version": malformed}
        await mlflow.refused(400, INVALID, "Invalid semantic version", "POST", "model-versions/create", **body)
    assert await create("major") == "5"
    tag = {"name": name, "version": "4", "key": "mlplat.semantic_version"}
    await mlflow.refused(400, INVALID, "cannot change", "POST", "model-versions/set-tag", **tag, value="9.0.0")
    await mlflow.refused(400, INVALID, "cannot change", "DELETE", "model-versions/delete-tag", **tag)
    copied = [{"key": "mlplat.semantic_version", "value": "1.0.0"}, {"key": "a", "value": "1"}]
    source = f"models:/{name}/1"
    answer = await mlflow.call("POST", "model-versions/create", name=name, source=source, tags=copied)
    assert {tag["key"]: tag["value"] for tag in answer["model_version"]["tags"]} == {
        "mlplat.semantic_version": "8.0.1",
        "a": "1",
    }


async def test_mlflows_user_is_in_the_history(http: httpx.AsyncClient, name: str) -> None:
    secret = base64.b64encode(b"carl:not checked").decode()
    body = {"name": name, "alias": "a", "version": "1"}
    url = "/api/2.0/mlflow/registered-models/alias"
    for header in (f"Basic {secret}", "Basic ???", "Bearer x"):
        response = await http.post(url, json=body, headers={"Authorization": header})
        assert response.status_code == 200, response.text
        body = body | {"version": str(int(body["version"]) + 1)}
    assert [item["by"] for item in await history(http, name, subject="alias")] == ["", "", "carl"]


async def test_the_commands(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPLAT_URL", server_url)
    monkeypatch.setenv("COLUMNS", "300")
    name, client = unique("model"), Client(server_url)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["models", *arguments])
        if result.exception is not None:
            raise result.exception
        return result.output

    def use() -> None:
        client.post("/api/2.0/mlflow/registered-models/create", {"name": name})
        for _ in range(2):
            client.post("/api/2.0/mlflow/model-versions/create", {"name": name, "source": "s3://b/m"})
        assert "champion → version 1" in run("alias", name, "champion", "1", "--reason", "first")
        with pytest.raises(Conflict):
            run("alias", name, "champion", "2", "--expect", "2")
        run("alias", name, "champion", "2", "--expect", "1")
        assert "champion → version 1 (was 2)" in run("rollback", name, "champion", "--reason", "too slow")
        assert "too slow" in run("history", name, "--alias", "champion")
        shown = run("versions", name, "^1")
        assert [line.split()[:2] for line in shown.splitlines()[1:]] == [["1.0.1", "2"], ["1.0.0", "1"]]
        assert "patch: no other signature" in shown
        assert "version 2 → Production" in run("stage", name, "2", "production")
        shown = run("show", name)
        assert "champion" in shown
        assert "Production" in shown
        then = datetime.now(UTC).isoformat()
        run("alias", name, "champion", "--delete")
        assert "champion" not in run("show", name)
        assert "champion" in run("show", name, "--at", then)
        with pytest.raises(PlatformError, match="nobody"):
            run("show", "nobody")

    await asyncio.to_thread(use)


async def test_what_the_documentation_shows_works(
    server_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (ROOT / "docs" / "registry.md").read_text()
    blocks = [block.replace("2026-11-24", "2126-11-24") for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]
    [policy] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "policy.yaml").write_text(policy)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLPLAT_URL", server_url)
    client = Client(server_url)

    def use() -> None:
        client.post("/api/2.0/mlflow/registered-models/create", {"name": "digits"})
        for _ in range(2):
            body = {"name": "digits", "source": "s3://b/m", "description": "a card"}
            client.post("/api/2.0/mlflow/model-versions/create", body)
        for block in blocks:
            if block.startswith("curl -X POST"):
                _curl(block, tmp_path)
                continue
            number = "1"
            for line in block.splitlines():
                if line.startswith("mlplat"):
                    command, _comment, user = line.partition("  # ")
                    command = command.replace("approve digits 1", f"approve digits {number}")
                    with monkeypatch.context() as patch:
                        patch.setenv("LOGNAME", user.strip() or "ann")
                        result = CliRunner().invoke(app, shlex.split(command)[1:])
                    assert result.exception is None, (line, result.exception)
                    number = (re.findall(r"^request (\d+)", result.output) or [number])[0]
                else:
                    _curl(line, tmp_path)

    await asyncio.to_thread(use)
    told = client.get("/api/v1/models/digits/history", subject="alias")
    assert [(item["key"], item["before"], item["after"]) for item in told[::-1]] == [
        ("champion", None, "1"), ("champion", "1", "2"), ("champion", "2", "1"), ("previous", None, "1"),
        ("champion", "1", "2"),
    ]  # fmt: skip
    told = client.get("/api/v1/models/digits/history", subject="stage", key=1)
    assert told[0]["after"] == "Production"
    assert told[0]["by"] == "ann"
    assert "approved by bob, eve" in told[0]["reason"]


def _curl(command: str, folder: Path) -> None:
    subprocess.run(
        ["bash", "-ec", command.replace("curl", "curl --fail --silent --show-error", 1)], cwd=folder, check=True,
        capture_output=True, timeout=60,
    )  # fmt: skip
