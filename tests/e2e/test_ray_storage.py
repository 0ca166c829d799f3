"""Ray Data, Tune and Train keep what they have among the artifacts of a run: drivers of the platform's own cluster."""

from __future__ import annotations

import re

import pytest

from tests.platform import ROOT, Platform

TEXT = (ROOT / "docs" / "artifacts.md").read_text()
SNIPPETS = [body for body in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "ray" in body]
#: The protocol is registered for installations that are older than its entry point.
JOIN = """
import ray

def register():
    import fsspec
    fsspec.register_implementation("mlplat", "mlplat.sdk.filesystem.ArtifactFileSystem")

register()
ray.init(log_to_driver=False, logging_level="ERROR", runtime_env={"worker_process_setup_hook": register})
"""
PREAMBLE = f"""{JOIN}
import fsspec, json, os, tempfile
from pathlib import Path
import mlplat
from mlplat.sdk.client import client_for, default_url
run = mlplat.start_run("storage", capture=mlplat.Capture(console=False, system_metrics=False))
root, files = f"fsspec+mlplat://{{run.run_id}}", fsspec.filesystem("mlplat")
"""
DATA = """
ray.data.DataContext.get_current().enable_progress_bars = False
data = ray.data.range(10_000, override_num_blocks=4).map(lambda row: {"id": row["id"], "square": row["id"] ** 2})
data.write_parquet(f"{root}/data/squares")
data.limit(100).write_csv(f"{run.run_id}/data/csv", filesystem=files)
parts = files.find(f"{run.run_id}/data/squares")
assert len(parts) == 4, parts
read = ray.data.read_parquet(f"{root}/data/squares")
assert read.count() == 10_000
assert read.sum("square") == sum(number ** 2 for number in range(10_000))
assert ray.data.read_csv(f"mlplat://{run.run_id}/data/csv", filesystem=files).count() == 100
reader = mlplat.start_run("storage", capture=mlplat.Capture(console=False, system_metrics=False))
told = reader.read_ray_dataset(f"mlplat://{run.run_id}/data/squares", columns=["id"], feature_views=["numbers"])
assert told.sum("id") == sum(range(10_000)), told
assert reader.read_ray_dataset(f"mlplat://{run.run_id}/data/csv", "hundred").count() == 100
files.pipe_file(f"{run.run_id}/data/x.feather", b"")
try:
    reader.read_ray_dataset(f"mlplat://{run.run_id}/data/x.feather")
except mlplat.errors.InvalidInput as error:
    assert "not feather" in str(error), error
else:
    raise AssertionError("Ray Data reads no Feather")
reader.finish()
found = client_for(default_url()).get("/api/v1/lineage/graph", node=f"run:{reader.run_id}")
assert {node["node"] for node in found["nodes"]} > {f"run:{run.run_id}", "feature-view:numbers"}, found
data.limit(10).write_parquet(f"{root}/data/squares", mode="overwrite")
assert ray.data.read_parquet(f"{root}/data/squares").count() == 10
"""
TUNE = """
from ray import tune

def trial(config):
    start, found = 0, tune.get_checkpoint()
    if found is not None:
        with found.as_directory() as folder:
            start = json.loads((Path(folder) / "state.json").read_text())["step"] + 1
    for step in range(start, 4):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "state.json").write_text(json.dumps({"step": step, "rate": config["rate"]}))
            (Path(folder) / "weights").mkdir()
            (Path(folder) / "weights" / "w.bin").write_bytes(bytes(200_000))
            tune.report({"loss": config["rate"] / (step + 1), "start": start}, checkpoint=tune.Checkpoint(folder))
        if step == 1 and start == 0 and config["rate"] == 2.0:
            raise RuntimeError("this trial dies once")

tuner = tune.Tuner(
    tune.with_resources(trial, {"cpu": 1}),
    param_space={"rate": tune.grid_search([1.0, 2.0])},
    run_config=tune.RunConfig(
        name="sweep", storage_path=f"{root}/tune", failure_config=tune.FailureConfig(max_failures=1), verbose=0,
        checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
    ),
)
results = tuner.fit()
assert not results.errors, results.errors
assert sorted(result.metrics["loss"] for result in results) == [0.25, 0.5]
assert {result.config["rate"]: result.metrics["start"] for result in results} == {1.0: 0, 2.0: 2}
best = results.get_best_result("loss", "min")
assert best.path.startswith(f"{run.run_id}/tune/sweep/"), best.path
with best.checkpoint.as_directory() as folder:
    assert json.loads((Path(folder) / "state.json").read_text()) == {"step": 3, "rate": 1.0}
    assert (Path(folder) / "weights" / "w.bin").stat().st_size == 200_000
kept = files.glob(f"{run.run_id}/tune/sweep/trial_*/checkpoint_*")
assert len(kept) == 2, kept
assert tune.Tuner.can_restore(f"{root}/tune/sweep")
again = tune.Tuner.restore(f"{root}/tune/sweep", trainable=trial).fit()
assert sorted(result.metrics["loss"] for result in again) == [0.25, 0.5]
"""
TRAIN = """
import pyarrow.fs
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

def worker(config):
    rank = ray.train.get_context().get_world_rank()
    found = ray.train.get_checkpoint()
    for epoch in range(2):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / f"rank-{rank}.json").write_text(json.dumps({"epoch": epoch}))
            ray.train.report({"epoch": epoch}, checkpoint=ray.train.Checkpoint(folder))

storage = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files))
for given in ({"storage_path": f"{root}/train"}, {"storage_path": f"{run.run_id}/own", "storage_filesystem": storage}):
    result = DataParallelTrainer(
        worker, scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(name="fit", **given),
    ).fit()
    assert result.checkpoint.path.startswith(given["storage_path"].removeprefix("fsspec+mlplat://") + "/fit/")
    with result.checkpoint.as_directory() as folder:
        states = {file.name: json.loads(file.read_text()) for file in Path(folder).iterdir()}
    assert states == {"rank-0.json": {"epoch": 1}, "rank-1.json": {"epoch": 1}}, states
"""
TORCH = """
import torch, ray.train.torch

def worker(config):
    model = ray.train.torch.prepare_model(torch.nn.Linear(4, 1))
    found, start = ray.train.get_checkpoint(), 0
    if found is not None:
        with found.as_directory() as folder:
            start = torch.load(Path(folder) / "model.pt")["epoch"] + 1
    for epoch in range(start, 3):
        model(torch.ones(8, 4)).pow(2).mean().backward()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if ray.train.get_context().get_world_rank() == 0:
                torch.save({"epoch": epoch, "start": start, "weights": model.state_dict()}, Path(folder) / "model.pt")
                checkpoint = ray.train.Checkpoint(folder)
            ray.train.report({"epoch": epoch}, checkpoint=checkpoint)
        if epoch == 1 and start == 0:
            raise RuntimeError("this worker dies once")

result = ray.train.torch.TorchTrainer(
    worker, scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
    run_config=ray.train.RunConfig(
        name="fit", storage_path=f"{root}/train", failure_config=ray.train.FailureConfig(max_failures=1)
    ),
).fit()
with fsspec.open(f"mlplat://{result.checkpoint.path}/model.pt") as file:
    state = torch.load(file)
assert state["epoch"] == 2 and state["start"] > 0 and len(state["weights"]) == 2, state
"""


def keep_files(platform: Platform, driver: str) -> None:
    """Runs a driver with a run of its own, ``run``, whose artifacts are at ``root``."""
    environment = platform.ray_environment | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    said = platform.python(f"{PREAMBLE}{driver}\nrun.finish()\nprint('done')", timeout_s=300, **environment)
    assert "done" in said.splitlines()


@pytest.mark.parametrize("driver", [DATA, TUNE, TRAIN], ids=["data", "tune", "train"])
def test_a_driver_keeps_its_files_in_a_run(platform: Platform, driver: str) -> None:
    keep_files(platform, driver)


def test_pytorch_trains_and_resumes_from_a_run(platform: Platform) -> None:
    pytest.importorskip("torch")
    keep_files(platform, TORCH)


def test_a_run_that_is_not_there_is_told_before_anything_runs(platform: Platform) -> None:
    driver = f"""{PREAMBLE}
from ray import tune
try:
    tune.Tuner(lambda config: None, run_config=tune.RunConfig(storage_path="fsspec+mlplat://nowhere/x")).fit()
except FileNotFoundError as error:
    assert "has no such run" in str(error), error
    print("done")
"""
    assert "done" in platform.python(driver, timeout_s=120, **platform.ray_environment).splitlines()


@pytest.mark.parametrize("number", range(2))
def test_a_snippet_of_the_documentation_runs(platform: Platform, number: int) -> None:
    assert len(SNIPPETS) == 2
    platform.python(f"{JOIN}{SNIPPETS[number]}", timeout_s=300, **platform.ray_environment)
