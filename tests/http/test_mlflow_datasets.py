"""MLflow's endpoints for datasets, inputs and outputs on the wire."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from sqlalchemy import delete, event, func, select

from mlplat.db.tables import dataset, experiment, run, run_input, run_model
from mlplat.tracking.model import MAX_MODEL_HISTORY
from tests.contract.chdb import unique
from tests.http.conftest import MLflow, Stack, expect_error

INVALID = "INVALID_PARAMETER_VALUE"
MISSING = "RESOURCE_DOES_NOT_EXIST"


def _dataset(name: str = "d", digest: str = "1", **fields: Any) -> dict[str, Any]:
    return {"name": name, "digest": digest, "source_type": "local", "source": "here"} | fields


def _input(context: str | None = None, **fields: Any) -> dict[str, Any]:
    tags = [] if context is None else [{"key": "mlflow.data.context", "value": context}]
    return {"dataset": _dataset(**fields), "tags": tags}


async def _model(mlflow: MLflow, experiment_id: str = "0") -> str:
    answer = await mlflow.call("POST", "logged-models", experiment_id=experiment_id)
    return str(answer["model"]["info"]["model_id"])


async def _run(mlflow: MLflow, run_id: str) -> Any:
    return (await mlflow.call("GET", "runs/get", run_id=run_id))["run"]


async def test_inputs_come_back_as_they_were_logged(mlflow: MLflow) -> None:
    run_id = await mlflow.run(await mlflow.experiment())
    first = _input("train", name="b", schema="{}", profile='{"rows": 1}')
    assert await mlflow.call("POST", "runs/log-inputs", run_id=run_id, datasets=[first]) == {}
    await mlflow.call("POST", "runs/log-inputs", run_id=run_id, datasets=[_input(name="a")])
    inputs = (await _run(mlflow, run_id))["inputs"]
    assert inputs == {"dataset_inputs": [first, {"dataset": _dataset("a")}]}


async def test_runs_without_links_have_empty_ones(mlflow: MLflow) -> None:
    found = await _run(mlflow, await mlflow.run())
    assert (found["inputs"], found["outputs"]) == ({}, {})


async def test_search_shows_the_links_of_every_run(mlflow: MLflow) -> None:
    number = await mlflow.experiment()
    runs = [await mlflow.run(number) for _ in range(3)]
    model_id = await _model(mlflow, number)
    for run_id in runs[:2]:
        await mlflow.call("POST", "runs/log-inputs", run_id=run_id, datasets=[_input(name=run_id[:5])])
    await mlflow.call("POST", "runs/outputs", run_id=runs[2], models=[{"model_id": model_id, "step": 4}])
    found = (await mlflow.call("POST", "runs/search", experiment_ids=[number]))["runs"]
    by_id = {entry["info"]["run_id"]: entry for entry in found}
    for run_id in runs[:2]:
        assert by_id[run_id]["inputs"]["dataset_inputs"][0]["dataset"]["name"] == run_id[:5]
    assert by_id[runs[2]]["outputs"] == {"model_outputs": [{"model_id": model_id, "step": 4}]}


async def test_runs_without_links_cost_no_statement_and_others_at_most_two(mlflow: MLflow, stack: Stack) -> None:
    plain, linked = await mlflow.run(), await mlflow.run()
    models = [{"model_id": await _model(mlflow), "step": number} for number in range(3)]
    many = [_input(name=str(number)) for number in range(20)]
    await mlflow.call("POST", "runs/log-inputs", run_id=linked, datasets=many, models=models)
    await mlflow.call("POST", "runs/outputs", run_id=linked, models=models)
    statements: list[str] = []

    def count(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        statements.append(statement)

    event.listen(stack.engine.sync_engine, "before_cursor_execute", count)
    try:
        await _run(mlflow, plain)
        without = [text for text in statements if text.startswith("SELECT")]
        statements.clear()
        await _run(mlflow, linked)
    finally:
        event.remove(stack.engine.sync_engine, "before_cursor_execute", count)
    assert len([text for text in statements if text.startswith("SELECT")]) == len(without) + 2


async def test_the_first_description_of_a_dataset_stays(mlflow: MLflow) -> None:
    number = await mlflow.experiment()
    first, second = await mlflow.run(number), await mlflow.run(number)
    await mlflow.call("POST", "runs/log-inputs", run_id=first, datasets=[_input(schema="old"), _input(schema="new")])
    await mlflow.call("POST", "runs/log-inputs", run_id=second, datasets=[_input("test", schema="newer")])
    [found] = (await _run(mlflow, second))["inputs"]["dataset_inputs"]
    assert (found["dataset"]["schema"], found["tags"][0]["value"]) == ("old", "test")
    other = await mlflow.run(await mlflow.experiment())
    await mlflow.call("POST", "runs/log-inputs", run_id=other, datasets=[_input(schema="other")])
    assert (await _run(mlflow, other))["inputs"]["dataset_inputs"][0]["dataset"]["schema"] == "other"


async def test_runs_that_log_the_same_datasets_at_once_share_them(mlflow: MLflow, stack: Stack) -> None:
    number = await mlflow.experiment()
    runs = [await mlflow.run(number) for _ in range(8)]
    names = [f"d{index}" for index in range(20)]
    orders = [names if index % 2 else names[::-1] for index in range(len(runs))]
    await asyncio.gather(
        *(
            mlflow.call("POST", "runs/log-inputs", run_id=run_id, datasets=[_input(name=name) for name in order])
            for run_id, order in zip(runs, orders, strict=True)
        )
    )
    async with stack.engine.connect() as connection:
        query = select(func.count()).select_from(dataset).where(dataset.c.experiment_id == int(number))
        assert (await connection.execute(query)).scalar_one() == len(names)
    for run_id, order in zip(runs, orders, strict=True):
        inputs = (await _run(mlflow, run_id))["inputs"]["dataset_inputs"]
        assert [one["dataset"]["name"] for one in inputs] == order


async def test_models_are_linked_once_and_take_the_last_step(mlflow: MLflow) -> None:
    run_id, model_id = await mlflow.run(), await _model(mlflow)
    for step in (1, "5"):
        await mlflow.call("POST", "runs/outputs", run_id=run_id, models=[{"model_id": model_id, "step": step}])
        await mlflow.call("POST", "runs/log-inputs", run_id=run_id, models=[{"model_id": model_id}])
    found = await _run(mlflow, run_id)
    assert found["outputs"] == {"model_outputs": [{"model_id": model_id, "step": 5}]}
    assert found["inputs"] == {"model_inputs": [{"model_id": model_id}]}


@pytest.mark.parametrize(
    ("path", "fields", "status", "code", "message"),
    [
        ("runs/log-inputs", {"datasets": [{}]}, 400, INVALID, "Dataset cannot be None"),
        ("runs/log-inputs", {"datasets": [_input(name="")]}, 400, INVALID, "'name'"),
        ("runs/log-inputs", {"datasets": [_input(digest="")]}, 400, INVALID, "'digest'"),
        ("runs/log-inputs", {"datasets": [_input(name="x" * 501)]}, 400, INVALID, "'name' exceeds the maximum length"),
        ("runs/log-inputs", {"datasets": [_input(digest="x" * 37)]}, 400, INVALID, "'digest' exceeds"),
        ("runs/log-inputs", {"datasets": [_input(source="x" * 65_536)]}, 400, INVALID, "'source' exceeds"),
        ("runs/log-inputs", {"datasets": [_input(schema="x" * 1_048_576)]}, 400, INVALID, "'schema' exceeds"),
        ("runs/log-inputs", {"datasets": [_input(profile="x" * 16_777_216)]}, 400, INVALID, "'profile' exceeds"),
        ("runs/log-inputs", {"datasets": [_input("x" * 501)]}, 400, INVALID, "'value' exceeds"),
        ("runs/log-inputs", {"datasets": [_input(name=str(n)) for n in range(1_001)]}, 400, INVALID, "at most 1000"),
        ("runs/log-inputs", {"datasets": "d"}, 400, INVALID, "$.datasets"),
        ("runs/log-inputs", {"models": [{}]}, 400, INVALID, "'model_id'"),
        ("runs/log-inputs", {"models": [{"model_id": "m-0"}]}, 404, MISSING, "Logged model with ID 'm-0' not found."),
        ("runs/outputs", {}, 400, INVALID, "Missing value for required parameter 'models'"),
        ("runs/outputs", {"models": [{"model_id": "m-0"}]}, 404, MISSING, "Logged model with ID 'm-0' not found."),
        ("runs/outputs", {"models": [{"model_id": "m-0", "step": 2**63}]}, 400, INVALID, "'step'"),
        ("runs/log-model", {}, 400, INVALID, "'model_json'"),
        ("runs/log-model", {"model_json": "{"}, 400, INVALID, "Malformed model info."),
        ("runs/log-model", {"model_json": "[" * 100_000}, 400, INVALID, "Malformed model info."),
        ("runs/log-model", {"model_json": "[]"}, 400, INVALID, "Malformed model info."),
        ("runs/log-model", {"model_json": '{"flavors": {}}'}, 400, INVALID, "missing mandatory fields"),
    ],
    ids=str,
)  # fmt: skip
async def test_a_malformed_request_is_refused_and_nothing_is_written(
    mlflow: MLflow, path: str, fields: dict[str, Any], status: int, code: str, message: str
) -> None:
    run_id = await mlflow.run()
    before = await _run(mlflow, run_id)
    if path == "runs/log-inputs":
        fields = {"datasets": [_input(name="good")]} | fields if "models" in fields else fields
    await mlflow.refused(status, code, message, "POST", path, run_id=run_id, **fields)
    assert await _run(mlflow, run_id) == before


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("runs/log-inputs", {"datasets": [_input()]}),
        ("runs/outputs", {"models": [{"model_id": "m-0"}]}),
        ("runs/log-model", {"model_json": '{"artifact_path":"a","flavors":{},"utc_time_created":"t","run_id":"r"}'}),
    ],
)
async def test_unknown_unnamed_and_deleted_runs_are_refused(mlflow: MLflow, path: str, fields: dict[str, Any]) -> None:
    await mlflow.refused(404, MISSING, "Run with id=nobody not found", "POST", path, run_id="nobody", **fields)
    await mlflow.refused(400, INVALID, "'run_id'", "POST", path, **fields)
    run_id = await mlflow.run()
    await mlflow.call("POST", "runs/delete", run_id=run_id)
    await mlflow.refused(400, INVALID, "must be in the 'active' state", "POST", path, run_id=run_id, **fields)


async def test_logging_models_writes_their_history(mlflow: MLflow) -> None:
    run_id = await mlflow.run()
    model: dict[str, Any] = {
        "artifact_path": "model", "run_id": run_id, "utc_time_created": "now", "model_uuid": "u", "mlflow_version": "3",
        "flavors": {"sklearn": {"config": {"big": 1}, "code": None}, "python_function": {"env": "e"}},
    }  # fmt: skip
    for _repeat in range(2):
        assert await mlflow.call("POST", "runs/log-model", run_id=run_id, model_json=json.dumps(model)) == {}
    history = json.loads((await mlflow.data(run_id))["tags"]["mlflow.log-model.history"])
    expected = {
        "artifact_path": "model", "run_id": run_id, "utc_time_created": "now", "model_uuid": "u",
        "flavors": {"sklearn": {"code": None}, "python_function": {"env": "e"}},
    }  # fmt: skip
    assert history == [expected, expected]
    for number in range(MAX_MODEL_HISTORY):
        text = json.dumps(model | {"artifact_path": str(number)})
        await mlflow.call("POST", "runs/log-model", run_id=run_id, model_json=text)
    history = json.loads((await mlflow.data(run_id))["tags"]["mlflow.log-model.history"])
    assert [entry["artifact_path"] for entry in history] == [str(number) for number in range(MAX_MODEL_HISTORY)]


async def test_a_history_that_somebody_overwrote_is_left_alone(mlflow: MLflow) -> None:
    run_id = await mlflow.run(tags=[{"key": "mlflow.log-model.history", "value": "mine"}])
    text = '{"artifact_path":"a","flavors":{},"utc_time_created":"t","run_id":"r"}'
    await mlflow.refused(400, INVALID, "not a JSON list", "POST", "runs/log-model", run_id=run_id, model_json=text)
    assert (await mlflow.data(run_id))["tags"]["mlflow.log-model.history"] == "mine"


@pytest.mark.parametrize("prefix", ["/api", "/ajax-api"])
async def test_the_datasets_of_experiments_are_listed_with_their_uses(http: httpx.AsyncClient, prefix: str) -> None:
    mlflow = MLflow(http, prefix)
    first, second, empty = [await mlflow.experiment() for _ in range(3)]
    for context in ("train", "train", "test"):
        await mlflow.call("POST", "runs/log-inputs", run_id=await mlflow.run(first), datasets=[_input(context)])
    await mlflow.call("POST", "runs/log-inputs", run_id=await mlflow.run(second), datasets=[_input(name="e")])
    answer = await mlflow.call("POST", "experiments/search-datasets", experiment_ids=[first, second, empty])
    assert answer == {
        "dataset_summaries": [
            {"experiment_id": first, "name": "d", "digest": "1", "context": "test"},
            {"experiment_id": first, "name": "d", "digest": "1", "context": "train"},
            {"experiment_id": second, "name": "e", "digest": "1"},
        ]
    }
    assert await mlflow.call("POST", "experiments/search-datasets", experiment_ids=[empty]) == {}


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "at least one experiment_id"), (["1"] * 21, "cannot specify more than 20"), (["x"], "Invalid experiment ID")],
)
async def test_a_malformed_search_for_datasets_is_refused(mlflow: MLflow, ids: list[str], message: str) -> None:
    await mlflow.refused(400, INVALID, message, "POST", "experiments/search-datasets", experiment_ids=ids)


async def test_links_go_with_their_runs_models_and_experiments(mlflow: MLflow, stack: Stack) -> None:
    number = await mlflow.experiment()
    run_id, model_id = await mlflow.run(number), await _model(mlflow, number)
    await mlflow.call("POST", "runs/log-inputs", run_id=run_id, datasets=[_input()], models=[{"model_id": model_id}])
    await mlflow.call(
        "POST", "runs/log-metric", run_id=run_id, key="m", value=1, timestamp=1, model_id=model_id
    )  # fmt: skip
    async with stack.engine.begin() as connection:
        await connection.execute(delete(run).where(run.c.run_id == run_id))
        for table in (run_input, run_model):
            left = select(func.count()).select_from(table).where(table.c.run_id == run_id)
            assert (await connection.execute(left)).scalar_one() == 0
        await connection.execute(delete(experiment).where(experiment.c.experiment_id == int(number)))
    await mlflow.refused(404, MISSING, "not found", "GET", f"logged-models/{model_id}")


@pytest.mark.parametrize(
    ("headers", "message"),
    [({}, "Content-Type header is missing"), ({"Content-Type": "text/plain"}, "Content-Type must be one of")],
)
async def test_a_post_says_that_it_is_json(
    mlflow: MLflow, http: httpx.AsyncClient, headers: dict[str, str], message: str
) -> None:
    body = json.dumps({"name": unique("e")}).encode()
    response = await http.post(mlflow.prefix + "experiments/create", content=body, headers=headers)
    expect_error(response, 400, INVALID, message)
    for content_type in ("application/json", "application/json; charset=utf-8"):
        body = json.dumps({"name": unique("e")}).encode()
        accepted = {"Content-Type": content_type}
        response = await http.post(mlflow.prefix + "experiments/create", content=body, headers=accepted)
        assert response.status_code == 200
