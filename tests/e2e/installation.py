"""What is in an installation, as its users see it, and what is put into one to be found again."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from mlplat.sdk.client import Client
from tests.platform import Platform

#: Runs, points, artifacts of all kinds, datasets, a registered model, a nested run, a deleted run and an open one.
WORK = textwrap.dedent("""\
    import pandas
    import mlflow
    import mlplat

    with mlplat.start_run("kept", params={"rate": 0.1, "note": "tab\\tand 漢"}) as run:
        for step in range(500):
            run.log({"loss": 1 / (step + 1), "acc": step / 500}, step=step)
        run.log({"odd": float("nan")}, step=0)
        run.log({"odd": float("inf")}, step=1)
        run.set_tag("team", "vision")
        run.log_text("weights " * 1000, "model/weights.txt")
        run.log_dict({"inputs": ["a"]}, "model/MLmodel.json")
        run.log_text("", "empty.txt")
        run.log_dataset(pandas.DataFrame({"a": [1, 2, 3]}), name="numbers")
        print("what the run printed")
    version = mlplat.register_model("kept-model", run, "model", alias="champion")
    client = mlflow.MlflowClient()
    client.set_model_version_tag("kept-model", str(version), "by", "ann")
    experiment = client.get_experiment_by_name("kept")
    open_run = client.create_run(experiment.experiment_id, tags={"mlflow.parentRunId": run.run_id})
    client.log_metric(open_run.info.run_id, "loss", 0.5)
    deleted = client.create_run(experiment.experiment_id)
    client.log_metric(deleted.info.run_id, "loss", 9.0)
    client.delete_run(deleted.info.run_id)
    """)
PIPELINE = """\
name: guarded
steps:
  first:
    command: ["echo", "made before"]
  sign_off:
    needs: [first]
    approval: {message: "Go on?"}
  last:
    needs: [sign_off]
    command: ["echo", "made after"]
"""
#: Takes for ever, unless there is a file.
SLOW = """\
name: slow
parameters:
  file: {type: str}
steps:
  only:
    command: ["sh", "-c", "test -e ${{ params.file }} || sleep 900"]
"""
TRIGGERED = """\
name: triggered
parameters:
  version: {type: int}
steps:
  only:
    command: ["echo", "version ${{ params.version }}"]
"""


def write_definitions(folder: Path) -> None:
    """The pipelines, in files."""
    (folder / "slow.yaml").write_text(SLOW)
    (folder / "guarded.yaml").write_text(PIPELINE)
    (folder / "triggered.yaml").write_text(TRIGGERED)


def picture(platform: Platform, but: str) -> dict[str, Any]:
    """Everything, as told over HTTP, but for one pipeline run, which changes by itself."""
    client, api = MlflowClient(platform.url), Client(platform.url)
    found: dict[str, Any] = {"experiments": {}, "runs": {}, "models": {}, "pipeline runs": {}}
    for experiment in client.search_experiments():
        found["experiments"][experiment.name] = (experiment.experiment_id, experiment.tags, experiment.lifecycle_stage)
        for run in client.search_runs([experiment.experiment_id], run_view_type=3):
            found["runs"][run.info.run_id] = _run(client, run)
    for model in client.search_registered_models():
        versions = client.search_model_versions(f"name = '{model.name}'")
        found["models"][model.name] = (
            model.aliases,
            [(each.version, each.run_id, each.tags, each.source, each.creation_timestamp) for each in versions],
            [api.get(f"/api/v1/models/{model.name}/versions/{each.version}/verify") for each in versions],
            api.get(f"/api/v1/models/{model.name}/history"),
        )
    for run in api.get("/api/v1/pipeline-runs"):
        if run["run_id"] == but:
            continue
        whole = api.get(f"/api/v1/pipeline-runs/{run['run_id']}")
        found["pipeline runs"][run["run_id"]] = (whole, platform.mlplat("logs", run["run_id"]))
    found["events"] = api.get("/api/v1/models/events/log", limit=100)["events"]
    found["schedules"] = api.get("/api/v1/schedules")
    found["triggers"] = api.get("/api/v1/triggers")
    return found


def _run(client: MlflowClient, run: Any) -> tuple[Any, ...]:
    info, run_id = run.info, run.info.run_id
    history = {
        key: [(point.step, point.timestamp, str(point.value)) for point in client.get_metric_history(run_id, key)]
        for key in run.data.metrics
    }
    datasets = [each.dataset.digest for each in run.inputs.dataset_inputs]
    about = (info.run_name, info.status, info.start_time, info.end_time, info.lifecycle_stage, info.artifact_uri)
    return about, run.data.params, run.data.tags, history, datasets, _artifacts(client, run_id)


def _artifacts(client: MlflowClient, run_id: str, path: str | None = None) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for entry in client.list_artifacts(run_id, path):
        if entry.is_dir:
            found |= _artifacts(client, run_id, entry.path)
        else:
            found[entry.path] = Path(client.download_artifacts(run_id, entry.path)).read_bytes()
    return found
