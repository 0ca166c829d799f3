"""MLflow's endpoints that read metric histories, on the wire."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from mlplat.http.mlflow import metric_history
from mlplat.metrics import queries
from mlplat.metrics.model import Point, concat
from mlplat.metrics.store import MetricStore
from tests.contract.chdb import batch, chdb_url, stored, unique, unique_number
from tests.http.conftest import MLflow, Stack

INVALID = "INVALID_PARAMETER_VALUE"
MISSING = "RESOURCE_DOES_NOT_EXIST"
INTERVAL = "metrics/get-history-bulk-interval"
BULK = "metrics/get-history-bulk"


async def _log(stack: Stack, run_id: str, points: Sequence[Point]) -> None:
    await stack.services.metrics.append(batch(run_id, points))


def _line(count: int, start: int = 0) -> list[Point]:
    return [Point("m", float(step), 1_000 + step, step) for step in range(start, start + count)]


def _sample(places: int, limit: int) -> list[int]:
    """The reference: NTILE by the book, the first of each tile, and the last place for the last tile."""
    size, large = divmod(places, limit)
    sizes = [size + 1] * large + [size] * (limit - large)
    firsts = [sum(sizes[:tile]) for tile in range(limit) if sizes[tile]]
    if firsts and firsts[-1] != places - 1:
        firsts[-1] = places - 1
    return firsts


def test_points_are_picked_as_mlflow_does() -> None:
    store = MetricStore(chdb_url())
    experiment, sizes = unique_number(), range(1, 26)
    runs = {unique("run"): size for size in sizes}
    store.insert(concat([stored(experiment, run, _line(size)) for run, size in runs.items()]))
    for limit in (*range(1, 9), 24, 25, 26, 2_500):
        found = store.query(queries.sampled_histories(list(runs), "m", limit, None))
        expected = [(run, step) for run, size in runs.items() for step in _sample(size, limit)]
        assert list(zip(found["run_id"].to_pylist(), found["step"].to_pylist(), strict=True)) == expected, limit


async def test_a_bulk_interval_keeps_the_order_of_the_runs_and_both_ends(mlflow: MLflow, stack: Stack) -> None:
    runs = [await mlflow.run() for _ in range(3)]
    for number, run in enumerate(runs):
        shuffled = _line(50 * number)
        random.Random(number).shuffle(shuffled)
        if shuffled:
            await _log(stack, run, shuffled)
    asked = [runs[2], runs[0], runs[1], runs[2]]
    answer = await mlflow.call("GET", INTERVAL, run_ids=asked, metric_key="m", max_results=5)
    assert [(point["run_id"], point["step"]) for point in answer["metrics"]] == [
        *((runs[2], step) for step in (0, 20, 40, 60, 99)),
        *((runs[1], step) for step in (0, 10, 20, 30, 49)),
    ]
    assert answer["metrics"][1] == {"key": "m", "value": 20.0, "timestamp": 1_020, "step": 20, "run_id": runs[2]}
    last = await mlflow.call("GET", INTERVAL, run_ids=[runs[2]], metric_key="m", max_results=1)
    assert [point["step"] for point in last["metrics"]] == [99]


async def test_a_bulk_interval_is_of_the_steps_asked_for(mlflow: MLflow, stack: Stack) -> None:
    run = await mlflow.run()
    await _log(stack, run, _line(100, -50))
    fields = {"run_ids": [run], "metric_key": "m"}
    answer = await mlflow.call("GET", INTERVAL, **fields, start_step="-3", end_step=2)
    assert [point["step"] for point in answer["metrics"]] == [-3, -2, -1, 0, 1, 2]
    answer = await mlflow.call("GET", INTERVAL, **fields, start_step=7, end_step=7)
    assert [point["step"] for point in answer["metrics"]] == [7]
    assert await mlflow.call("GET", INTERVAL, **fields, start_step=1_000, end_step=2_000) == {}
    assert await mlflow.call("GET", INTERVAL, run_ids=[run], metric_key="nobody") == {}


async def test_a_bulk_interval_answers_2500_points_of_a_run_by_default(mlflow: MLflow, stack: Stack) -> None:
    run = await mlflow.run()
    await _log(stack, run, _line(3_000))
    points = (await mlflow.call("GET", INTERVAL, run_ids=[run], metric_key="m"))["metrics"]
    assert len(points) == 2_500
    assert (points[0]["step"], points[-1]["step"]) == (0, 2_999)


@pytest.mark.parametrize("prefix", ["/api", "/ajax-api"])
async def test_numbers_that_json_lacks_are_text(http: httpx.AsyncClient, stack: Stack, prefix: str) -> None:
    mlflow = MLflow(http, prefix)
    run = await mlflow.run()
    values = [float("nan"), float("inf"), float("-inf"), 0.5]
    await _log(stack, run, [Point("m", value, 1, step) for step, value in enumerate(values)])
    for path, fields in (
        (INTERVAL, {"run_ids": [run]}), (BULK, {"run_id": [run]}), ("metrics/get-history", {"run_id": run}),
    ):  # fmt: skip
        answer = await mlflow.send("GET", path, metric_key="m", **fields)
        json.loads(answer.text, parse_constant=pytest.fail)
        assert [point["value"] for point in answer.json()["metrics"]] == ["NaN", "Infinity", "-Infinity", 0.5]


async def test_bulk_is_ordered_by_run_and_time_under_one_cap(mlflow: MLflow, stack: Stack) -> None:
    runs = sorted([await mlflow.run(), await mlflow.run()])
    for run in runs:
        await _log(stack, run, [Point("m", 1.0, 9 - step, step) for step in range(5)])
        await _log(stack, run, [Point("m", 0.5, 9, 0), Point("m", 1.0, 9, 0)])
    fields: dict[str, Any] = {"run_id": [runs[1], runs[0], "nobody"], "metric_key": "m"}
    points = (await mlflow.call("GET", BULK, **fields))["metrics"]
    one_run = [(5, 4, 1.0), (6, 3, 1.0), (7, 2, 1.0), (8, 1, 1.0), (9, 0, 0.5), (9, 0, 1.0)]
    assert [(point["run_id"], point["timestamp"], point["step"], point["value"]) for point in points] == [
        (run, *rest) for run in runs for rest in one_run
    ]
    assert (await mlflow.call("GET", BULK, **fields, max_results=8))["metrics"] == points[:8]
    assert len((await mlflow.call("GET", BULK, **fields, max_results=10**6))["metrics"]) == 12
    assert await mlflow.call("GET", BULK, run_id=["nobody"], metric_key="m") == {"metrics": []}


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        (INTERVAL, {"metric_key": "m"}, "run_ids"),
        (INTERVAL, {"run_ids": ["r"]}, "'metric_key'"),
        (INTERVAL, {"run_ids": ["r"] * 101, "metric_key": "m"}, "100 run_ids. Received 101"),
        (INTERVAL, {"run_ids": ["r"], "metric_key": "m", "max_results": 0}, "max_results must be between 1 and 2500"),
        (INTERVAL, {"run_ids": ["r"], "metric_key": "m", "max_results": 2_501}, "between 1 and 2500"),
        (INTERVAL, {"run_ids": ["r"], "metric_key": "m", "start_step": 1}, "both must be specified"),
        (INTERVAL, {"run_ids": ["r"], "metric_key": "m", "end_step": 1}, "both must be specified"),
        (INTERVAL, {"run_ids": ["r"], "metric_key": "m", "start_step": 2, "end_step": 1}, "greater than start_step"),
        (INTERVAL, {"run_ids": ["r"], "metric_key": "m", "start_step": 0, "end_step": 2**63}, "out of range"),
        (INTERVAL, {"run_ids": ["r"], "metric_key": "m", "start_step": "x", "end_step": 1}, "start_step"),
        (BULK, {"metric_key": "m"}, "at least one run_id"),
        (BULK, {"run_id": ["r"]}, "'metric_key'"),
        (BULK, {"run_id": ["r"] * 101, "metric_key": "m"}, "Received 101"),
        (BULK, {"run_id": ["r"], "metric_key": "m", "max_results": -1}, "max_results"),
        (BULK, {"run_id": ["r"], "metric_key": "m", "max_results": "x"}, "max_results"),
    ],
)
async def test_a_malformed_bulk_request_is_refused(
    mlflow: MLflow, path: str, fields: dict[str, Any], message: str
) -> None:
    await mlflow.refused(400, INVALID, message, "GET", path, **fields)


async def test_an_unknown_run_is_named(mlflow: MLflow) -> None:
    known = await mlflow.run()
    message = "Run with id=nobody not found"
    await mlflow.refused(404, MISSING, message, "GET", INTERVAL, run_ids=[known, "nobody"], metric_key="m")


@pytest.mark.parametrize("max_results", [None, 1, 6, 7, 13, 20, 21, 22, 50])
async def test_a_history_of_many_pages_is_whole(
    mlflow: MLflow, stack: Stack, monkeypatch: pytest.MonkeyPatch, max_results: int | None
) -> None:
    monkeypatch.setattr(metric_history, "PAGE", 7)
    monkeypatch.setattr(metric_history, "BATCH", 3)
    run = await mlflow.run()
    points = [Point("m", value, 5, step) for step in range(7) for value in (0.5, float("inf"), float("nan"))]
    await _log(stack, run, points)
    fields: dict[str, Any] = {"run_id": run, "metric_key": "m"}
    if max_results is not None:
        fields["max_results"] = max_results
    seen: list[tuple[int, object]] = []
    while True:
        answer = await mlflow.call("GET", "metrics/get-history", **fields)
        seen += [(point["step"], point["value"]) for point in answer["metrics"]]
        if "next_page_token" not in answer:
            break
        assert len(answer["metrics"]) == max_results
        fields["page_token"] = answer["next_page_token"]
    assert seen == [(step, value) for step in range(7) for value in (0.5, "Infinity", "NaN")]


async def test_a_long_history_comes_in_one_answer(mlflow: MLflow, stack: Stack) -> None:
    run = await mlflow.run()
    await _log(stack, run, _line(120_000))
    answer = await mlflow.call("GET", "metrics/get-history", run_id=run, metric_key="m")
    assert [point["step"] for point in answer["metrics"]] == list(range(120_000))
    assert set(answer) == {"metrics"}
