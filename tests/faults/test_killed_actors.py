"""``kill -9`` on each part of the platform while the demo's pipeline runs: it still ends correctly."""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient

import mlplat
from mlplat.demo.digits import EPOCHS
from mlplat.demo.show import PIPELINE
from mlplat.sdk.pipeline_runs import PipelineRunHandle
from tests.platform import Platform, eventually

#: A smaller sweep than the demo's default: the faults hit the same steps in a third of the time.
PARAMS = {"trials": 2, "folds": 2}
ACTORS = ["metric-shard-0", "registry-coordinator", "pipeline-scheduler", "run-executor-0", "gateway"]


def _rows(platform: Platform) -> dict[str, dict[str, Any]]:
    try:
        answer = httpx.get(f"{platform.url}/api/v1/status", timeout=10, trust_env=False)
        return {row["actor"]: row for row in answer.json()} if answer.status_code == 200 else {}
    except (httpx.HTTPError, ValueError):
        return {}


def _kill(platform: Platform, actor: str) -> int:
    pid: int = eventually(lambda: _rows(platform).get(actor, {}).get("pid"), what=f"{actor} has a pid")
    os.kill(pid, signal.SIGKILL)
    return pid


def _wait_for(handle: PipelineRunHandle, step: str, *states: str) -> None:
    eventually(lambda: handle.status()["steps"][step]["state"] in states, 90, f"{step} is {states}")


@pytest.mark.parametrize("actor", ACTORS)
def test_the_demo_survives_the_death_of(actor: str, platform: Platform) -> None:
    handle = mlplat.submit(PIPELINE, PARAMS, url=platform.url)
    _wait_for(handle, "tune", "RUNNING")
    # In the middle of the sweep, when trials write metrics and every actor has work.
    client = MlflowClient(platform.url)
    experiment = client.get_experiment_by_name("digits")
    ours = f"tags.`mlplat.pipelineRun` = '{handle.run_id}'"
    if experiment is not None:
        eventually(
            lambda: client.search_runs([experiment.experiment_id], f"{ours} AND metrics.accuracy > 0"),
            60,
            "a trial has logged a point",
        )
    pid = _kill(platform, actor)
    final = handle.wait(timeout_s=120)
    assert final["state"] == "SUCCEEDED", final["error"]

    replacement = eventually(
        lambda: (row := _rows(platform).get(actor)) and row["health"] == "ok" and row["pid"] != pid and row, 30
    )
    assert actor == "gateway" or replacement["restarts"] >= 1  # Serve replaces replicas instead of restarting them

    _check_attempts(final, lost_allowed=actor == "run-executor-0")
    _check_tracking(client, ours, lost_allowed=actor == "run-executor-0")
    registered = final["steps"]["register"]["output"]
    assert str(client.get_model_version_by_alias("digits", "champion").version) == str(registered["version"])


def _check_attempts(final: dict[str, Any], lost_allowed: bool) -> None:
    """One success per node, numbers without a gap, nothing left running, nothing lost without a reason."""
    nodes: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for attempt in final["attempts"]:
        nodes.setdefault((attempt["step"], attempt["item"]), []).append(attempt)
    for node, attempts in nodes.items():
        states = Counter(attempt["state"] for attempt in attempts)
        assert states["SUCCEEDED"] == 1, (node, states)
        assert states["RUNNING"] == 0, (node, states)
        assert lost_allowed or states["LOST"] == 0, (node, states)
        assert [attempt["attempt"] for attempt in attempts] == list(range(1, len(attempts) + 1))


def _check_tracking(client: MlflowClient, ours: str, lost_allowed: bool) -> None:
    """No run of the pipeline is left RUNNING, and every finished trial has its whole curve, once."""
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], ours)
    # A lost attempt's trials end as KILLED, or as FAILED where they noticed it themselves.
    allowed = {"FINISHED", "KILLED", "FAILED"} if lost_allowed else {"FINISHED"}
    assert {run.info.status for run in runs} <= allowed, [run.info.status for run in runs]
    trials = [
        run for run in runs if "mlflow.parentRunId" in run.data.tags and run.info.status == "FINISHED"
    ]  # fmt: skip
    assert len(trials) >= PARAMS["trials"]
    for run in trials:
        curve = client.get_metric_history(run.info.run_id, "accuracy")
        assert [point.step for point in curve] == list(range(EPOCHS))
