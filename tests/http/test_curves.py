"""POST /api/v1/metrics/curves: formats, limits and errors."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pyarrow as pa
import pytest

from mlplat.metrics.model import ARROW, Point
from tests.contract.chdb import batch
from tests.http.conftest import MLflow, Stack, expect_error

INVALID = "INVALID_PARAMETER_VALUE"
URL = "/api/v1/metrics/curves"


async def _two_runs(mlflow: MLflow, stack: Stack) -> list[str]:
    """Two runs: a long curve with a NaN and an infinity in both, a short one in the first."""
    runs = [await mlflow.run() for _ in range(2)]
    for run in runs:
        points = [Point("loss", 1.0 / (step + 1), 2_000 + step, step) for step in range(500)]
        points += [Point("loss", float("nan"), 2_500, 500), Point("loss", float("-inf"), 2_501, 501)]
        await stack.services.metrics.append(batch(run, points))
    await stack.services.metrics.append(batch(runs[0], [Point("acc/val", 0.5, 2_000, 0)]))
    return runs


async def _read(http: httpx.AsyncClient, **fields: Any) -> Any:
    response = await http.post(URL, json=fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return json.loads(response.text, parse_constant=pytest.fail)


async def test_json_and_arrow_have_the_same_points(http: httpx.AsyncClient, mlflow: MLflow, stack: Stack) -> None:
    runs = await _two_runs(mlflow, stack)
    for axis in ("step", "timestamp", "relative"):
        fields = {"run_ids": runs, "keys": ["loss", "acc/*"], "axis": axis, "buckets": 20}
        answer = await _read(http, **fields)
        assert [(curve["run_id"], curve["key"], curve["exact"]) for curve in answer["curves"]] == [
            (runs[0], "acc/val", True), (runs[0], "loss", False), (runs[1], "loss", False),
        ]  # fmt: skip
        response = await http.post(URL, json=fields, headers={"Accept": ARROW})
        assert (response.status_code, response.headers["content-type"]) == (200, ARROW)
        with pa.ipc.open_stream(response.content) as reader:
            table = reader.read_all()
        assert table.schema.names == ["run_id", "key", "step", "timestamp", "value", "exact"]
        rows = [
            (curve["run_id"], curve["key"], step, timestamp, str(float(value)), curve["exact"])
            for curve in answer["curves"]
            for step, timestamp, value in zip(curve["steps"], curve["timestamps"], curve["values"], strict=True)
        ]
        found = [tuple(row.values()) for row in table.to_pylist()]
        assert [(*row[:4], str(row[4]), row[5]) for row in found] == rows
        head = json.loads(table.schema.metadata[b"curves"])
        origins = {curve["run_id"]: curve["origin"] for curve in answer["curves"]}
        assert head == {key: answer[key] for key in ("axis", "bucket_start", "bucket_width")} | {"origins": origins}


async def test_numbers_that_json_lacks_are_text(http: httpx.AsyncClient, mlflow: MLflow, stack: Stack) -> None:
    run = (await _two_runs(mlflow, stack))[0]
    [curve] = (await _read(http, run_ids=[run], keys=["loss"], start=499))["curves"]
    assert curve == {
        "run_id": run, "key": "loss", "origin": 1_000, "exact": True, "steps": [499, 500, 501],
        "timestamps": [2_499, 2_500, 2_501], "values": [0.002, "NaN", "-Infinity"],
    }  # fmt: skip
    [coarse] = (await _read(http, run_ids=[run], keys=["loss"], buckets=2))["curves"]
    assert {"NaN", "-Infinity", 1.0} <= set(coarse["values"])


async def test_nothing_to_draw_is_an_empty_answer(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    run = await mlflow.run()
    empty: dict[str, Any] = {"axis": "step", "bucket_start": None, "bucket_width": None, "curves": []}
    assert await _read(http, run_ids=[run], keys=["m"]) == empty
    response = await http.post(URL, json={"run_ids": [run], "keys": ["*"]}, headers={"Accept": f"text/html, {ARROW}"})
    with pa.ipc.open_stream(response.content) as reader:
        assert reader.read_all().num_rows == 0


async def test_a_run_named_twice_is_drawn_once(http: httpx.AsyncClient, mlflow: MLflow, stack: Stack) -> None:
    run = (await _two_runs(mlflow, stack))[0]
    assert len((await _read(http, run_ids=[run, run], keys=["acc/val", "*val"]))["curves"]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_ids": []}, "run_ids"),
        ({"run_ids": ["r"] * 101}, "run_ids"),
        ({"run_ids": "r"}, "run_ids"),
        ({"run_ids": ["a\0"]}, "run_ids"),
        ({"keys": []}, "keys"),
        ({"keys": [""]}, "keys"),
        ({"keys": ["k" * 251]}, "keys"),
        ({"keys": ["k"] * 101}, "keys"),
        ({"axis": "epoch"}, "axis"),
        ({"buckets": 1}, "buckets"),
        ({"buckets": 10_001}, "buckets"),
        ({"start": 2**63}, "start"),
        ({"end": -(2**63) - 1}, "end"),
        ({"start": 1.5}, "start"),
        ({"start": 5, "end": 4}, "start (5) lies behind end (4)"),
    ],
)
async def test_a_malformed_request_says_what_is_wrong(
    http: httpx.AsyncClient, mlflow: MLflow, changes: dict[str, Any], message: str
) -> None:
    body = {"run_ids": [await mlflow.run()], "keys": ["m"]} | changes
    expect_error(await http.post(URL, json=body), 400, INVALID, message)


async def test_an_unknown_run_is_named(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    body = {"run_ids": [await mlflow.run(), "nobody"], "keys": ["m"]}
    expect_error(await http.post(URL, json=body), 404, "RESOURCE_DOES_NOT_EXIST", "Run with id=nobody not found")


async def test_the_endpoint_is_described(http: httpx.AsyncClient) -> None:
    described = (await http.get("/openapi.json")).json()["paths"][URL]["post"]
    assert set(described["responses"]["200"]["content"]) == {"application/json", ARROW}
