"""The unmodified mlflow client against the app, over a real socket: everything but the registry."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Run,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from sklearn.linear_model import LogisticRegression, Ridge

from tests.contract.chdb import unique

FEATURES = np.array([[0.0], [1.0], [2.0], [3.0]])
LABELS = np.array([0, 0, 1, 1])


def _read(run: Run) -> Run:
    return mlflow.get_run(run.info.run_id)


def _frame() -> pd.DataFrame:
    return pd.DataFrame({"x": [1.0, 2.0, 3.0], "y": [1, 0, 1]})


def test_the_fluent_api_logs_values_of_every_kind(mlflow_client: MlflowClient, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("hello")
    figure = Figure()
    figure.subplots().plot([1, 2])
    with mlflow.start_run(run_name="values", tags={"team": "red"}, description="what it is") as run:
        mlflow.log_params({"rate": 0.1, "kind": "tree"})
        mlflow.log_metrics({"loss": 0.5, "nan": math.nan}, step=3)
        mlflow.log_artifact(str(note), "notes")
        mlflow.log_artifacts(str(tmp_path), "folder")
        mlflow.log_text("text", "text.txt")
        mlflow.log_dict({"a": [1]}, "dict.json")
        mlflow.log_figure(figure, "figure.png")
        mlflow.log_image(np.zeros((4, 4, 3), dtype=np.uint8), "image.png")
        mlflow.log_image(np.zeros((4, 4, 3), dtype=np.uint8), key="seen", step=1)
        mlflow.log_table({"question": ["a"], "answer": ["b"]}, "table.json")
        mlflow.log_table({"question": ["c"], "answer": ["d"]}, "table.json")
    found = _read(run)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"rate": "0.1", "kind": "tree"}
    assert found.data.metrics["loss"] == 0.5
    assert math.isnan(found.data.metrics["nan"])
    assert (found.data.tags["team"], found.data.tags["mlflow.note.content"]) == ("red", "what it is")
    names = {entry.path for entry in mlflow_client.list_artifacts(run.info.run_id)}
    assert names == {"notes", "folder", "text.txt", "dict.json", "figure.png", "image.png", "images", "table.json"}
    images = [entry.path for entry in mlflow_client.list_artifacts(run.info.run_id, "images")]
    assert any(path.startswith("images/seen") and path.endswith(".png") for path in images), images
    uri = run.info.artifact_uri
    assert mlflow.artifacts.load_text(f"{uri}/notes/note.txt") == "hello"
    assert mlflow.artifacts.load_dict(f"{uri}/dict.json") == {"a": [1]}
    assert mlflow.artifacts.load_image(f"{uri}/image.png").size == (4, 4)
    table = mlflow.load_table("table.json", run_ids=[run.info.run_id])
    assert list(table["question"]) == ["a", "c"]
    local = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=str(tmp_path / "copy"))
    assert (Path(local) / "folder" / "note.txt").read_text() == "hello"


def test_runs_nest(mlflow_client: MlflowClient) -> None:
    with mlflow.start_run() as parent, mlflow.start_run(nested=True) as child:
        mlflow.log_metric("m", 1)
    assert _read(child).data.tags["mlflow.parentRunId"] == parent.info.run_id
    children = mlflow_client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )
    assert [run.info.run_id for run in children] == [child.info.run_id]


def test_what_is_logged_asynchronously_arrives(mlflow_client: MlflowClient) -> None:
    with mlflow.start_run() as run:
        waiting = [mlflow.log_metric("m", step, step=step, synchronous=False) for step in range(50)]
        waiting.append(mlflow.log_params({"p": 1}, synchronous=False))
        waiting.append(mlflow.set_tag("t", "1", synchronous=False))
        for one in waiting:
            one.wait()
    found = _read(run)
    assert (found.data.metrics["m"], found.data.params, found.data.tags["t"]) == (49, {"p": "1"}, "1")
    assert len(mlflow_client.get_metric_history(run.info.run_id, "m")) == 50


def test_a_failing_run_is_failed_and_may_be_resumed(mlflow_client: MlflowClient) -> None:
    def fail() -> Any:
        with mlflow.start_run() as run:
            ids.append(run.info.run_id)
            raise ArithmeticError

    ids: list[str] = []
    with pytest.raises(ArithmeticError):
        fail()
    assert mlflow.get_run(ids[0]).info.status == "FAILED"
    with mlflow.start_run(run_id=ids[0]):
        mlflow.log_param("again", 1)
    found = mlflow_client.get_run(ids[0])
    assert (found.info.status, found.data.params) == ("FINISHED", {"again": "1"})
    mlflow_client.update_run(ids[0], status="KILLED", name="renamed")
    found = mlflow_client.get_run(ids[0])
    assert (found.info.status, found.info.run_name, found.data.tags["mlflow.runName"]) == (
        "KILLED", "renamed", "renamed",
    )  # fmt: skip


def test_experiments_are_tagged_searched_deleted_and_restored(mlflow_client: MlflowClient) -> None:
    name = unique("fluent")
    number = mlflow.create_experiment(name, tags={"team": "red"})
    mlflow.set_experiment(name)
    mlflow.set_experiment_tags({"stage": "dev", "owner": "ann"})
    found = mlflow.get_experiment(number)
    assert found.tags == {"team": "red", "stage": "dev", "owner": "ann"}
    mlflow_client.delete_experiment_tag(number, "owner")
    assert "owner" not in mlflow.get_experiment(number).tags
    assert number in [one.experiment_id for one in mlflow.search_experiments()]
    mlflow.delete_experiment(number)
    assert mlflow.get_experiment_by_name(name).lifecycle_stage == "deleted"
    assert number not in [one.experiment_id for one in mlflow.search_experiments()]
    assert number in [one.experiment_id for one in mlflow.search_experiments(view_type=ViewType.DELETED_ONLY)]
    with pytest.raises(MlflowException, match="No Experiment with id="):
        mlflow.delete_experiment(number)
    mlflow_client.restore_experiment(number)
    mlflow_client.rename_experiment(number, f"{name}-renamed")
    assert mlflow.get_experiment(number).name == f"{name}-renamed"


def test_datasets_are_inputs_of_runs(mlflow_client: MlflowClient) -> None:
    train = mlflow.data.from_pandas(_frame(), source="s3://bucket/train.csv", name="train", targets="y")
    test = mlflow.data.from_numpy(FEATURES, name="test")
    with mlflow.start_run() as run:
        mlflow.log_input(train, context="training", tags={"fold": "1"})
        mlflow.log_input(train, context="again")
        mlflow.log_input(test)
    inputs = _read(run).inputs.dataset_inputs
    assert [(one.dataset.name, one.dataset.digest) for one in inputs] == [
        ("train", train.digest), ("test", test.digest),
    ]  # fmt: skip
    assert {tag.key: tag.value for tag in inputs[0].tags} == {"mlflow.data.context": "training", "fold": "1"}
    assert inputs[0].dataset.schema == train.to_dict()["schema"]
    assert mlflow.data.get_source(inputs[0]).uri == "s3://bucket/train.csv"
    [found] = mlflow_client.search_runs([run.info.experiment_id])
    assert len(found.inputs.dataset_inputs) == 2


def test_the_first_to_log_a_dataset_describes_it(mlflow_client: MlflowClient) -> None:
    experiment = mlflow_client.create_experiment(unique("datasets"))
    runs = [mlflow_client.create_run(experiment).info.run_id for _ in range(2)]
    for number, run_id in enumerate(runs):
        dataset = Dataset("d", "1", "local", "here", schema=f"schema {number}")
        mlflow_client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", f"use {number}")])])
    inputs = [mlflow_client.get_run(run_id).inputs.dataset_inputs[0] for run_id in runs]
    assert [one.dataset.schema for one in inputs] == ["schema 0", "schema 0"]
    assert [one.tags[0].value for one in inputs] == ["use 0", "use 1"]


def test_a_model_is_logged_found_and_loaded(mlflow_client: MlflowClient) -> None:
    model = LogisticRegression().fit(FEATURES, LABELS)
    with mlflow.start_run() as run:
        mlflow.log_params({"depth": 3})
        signature = infer_signature(FEATURES, model.predict(FEATURES))
        info = mlflow.sklearn.log_model(model, name="classifier", signature=signature, params={"c": 1.0}, step=7)
        mlflow.log_metric("accuracy", 0.75, step=7, model_id=info.model_id)
    logged = mlflow.get_logged_model(info.model_id)
    assert (logged.name, logged.status, logged.source_run_id) == (
        "classifier", LoggedModelStatus.READY, run.info.run_id,
    )  # fmt: skip
    assert logged.params["c"] == "1.0"
    assert [(metric.key, metric.value, metric.run_id) for metric in logged.metrics] == [
        ("accuracy", 0.75, run.info.run_id),
    ]  # fmt: skip
    [output] = _read(run).outputs.model_outputs
    assert (output.model_id, output.step) == (info.model_id, 7)
    for uri in (info.model_uri, f"models:/{info.model_id}", f"runs:/{run.info.run_id}/classifier"):
        assert list(mlflow.pyfunc.load_model(uri).predict(FEATURES)) == [0, 0, 1, 1]
    assert mlflow.sklearn.load_model(info.model_uri).coef_.shape == (1, 1)
    paths = {entry.path for entry in mlflow_client.list_artifacts(run.info.run_id, "classifier")}
    assert "classifier/MLmodel" in paths
    assert mlflow_client.list_logged_model_artifacts(info.model_id)
    local = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/classifier/MLmodel")
    assert "sklearn" in Path(local).read_text()


def test_a_logged_model_is_registered_and_loaded_by_version_and_alias(mlflow_client: MlflowClient) -> None:
    name = unique("model")
    with mlflow.start_run():
        info = mlflow.sklearn.log_model(Ridge().fit(FEATURES, LABELS), name="ridge", registered_model_name=name)
    mlflow_client.set_registered_model_alias(name, "champion", "1")
    assert mlflow_client.get_model_version(name, "1").source == f"models:/{info.model_id}"
    for uri in (f"models:/{name}/1", f"models:/{name}@champion"):
        assert mlflow.sklearn.load_model(uri).predict(FEATURES).shape == (4,)


def test_models_are_loaded_by_semantic_version(mlflow_client: MlflowClient) -> None:
    name = unique("model")
    wider = np.hstack([FEATURES, FEATURES])
    with mlflow.start_run():
        for features in (FEATURES, FEATURES, wider):
            model = Ridge().fit(features, LABELS)
            signature = infer_signature(features, model.predict(features))
            mlflow.sklearn.log_model(model, name="ridge", signature=signature, registered_model_name=name)
    found = {version.version: version.tags["mlplat.semantic_version"] for version in
             mlflow_client.search_model_versions(f"name = '{name}'")}  # fmt: skip
    assert found == {"1": "1.0.0", "2": "1.0.1", "3": "2.0.0"}
    for spec, taken in (("^1.0", FEATURES), ("1.0.0", FEATURES), ("2.x", wider), ("latest", wider)):
        assert mlflow.sklearn.load_model(f"models:/{name}/{spec}").predict(taken).shape == (4,)
    with pytest.raises(MlflowException, match=r"stage '\^7'"):
        mlflow.sklearn.load_model(f"models:/{name}/^7")
    copied = mlflow_client.copy_model_version(f"models:/{name}/3", unique("copy"))
    assert copied.tags["mlplat.semantic_version"] == "1.0.0"


def test_models_are_loaded_by_stage(mlflow_client: MlflowClient) -> None:
    name = unique("model")
    with mlflow.start_run():
        for _ in range(2):
            mlflow.sklearn.log_model(Ridge().fit(FEATURES, LABELS), name="ridge", registered_model_name=name)
    mlflow_client.transition_model_version_stage(name, "1", "Production")
    moved = mlflow_client.transition_model_version_stage(name, "2", "production", archive_existing_versions=True)
    assert moved.current_stage == "Production"
    assert mlflow_client.get_model_version(name, "1").current_stage == "Archived"
    assert mlflow.sklearn.load_model(f"models:/{name}/Production").predict(FEATURES).shape == (4,)
    latest = mlflow_client.get_latest_versions(name, stages=["Production", "Archived"])
    assert {(found.version, found.current_stage) for found in latest} == {("2", "Production"), ("1", "Archived")}
    with pytest.raises(MlflowException, match="Invalid Model Version stage: live"):
        mlflow_client.transition_model_version_stage(name, "1", "live")


def test_a_dataset_tells_a_models_metrics_apart(mlflow_client: MlflowClient) -> None:
    train = mlflow.data.from_pandas(_frame(), name="train")
    test = mlflow.data.from_pandas(_frame().head(2), name="test")
    with mlflow.start_run() as run:
        model = mlflow.initialize_logged_model("model", source_run_id=run.info.run_id)
        mlflow.log_metric("accuracy", 0.9, model_id=model.model_id, dataset=train)
        mlflow.log_metrics({"accuracy": 0.7, "f1": 0.6}, model_id=model.model_id, dataset=test)
    found = mlflow_client.get_logged_model(model.model_id)
    assert {(metric.key, metric.dataset_name, metric.dataset_digest, metric.value) for metric in found.metrics} == {
        ("accuracy", "train", train.digest, 0.9), ("accuracy", "test", test.digest, 0.7),
        ("f1", "test", test.digest, 0.6),
    }  # fmt: skip
    scope: dict[str, Any] = {"experiment_ids": [run.info.experiment_id], "output_format": "list"}
    on_test = [{"dataset_name": "test", "dataset_digest": test.digest}]
    assert len(mlflow.search_logged_models(**scope, filter_string="metrics.accuracy > 0.8")) == 1
    assert mlflow.search_logged_models(**scope, filter_string="metrics.accuracy > 0.8", datasets=on_test) == []
    assert len(mlflow.search_logged_models(**scope, datasets=on_test)) == 1


def test_logged_models_are_searched_ordered_and_paged(mlflow_client: MlflowClient) -> None:
    experiment = mlflow_client.create_experiment(unique("models"))
    run_id = mlflow_client.create_run(experiment).info.run_id
    for number in range(5):
        model = mlflow_client.create_logged_model(
            experiment, name=f"model-{number}", source_run_id=run_id, tags={"even": str(number % 2 == 0)},
            params={"depth": str(number)}, model_type="tree",
        )  # fmt: skip
        mlflow_client.log_batch(run_id, [Metric("score", 10 - number, 1, 0, model_id=model.model_id)])
        mlflow_client.finalize_logged_model(model.model_id, "READY" if number else "FAILED")

    def names(**arguments: Any) -> list[str]:
        found = mlflow.search_logged_models(experiment_ids=[experiment], output_format="list", **arguments)
        return [model.name for model in found]

    assert names() == [f"model-{number}" for number in (4, 3, 2, 1, 0)]
    assert names(filter_string="tags.even = 'True' AND params.depth != '0'") == ["model-4", "model-2"]
    assert names(filter_string="metrics.score >= 9 AND status = 'READY'") == ["model-1"]
    assert names(filter_string=f"name LIKE 'model-%' AND source_run_id = '{run_id}'", max_results=2) == [
        "model-4", "model-3",
    ]  # fmt: skip
    assert names(order_by=[{"field_name": "metrics.score"}]) == [f"model-{number}" for number in (4, 3, 2, 1, 0)]
    assert names(order_by=[{"field_name": "name", "ascending": True}])[0] == "model-0"
    page = mlflow_client.search_logged_models([experiment], max_results=3)
    rest = mlflow_client.search_logged_models([experiment], max_results=3, page_token=page.token)
    assert [model.name for model in [*page, *rest]] == names()
    assert rest.token is None
    frame = mlflow.search_logged_models(experiment_ids=[experiment])
    assert len(frame) == 5


def test_a_logged_model_is_changed_and_deleted(mlflow_client: MlflowClient) -> None:
    experiment = mlflow_client.create_experiment(unique("models"))
    model = mlflow_client.create_logged_model(experiment, params={f"p{number}": str(number) for number in range(250)})
    assert (model.status, len(model.params)) == (LoggedModelStatus.PENDING, 250)
    mlflow.set_logged_model_tags(model.model_id, {"a": "1", "b/c": "2"})
    mlflow.delete_logged_model_tag(model.model_id, "b/c")
    mlflow.log_model_params({"late": "1"}, model.model_id)
    found = mlflow.get_logged_model(model.model_id)
    assert (found.tags, found.params["late"]) == ({"a": "1"}, "1")
    mlflow_client.delete_logged_model(model.model_id)
    with pytest.raises(MlflowException, match=f"Logged model with ID '{model.model_id}' not found"):
        mlflow.get_logged_model(model.model_id)


def test_models_go_into_runs_and_come_out_of_them(mlflow_client: MlflowClient) -> None:
    experiment = mlflow_client.create_experiment(unique("links"))
    run_id = mlflow_client.create_run(experiment).info.run_id
    teacher, student = (mlflow_client.create_logged_model(experiment, name=name).model_id for name in "ab")
    mlflow_client.log_inputs(run_id, models=[LoggedModelInput(teacher)])
    for step in (1, 2):
        mlflow_client.log_outputs(run_id, [LoggedModelOutput(student, step)])
    run = mlflow_client.get_run(run_id)
    assert [one.model_id for one in run.inputs.model_inputs] == [teacher]
    assert [(one.model_id, one.step) for one in run.outputs.model_outputs] == [(student, 2)]
    with pytest.raises(MlflowException, match="Logged model with ID 'm-0' not found"):
        mlflow_client.log_inputs(run_id, models=[LoggedModelInput("m-0")])


def test_a_batch_that_names_an_unknown_model_writes_nothing(mlflow_client: MlflowClient) -> None:
    with mlflow.start_run() as run, pytest.raises(MlflowException, match="Logged model with ID 'm-0' not found"):
        mlflow_client.log_batch(
            run.info.run_id, [Metric("m", 1, 1, 0, model_id="m-0")], params=[mlflow.entities.Param("p", "1")]
        )
    found = _read(run)
    assert (found.data.params, found.data.metrics) == ({}, {})


def test_evaluation_attaches_its_metrics_to_the_model(mlflow_client: MlflowClient) -> None:
    frame = pd.DataFrame({"x": FEATURES[:, 0], "label": LABELS})
    with mlflow.start_run() as run:
        info = mlflow.sklearn.log_model(LogisticRegression().fit(frame[["x"]], LABELS), name="model")
        result = mlflow.models.evaluate(
            info.model_uri, mlflow.data.from_pandas(frame, targets="label", name="eval"), model_type="classifier",
            evaluator_config={"log_explainer": False},
        )  # fmt: skip
    assert result.metrics["accuracy_score"] == 1.0
    metrics = {metric.key: metric for metric in mlflow.get_logged_model(info.model_id).metrics}
    assert (metrics["accuracy_score"].value, metrics["accuracy_score"].dataset_name) == (1.0, "eval")
    assert _read(run).inputs.dataset_inputs[0].dataset.name == "eval"
