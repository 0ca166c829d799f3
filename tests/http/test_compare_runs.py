"""/api/v1/runs: runs side by side, and the metrics of one."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from mlplat.metrics.model import Point
from tests.contract.chdb import batch
from tests.http.conftest import MLflow, Stack, expect_error

INVALID = "INVALID_PARAMETER_VALUE"
MISSING = "RESOURCE_DOES_NOT_EXIST"
URL = "/api/v1/runs/compare"


async def _compare(http: httpx.AsyncClient, run_ids: list[str], **fields: Any) -> Any:
    response = await http.post(URL, json={"run_ids": run_ids} | fields)
    assert response.status_code == 200, response.text
    return json.loads(response.text, parse_constant=pytest.fail)


def _rows(answer: Any, section: str) -> dict[str, Any]:
    return {row["key"]: (row["differs"], row["values"]) for row in answer[section]}


async def _run(mlflow: MLflow, name: str, params: dict[str, str], tags: dict[str, str] | None = None) -> str:
    run_id = await mlflow.run(run_name=name, user_id="ann")
    pairs = [{"key": key, "value": value} for key, value in params.items()]
    tag_pairs = [{"key": key, "value": value} for key, value in (tags or {}).items()]
    await mlflow.call("POST", "runs/log-batch", run_id=run_id, params=pairs, tags=tag_pairs)
    return run_id


async def test_params_tags_and_info_are_side_by_side(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    first = await _run(mlflow, "one", {"lr": "0.1", "depth": "3"}, {"team": "red"})
    second = await _run(mlflow, "two", {"lr": "0.2", "depth": "3", "extra": ""})
    await mlflow.call("POST", "runs/update", run_id=second, status="FINISHED", end_time=5_000)
    answer = await _compare(http, [first, second])
    assert (answer["run_ids"], answer["base"]) == ([first, second], first)
    assert _rows(answer, "params") == {
        "depth": (False, ["3", "3"]), "extra": (True, [None, ""]), "lr": (True, ["0.1", "0.2"]),
    }  # fmt: skip
    assert _rows(answer, "tags")["team"] == (True, ["red", None])
    info = _rows(answer, "info")
    assert info["name"] == (True, ["one", "two"])
    assert info["status"] == (True, ["RUNNING", "FINISHED"])
    assert info["user"] == (False, ["ann", "ann"])
    assert info["start_time"] == (False, [1_000, 1_000])
    assert info["end_time"] == (True, [None, 5_000])
    assert info["duration_ms"] == (True, [None, 4_000])
    assert (answer.get("metrics"), answer.get("environment"), answer.get("code")) == (None, None, None)
    different = await _compare(http, [first, second], only_differences=True)
    assert set(_rows(different, "params")) == {"extra", "lr"}
    assert "start_time" not in _rows(different, "info")


async def test_metrics_are_compared_by_their_numbers(http: httpx.AsyncClient, mlflow: MLflow, stack: Stack) -> None:
    runs = [await mlflow.run() for _ in range(2)]
    nan = float("nan")
    for number, run in enumerate(runs):
        points = [
            Point("same", 3.0, 10, 0), Point("same", 1.0, 20 + number, 1), Point("nan", nan, number, 5),
            Point("differs", float(number), 5, 5), Point(f"only{number}", 1.0, 1, 1),
        ]  # fmt: skip
        await stack.services.metrics.append(batch(run, points))
    answer = await _compare(http, runs, sections=["metrics"])
    rows = _rows(answer, "metrics")
    assert rows["same"] == (
        False, [{"value": 1.0, "step": 1, "timestamp": 20 + number, "min": 1.0, "max": 3.0} for number in range(2)],
    )  # fmt: skip
    assert rows["nan"] == (False, [{"value": "NaN", "step": 5, "timestamp": number} for number in range(2)])
    assert rows["differs"][0]
    assert rows["only0"][0]
    assert rows["only0"][1][1] is None
    assert "params" not in answer
    different = await _compare(http, runs, only_differences=True)
    assert set(_rows(different, "metrics")) == {"differs", "only0", "only1"}


async def test_input_datasets_are_side_by_side(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    experiment = await mlflow.experiment()
    runs = [await mlflow.run(experiment) for _ in range(3)]
    digits = {"name": "digits", "source_type": "local", "source": "{}"}
    tags = [{"key": "mlflow.data.context", "value": "train"}]
    for number, run in enumerate(runs[:2]):
        datasets = [
            {"dataset": digits | {"digest": f"d{number}"}, "tags": tags},
            {"dataset": digits | {"name": "same", "digest": "s"}},
        ]
        await mlflow.call("POST", "runs/log-inputs", run_id=run, datasets=datasets)
    rows = _rows(await _compare(http, runs, sections=["datasets"]), "datasets")
    assert rows == {
        "digits": (True, [[{"digest": "d0", "context": "train"}], [{"digest": "d1", "context": "train"}], None]),
        "same": (True, [[{"digest": "s", "context": None}]] * 2 + [None]),
    }
    different = await _compare(http, runs[:2], sections=["datasets"], only_differences=True)
    assert set(_rows(different, "datasets")) == {"digits"}
    assert (await _compare(http, runs[2:]))["datasets"] is None


def _capture(stack: Stack, run_id: str, name: str, body: bytes) -> None:
    stack.services.artifacts.write(f"0/{run_id}/artifacts/mlplat/{name}", [body])


async def test_environment_and_code_come_from_what_the_run_recorded(
    http: httpx.AsyncClient, mlflow: MLflow, stack: Stack
) -> None:
    tags = {"mlflow.source.git.commit": "c1", "mlflow.source.name": "train.py"}
    runs = [await _run(mlflow, "r", {}, tags) for _ in range(3)]
    clean = await _run(mlflow, "clean", {}, tags | {"mlflow.source.git.dirty": "false"})
    for number, run in enumerate(runs):
        facts = {"python": "3.12", "host": f"node{number}", "gpus": [], "packages": {"numpy": f"2.{number // 2}"}}
        _capture(stack, run, "environment.json", json.dumps(facts).encode())
        _capture(stack, run, "code.diff", b"-a\n+b%d\n" % (number // 2))
    _capture(stack, clean, "requirements.txt", b"numpy==2.0\n")
    answer = await _compare(http, [*runs, clean], base=runs[1])
    environment = _rows(answer, "environment")
    assert environment["packages.numpy"] == (True, ["2.0", "2.0", "2.1", "2.0"])
    assert environment["python"] == (True, ["3.12", "3.12", "3.12", None])
    assert environment["gpus"] == (True, [[], [], [], None])
    assert environment["git.commit"] == (False, ["c1"] * 4)
    assert environment["source"] == (False, ["train.py"] * 4)
    code = {one["run_id"]: one for one in answer["code"]}
    assert list(code) == [runs[0], runs[2], clean]
    assert (code[runs[0]]["differs"], code[runs[0]]["diff"]) == (False, "")
    assert code[runs[2]]["diff"] == f"--- {runs[1]}\n+++ {runs[2]}\n@@ -1,2 +1,2 @@\n -a\n-+b0\n++b1"
    assert code[clean]["diff"].endswith("\n--a\n-+b0")
    different = await _compare(http, [*runs, clean], base=runs[1], only_differences=True)
    assert [one["run_id"] for one in different["code"]] == [runs[2], clean]


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"[1]", b'"x"', b" " * 2_000_000 + b"{}"])
async def test_what_was_recorded_badly_is_left_out(
    http: httpx.AsyncClient, mlflow: MLflow, stack: Stack, body: bytes
) -> None:
    run = await mlflow.run()
    _capture(stack, run, "environment.json", body)
    assert (await _compare(http, [run])).get("environment") is None


async def test_changes_that_are_too_large_are_not_compared(
    http: httpx.AsyncClient, mlflow: MLflow, stack: Stack
) -> None:
    runs = [await mlflow.run() for _ in range(2)]
    _capture(stack, runs[0], "code.diff", b"x\n")
    _capture(stack, runs[1], "code.diff", b"x\n" * 1_000_000)
    [code] = (await _compare(http, runs))["code"]
    assert (code["differs"], code["diff"]) == (True, None)
    assert "too large" in code["note"]


async def test_a_link_compares_as_well(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    runs = [await _run(mlflow, "r", {"p": str(number)}) for number in range(2)]
    query = {"run_id": [*runs, runs[0]], "base": runs[1], "only_differences": "true", "section": ["params", "code"]}
    answer = (await http.get(URL, params=query)).json()
    assert (answer["run_ids"], answer["base"]) == (runs, runs[1])
    assert _rows(answer, "params") == {"p": (True, ["0", "1"])}
    assert "info" not in answer


async def test_a_run_whose_files_are_elsewhere_is_compared_without_them(
    http: httpx.AsyncClient, mlflow: MLflow
) -> None:
    experiment = (
        await mlflow.call("POST", "experiments/create", name=f"s3-{await mlflow.run()}", artifact_location="s3://x/y")
    )["experiment_id"]
    run = await mlflow.run(str(experiment))
    assert _rows(await _compare(http, [run]), "info")["experiment_id"] == (False, [str(experiment)])


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ({"run_ids": []}, 400, INVALID, "run_ids"),
        ({"run_ids": ["r"] * 101}, 400, INVALID, "run_ids"),
        ({"run_ids": ["nobody"]}, 404, MISSING, "Run with id=nobody not found"),
        ({"run_ids": ["nobody"], "base": "other"}, 400, INVALID, "run other is not one of"),
        ({"run_ids": ["nobody"], "sections": ["everything"]}, 400, INVALID, "sections"),
    ],
)
async def test_a_malformed_comparison_is_refused(
    http: httpx.AsyncClient, body: dict[str, Any], status: int, code: str, message: str
) -> None:
    expect_error(await http.post(URL, json=body), status, code, message)


async def test_a_missing_or_unknown_run_in_a_link_is_refused(http: httpx.AsyncClient) -> None:
    expect_error(await http.get(URL), 400, INVALID, "run_id")
    expect_error(await http.get(f"{URL}?run_id=nobody"), 404, MISSING, "nobody")


async def test_the_metrics_of_a_run_are_summarised(http: httpx.AsyncClient, mlflow: MLflow, stack: Stack) -> None:
    run, other = await mlflow.run(), await mlflow.run()
    points = [Point("b", 2.0, 10, 1), Point("b", -1.0, 30, 3), Point("b", 5.0, 20, 2), Point("a", float("nan"), 1, 0),
              Point("c", float("inf"), 1, 0)]  # fmt: skip
    await stack.services.metrics.append(batch(run, points))
    await stack.services.metrics.append(batch(other, [Point("b", 9.0, 1, 1)]))
    answer = (await http.get(f"/api/v1/runs/{run}/metrics")).json()
    assert answer == {
        "run_id": run,
        "metrics": [
            {"key": "a", "value": "NaN", "step": 0, "timestamp": 1},
            {"key": "b", "value": -1.0, "step": 3, "timestamp": 30, "min": -1.0, "max": 5.0},
            {"key": "c", "value": "Infinity", "step": 0, "timestamp": 1, "min": "Infinity", "max": "Infinity"},
        ],
    }
    expect_error(await http.get("/api/v1/runs/nobody/metrics"), 404, MISSING, "Run with id=nobody not found")


async def test_a_run_with_ten_thousand_metrics_is_read_whole(
    http: httpx.AsyncClient, mlflow: MLflow, stack: Stack
) -> None:
    run = await mlflow.run()
    await stack.services.metrics.append(batch(run, [Point(f"k{number}", number, 1, 1) for number in range(10_000)]))
    assert len((await http.get(f"/api/v1/runs/{run}/metrics")).json()["metrics"]) == 10_000
    assert len((await mlflow.data(run))["metrics"]) == 10_000
