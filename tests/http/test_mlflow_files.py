"""Files by the run or version they belong to: listings in pages, downloads, small uploads."""

from __future__ import annotations

import httpx
import pytest

from mlplat.http.mlflow.listing import MAX_UPLOAD_BYTES, PAGE
from tests.contract.chdb import unique
from tests.http.conftest import MLflow, Stack, expect_error

INVALID = "INVALID_PARAMETER_VALUE"
MISSING = "RESOURCE_DOES_NOT_EXIST"
UPLOAD = "/ajax-api/2.0/mlflow/upload-artifact"


async def test_a_large_folder_is_listed_in_pages(mlflow: MLflow, stack: Stack) -> None:
    run_id = await mlflow.run()
    folder = stack.artifact_folder / "0" / run_id / "artifacts" / "many"
    folder.mkdir(parents=True)
    names = [f"{number:05}" for number in range(PAGE + 2)]
    for name in names:
        (folder / name).touch()
    first = await mlflow.call("GET", "artifacts/list", run_id=run_id, path="many")
    token = first["next_page_token"]
    second = await mlflow.call("GET", "artifacts/list", run_id=run_id, path="many", page_token=token)
    assert [entry["path"] for entry in first["files"] + second["files"]] == [f"many/{name}" for name in names]
    assert "next_page_token" not in second
    await mlflow.refused(
        400, INVALID, "Invalid page token", "GET", "artifacts/list", run_id=run_id, page_token="x"
    )  # fmt: skip


async def test_a_runs_file_is_downloaded(mlflow: MLflow, http: httpx.AsyncClient, stack: Stack) -> None:
    run_id = await mlflow.run()
    stack.services.artifacts.write(f"0/{run_id}/artifacts/a b/ü.html", [b"<b>0123456789</b>"])
    for key in ("run_id", "run_uuid"):
        response = await http.get("/get-artifact", params={key: run_id, "path": "a b/ü.html"})
        assert (response.status_code, response.content) == (200, b"<b>0123456789</b>")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-disposition"].startswith("attachment")
    part = await http.get(
        "/get-artifact", params={"run_id": run_id, "path": "a b/ü.html"}, headers={"Range": "bytes=3-5"}
    )
    assert (part.status_code, part.content) == (206, b"012")


@pytest.mark.parametrize(
    ("query", "status", "code", "message"),
    [
        ({"path": "x"}, 400, INVALID, "'run_id'"),
        ({"run_id": "nobody", "path": "x"}, 404, MISSING, "Run with id=nobody not found"),
        ({"run_id": "RUN"}, 400, INVALID, "'path'"),
        ({"run_id": "RUN", "path": "none"}, 404, MISSING, "No such artifact"),
        ({"run_id": "RUN", "path": "."}, 404, MISSING, "No such artifact"),
        ({"run_id": "RUN", "path": "../x"}, 400, INVALID, "Invalid path"),
        ({"run_id": "RUN", "path": "/etc/passwd"}, 400, INVALID, "Invalid path"),
        ({"run_id": "RUN", "path": "%252e%252e/x"}, 400, INVALID, "Invalid path"),
    ],
)
async def test_a_download_that_cannot_be_says_why(
    mlflow: MLflow, http: httpx.AsyncClient, query: dict[str, str], status: int, code: str, message: str
) -> None:
    run_id = await mlflow.run()
    params = {key: run_id if value == "RUN" else value for key, value in query.items()}
    expect_error(await http.get("/get-artifact", params=params), status, code, message)


async def test_artifacts_that_live_elsewhere_are_not_served(mlflow: MLflow, http: httpx.AsyncClient) -> None:
    created = await mlflow.call(
        "POST", "experiments/create", name=unique("e"), artifact_location="s3://bucket/x/"
    )  # fmt: skip
    run_id = await mlflow.run(created["experiment_id"])
    info = (await mlflow.call("GET", "runs/get", run_id=run_id))["run"]["info"]
    assert info["artifact_uri"] == f"s3://bucket/x/{run_id}/artifacts"
    response = await http.get("/get-artifact", params={"run_id": run_id, "path": "a"})
    expect_error(response, 400, INVALID, "which this platform does not serve")


async def test_a_model_versions_file_is_downloaded(mlflow: MLflow, http: httpx.AsyncClient, stack: Stack) -> None:
    name, run_id = unique("model"), await mlflow.run()
    stack.services.artifacts.write(f"0/{run_id}/artifacts/model/MLmodel", [b"flavors: {}"])
    model_id = (await mlflow.call("POST", "logged-models", experiment_id="0"))["model"]["info"]["model_id"]
    stack.services.artifacts.write(f"0/models/{model_id}/artifacts/MLmodel", [b"logged"])
    await mlflow.call("POST", "registered-models/create", name=name)
    for source in (f"runs:/{run_id}/model", f"models:/{model_id}"):
        await mlflow.call("POST", "model-versions/create", name=name, source=source)
    for version, content in (("1", b"flavors: {}"), ("2", b"logged")):
        query = {"name": name, "version": version, "path": "MLmodel"}
        response = await http.get("/model-versions/get-artifact", params=query)
        assert (response.status_code, response.content) == (200, content)
    response = await http.get("/model-versions/get-artifact", params={"name": name, "version": "3", "path": "x"})
    expect_error(response, 404, MISSING, "not found")
    response = await http.get("/model-versions/get-artifact", params={"name": name, "path": "x"})
    expect_error(response, 400, INVALID, "'version'")
    await mlflow.refused(
        404, MISSING, "Logged model with ID 'm-0' not found.", "POST", "model-versions/create", name=name,
        source="models:/m-0",
    )  # fmt: skip


async def test_a_small_file_is_uploaded_into_a_run(mlflow: MLflow, http: httpx.AsyncClient) -> None:
    run_id = await mlflow.run()
    response = await http.post(UPLOAD, params={"run_uuid": run_id, "path": "charts/c.json"}, content=b"{}")
    assert response.status_code == 200
    files = (await mlflow.call("GET", "artifacts/list", run_id=run_id, path="charts"))["files"]
    assert files == [{"path": "charts/c.json", "is_dir": False, "file_size": 2}]


@pytest.mark.parametrize(
    ("query", "body", "status", "code", "message"),
    [
        ({"path": "x"}, b"1", 400, INVALID, "Request must specify run_uuid."),
        ({"run_uuid": "RUN"}, b"1", 400, INVALID, "Request must specify path."),
        ({"run_uuid": "RUN", "path": "x"}, b"", 400, INVALID, "Request must specify data."),
        ({"run_uuid": "nobody", "path": "x"}, b"1", 404, MISSING, "Run with id=nobody not found"),
        ({"run_uuid": "RUN", "path": "../../x"}, b"1", 400, INVALID, "Invalid path"),
        ({"run_uuid": "RUN", "path": "x"}, b"1" * (MAX_UPLOAD_BYTES + 1), 413, "BAD_REQUEST", "bytes"),
    ],
    ids=["no run", "no path", "no data", "unknown run", "outside", "too large"],
)
async def test_an_upload_that_cannot_be_says_why(
    mlflow: MLflow,
    http: httpx.AsyncClient,
    query: dict[str, str],
    body: bytes,
    status: int,
    code: str,
    message: str,
) -> None:
    run_id = await mlflow.run()
    params = {key: run_id if value == "RUN" else value for key, value in query.items()}
    expect_error(await http.post(UPLOAD, params=params, content=body), status, code, message)
    assert "files" not in await mlflow.call("GET", "artifacts/list", run_id=run_id)


async def test_a_path_that_nobody_serves_is_404(http: httpx.AsyncClient) -> None:
    response = await http.post("/api/2.0/mlflow/nothing", json={})
    assert (response.status_code, response.json()["error_code"]) == (404, "ENDPOINT_NOT_FOUND")
