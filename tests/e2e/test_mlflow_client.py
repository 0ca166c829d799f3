"""The unmodified mlflow client against the platform."""

from __future__ import annotations

import math
import time
import uuid
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException


@pytest.fixture
def experiment(client: MlflowClient) -> str:
    """The id of a fresh experiment."""
    return str(client.create_experiment(f"e2e-{uuid.uuid4().hex[:8]}"))


def test_the_fluent_api_logs_a_run(client: MlflowClient, experiment: str, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("hello")
    with mlflow.start_run(experiment_id=experiment, run_name="fluent") as active:
        mlflow.log_param("rate", 0.1)
        mlflow.log_params({"depth": 3, "kind": "tree"})
        for step in range(5):
            mlflow.log_metric("loss", 1 / (step + 1), step=step)
        mlflow.log_metrics({"accuracy": 0.5, "f1": 0.25}, step=4)
        mlflow.set_tag("team", "blue")
        mlflow.log_artifact(str(note), "notes")
        mlflow.log_dict({"a": [1, 2]}, "config.json")
    run = client.get_run(active.info.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "fluent"
    assert run.data.params == {"rate": "0.1", "depth": "3", "kind": "tree"}
    assert run.data.metrics == {"loss": 0.2, "accuracy": 0.5, "f1": 0.25}
    assert run.data.tags["team"] == "blue"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / (step + 1)) for step in range(5)]
    assert [entry.path for entry in client.list_artifacts(run.info.run_id)] == ["config.json", "notes"]
    assert [entry.path for entry in client.list_artifacts(run.info.run_id, "notes")] == ["notes/note.txt"]
    local = client.download_artifacts(run.info.run_id, "notes/note.txt", str(tmp_path))
    assert Path(local).read_text() == "hello"
    assert mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/config.json") == {"a": [1, 2]}


def test_a_batch_is_read_back_at_once(client: MlflowClient, experiment: str) -> None:
    run_id = client.create_run(experiment).info.run_id
    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[Metric("m", float(step), now + step, step) for step in range(1000)],
        params=[],
        tags=[],
    )
    assert client.get_run(run_id).data.metrics["m"] == 999.0
    assert len(client.get_metric_history(run_id, "m")) == 1000


def test_not_a_number_and_infinity_come_back(client: MlflowClient, experiment: str) -> None:
    run_id = client.create_run(experiment).info.run_id
    client.log_metric(run_id, "nan", math.nan)
    client.log_metric(run_id, "inf", math.inf)
    metrics = client.get_run(run_id).data.metrics
    assert math.isnan(metrics["nan"])
    assert metrics["inf"] == math.inf


def test_a_param_cannot_be_changed(client: MlflowClient, experiment: str) -> None:
    run_id = client.create_run(experiment).info.run_id
    client.log_param(run_id, "rate", "1")
    client.log_param(run_id, "rate", "1")
    with pytest.raises(MlflowException, match="Changing param values is not allowed"):
        client.log_batch(run_id, params=[Param("rate", "2")], tags=[RunTag("seen", "yes")], metrics=[])
    assert "seen" not in client.get_run(run_id).data.tags


def test_search_runs_filters_and_orders(client: MlflowClient, experiment: str) -> None:
    for index in range(4):
        with mlflow.start_run(experiment_id=experiment, run_name=f"r{index}"):
            mlflow.log_param("group", "even" if index % 2 == 0 else "odd")
            mlflow.log_metric("score", index)
    found = client.search_runs(
        [experiment], "metrics.score > 0 AND params.group = 'odd'", order_by=["metrics.score DESC"]
    )
    assert [run.info.run_name for run in found] == ["r3", "r1"]
    frame = mlflow.search_runs(experiment_ids=[experiment], order_by=["metrics.score ASC"])
    assert list(frame["metrics.score"]) == [0.0, 1.0, 2.0, 3.0]
    page = client.search_runs([experiment], max_results=3)
    assert len(page) == 3
    assert len(client.search_runs([experiment], max_results=3, page_token=page.token)) == 1


def test_deleting_and_restoring(client: MlflowClient, experiment: str) -> None:
    run_id = client.create_run(experiment).info.run_id
    client.delete_run(run_id)
    with pytest.raises(MlflowException, match="must be in the 'active' state"):
        client.log_metric(run_id, "m", 1)
    client.restore_run(run_id)
    client.log_metric(run_id, "m", 1)
    client.delete_experiment(experiment)
    assert client.get_experiment(experiment).lifecycle_stage == "deleted"
    client.restore_experiment(experiment)
    assert client.search_runs([experiment])


def test_the_registry_from_version_to_alias(client: MlflowClient, experiment: str) -> None:
    name = f"model-{uuid.uuid4().hex[:8]}"
    with mlflow.start_run(experiment_id=experiment) as active:
        mlflow.log_text("weights", "model/weights.txt")
    client.create_registered_model(name, description="a test")
    first = client.create_model_version(name, f"runs:/{active.info.run_id}/model", active.info.run_id)
    second = client.create_model_version(name, f"runs:/{active.info.run_id}/model", active.info.run_id)
    assert (str(first.version), str(second.version)) == ("1", "2")
    client.set_registered_model_alias(name, "champion", "1")
    client.set_registered_model_alias(name, "champion", "2")
    champion = client.get_model_version_by_alias(name, "champion")
    assert str(champion.version) == "2"
    assert list(champion.aliases) == ["champion"]
    client.set_model_version_tag(name, "2", "checked", "yes")
    assert client.get_model_version(name, "2").tags == {
        "checked": "yes", "mlplat.semantic_version": "1.0.1",
    }  # fmt: skip
    assert [str(version.version) for version in client.search_model_versions(f"name='{name}'")] == ["2", "1"]
    local = mlflow.artifacts.download_artifacts(f"models:/{name}@champion")
    assert (Path(local) / "weights.txt").read_text() == "weights"
    client.delete_registered_model_alias(name, "champion")
    with pytest.raises(MlflowException, match="alias champion not found"):
        client.get_model_version_by_alias(name, "champion")
    client.delete_registered_model(name)
    with pytest.raises(MlflowException, match="not found"):
        client.get_registered_model(name)
