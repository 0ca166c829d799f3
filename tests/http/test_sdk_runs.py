"""Runs of the SDK against the real app on a real port, also while that is away."""

from __future__ import annotations

import asyncio
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlplat
from mlplat.errors import InvalidInput, NotFound, Unavailable
from mlplat.sdk import run as run_module
from mlplat.sdk.process import this_process
from mlplat.sdk.spool import spooled_files
from tests.contract.chdb import unique
from tests.http.conftest import MLflow
from tests.http.sdk import history, info, sync, user
from tests.http.served import Served


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """Where the SDK of the test keeps what it cannot send."""
    return tmp_path / "spool"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which the platform is away for certain."""
    monkeypatch.setattr("mlplat.sdk.outbox.START_TIMEOUT_S", 0.2)
    monkeypatch.setattr("mlplat.sdk.outbox.SEND_TIMEOUT_S", 1.0)
    monkeypatch.setattr("mlplat.sdk.run.PATIENCE_S", 0.2)


async def test_a_run_arrives_whole(served: Served, mlflow: MLflow, spool: Path) -> None:
    name = unique("exp")

    def code() -> mlplat.Run:
        with mlplat.start_run(name, "first", params={"rate": 0.1}, tags={"team": "x"}) as run:
            for step in range(300):
                run.log({"loss": 1 / (step + 1), "acc": np.float32(step)})
            run.set_tag("late", 1)
            run.log_param("depth", 3)
        return run

    run = await user(code)
    assert run.finish() == run_module.Finished(True, 0, ())
    found = await info(mlflow, run.run_id)
    assert (found["status"], found["run_name"]) == ("FINISHED", "first")
    assert run.experiment_id == int(found["experiment_id"])
    assert run.artifact_uri == found["artifact_uri"]
    data = await mlflow.data(run.run_id)
    assert data["params"] == {"rate": "0.1", "depth": "3"}
    assert data["tags"] | {"team": "x", "late": "1"} == data["tags"]
    assert await history(mlflow, run.run_id, "loss") == [(step, 1 / (step + 1)) for step in range(300)]
    assert len(await history(mlflow, run.run_id, "acc")) == 300
    await user(this_process().close)
    assert spooled_files(spool) == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError(), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(1), "FAILED"),
        (SystemExit("told"), "FAILED"),
        (SystemExit(0), "FINISHED"),
        (SystemExit(), "FINISHED"),
    ],
)
async def test_an_exception_ends_the_run(served: Served, mlflow: MLflow, error: BaseException, status: str) -> None:
    def code() -> str:
        run = mlplat.start_run(unique("exp"))
        with pytest.raises(type(error)), run:
            raise error
        return run.run_id

    assert (await info(mlflow, await user(code)))["status"] == status


@pytest.mark.parametrize("values", [{"a": "3"}, {"a": None}, {"a": [1]}, {"a": 1j}, {1: 1.0}, {"a": b"1"}])
async def test_a_users_mistake_is_told_at_once(served: Served, mlflow: MLflow, values: Any) -> None:
    def code() -> str:
        with mlplat.start_run(unique("exp")) as run:
            with pytest.raises(InvalidInput):
                run.log(values)
            with pytest.raises(InvalidInput, match="whole number"):
                run.log({"a": 1.0}, step=1.5)  # type: ignore[arg-type]
            run.log({"a": 1.0})
        return run.run_id

    assert await history(mlflow, await user(code), "a") == [(0, 1.0)]


async def test_a_changed_param_is_refused_here_and_there(served: Served, mlflow: MLflow) -> None:
    def code() -> str:
        run = mlplat.start_run(unique("exp"), params={"a": 1})
        run.log_params({"a": 1})
        with pytest.raises(InvalidInput, match="was logged as '1'"):
            run.log_params({"b": 1, "a": 2})
        other = mlplat.resume_run(run.run_id)
        other.log_param("a", 3)
        other.log({"m": 1.0}, step=7)
        with pytest.raises(InvalidInput, match="Changing param values is not allowed"):
            other.flush()
        with pytest.warns(mlplat.RunWarning, match="not accepted"):
            done = run.finish()
        assert len(done.refused) == 1
        return run.run_id

    run_id = await user(code)
    assert (await mlflow.data(run_id))["params"] == {"a": "1"}
    assert await history(mlflow, run_id, "m") == [(7, 1.0)]
    assert (await info(mlflow, run_id))["status"] == "FINISHED"


async def test_a_bad_metric_key_costs_only_itself(served: Served, mlflow: MLflow) -> None:
    def code() -> tuple[str, tuple[str, ...]]:
        run = mlplat.start_run(unique("exp"))
        run.log({"good": 1.0, "no*good": 2.0})
        run.log({"good": 2.0, "no*good": 2.0, "x" * 300: 1.0})
        with pytest.warns(mlplat.RunWarning):
            return run.run_id, run.finish().refused

    run_id, refused = await user(code)
    assert len(refused) == 2
    assert await history(mlflow, run_id, "good") == [(0, 1.0), (1, 2.0)]


async def test_a_refused_run_costs_no_other(served: Served, mlflow: MLflow, spool: Path) -> None:
    def code() -> str:
        lost = mlplat.resume_run("0" * 32)
        lost.log({"m": 1.0})
        lost.set_tag("a", 1)
        run = mlplat.start_run(unique("exp"))
        run.log({"m": 1.0})
        assert run.finish().delivered
        with pytest.warns(mlplat.RunWarning, match="not found"):
            assert len(lost.finish().refused) == 3
        return run.run_id

    run_id = await user(code)
    assert await history(mlflow, run_id, "m") == [(0, 1.0)]
    await user(this_process().close)
    (left,) = spooled_files(spool)  # the run might still come: what was logged to it is not thrown away
    (again,) = await user(lambda: sync(spool))
    assert (again.path, len(again.refusals)) == (left, 3)


async def test_a_platform_that_is_away_costs_a_warning_and_nothing_else(
    served: Served, mlflow: MLflow, spool: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = unique("exp")
    await served.stop()

    def code() -> mlplat.Run:
        with pytest.warns(mlplat.RunWarning, match="no answer from"):
            run = mlplat.start_run(name, params={"a": 1})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            child = mlplat.start_run(name, parent=run)
            for step in range(100):
                run.log({"m": step})
            child.set_tag("t", 1)
        with pytest.warns(mlplat.RunWarning, match="mlplat sync"):
            assert not child.finish("KILLED").delivered
        with pytest.raises(Unavailable):
            run.flush(timeout_s=0.2)
        return run

    run = await user(code)
    assert spooled_files(spool)
    await served.start()
    monkeypatch.undo()
    await user(run.flush)
    assert (await user(run.finish)).delivered
    assert (await info(mlflow, run.run_id))["status"] == "FINISHED"
    assert len(await history(mlflow, run.run_id, "m")) == 100
    answer = await mlflow.call(
        "POST",
        "runs/search",
        experiment_ids=[await user(lambda: str(run.experiment_id))],
        filter=f"tags.`mlflow.parentRunId`='{run.run_id}'",
    )
    assert [found["info"]["status"] for found in answer["runs"]] == ["KILLED"]


@pytest.mark.parametrize("mood", ["refuses", "breaks", "hangs"])
async def test_a_platform_that_fails_for_a_while_loses_nothing(
    served: Served, mlflow: MLflow, mood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlplat.sdk.outbox.SEND_TIMEOUT_S", 1.0)
    run = await user(lambda: mlplat.start_run(unique("exp")))
    served.mood = mood

    def code() -> float:
        began = time.perf_counter()
        for step in range(1000):
            run.log({"m": step})
        return time.perf_counter() - began

    await user(code)
    requests = len(served.requests)
    while len(served.requests) < requests + 2:  # it has been tried, and tried again
        await asyncio.sleep(0.02)
    served.mood = "ok"
    await user(lambda: run.flush(timeout_s=30))
    assert len(await history(mlflow, run.run_id, "m")) == 1000


async def test_an_offline_run_arrives_by_sync(
    served: Served, mlflow: MLflow, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = unique("exp")
    monkeypatch.setenv("MLPLAT_MODE", "offline")

    def code() -> mlplat.Run:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with mlplat.start_run(name, "off", params={"a": 1}) as run:
                run.log({"m": 1.0}, step=5)
                run.flush()
                with pytest.raises(Unavailable, match="offline"):
                    run.artifact_uri  # noqa: B018
        this_process().close()
        return run

    run = await user(code)
    assert served.requests == []
    assert len(spooled_files(spool)) == 1
    (left,) = await user(lambda: sync(spool))
    assert (left.points, left.records, left.refusals) == (1, 3, [])
    assert spooled_files(spool) == []
    found = await info(mlflow, run.run_id)
    assert (found["run_name"], found["status"]) == ("off", "FINISHED")
    assert await history(mlflow, run.run_id, "m") == [(5, 1.0)]
    assert await user(lambda: sync(spool)) == []


async def test_the_next_run_sends_what_an_earlier_process_left(
    served: Served, mlflow: MLflow, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = unique("exp")

    def earlier() -> str:
        run = mlplat.start_run(name, mode="offline")
        run.log({"m": 1.0})
        run.finish()
        this_process().close()
        return run.run_id

    run_id = await user(earlier)
    (left,) = spooled_files(spool)
    run = await user(lambda: mlplat.start_run(name))
    await user(lambda: run.set_tag("a", 1))
    while left.exists():
        await asyncio.sleep(0.02)
    await user(run.finish)
    assert await history(mlflow, run_id, "m") == [(0, 1.0)]


async def test_a_joined_run_is_ended_by_its_owner_only(served: Served, mlflow: MLflow) -> None:
    def code() -> mlplat.Run:
        run = mlplat.start_run(unique("exp"), "together")
        for joined in (mlplat.start_run(run_id=run.run_id), pickle.loads(pickle.dumps(run))):
            with joined:
                joined.log({"m": 1.0}, step=1)
            assert joined.name == "together"
        return run

    run = await user(code)
    assert (await info(mlflow, run.run_id))["status"] == "RUNNING"
    await user(run.finish)
    assert (await info(mlflow, run.run_id))["status"] == "FINISHED"
    resumed = await user(lambda: mlplat.resume_run(run.run_id, owner=True))
    await user(resumed.flush)
    found = await info(mlflow, run.run_id)
    assert found["status"] == "RUNNING"
    assert "end_time" not in found
    await user(lambda: resumed.finish("FAILED"))
    assert (await info(mlflow, run.run_id))["status"] == "FAILED"


async def test_many_threads_and_runs_keep_their_own(served: Served, mlflow: MLflow) -> None:
    name = unique("exp")

    def one(index: int) -> str:
        with mlplat.start_run(name) as run:
            for _step in range(200):
                run.log({"m": index})
        return run.run_id

    def code() -> list[str]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, range(8)))

    for index, run_id in enumerate(await user(code)):
        assert await history(mlflow, run_id, "m") == [(step, index) for step in range(200)]


async def test_runs_are_found_and_read(served: Served, mlflow: MLflow) -> None:
    name = unique("exp")

    def code() -> None:
        for index in range(5):
            with mlplat.start_run(name, f"r{index}", params={"i": index}, tags={"even": index % 2 == 0}) as run:
                run.log({"loss": index / 2}, step=0)
                run.log({"loss": float("nan") if index == 4 else index}, step=1)
        frame = mlplat.search_runs(name, "params.i != '2'", "metrics.loss DESC")
        assert list(frame["name"]) in (["r3", "r1", "r0", "r4"], ["r4", "r3", "r1", "r0"])
        assert frame["status"].tolist() == ["FINISHED"] * 4
        assert str(frame["started_at"].dtype).startswith("datetime64")
        table = mlplat.search_runs([name], max_results=2, as_arrow=True)
        assert table.num_rows == 2
        assert {"params.i", "tags.even", "metrics.loss"} <= set(table.column_names)
        assert mlplat.search_runs(name, "params.i = 'none'").empty
        assert run.run_id in set(mlplat.search_runs(filter="tags.even = 'True'")["run_id"])
        record = mlplat.get_run(run.run_id)
        assert (record.status, record.params) == ("FINISHED", {"i": "4"})
        points = record.metrics_history("loss")
        assert points["step"].tolist() == [0, 1]
        assert points["value"].tolist()[0] == 2.0
        assert record.metrics_history("none", as_arrow=True).num_rows == 0
        with pytest.raises(NotFound):
            mlplat.search_runs("no such experiment")
        with pytest.raises(NotFound):
            mlplat.get_run("none")
        with pytest.raises(InvalidInput):
            mlplat.search_runs(name, "nonsense")

    await user(code)


async def test_search_pages(served: Served, mlflow: MLflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlplat.sdk.search.PAGE", 2)
    name = unique("exp")
    experiment = await mlflow.experiment(name)
    ids = {await mlflow.run(experiment) for _ in range(5)}
    assert set(await user(lambda: mlplat.search_runs(name)["run_id"])) == ids
    assert len(await user(lambda: mlplat.search_runs(name, max_results=3))) == 3


async def test_refused_starts_raise(served: Served, mlflow: MLflow) -> None:
    name = unique("exp")
    experiment = await mlflow.experiment(name)
    await mlflow.call("POST", "experiments/delete", experiment_id=experiment)
    with pytest.raises(InvalidInput, match="is deleted"):
        await user(lambda: mlplat.start_run(name))
    for code in (
        lambda: mlplat.start_run(name, mode="sometimes"),  # type: ignore[arg-type]
        lambda: mlplat.start_run(name, tags={"no*good": 1}),
        lambda: mlplat.resume_run(""),
    ):
        with pytest.raises(InvalidInput):
            await user(code)
