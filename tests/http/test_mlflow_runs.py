"""MLflow's run, metric and artifact-listing endpoints on the wire."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest

from tests.contract.chdb import unique
from tests.http.conftest import MLflow, Stack, expect_error

INVALID = "INVALID_PARAMETER_VALUE"
MISSING = "RESOURCE_DOES_NOT_EXIST"


def _pairs(prefix: str, count: int) -> list[dict[str, str]]:
    return [{"key": f"{prefix}{number}", "value": str(number)} for number in range(count)]


def _metrics(count: int) -> list[dict[str, Any]]:
    return [{"key": "m", "value": number, "timestamp": number, "step": number} for number in range(count)]


async def test_a_created_run_is_answered_whole_and_read_back(mlflow: MLflow) -> None:
    experiment = await mlflow.experiment()
    answer = await mlflow.call(
        "POST", "runs/create", experiment_id=experiment, user_id="ann", run_name="first", start_time=1_234_567_890_123,
        tags=[{"key": "team", "value": "red"}],
    )  # fmt: skip
    run_id = answer["run"]["info"]["run_id"]
    assert answer["run"]["info"] == {
        "run_id": run_id,
        "run_uuid": run_id,
        "run_name": "first",
        "experiment_id": experiment,
        "user_id": "ann",
        "status": "RUNNING",
        "start_time": 1_234_567_890_123,
        "artifact_uri": f"mlflow-artifacts:/{experiment}/{run_id}/artifacts",
        "lifecycle_stage": "active",
    }
    tags = [{"key": "mlflow.runName", "value": "first"}, {"key": "team", "value": "red"}]
    assert sorted(answer["run"]["data"]["tags"], key=lambda tag: str(tag["key"])) == tags
    assert "metrics" not in answer["run"]["data"]
    read = await mlflow.call("GET", "runs/get", run_id=run_id)
    assert read["run"]["info"] == answer["run"]["info"]
    assert (await mlflow.call("GET", "runs/get", run_uuid=run_id)) == read


async def test_a_run_without_a_name_gets_one_and_keeps_an_empty_user(mlflow: MLflow) -> None:
    info = (await mlflow.call("POST", "runs/create", experiment_id="0"))["run"]["info"]
    assert info["run_name"]
    assert info["user_id"] == ""
    assert (await mlflow.data(info["run_id"]))["tags"] == {"mlflow.runName": info["run_name"]}


async def test_a_repeat_under_one_idempotency_key_is_one_run(mlflow: MLflow, http: httpx.AsyncClient) -> None:
    experiment, headers = await mlflow.experiment(), {"Idempotency-Key": unique("key")}
    body = {"experiment_id": experiment, "run_name": "once", "start_time": 5}
    answers = [await http.post(mlflow.prefix + "runs/create", json=body, headers=headers) for _ in range(3)]
    assert len({answer.text for answer in answers}) == 1
    found = await mlflow.call("POST", "runs/search", experiment_ids=[experiment])
    assert len(found["runs"]) == 1
    await mlflow.run(experiment)
    assert len((await mlflow.call("POST", "runs/search", experiment_ids=[experiment]))["runs"]) == 2


async def test_update_answers_the_info_and_moves_the_name_tag(mlflow: MLflow) -> None:
    run_id = await mlflow.run()
    answer = await mlflow.call("POST", "runs/update", run_id=run_id, status="FINISHED", end_time=9_000, run_name="new")
    assert set(answer) == {"run_info"}
    info = answer["run_info"]
    assert (info["status"], info["end_time"], info["run_name"]) == ("FINISHED", 9_000, "new")
    assert (await mlflow.data(run_id))["tags"]["mlflow.runName"] == "new"
    await mlflow.call("POST", "runs/set-tag", run_id=run_id, key="mlflow.runName", value="newer")
    assert (await mlflow.call("GET", "runs/get", run_id=run_id))["run"]["info"]["run_name"] == "newer"


async def test_an_unknown_status_changes_nothing(mlflow: MLflow) -> None:
    run_id = await mlflow.run()
    info = (await mlflow.call("POST", "runs/update", run_id=run_id, status="NONSENSE"))["run_info"]
    assert info["status"] == "RUNNING"
    assert "end_time" not in info


@pytest.mark.parametrize(
    ("number", "name"), enumerate(["RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED"], start=1)
)
async def test_a_status_may_be_sent_by_its_number(mlflow: MLflow, number: int, name: str) -> None:
    for sent in (number, str(number)):
        answer = await mlflow.call("POST", "runs/update", run_id=await mlflow.run(), status=sent)
        assert answer["run_info"]["status"] == name
    answer = await mlflow.call("POST", "runs/update", run_id=await mlflow.run(), status=6)
    assert answer["run_info"]["status"] == "RUNNING"


@pytest.mark.parametrize("status", ["RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED"])
async def test_every_status_is_a_name_on_the_wire(mlflow: MLflow, status: str) -> None:
    run_id = await mlflow.run()
    await mlflow.call("POST", "runs/update", run_id=run_id, status=status)
    assert (await mlflow.call("GET", "runs/get", run_id=run_id))["run"]["info"]["status"] == status


WRITES: list[tuple[str, dict[str, Any]]] = [
    ("runs/log-metric", {"key": "m", "value": 1, "timestamp": 1}),
    ("runs/log-parameter", {"key": "p", "value": "1"}),
    ("runs/set-tag", {"key": "t", "value": "1"}),
    ("runs/delete-tag", {"key": "mlflow.runName"}),
    ("runs/log-batch", {"metrics": _metrics(1)}),
    ("runs/update", {"status": "FAILED"}),
]


@pytest.mark.parametrize(("path", "fields"), WRITES)
async def test_a_deleted_run_refuses_writes_and_stays_readable(
    mlflow: MLflow, path: str, fields: dict[str, Any]
) -> None:
    run_id = await mlflow.run()
    before = await mlflow.data(run_id)
    assert await mlflow.call("POST", "runs/delete", run_id=run_id) == {}
    await mlflow.refused(400, INVALID, "must be in the 'active' state", "POST", path, run_id=run_id, **fields)
    assert (await mlflow.call("GET", "runs/get", run_id=run_id))["run"]["info"]["lifecycle_stage"] == "deleted"
    assert await mlflow.call("POST", "runs/restore", run_id=run_id) == {}
    assert await mlflow.data(run_id) == before


@pytest.mark.parametrize(
    ("method", "path", "fields"),
    [
        *(("POST", path, fields) for path, fields in WRITES),
        ("GET", "runs/get", {}),
        ("POST", "runs/delete", {}),
        ("POST", "runs/restore", {}),
        ("GET", "metrics/get-history", {"metric_key": "m"}),
        ("GET", "artifacts/list", {}),
    ],
)
async def test_every_endpoint_knows_unknown_and_unnamed_runs(
    mlflow: MLflow, method: str, path: str, fields: dict[str, Any]
) -> None:
    await mlflow.refused(404, MISSING, "Run with id=nobody not found", method, path, run_id="nobody", **fields)
    await mlflow.refused(400, INVALID, "Missing value for required parameter 'run_id'", method, path, **fields)


@pytest.mark.parametrize(
    ("fields", "status", "code", "message"),
    [
        ({"experiment_id": "99999999"}, 404, MISSING, "No Experiment with id=99999999"),
        ({"experiment_id": "x"}, 400, INVALID, "Invalid experiment ID"),
        ({"run_name": "a", "tags": [{"key": "mlflow.runName", "value": "b"}]}, 400, INVALID, "different values"),
        ({"tags": [{"key": "a//b", "value": "1"}]}, 400, INVALID, "Invalid tag name"),
        ({"start_time": -1}, 400, INVALID, "Invalid time"),
        ({"start_time": 2**70}, 400, INVALID, "Invalid time"),
        ({"start_time": "soon"}, 400, INVALID, "$.start_time"),
        ({"run_name": 5}, 400, INVALID, "$.run_name"),
        ({"run_name": "a\0"}, 400, INVALID, "NUL"),
    ],
)
async def test_a_run_that_cannot_be_created_says_why(
    mlflow: MLflow, fields: dict[str, Any], status: int, code: str, message: str
) -> None:
    await mlflow.refused(status, code, message, "POST", "runs/create", **fields)


async def test_a_param_is_written_once(mlflow: MLflow) -> None:
    run_id = await mlflow.run()
    for _repeat in range(2):
        assert await mlflow.call("POST", "runs/log-parameter", run_id=run_id, key="lr", value="0.1") == {}
    changed = "Changing param values is not allowed"
    await mlflow.refused(400, INVALID, changed, "POST", "runs/log-parameter", run_id=run_id, key="lr", value="0.2")
    await mlflow.refused(
        400, INVALID, changed, "POST", "runs/log-batch", run_id=run_id,
        params=[{"key": "new", "value": "1"}, {"key": "lr", "value": "0.2"}], tags=_pairs("t", 1), metrics=_metrics(1),
    )  # fmt: skip
    data = await mlflow.data(run_id)
    assert data["params"] == {"lr": "0.1"}
    assert "metrics" not in data
    assert "t0" not in data["tags"]


async def test_values_may_be_empty_absent_or_too_long(mlflow: MLflow) -> None:
    run_id = await mlflow.run()
    await mlflow.call("POST", "runs/log-parameter", run_id=run_id, key="empty", value="")
    await mlflow.call("POST", "runs/log-parameter", run_id=run_id, key="absent")
    await mlflow.call("POST", "runs/log-parameter", run_id=run_id, key="long", value="x" * 6_001)
    await mlflow.call("POST", "runs/set-tag", run_id=run_id, key="long", value="y" * 8_001)
    await mlflow.call("POST", "runs/log-parameter", run_id=run_id, key="k" * 250, value="1")
    data = await mlflow.data(run_id)
    assert data["params"] == {"empty": "", "absent": "", "long": "x" * 6_000, "k" * 250: "1"}
    assert data["tags"]["long"] == "y" * 8_000


async def test_a_tag_is_replaced_and_removed_once(mlflow: MLflow) -> None:
    run_id = await mlflow.run()
    for value in ("1", "2"):
        assert await mlflow.call("POST", "runs/set-tag", run_id=run_id, key="a", value=value) == {}
    assert (await mlflow.data(run_id))["tags"]["a"] == "2"
    assert await mlflow.call("POST", "runs/delete-tag", run_id=run_id, key="a") == {}
    await mlflow.refused(404, MISSING, "No tag with name: a", "POST", "runs/delete-tag", run_id=run_id, key="a")


@pytest.mark.parametrize("key", ["", "a/../b", "/a", "a//b", ".", "..", "a$b", "k" * 251])
async def test_malformed_keys_are_refused_everywhere(mlflow: MLflow, key: str) -> None:
    run_id = await mlflow.run()
    before = await mlflow.data(run_id)
    metric = {"key": key, "value": 1, "timestamp": 1}
    for path, fields in (
        ("runs/log-metric", metric),
        ("runs/log-parameter", {"key": key, "value": "1"}),
        ("runs/set-tag", {"key": key, "value": "1"}),
        ("runs/log-batch", {"metrics": [metric]}),
        ("runs/log-batch", {"params": [{"key": "ok", "value": "1"}, {"key": key, "value": "1"}]}),
        ("runs/log-batch", {"tags": [{"key": "ok", "value": "1"}, {"key": key, "value": "1"}]}),
    ):
        await mlflow.refused(400, INVALID, "Invalid", "POST", path, run_id=run_id, **fields)
    assert await mlflow.data(run_id) == before


async def test_a_batch_writes_all_three_kinds(mlflow: MLflow) -> None:
    run_id = await mlflow.run()
    assert await mlflow.call("POST", "runs/log-batch", run_id=run_id) == {}
    fields = {"metrics": _metrics(800), "params": _pairs("p", 100), "tags": _pairs("t", 100)}
    for _repeat in range(2):
        assert await mlflow.call("POST", "runs/log-batch", run_id=run_id, **fields) == {}
    data = await mlflow.data(run_id)
    assert (len(data["params"]), len(data["tags"]), data["metrics"]) == (100, 101, {"m": 799})
    history = await mlflow.call("GET", "metrics/get-history", run_id=run_id, metric_key="m")
    assert len(history["metrics"]) == 800


async def test_in_a_batch_tags_may_repeat_and_params_may_not(mlflow: MLflow) -> None:
    run_id = await mlflow.run()
    twice = [{"key": "a", "value": "1"}, {"key": "a", "value": "2"}]
    await mlflow.call("POST", "runs/log-batch", run_id=run_id, tags=twice)
    assert (await mlflow.data(run_id))["tags"]["a"] == "2"
    for params in (twice, [twice[0], twice[0]]):
        await mlflow.refused(400, INVALID, "Duplicate param", "POST", "runs/log-batch", run_id=run_id, params=params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": _metrics(1_001)}, "at most 1000 metrics. Got 1001"),
        ({"params": _pairs("p", 101)}, "at most 100 params. Got 101"),
        ({"tags": _pairs("t", 101)}, "at most 100 tags. Got 101"),
        ({"metrics": _metrics(801), "params": _pairs("p", 100), "tags": _pairs("t", 100)}, "at most 1000 metrics, p"),
    ],
)  # fmt: skip
async def test_a_batch_that_is_too_large_writes_nothing(mlflow: MLflow, fields: dict[str, Any], message: str) -> None:
    run_id = await mlflow.run()
    before = await mlflow.data(run_id)
    await mlflow.refused(400, INVALID, message, "POST", "runs/log-batch", run_id=run_id, **fields)
    assert await mlflow.data(run_id) == before


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.5, 1.5), (3, 3), ("1.5", 1.5), ("-2e-3", -0.002), ("NaN", "NaN"), ("nan", "NaN"), ("Infinity", "Infinity"),
        ("-Infinity", "-Infinity"), ("Inf", "Infinity"), ("-inf", "-Infinity"), (1.7976931348623157e308,) * 2,
        (5e-324, 5e-324), (0.1 + 0.2, 0.1 + 0.2),
    ],
)  # fmt: skip
async def test_a_double_is_taken_in_every_form_and_answered_in_one(
    mlflow: MLflow, value: float | str, shown: float | str
) -> None:
    run_id = await mlflow.run()
    assert await mlflow.call("POST", "runs/log-metric", run_id=run_id, key="m", value=value, timestamp=7) == {}
    answer = await mlflow.send("GET", "runs/get", run_id=run_id)
    json.loads(answer.text, parse_constant=pytest.fail)  # no bare NaN: that is no JSON
    [metric] = answer.json()["run"]["data"]["metrics"]
    assert metric == {"key": "m", "value": shown, "timestamp": 7, "step": 0}
    history = await mlflow.call("GET", "metrics/get-history", run_id=run_id, metric_key="m")
    assert history == {"metrics": [metric]}


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e400", "0x10", "01", "1_0", "+1"])
async def test_a_literal_that_is_no_json_number_is_400_and_stores_nothing(mlflow: MLflow, literal: str) -> None:
    run_id = await mlflow.run()
    body = f'{{"run_id": "{run_id}", "key": "m", "value": {literal}, "timestamp": 1}}'
    expect_error(await mlflow.raw("runs/log-metric", body), 400, INVALID, "")
    assert "metrics" not in await mlflow.data(run_id)


async def test_int64_is_a_number_in_answers_and_a_number_or_text_in_requests(mlflow: MLflow) -> None:
    run_id = await mlflow.run()
    big = 2**53 + 1
    for step, timestamp in ((-5, 17), ("-4", "18"), (str(big), "19")):
        await mlflow.call("POST", "runs/log-metric", run_id=run_id, key="m", value="1", timestamp=timestamp, step=step)
    history = await mlflow.call("GET", "metrics/get-history", run_id=run_id, metric_key="m", max_results="10")
    assert [(point["timestamp"], point["step"]) for point in history["metrics"]] == [(17, -5), (18, -4), (19, big)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": None}, "Missing value for required parameter 'value'"),
        ({"timestamp": None}, "Missing value for required parameter 'timestamp'"),
        ({"value": "a lot"}, "'a lot'"),
        ({"value": ""}, "expected a number"),
        ({"value": True}, "$.value"),
        ({"value": [1]}, "$.value"),
        ({"timestamp": -1}, "Invalid time"),
        ({"timestamp": "noon"}, "$.timestamp"),
        ({"timestamp": 2**63}, "Invalid time"),
        ({"step": 1.5}, "$.step"),
        ({"step": "x"}, "$.step"),
        ({"step": 2**63}, "out of range"),
        ({"step": -(2**63) - 1}, "out of range"),
    ],
)
async def test_a_malformed_point_is_refused_alone_and_in_a_batch(
    mlflow: MLflow, changes: dict[str, Any], message: str
) -> None:
    run_id = await mlflow.run()
    point = {"key": "m", "value": 1, "timestamp": 1, "step": 0} | changes
    await mlflow.refused(400, INVALID, message, "POST", "runs/log-metric", run_id=run_id, **point)
    in_batch = message.replace("$.", "$.metrics[1].")
    await mlflow.refused(400, INVALID, in_batch, "POST", "runs/log-batch", run_id=run_id, metrics=[*_metrics(1), point])
    assert "metrics" not in await mlflow.data(run_id)


async def test_required_fields_of_a_point_may_not_be_left_out(mlflow: MLflow) -> None:
    run_id = await mlflow.run()
    await mlflow.refused(400, INVALID, "'value'", "POST", "runs/log-metric", run_id=run_id, key="m", timestamp=1)
    await mlflow.refused(400, INVALID, "'timestamp'", "POST", "runs/log-metric", run_id=run_id, key="m", value=1)
    await mlflow.refused(400, INVALID, "metric", "POST", "runs/log-metric", run_id=run_id, value=1, timestamp=1)


async def test_the_greatest_point_shows_and_exact_repeats_count_once(mlflow: MLflow) -> None:
    run_id = await mlflow.run()
    for value in (5, 3, 5):
        await mlflow.call("POST", "runs/log-metric", run_id=run_id, key="m", value=value, timestamp=1, step=1)
    assert (await mlflow.data(run_id))["metrics"] == {"m": 5}
    history = await mlflow.call("GET", "metrics/get-history", run_id=run_id, metric_key="m")
    assert [point["value"] for point in history["metrics"]] == [3, 5]


async def test_history_is_paged_in_order(mlflow: MLflow) -> None:
    run_id = await mlflow.run()
    points = [{"key": "m", "value": value, "timestamp": timestamp, "step": step}
              for timestamp in (2, 1) for step in (1, -1) for value in (0.1, "Infinity", "-Infinity")]  # fmt: skip
    await mlflow.call("POST", "runs/log-batch", run_id=run_id, metrics=points)
    whole = await mlflow.call("GET", "metrics/get-history", run_id=run_id, metric_key="m")
    assert "next_page_token" not in whole
    order = [(point["timestamp"], point["step"], float(point["value"])) for point in whole["metrics"]]
    assert order == sorted(order)
    assert len(order) == 12
    for size in (1, 5, 12):
        fields: dict[str, Any] = {"run_id": run_id, "metric_key": "m", "max_results": size}
        seen: list[Any] = []
        while True:
            answer = await mlflow.call("GET", "metrics/get-history", **fields)
            assert len(answer["metrics"]) <= size
            seen += answer["metrics"]
            if "next_page_token" not in answer:
                break
            fields["page_token"] = answer["next_page_token"]
        assert seen == whole["metrics"]


async def test_the_history_of_an_unknown_metric_is_an_empty_object(mlflow: MLflow) -> None:
    assert await mlflow.call("GET", "metrics/get-history", run_id=await mlflow.run(), metric_key="nobody") == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "'metric_key'"),
        ({"metric_key": "m", "max_results": "0"}, "'max_results'"),
        ({"metric_key": "m", "max_results": "x"}, "$.max_results"),
        ({"metric_key": "m", "page_token": "x"}, "Invalid page token"),
        ({"metric_key": "m", "page_token": "1:2"}, "Invalid page token"),
        ({"metric_key": "m", "page_token": "1:2:zz"}, "Invalid page token"),
    ],
)
async def test_a_malformed_history_request_is_refused(mlflow: MLflow, fields: dict[str, str], message: str) -> None:
    await mlflow.refused(400, INVALID, message, "GET", "metrics/get-history", run_id=await mlflow.run(), **fields)


async def test_of_repeated_query_keys_the_last_counts_where_one_is_wanted(
    mlflow: MLflow, http: httpx.AsyncClient
) -> None:
    run_id = await mlflow.run()
    answer = await http.get(f"{mlflow.prefix}runs/get?run_id=nobody&run_id={run_id}")
    assert answer.json()["run"]["info"]["run_id"] == run_id


async def test_repeated_query_keys_make_a_list_where_one_is_wanted(mlflow: MLflow, http: httpx.AsyncClient) -> None:
    response = await http.get(f"{mlflow.prefix}experiments/search?max_results=1&order_by=name&order_by=creation_time")
    assert response.status_code == 200


async def _searched(mlflow: MLflow, **fields: Any) -> list[str]:
    answer = await mlflow.call("POST", "runs/search", **fields)
    return [run["info"]["run_name"] for run in answer.get("runs", [])]


async def test_search_filters_orders_and_views(mlflow: MLflow) -> None:
    experiment = await mlflow.experiment()
    for name, value in (("low", 0.1), ("high", 0.9), ("nan", "NaN"), ("none", None)):
        run_id = await mlflow.run(experiment, run_name=name)
        await mlflow.call("POST", "runs/log-parameter", run_id=run_id, key="p", value=name)
        if value is not None:
            await mlflow.call("POST", "runs/log-metric", run_id=run_id, key="acc", value=value, timestamp=1)
    inside = {"experiment_ids": [experiment]}
    assert await _searched(mlflow, **inside, filter="metrics.acc > 0.5 AND params.p LIKE 'h%'") == ["high"]
    assert await _searched(mlflow, **inside, order_by=["metrics.acc DESC"]) == ["high", "low", "nan", "none"]
    assert await _searched(mlflow, **inside, order_by=["metrics.acc ASC"]) == ["low", "high", "nan", "none"]
    found = await mlflow.call("POST", "runs/search", **inside, filter="attributes.run_name = 'low'")
    [run] = found["runs"]
    assert (run["data"]["metrics"][0]["value"], run["data"]["params"]) == (0.1, [{"key": "p", "value": "low"}])
    await mlflow.call("POST", "runs/delete", run_id=run["info"]["run_id"])
    assert "low" not in await _searched(mlflow, **inside)
    for view in ("DELETED_ONLY", 2, "2"):
        assert await _searched(mlflow, **inside, run_view_type=view) == ["low"]
    assert len(await _searched(mlflow, **inside, run_view_type="ALL")) == 4


async def test_search_pages_through_everything_once(mlflow: MLflow) -> None:
    experiment = await mlflow.experiment()
    names = {f"run {number}" for number in range(7)}
    for name in names:
        await mlflow.run(experiment, run_name=name)
    fields: dict[str, Any] = {"experiment_ids": [experiment], "max_results": 3}
    seen: list[str] = []
    while True:
        answer = await mlflow.call("POST", "runs/search", **fields)
        seen += [run["info"]["run_name"] for run in answer["runs"]]
        if "next_page_token" not in answer:
            break
        fields["page_token"] = answer["next_page_token"]
    assert len(seen) == 7
    assert set(seen) == names


async def test_searching_no_experiment_finds_nothing(mlflow: MLflow) -> None:
    await mlflow.run()
    assert await mlflow.call("POST", "runs/search") == {}
    assert await mlflow.call("POST", "runs/search", experiment_ids=["99999999"]) == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filter": "metrics.acc > 'x'"}, "Expected numeric value type for metric"),
        ({"filter": "tags.p = 1"}, "quoted string"),
        ({"filter": "nonsense"}, "Invalid filter string"),
        ({"filter": "attributes.nobody = 'x'"}, "Invalid attribute key"),
        ({"order_by": ["nonsense.x"]}, "Invalid entity type"),
        ({"max_results": 0}, "'max_results'"),
        ({"max_results": 50_001}, "'max_results'"),
        ({"page_token": "no"}, "Invalid page token"),
        ({"page_token": "-1"}, "Invalid page token"),
        ({"page_token": "eyJxIjoieCIsInYiOltdfQ=="}, "another filter"),
        ({"order_by": ["metrics.a", "metrics.a DESC"]}, "duplicate fields"),
        ({"filter": "min(params.a) > 1"}, "it takes a metric"),
        ({"filter": "avg(metrics.a) > 1"}, "Invalid function"),
        ({"run_view_type": "SOME"}, "Invalid view type"),
        ({"experiment_ids": ["x"]}, "Invalid experiment ID"),
        ({"experiment_ids": "0"}, "$.experiment_ids"),
        ({"order_by": "start_time"}, "$.order_by"),
    ],
)
async def test_a_malformed_search_is_refused(mlflow: MLflow, fields: dict[str, Any], message: str) -> None:
    await mlflow.refused(400, INVALID, message, "POST", "runs/search", **({"experiment_ids": ["0"]} | fields))


async def test_the_artifacts_of_a_run_are_listed_relative_to_its_root(mlflow: MLflow, stack: Stack) -> None:
    experiment = await mlflow.experiment()
    run_id = await mlflow.run(experiment)
    root = f"{experiment}/{run_id}/artifacts"
    stack.services.artifacts.write(f"{root}/model/MLmodel", [b"123"])
    stack.services.artifacts.write(f"{root}/a.txt", [b"1"])
    uri = f"mlflow-artifacts:/{root}"
    assert await mlflow.call("GET", "artifacts/list", run_id=run_id) == {
        "root_uri": uri,
        "files": [{"path": "a.txt", "is_dir": False, "file_size": 1}, {"path": "model", "is_dir": True}],
    }
    assert await mlflow.call("GET", "artifacts/list", run_id=run_id, path="model") == {
        "root_uri": uri,
        "files": [{"path": "model/MLmodel", "is_dir": False, "file_size": 3}],
    }
    for path in ("a.txt", "nothing"):
        assert await mlflow.call("GET", "artifacts/list", run_id=run_id, path=path) == {"root_uri": uri}
    for path in ("..", "../..", "/etc", "%2e%2e", "a/../.."):
        await mlflow.refused(400, INVALID, "Invalid path", "GET", "artifacts/list", run_id=run_id, path=path)


async def test_metrics_sent_to_one_run_do_not_show_in_another(mlflow: MLflow) -> None:
    first, second = await mlflow.run(), await mlflow.run()
    await mlflow.call("POST", "runs/log-metric", run_id=first, key="m", value=1, timestamp=1)
    assert math.isclose((await mlflow.data(first))["metrics"]["m"], 1)
    assert "metrics" not in await mlflow.data(second)
