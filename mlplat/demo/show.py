"""What ``mlplat demo`` does and shows."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlplat.errors import PlatformError
from mlplat.progress import follow
from mlplat.sdk.client import default_url
from mlplat.sdk.pipeline_runs import submit

PIPELINE = Path(__file__).parent / "train_digits.yaml"

#: Runs in a process of its own: mlflow reads its environment once.
_PREDICT = """
import mlflow
from sklearn.datasets import load_digits
digits = load_digits()
model = mlflow.sklearn.load_model("models:/digits@champion")
found = model.predict(digits.data[:10] / 16.0)
print("first ten digits:", *digits.target[:10])
print("predicted:       ", *found)
"""


def run_demo(console: Console) -> None:
    """Brings the platform up, runs the pipeline, and predicts with the registered model.

    Raises:
        PlatformError: a part of it failed.
    """
    began = time.monotonic()
    if subprocess.run([sys.executable, "-m", "mlplat.cli", "up"], check=False).returncode:
        raise PlatformError("the platform did not start")
    console.print("\nsubmitting train-digits (one of its steps fails once on purpose, to show a retry)")
    handle = submit(PIPELINE)
    final = follow(console, handle.events(timeout_s=600), errors=False)
    if final["state"] != "SUCCEEDED":
        raise PlatformError(f"{final['error']}\nsee: mlplat logs {handle.run_id}")
    outputs = {name: step["output"] for name, step in final["steps"].items()}
    _show_results(console, outputs)
    _predict(console)
    _show_links(console, handle.run_id, time.monotonic() - began)


def _show_results(console: Console, outputs: dict[str, Any]) -> None:
    trials = Table(title="\nTrials", title_justify="left", box=None, pad_edge=False)
    for column in ("accuracy", "family", "alpha", "learning rate", "hidden", "run"):
        trials.add_column(column)
    for trial in outputs["tune"]:
        trials.add_row(f"{trial['accuracy']:.4f}", *_config_cells(trial["config"]), trial["run_id"][:8])
    candidates = Table(title="\nCandidates, 5-fold cross-validation", title_justify="left", box=None, pad_edge=False)
    for column in ("accuracy", "family", "alpha", "learning rate", "hidden"):
        candidates.add_column(column)
    for candidate in outputs["evaluate"]["candidates"]:
        candidates.add_row(f"{candidate['cv_accuracy']:.4f}", *_config_cells(candidate["config"]))
    console.print(trials, candidates)
    model = outputs["register"]
    console.print(
        f"\nregistered [bold]{model['name']}[/] version {model['version']} as [bold]@{model['alias']}[/], "
        f"test accuracy {model['test_accuracy']:.4f}"
    )


def _config_cells(config: dict[str, Any]) -> tuple[str, str, str, str]:
    is_mlp = config["family"] == "mlp"
    return (
        config["family"],
        f"{config['alpha']:.1e}",
        f"{config['learning_rate']:.1e}" if is_mlp else "-",
        str(config["hidden"]) if is_mlp else "-",
    )


def _predict(console: Console) -> None:
    console.print("\nloading models:/digits@champion with the mlflow client")
    environment = os.environ | {"MLFLOW_TRACKING_URI": default_url(), "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    done = subprocess.run(
        [sys.executable, "-c", _PREDICT], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise PlatformError(f"mlflow could not use the model: {done.stderr.strip().splitlines()[-1:]}")
    console.print(done.stdout.rstrip())


def _show_links(console: Console, run_id: str, seconds: float) -> None:
    url = default_url()
    console.print(f"\ndone in {seconds:.0f} s. The platform stays up:")
    console.print(f"  {url}/        what is running")
    console.print(f"  {url}/docs    the API")
    console.print(f"  mlplat logs {run_id}    what the steps printed")
    console.print("  mlplat down    stops it (make down); the data stays")
