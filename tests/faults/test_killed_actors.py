"""``kill -9`` on each part of the platform while the demo's pipeline runs: it still ends correctly."""

from __future__ import annotations

import os
import signal
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

import mlplat
from mlplat.demo.digits import EPOCHS, EXPERIMENT
from mlplat.demo.show import PIPELINE
from mlplat.sdk.client import Client
from mlplat.sdk.delivery import ensure_experiment
from mlplat.sdk.pipeline_runs import PipelineRunHandle
from tests.faults.stage import RECOVERY_S, rows
from tests.platform import Platform, eventually

#: A smaller sweep than the demo's default: the faults hit the same steps in a third of the time.
PARAMS = {"trials": 2, "folds": 2}
#: Longer than the minute of silence after which the platform ends a run itself.
DELIVERY_S = 150


def _kill(platform: Platform, actor: str) -> int:
    pid: int = eventually(lambda: rows(platform).get(actor, {}).get("pid"), RECOVERY_S, f"{actor} has a pid")
    os.kill(pid, signal.SIGKILL)
    return pid


def _wait_for(handle: PipelineRunHandle, step: str, *states: str) -> None:
    eventually(lambda: handle.status()["steps"][step]["state"] in states, RECOVERY_S, f"{step} is {states}")


@dataclass(frozen=True)
class Kill:
    """Which actor dies when this step of the demo's pipeline is under way."""

    actor: str
    step: str


@pytest.mark.parametrize(
    "kills",
    [
        [Kill("run-executor-0", "tune")],
        [Kill("pipeline-scheduler", "tune")],
        # One at a time, each when it has work: points arrive, requests arrive, a version is about to be made.
        [Kill("metric-shard-0", "tune"), Kill("gateway", "cross_validate"), Kill("registry-coordinator", "evaluate")],
    ],
    ids=["executor", "scheduler", "shard-gateway-registry"],
)
def test_the_demo_survives_kill_9(kills: list[Kill], platform: Platform) -> None:
    client = MlflowClient(platform.url)
    experiment_id = ensure_experiment(Client(platform.url), EXPERIMENT)
    handle = mlplat.submit(PIPELINE, PARAMS, url=platform.url)
    ours = f"tags.`mlplat.pipelineRun` = '{handle.run_id}'"
    killed: list[tuple[str, int]] = []
    for kill in kills:
        _wait_for(handle, kill.step, "RUNNING", "SUCCEEDED")
        if kill.step == "tune":  # in the middle of the sweep, when the trials write metrics
            logged = f"{ours} AND metrics.accuracy > 0"
            eventually(
                partial(client.search_runs, [str(experiment_id)], logged), RECOVERY_S, "a trial has logged a point"
            )
        killed.append((kill.actor, _kill(platform, kill.actor)))
    final = handle.wait(timeout_s=2 * RECOVERY_S)
    assert final["state"] == "SUCCEEDED", final["error"]

    for actor, pid in killed:
        replacement = eventually(partial(_replaced, platform, actor, pid), RECOVERY_S, f"{actor} is back")
        assert actor == "gateway" or replacement["restarts"] >= 1  # Serve replaces replicas, it does not restart them
    lost_allowed = kills[0].actor == "run-executor-0"
    _check_attempts(final, lost_allowed)
    _check_tracking(client, ours, lost_allowed)
    registered = final["steps"]["register"]["output"]
    assert str(client.get_model_version_by_alias("digits", "champion").version) == str(registered["version"])


def _replaced(platform: Platform, actor: str, pid: int) -> dict[str, Any] | None:
    row = rows(platform).get(actor)
    return row if row and row["health"] == "ok" and row["pid"] != pid else None


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
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    experiment_id = experiment.experiment_id

    def ended() -> list[Run]:
        runs = list(client.search_runs([experiment_id], ours))
        return [] if any(run.info.status == "RUNNING" for run in runs) else runs

    # Whoever finds the platform away leaves the end of its run to a thread, which tells it when the platform is back. A
    # run that is never told ends as KILLED, after a minute of silence.
    runs = eventually(ended, DELIVERY_S, "every run has ended")
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
