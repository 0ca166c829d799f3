"""``mlplat demo`` as a newcomer sees it."""

from __future__ import annotations

import re

from mlflow import MlflowClient

from mlplat.sdk.client import Client
from tests.platform import Platform


def test_the_demo_ends_well_and_leaves_everything_visible(platform: Platform, client: MlflowClient) -> None:
    output = platform.mlplat("demo", timeout_s=500)
    assert "retrying after: ConnectionError: simulated" in output
    assert "Candidates, 5-fold cross-validation" in output
    registered = re.search(r"registered digits version (\d+) as @champion, test accuracy (0\.9\d+)", output)
    assert registered
    assert "predicted:        0 1 2 3 4 5 6 7 8 9" in output
    assert "mlplat down" in output

    champion = client.get_model_version_by_alias("digits", "champion")
    assert str(champion.version) == registered[1]
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    sweep = client.search_runs([experiment.experiment_id], "attributes.run_name = 'tune-digits'")[0]
    trials = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{sweep.info.run_id}'")
    assert len(trials) == 8
    assert {run.info.status for run in trials} == {"FINISHED"}
    assert {run.data.params["family"] for run in trials} == {"linear", "mlp"}
    for run in trials:
        curve = client.get_metric_history(run.info.run_id, "accuracy")
        assert [point.step for point in curve] == list(range(12))
    source = client.get_run(str(champion.run_id))
    assert f"{source.data.metrics['test_accuracy']:.4f}" == f"{float(registered[2]):.4f}"

    lineage = Client(platform.url).get("/api/v1/lineage/model-versions/digits/@champion")
    assert [(use["name"], use["context"]) for use in lineage["data"]] == [
        ("digits-test", "evaluation"), ("digits-train", "training"),
    ]  # fmt: skip
    assert lineage["run"] == champion.run_id
    assert [pipeline["name"] for pipeline in lineage["pipelines"]] == ["train-digits"]
    steps = {node["node"].rpartition("/")[2] for node in lineage["graph"]["nodes"] if node["kind"] == "step"}
    assert steps == {"load", "split", "tune", "pick", "cross_validate"}
    assert len(lineage["runs"]) >= 9  # with the trials of the sweep
    assert lineage["runs"][0]["packages"]["scikit-learn"]
    assert lineage["version"]["manifest"]
