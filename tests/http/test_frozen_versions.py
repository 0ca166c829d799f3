"""Versions whose files were changed are refused, by whatever door they are read."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from mlplat.cli import app
from mlplat.errors import Corrupted
from mlplat.sdk.client import Client
from tests.contract.chdb import unique


def change(uri: str, client: Client, path: str, body: bytes) -> None:
    """Writes a file of a version, past the registry."""
    client._call("PUT", f"/api/2.0/mlflow-artifacts/artifacts/{uri.partition(':/')[2]}/{path}", content=body)


@pytest.fixture
def name(mlflow_client: MlflowClient) -> str:
    """A model that MLflow's own client has logged and registered."""
    name = unique("model")
    with mlflow.start_run():
        mlflow.sklearn.log_model(LogisticRegression().fit([[0.0], [1.0]], [0, 1]), name="m", registered_model_name=name)
    return name


def test_a_version_loads_until_a_byte_of_it_is_changed(
    server_url: str, mlflow_client: MlflowClient, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = Client(server_url)
    version = client.get(f"/api/v1/models/{name}/versions/1")
    assert len(version["manifest"]) == 64
    assert mlflow.sklearn.load_model(f"models:/{name}/1").predict([[1.0]]).tolist() == [1]
    verified = client.get(f"/api/v1/models/{name}/versions/1/verify")
    assert (verified["frozen"], verified["intact"], verified["problems"]) == (True, True, [])
    monkeypatch.setenv("MLPLAT_URL", server_url)
    assert "what was registered" in CliRunner().invoke(app, ["models", "verify", name, "1"]).output

    before = client.get_bytes("/model-versions/get-artifact", name=name, version="1", path="MLmodel")
    change(version["artifact_uri"], client, "MLmodel", before)
    assert client.get_bytes("/model-versions/get-artifact", name=name, version="1", path="MLmodel") == before

    change(version["artifact_uri"], client, "MLmodel", before.replace(b"sklearn", b"sklearX", 1))
    with pytest.raises(MlflowException, match=r"is not what was registered: MLmodel has the SHA-256"):
        mlflow.sklearn.load_model(f"models:/{name}/1", dst_path=str(tmp_path))
    with pytest.raises(Exception, match="not what was registered"):
        client.get_bytes("/model-versions/get-artifact", name=name, version="1", path="MLmodel")
    verified = client.get(f"/api/v1/models/{name}/versions/1/verify")
    assert [problem["path"] for problem in verified["problems"]] == ["MLmodel"]
    result = CliRunner().invoke(app, ["models", "verify", name, "1"])
    assert isinstance(result.exception, Corrupted)
    assert "MLmodel has the SHA-256" in result.output
    events = client.get("/api/v1/models/events/log", model=name, kinds="version_tampered")["events"]
    assert len(events) == 1
    assert "MLmodel" in events[0]["problem"]

    change(version["artifact_uri"], client, "MLmodel", before)
    assert mlflow.sklearn.load_model(f"models:/{name}/1").predict([[0.0]]).tolist() == [0]


def test_a_version_without_files_here_is_not_frozen(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client, name = Client(server_url), unique("model")
    client.post("/api/2.0/mlflow/registered-models/create", {"name": name})
    client.post("/api/2.0/mlflow/model-versions/create", {"name": name, "source": "s3://bucket/m"})
    verified = client.get(f"/api/v1/models/{name}/versions/1/verify")
    assert (verified["frozen"], verified["intact"]) == (False, True)
    monkeypatch.setenv("MLPLAT_URL", server_url)
    assert "nothing is known" in CliRunner().invoke(app, ["models", "verify", name, "1"]).output
