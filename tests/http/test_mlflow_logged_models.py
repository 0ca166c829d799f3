"""MLflow's logged-model endpoints on the wire."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import httpx
import pytest

from mlplat.tracking.logged_models import POINTS_PER_METRIC
from tests.contract.chdb import unique
from tests.http.conftest import MLflow, Stack

INVALID = "INVALID_PARAMETER_VALUE"
MISSING = "RESOURCE_DOES_NOT_EXIST"


async def _create(mlflow: MLflow, experiment_id: str = "0", **fields: Any) -> str:
    answer = await mlflow.call("POST", "logged-models", experiment_id=experiment_id, **fields)
    return str(answer["model"]["info"]["model_id"])


async def _get(mlflow: MLflow, model_id: str, **fields: Any) -> Any:
    return (await mlflow.call("GET", f"logged-models/{model_id}", **fields))["model"]


async def _measure(mlflow: MLflow, run_id: str, model_id: str, **metric: Any) -> None:
    defaults = {"key": "m", "timestamp": 1, "model_id": model_id}
    await mlflow.call("POST", "runs/log-metric", run_id=run_id, **defaults | metric)


async def _found(mlflow: MLflow, experiment_id: str, **fields: Any) -> list[str]:
    answer = await mlflow.call("POST", "logged-models/search", experiment_ids=[experiment_id], **fields)
    return [model["info"]["name"] for model in answer.get("models", [])]


@pytest.mark.parametrize("prefix", ["/api", "/ajax-api"])
async def test_a_created_model_is_answered_whole_and_read_back(http: httpx.AsyncClient, prefix: str) -> None:
    mlflow = MLflow(http, prefix)
    experiment = await mlflow.experiment()
    answer = await mlflow.call(
        "POST", "logged-models", experiment_id=experiment, name="tree", model_type="classifier", source_run_id="r",
        params=[{"key": "depth", "value": "3"}], tags=[{"key": "team", "value": "red"}],
    )  # fmt: skip
    model = answer["model"]
    model_id = model["info"]["model_id"]
    assert model_id.startswith("m-")
    assert model["info"].pop("creation_timestamp_ms") == model["info"].pop("last_updated_timestamp_ms")
    assert model == {
        "info": {
            "model_id": model_id,
            "experiment_id": experiment,
            "name": "tree",
            "artifact_uri": f"mlflow-artifacts:/{experiment}/models/{model_id}/artifacts",
            "status": "LOGGED_MODEL_PENDING",
            "model_type": "classifier",
            "source_run_id": "r",
            "tags": [{"key": "team", "value": "red"}],
        },
        "data": {"params": [{"key": "depth", "value": "3"}]},
    }
    read = await _get(mlflow, model_id)
    assert read["info"]["name"] == "tree"
    assert read["data"] == model["data"]


async def test_a_model_without_a_name_gets_one_and_what_is_empty_is_absent(mlflow: MLflow) -> None:
    model = await _get(mlflow, await _create(mlflow))
    assert model["info"]["name"]
    assert not {"model_type", "source_run_id", "tags"} & set(model["info"])
    assert model["data"] == {}


async def test_a_repeat_under_one_idempotency_key_is_one_model(mlflow: MLflow, http: httpx.AsyncClient) -> None:
    experiment, headers = await mlflow.experiment(), {"Idempotency-Key": unique("key")}
    body = {"experiment_id": experiment, "params": [{"key": "p", "value": "1"}]}
    answers = [await http.post(mlflow.prefix + "logged-models", json=body, headers=headers) for _ in range(3)]
    assert len({answer.text for answer in answers}) == 1
    assert len(await _found(mlflow, experiment)) == 1


@pytest.mark.parametrize(
    ("sent", "shown"),
    [("LOGGED_MODEL_READY", "LOGGED_MODEL_READY"), ("READY", "LOGGED_MODEL_READY"), (2, "LOGGED_MODEL_READY"),
     ("3", "LOGGED_MODEL_UPLOAD_FAILED"), ("LOGGED_MODEL_UPLOAD_FAILED", "LOGGED_MODEL_UPLOAD_FAILED")],
)  # fmt: skip
async def test_finalizing_says_how_the_upload_ended(mlflow: MLflow, sent: str | int, shown: str) -> None:
    model_id = await _create(mlflow)
    answer = await mlflow.call("PATCH", f"logged-models/{model_id}", status=sent)
    assert answer["model"]["info"]["status"] == shown
    assert (await _get(mlflow, model_id))["info"]["status"] == shown


async def test_params_are_written_once_and_tags_replaced(mlflow: MLflow) -> None:
    model_id = await _create(mlflow)
    path = f"logged-models/{model_id}"
    for _repeat in range(2):
        assert await mlflow.call("POST", f"{path}/params", params=[{"key": "p", "value": "1"}, {"key": "q"}]) == {}
        tags = [{"key": "a/b", "value": "1"}, {"key": "a/b", "value": "2"}]
        assert await mlflow.call("PATCH", f"{path}/tags", tags=tags) == {}
    changed = [{"key": "new", "value": "1"}, {"key": "p", "value": "2"}]
    await mlflow.refused(
        400, INVALID, "Changing param values is not allowed", "POST", f"{path}/params", params=changed
    )  # fmt: skip
    model = await _get(mlflow, model_id)
    assert model["data"]["params"] == [{"key": "p", "value": "1"}, {"key": "q", "value": ""}]
    assert model["info"]["tags"] == [{"key": "a/b", "value": "2"}]
    assert await mlflow.call("DELETE", f"{path}/tags/a/b") == {}
    await mlflow.refused(404, MISSING, "No tag with key 'a/b' found for model", "DELETE", f"{path}/tags/a/b")
    assert "tags" not in (await _get(mlflow, model_id))["info"]


async def test_a_deleted_model_is_unknown_but_to_those_who_ask_for_deleted_ones(mlflow: MLflow) -> None:
    experiment = await mlflow.experiment()
    model_id = await _create(mlflow, experiment)
    path, unknown = f"logged-models/{model_id}", (404, MISSING, f"Logged model with ID '{model_id}' not found.")
    for _repeat in range(2):
        assert await mlflow.call("DELETE", path, model_id=model_id) == {}
    await mlflow.refused(*unknown, "GET", path)
    await mlflow.refused(*unknown, "PATCH", path, status="READY")
    await mlflow.refused(*unknown, "PATCH", f"{path}/tags", tags=[{"key": "a", "value": "1"}])
    await mlflow.refused(*unknown, "POST", f"{path}/params", params=[{"key": "a", "value": "1"}])
    await mlflow.refused(*unknown, "GET", f"{path}/artifacts/directories")
    assert await _found(mlflow, experiment) == []
    for text in ("true", "True"):
        assert (await _get(mlflow, model_id, allow_deleted=text))["info"]["model_id"] == model_id
    await mlflow.refused(*unknown, "GET", path, allow_deleted="false")
    await _measure(mlflow, await mlflow.run(), model_id, value=1)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/params"), ("PATCH", "/tags"), ("DELETE", "/tags/t"),
     ("GET", "/artifacts/directories"), ("GET", "/artifacts/files")],
)  # fmt: skip
async def test_every_endpoint_knows_unknown_models(mlflow: MLflow, method: str, path: str) -> None:
    fields = {"artifact_file_path": "x"} if method == "GET" else {"status": "READY"}
    message = "Logged model with ID 'm-0' not found."
    await mlflow.refused(404, MISSING, message, method, f"logged-models/m-0{path}", **fields)


@pytest.mark.parametrize(
    ("fields", "status", "code", "message"),
    [
        ({"experiment_id": ""}, 400, INVALID, "Missing value for required parameter 'experiment_id'"),
        ({"experiment_id": "x"}, 400, INVALID, "Invalid experiment ID"),
        ({"experiment_id": "99999999"}, 404, MISSING, "No Experiment with id=99999999"),
        *(({"name": f"a{bad}b"}, 400, INVALID, "Invalid model name") for bad in "/:.%\"'"),
        ({"name": "x" * 501}, 400, INVALID, "'name' exceeds the maximum length"),
        ({"model_type": "x" * 501}, 400, INVALID, "'model_type' exceeds"),
        ({"source_run_id": "x" * 501}, 400, INVALID, "'source_run_id' exceeds"),
        ({"params": [{"key": "", "value": "1"}]}, 400, INVALID, "Invalid param name"),
        ({"params": [{"key": "a", "value": "1"}, {"key": "a", "value": "2"}]}, 400, INVALID, "Duplicate parameter"),
        ({"tags": [{"key": "x" * 251, "value": "1"}]}, 400, INVALID, "Invalid tag name"),
        ({"tags": "t"}, 400, INVALID, "$.tags"),
    ],
)
async def test_a_model_that_cannot_be_created_says_why(
    mlflow: MLflow, fields: dict[str, Any], status: int, code: str, message: str
) -> None:
    await mlflow.refused(status, code, message, "POST", "logged-models", **{"experiment_id": "0"} | fields)


@pytest.mark.parametrize("status", ["", "NONSENSE", "LOGGED_MODEL_PENDING", 0, 4, "9" * 30])
async def test_a_model_is_only_finalized_with_a_final_status(mlflow: MLflow, status: str | int) -> None:
    model_id = await _create(mlflow)
    await mlflow.refused(400, INVALID, "model status", "PATCH", f"logged-models/{model_id}", status=status)


async def test_nothing_is_created_in_a_deleted_experiment(mlflow: MLflow) -> None:
    number = await mlflow.experiment()
    await mlflow.call("POST", "experiments/delete", experiment_id=number)
    await mlflow.refused(400, INVALID, "must be in the 'active' state", "POST", "logged-models", experiment_id=number)


async def test_metrics_reach_the_model_and_the_run(mlflow: MLflow) -> None:
    run_id, model_id = await mlflow.run(), await _create(mlflow)
    point = {"key": "m", "value": 0.5, "timestamp": 1, "step": 2, "model_id": model_id}
    on_dataset = point | {"value": "NaN", "dataset_name": "d", "dataset_digest": "1"}
    for _repeat in range(2):
        await mlflow.call("POST", "runs/log-batch", run_id=run_id, metrics=[point, on_dataset, point | {"key": "n"}])
        await _measure(mlflow, run_id, model_id, value="0.25", step=3)
    shown = [metric | {"run_id": run_id} for metric in (point, on_dataset, point | {"value": 0.25, "step": 3})]
    metrics = (await _get(mlflow, model_id))["data"]["metrics"]
    assert sorted((m for m in metrics if m["key"] == "m"), key=str) == sorted(shown, key=str)
    assert len(metrics) == 4
    assert (await mlflow.data(run_id))["metrics"] == {"m": 0.25, "n": 0.5}


async def test_a_model_shows_the_newest_points_of_each_metric(mlflow: MLflow) -> None:
    run_id, model_id = await mlflow.run(), await _create(mlflow)
    count = POINTS_PER_METRIC + 5
    metrics = [{"key": "m", "value": n, "timestamp": n, "step": n, "model_id": model_id} for n in range(count)]
    await mlflow.call("POST", "runs/log-batch", run_id=run_id, metrics=[*metrics, metrics[0] | {"key": "other"}])
    found = (await _get(mlflow, model_id))["data"]["metrics"]
    assert [metric["step"] for metric in found if metric["key"] == "m"] == list(range(5, count))
    assert [metric["key"] for metric in found].count("other") == 1


@pytest.mark.parametrize(
    ("metric", "status", "code", "message"),
    [
        ({"model_id": "m-0"}, 404, MISSING, "Logged model with ID 'm-0' not found."),
        ({"dataset_name": "x" * 501}, 400, INVALID, "'dataset_name' exceeds"),
        ({"dataset_digest": "x" * 37}, 400, INVALID, "'dataset_digest' exceeds"),
        ({"model_id": 5}, 400, INVALID, "model_id"),
    ],
)
async def test_a_metric_of_a_malformed_model_or_dataset_writes_nothing(
    mlflow: MLflow, metric: dict[str, Any], status: int, code: str, message: str
) -> None:
    run_id, model_id = await mlflow.run(), await _create(mlflow)
    bad = {"key": "m", "value": 1, "timestamp": 1, "model_id": model_id} | metric
    good = {"key": "m", "value": 1, "timestamp": 1, "model_id": model_id}
    params = [{"key": "p", "value": "1"}]
    await mlflow.refused(
        status, code, message, "POST", "runs/log-batch", run_id=run_id, metrics=[good, bad], params=params
    )
    await mlflow.refused(status, code, message, "POST", "runs/log-metric", run_id=run_id, **bad)
    assert set(await mlflow.data(run_id)) == {"tags"}
    assert (await _get(mlflow, model_id))["data"] == {}


async def test_one_point_sent_by_many_at_once_is_one_point(mlflow: MLflow) -> None:
    run_id, models = await mlflow.run(), [await _create(mlflow) for _ in range(5)]
    points = [{"key": "m", "value": 1, "timestamp": 1, "model_id": model_id} for model_id in models]
    orders = [points, points[::-1]] * 4
    await asyncio.gather(*(mlflow.call("POST", "runs/log-batch", run_id=run_id, metrics=metrics) for metrics in orders))
    for model_id in models:
        assert len((await _get(mlflow, model_id))["data"]["metrics"]) == 1


@pytest.fixture
async def models(mlflow: MLflow) -> tuple[str, dict[str, str]]:
    """An experiment with four models: their metric ``m`` is 1, 2, NaN and missing; and their ids by name."""
    experiment = await mlflow.experiment()
    run_id = await mlflow.run(experiment)
    ids = {}
    for name, value in (("one", 1), ("two", 2), ("nan", "NaN"), ("none", None)):
        ids[name] = await _create(
            mlflow, experiment, name=name, model_type="tree" if name == "one" else None, source_run_id=run_id,
            params=[{"key": "p", "value": name}], tags=[{"key": "t", "value": name}] if value is not None else [],
        )  # fmt: skip
        if value is not None:
            # The newest point decides an order, not the last one sent.
            await _measure(mlflow, run_id, ids[name], value=value, timestamp=10, dataset_name=name, dataset_digest="1")
            await _measure(mlflow, run_id, ids[name], value=-5, timestamp=1, dataset_name="all", dataset_digest="2")
    await mlflow.call("PATCH", f"logged-models/{ids['one']}", status="READY")
    return experiment, ids


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"one", "two", "nan", "none"}),
        ("name = 'one'", {"one"}),
        ("name LIKE 'n%'", {"nan", "none"}),
        ("name ILIKE 'N%' AND params.p != 'nan'", {"none"}),
        ("name IN ('one', 'two')", {"one", "two"}),
        ("name NOT IN ('one', 'two')", {"nan", "none"}),
        ("attributes.name = 'one' OR name = 'two'", {"one", "two"}),
        ("NOT name = 'one'", {"two", "nan", "none"}),
        ("model_type = 'tree'", {"one"}),
        ("model_type IS NULL", {"two", "nan", "none"}),
        ("status = 'READY'", {"one"}),
        ("status != 'READY'", {"two", "nan", "none"}),
        ("creation_timestamp > 0 AND last_updated_timestamp > 0", {"one", "two", "nan", "none"}),
        ("creation_time < 1000", set()),
        ("metrics.m > 0", {"one", "two"}),
        ("metrics.m = 2", {"two"}),
        ("metrics.m < 0", {"one", "two", "nan"}),
        ("metrics.m != -5", {"one", "two", "nan"}),
        ("metrics.`m` >= 1 AND metrics.m > 1.5", {"two"}),
        ("metrics.other > 0", set()),
        ("params.p = 'two'", {"two"}),
        ("tags.t LIKE '%n%'", {"one", "nan"}),
        ("tags.t IS NULL", {"none"}),
        ("tags.t IS NOT NULL", {"one", "two", "nan"}),
        ("params.p = '''; DROP TABLE logged_model; --'", None),
        ("name = '\"; DROP TABLE logged_model; --'", set()),
    ],
)
async def test_filters(
    mlflow: MLflow, models: tuple[str, dict[str, str]], text: str, expected: set[str] | None
) -> None:
    if expected is None:
        await mlflow.refused(
            400, INVALID, "Invalid filter string", "POST", "logged-models/search", experiment_ids=[models[0]],
            filter=text,
        )  # fmt: skip
        return
    assert set(await _found(mlflow, models[0], filter=text)) == expected


@pytest.mark.parametrize(
    ("order_by", "expected"),
    [
        ([], ["none", "nan", "two", "one"]),
        ([{"field_name": "creation_timestamp"}], ["one", "two", "nan", "none"]),
        ([{"field_name": "creation_time", "ascending": False}], ["none", "nan", "two", "one"]),
        ([{"field_name": "name", "ascending": True}], ["nan", "none", "one", "two"]),
        ([{"field_name": "attributes.name", "ascending": False}], ["two", "one", "none", "nan"]),
        ([{"field_name": "metrics.m"}], ["one", "two", "nan", "none"]),
        ([{"field_name": "metrics.m", "ascending": False}], ["two", "one", "nan", "none"]),
        ([{"field_name": "model_type"}, {"field_name": "name"}], ["one", "nan", "none", "two"]),
        ([{"field_name": "metrics.m", "dataset_name": "two"}], ["two", "none", "nan", "one"]),
        (
            [{"field_name": "metrics.m", "dataset_name": "all", "dataset_digest": "2"}, {"field_name": "name"}],
            ["nan", "one", "two", "none"],
        ),
    ],
)
async def test_orders(
    mlflow: MLflow, models: tuple[str, dict[str, str]], order_by: list[dict[str, Any]], expected: list[str]
) -> None:
    assert await _found(mlflow, models[0], order_by=order_by) == expected
    paged: list[str] = []
    fields: dict[str, Any] = {"experiment_ids": [models[0]], "order_by": order_by, "max_results": 3}
    while True:
        answer = await mlflow.call("POST", "logged-models/search", **fields)
        paged += [model["info"]["name"] for model in answer["models"]]
        if "next_page_token" not in answer:
            break
        fields["page_token"] = answer["next_page_token"]
    assert paged == expected


@pytest.mark.parametrize(
    ("datasets", "text", "expected"),
    [
        ([{"dataset_name": "all"}], "", {"one", "two", "nan"}),
        ([{"dataset_name": "all", "dataset_digest": "1"}], "", set()),
        ([{"dataset_name": "one"}, {"dataset_name": "two", "dataset_digest": "1"}], "", {"one", "two"}),
        ([{"dataset_name": "all"}], "metrics.m > 0", set()),
        ([{"dataset_name": "one"}], "metrics.m > 0", {"one"}),
        ([{"dataset_name": "one"}], "name = 'two'", set()),
    ],
)
async def test_datasets_confine_a_search(
    mlflow: MLflow, models: tuple[str, dict[str, str]], datasets: list[dict[str, str]], text: str, expected: set[str]
) -> None:
    assert set(await _found(mlflow, models[0], datasets=datasets, filter=text)) == expected


async def test_searching_no_experiment_finds_nothing(mlflow: MLflow) -> None:
    await _create(mlflow)
    assert await mlflow.call("POST", "logged-models/search") == {}
    assert await mlflow.call("POST", "logged-models/search", experiment_ids=["99999999"]) == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filter": "metrics.m > 'x'"}, "Expected numeric value"),
        ({"filter": "min(metrics.m) > 1"}, "no aggregates"),
        ({"filter": "nonsense"}, "Invalid filter string"),
        ({"filter": "attributes.run_id = 'x'"}, "Invalid attribute key"),
        ({"filter": "creation_timestamp > -1"}, "Invalid time"),
        ({"order_by": [{"field_name": ""}]}, "'field_name'"),
        ({"order_by": [{"field_name": "params.p"}]}, "Invalid order by field name"),
        ({"order_by": [{"field_name": "nobody"}]}, "Invalid order by field name"),
        ({"order_by": [{"field_name": "name", "dataset_name": "d"}]}, "Only metrics have datasets"),
        ({"order_by": ["name"]}, "$.order_by"),
        ({"datasets": [{"dataset_digest": "1"}]}, "`dataset_name` in the `datasets` clause must be specified"),
        ({"max_results": 0}, "'max_results'"),
        ({"max_results": -1}, "'max_results'"),
        ({"page_token": "no"}, "Invalid page token"),
        ({"experiment_ids": ["x"]}, "Invalid experiment ID"),
    ],
)
async def test_a_malformed_search_is_refused(mlflow: MLflow, fields: dict[str, Any], message: str) -> None:
    everything = {"experiment_ids": ["0"]} | fields
    await mlflow.refused(400, INVALID, message, "POST", "logged-models/search", **everything)


async def test_a_models_files_are_listed_and_downloaded(mlflow: MLflow, http: httpx.AsyncClient, stack: Stack) -> None:
    experiment = await mlflow.experiment()
    model_id = await _create(mlflow, experiment)
    root = f"{experiment}/models/{model_id}/artifacts"
    for path in ("MLmodel", "code/a.py"):
        stack.services.artifacts.write(f"{root}/{path}", [path.encode()])
    path, uri = f"logged-models/{model_id}/artifacts", f"mlflow-artifacts:/{root}"
    assert await mlflow.call("GET", f"{path}/directories") == {
        "root_uri": uri,
        "files": [{"path": "MLmodel", "is_dir": False, "file_size": 7}, {"path": "code", "is_dir": True}],
    }
    assert (await mlflow.call("GET", f"{path}/directories", artifact_directory_path="code"))["files"] == [
        {"path": "code/a.py", "is_dir": False, "file_size": 9},
    ]  # fmt: skip
    assert await mlflow.call("GET", f"{path}/directories", artifact_directory_path="none") == {"root_uri": uri}
    ajax = MLflow(http, "/ajax-api")
    response = await ajax.send("GET", f"{path}/files", artifact_file_path="code/a.py")
    assert (response.status_code, response.content) == (200, b"code/a.py")
    assert response.headers["content-disposition"].startswith("attachment")
    await ajax.refused(404, MISSING, "No such artifact", "GET", f"{path}/files", artifact_file_path="none")
    await ajax.refused(400, INVALID, "'artifact_file_path'", "GET", f"{path}/files")
    for outside in ("..", "%2e%2e/x", "/etc/passwd"):
        await ajax.refused(400, INVALID, "Invalid path", "GET", f"{path}/files", artifact_file_path=outside)
        await ajax.refused(400, INVALID, "Invalid path", "GET", f"{path}/directories", artifact_directory_path=outside)


async def test_not_a_number_comes_back_as_text(mlflow: MLflow) -> None:
    run_id, model_id = await mlflow.run(), await _create(mlflow)
    for value in (math.inf, -math.inf):
        await _measure(mlflow, run_id, model_id, key=f"m{value}", value="Infinity" if value > 0 else "-Infinity")
    values = {metric["key"]: metric["value"] for metric in (await _get(mlflow, model_id))["data"]["metrics"]}
    assert values == {"minf": "Infinity", "m-inf": "-Infinity"}
