"""Lineage over HTTP, from the shell, as OpenLineage events and as an audit file."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import html.parser
import json
import re
import shlex
import subprocess
import uuid
from pathlib import Path

import httpx
import mlflow
import mlflow.data.pandas_dataset as mlflow_data
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.tracking.context.registry import resolve_tags
from typer.testing import CliRunner

import mlplat
from mlplat.artifacts.store import ArtifactStore
from mlplat.cli import app
from mlplat.sdk.checkpoints import Checkpoints
from mlplat.sdk.client import Client
from mlplat.sdk.context import StepContext, enter_step
from tests.contract.chdb import unique
from tests.http.conftest import expect_error
from tests.platform import ROOT


@pytest.fixture
def trained(server_url: str, mlflow_client: MlflowClient) -> dict[str, str]:
    """A model of one version, made by MLflow's own client from a run with a dataset."""
    name = unique("model")
    data = mlflow_data.from_pandas(pd.DataFrame({"x": [1.0, 2.0], "<b>": [3, 4]}), source="/data/d.csv", name="digits")
    with mlflow.start_run() as run:
        mlflow.log_input(data, context="training", tags={"mlplat.featureView.driver_stats": ""})
        mlflow.log_param("rate", "</script><b>1")
        mlflow.log_metric("accuracy", 0.9)
    mlflow_client.create_registered_model(name)
    mlflow_client.create_model_version(name, "s3://bucket/model", run_id=run.info.run_id)
    mlflow_client.set_registered_model_alias(name, "champion", "1")
    return {"name": name, "run_id": run.info.run_id, "digest": data.digest}


class Facts(html.parser.HTMLParser):
    """Takes the JSON out of an audit page, and its text for people."""

    def __init__(self) -> None:
        super().__init__()
        self.facts, self.text, self._inside = "", "", False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script" and ("id", "facts") in attrs

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.facts += data
        else:
            self.text += data


def test_a_version_tells_what_it_comes_from(server_url: str, trained: dict[str, str]) -> None:
    client, name = Client(server_url), trained["name"]
    found = client.get(f"/api/v1/lineage/model-versions/{name}/@champion")
    assert found["run"] == trained["run_id"]
    assert [(use["name"], use["digest"], use["rows"], use["context"]) for use in found["data"]] == [
        ("digits", trained["digest"], 2, "training")
    ]
    [run] = found["runs"]
    assert run["metrics"] == {"accuracy": 0.9}
    assert {"from": f"run:{trained['run_id']}", "to": f"model-version:{name}/1"} in found["graph"]["edges"]
    used = client.get("/api/v1/lineage/datasets", digest=trained["digest"], name="digits")
    assert f"{name}/1" in used["model_versions"]
    both = client.get("/api/v1/lineage/graph", node=f"run:{trained['run_id']}", direction="both")
    assert {node["kind"] for node in both["nodes"]} == {"run", "dataset", "feature-view", "model-version"}
    assert found["data"][0]["feature_views"] == ["driver_stats"]
    assert both["nodes"][0] == {"node": f"run:{trained['run_id']}", "kind": "run", "distance": 0}
    near = client.get("/api/v1/lineage/graph", node=f"model-version:{name}/1", depth=1)
    assert (len(near["nodes"]), near["truncated"]) == (2, True)


def test_the_events_follow_openlineage(server_url: str, trained: dict[str, str]) -> None:
    [event] = Client(server_url).get(f"/api/v1/lineage/model-versions/{trained['name']}/1/openlineage")
    assert event["eventType"] == "COMPLETE"
    assert uuid.UUID(event["run"]["runId"]).hex == trained["run_id"]
    assert event["schemaURL"].endswith("OpenLineage.json#/$defs/RunEvent")
    [data] = event["inputs"]
    assert (data["name"], data["facets"]["version"]["datasetVersion"]) == ("digits", trained["digest"])
    assert [field["name"] for field in data["facets"]["schema"]["fields"]] == ["x", "<b>"]
    assert data["inputFacets"]["inputStatistics"]["rowCount"] == 2
    assert data["facets"]["mlplat_featureViews"]["featureViews"] == ["driver_stats"]
    [model] = event["outputs"]
    assert (model["name"], model["facets"]["version"]["datasetVersion"]) == (trained["name"], "1")
    for facets in (event["run"]["facets"], event["job"]["facets"], data["facets"], model["facets"]):
        for facet in facets.values():
            assert facet["_producer"] == event["producer"]
            assert facet["_schemaURL"].startswith("https://openlineage.io/spec/")


def test_the_audit_file_is_for_people_and_for_programs(server_url: str, trained: dict[str, str]) -> None:
    client, url = Client(server_url), f"/api/v1/lineage/model-versions/{trained['name']}/1/audit"
    page = client.get_bytes(url).decode()
    parser = Facts()
    parser.feed(page)
    document = json.loads(parser.facts)
    assert hashlib.sha256(parser.facts.encode()).hexdigest() in parser.text
    assert document["runs"][0]["params"] == {"rate": "</script><b>1"}
    assert "</script><b>1" in parser.text
    assert "<b>1" not in page
    assert page.count("<script") == 1
    assert '["driver_stats"]' in parser.text
    assert [change["subject"] for change in document["history"]] == ["alias", "stage", "model"]
    assert document["openlineage"][0]["outputs"][0]["name"] == trained["name"]
    alone = client.get(url, format="json")
    assert {**alone, "made_at": ""} == {**document, "made_at": ""}


async def test_what_is_not_there_or_makes_no_sense_is_refused(http: httpx.AsyncClient) -> None:
    for path, status, code, message in (
        ("model-versions/nobody/1", 404, "RESOURCE_DOES_NOT_EXIST", "nobody"),
        ("model-versions/nobody/1/audit", 404, "RESOURCE_DOES_NOT_EXIST", "nobody"),
        ("graph?node=run", 400, "INVALID_PARAMETER_VALUE", "not a node of the lineage"),
        ("graph?node=model-version:nobody/1", 404, "RESOURCE_DOES_NOT_EXIST", "nobody"),
        ("graph?node=run:x&depth=0", 400, "INVALID_PARAMETER_VALUE", "depth"),
        ("graph?node=run:x&direction=across", 400, "INVALID_PARAMETER_VALUE", "direction"),
        ("datasets?digest=nothing", 404, "RESOURCE_DOES_NOT_EXIST", "no run has read"),
        ("datasets", 400, "INVALID_PARAMETER_VALUE", "digest"),
    ):
        expect_error(await http.get(f"/api/v1/lineage/{path}"), status, code, message)


def test_runs_of_mlflows_client_carry_the_step_that_they_are_started_in(tmp_path: Path) -> None:
    assert not [tag for tag in resolve_tags() if tag.startswith("mlplat.")]
    checkpoints = Checkpoints(ArtifactStore(f"file://{tmp_path}"), ("node",), 2, 1)
    step = StepContext("p", "r", "train", None, 2, 3, "", checkpoints, lambda progress: None)

    def inside() -> dict[str, str]:
        enter_step(step)
        return dict(resolve_tags())

    tags = contextvars.copy_context().run(inside)
    assert {key: value for key, value in tags.items() if key.startswith("mlplat.")} == {
        "mlplat.attempt": "r/train/-1/2", "mlplat.pipelineRun": "r", "mlplat.step": "train",
    }  # fmt: skip


async def test_what_the_documentation_shows_works(
    server_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = unique("digits")
    text = (ROOT / "docs" / "lineage.md").read_text().replace("digits", name)
    [snippet] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    client, shown = Client(server_url), {}
    monkeypatch.chdir(tmp_path)

    def use() -> None:
        with mlplat.start_run(experiment=unique("lineage")) as run:
            exec(snippet, {"run": run, "frame": pd.DataFrame({"distance": [1.5]})})
        digest = uuid.uuid4().hex
        experiment = client.post("/api/2.0/mlflow/experiments/create", {"name": unique("lineage")})["experiment_id"]
        made = client.post("/api/2.0/mlflow/runs/create", {"experiment_id": experiment})
        run_id = made["run"]["info"]["run_id"]
        data = {"name": name, "digest": digest, "source_type": "local", "source": "{}"}
        client.post("/api/2.0/mlflow/runs/log-inputs", {"run_id": run_id, "datasets": [{"dataset": data}]})
        client.post("/api/2.0/mlflow/registered-models/create", {"name": name})
        version = {"name": name, "source": "s3://b/m", "run_id": run_id}
        client.post("/api/2.0/mlflow/model-versions/create", version)
        alias = {"name": name, "alias": "champion", "version": "1"}
        client.post("/api/2.0/mlflow/registered-models/alias", alias)
        for line in commands:
            filled = line.replace("$DIGEST", digest).replace("$MLPLAT_URL", server_url)
            if filled.startswith("curl"):
                told = subprocess.run(
                    ["bash", "-ec", filled.replace("curl", "curl --fail --silent --show-error", 1)], check=True,
                    capture_output=True, timeout=60,
                )  # fmt: skip
                shown[line] = told.stdout.decode()
                continue
            result = CliRunner().invoke(app, shlex.split(filled)[1:])
            assert result.exception is None, (line, result.exception)
            shown[line] = result.output

    monkeypatch.setenv("MLPLAT_URL", server_url)
    monkeypatch.setenv("COLUMNS", "200")
    await asyncio.to_thread(use)
    outputs = list(shown.values())
    assert "run-" not in outputs[0]
    assert f"{name} version 1 (1.0.0)" in outputs[0]
    assert f"dataset:{name}@" in outputs[1]
    assert outputs[2] == f"{name}/1\n"
    assert f"model-version:{name}/1" in outputs[3]
    assert "run:" in shown["mlplat lineage graph feature-view:driver_stats --direction downstream"]
    assert f"<h1>{name}, version 1" in (tmp_path / "audit.html").read_text()
    assert all(json.loads(line)["eventType"] for line in (tmp_path / "events.jsonl").read_text().splitlines())
