"""MLflow's autologging against the app."""

from __future__ import annotations

from collections.abc import Iterator

import lightgbm as lgb
import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(80, 3))
LABELS = (FEATURES[:, 0] > 0).astype(int)


@pytest.fixture(autouse=True)
def _autologging_ends_with_the_test() -> Iterator[None]:
    yield
    mlflow.sklearn.autolog(disable=True)
    mlflow.lightgbm.autolog(disable=True)


def test_scikit_learn_logs_params_metrics_dataset_and_model(mlflow_client: MlflowClient) -> None:
    mlflow.sklearn.autolog()
    with mlflow.start_run() as active:
        forest = RandomForestClassifier(n_estimators=5, random_state=0).fit(FEATURES, LABELS)
        forest.score(FEATURES, LABELS)
    run = mlflow_client.get_run(active.info.run_id)
    assert run.data.params["n_estimators"] == "5"
    assert run.data.metrics["training_accuracy_score"] > 0.9
    assert run.inputs.dataset_inputs[0].tags[0].value == "train"
    [output] = run.outputs.model_outputs
    loaded = mlflow.sklearn.load_model(f"models:/{output.model_id}")
    assert (loaded.predict(FEATURES) == forest.predict(FEATURES)).all()
    metrics = {metric.key for metric in mlflow.get_logged_model(output.model_id).metrics}
    assert "training_accuracy_score" in metrics
    assert "training_confusion_matrix.png" in {entry.path for entry in mlflow_client.list_artifacts(run.info.run_id)}


def test_a_parameter_search_logs_its_best_trials_as_children(mlflow_client: MlflowClient) -> None:
    mlflow.sklearn.autolog(max_tuning_runs=2, log_models=False)
    with mlflow.start_run() as active:
        GridSearchCV(RandomForestClassifier(random_state=0), {"n_estimators": [1, 2, 3]}, cv=2).fit(FEATURES, LABELS)
    children = mlflow_client.search_runs(
        [active.info.experiment_id], f"tags.mlflow.parentRunId = '{active.info.run_id}'"
    )
    assert len(children) == 2
    assert all("mean_test_score" in child.data.metrics for child in children)


def test_lightgbm_logs_every_round(mlflow_client: MlflowClient) -> None:
    mlflow.lightgbm.autolog()
    data = lgb.Dataset(FEATURES, LABELS)
    settings = {"objective": "binary", "metric": "binary_logloss", "verbose": -1, "num_threads": 1}
    with mlflow.start_run() as active:
        booster = lgb.train(settings, data, num_boost_round=10, valid_sets=[data], valid_names=["train"])
    run = mlflow_client.get_run(active.info.run_id)
    assert run.data.params["num_boost_round"] == "10"
    history = mlflow_client.get_metric_history(run.info.run_id, "train-binary_logloss")
    assert [point.step for point in history] == list(range(10))
    assert history[0].value > history[-1].value
    assert {one.tags[0].value for one in run.inputs.dataset_inputs} == {"train", "eval"}
    [output] = run.outputs.model_outputs
    loaded = mlflow.lightgbm.load_model(f"models:/{output.model_id}")
    assert np.allclose(loaded.predict(FEATURES), booster.predict(FEATURES))
    assert {entry.path for entry in mlflow_client.list_artifacts(run.info.run_id)} >= {
        "feature_importance_gain.json", "feature_importance_split.json",
    }  # fmt: skip
