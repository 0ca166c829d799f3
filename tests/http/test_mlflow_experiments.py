"""MLflow's experiment endpoints on the wire."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.contract.chdb import unique
from tests.http.conftest import MLflow, expect_error

INVALID = "INVALID_PARAMETER_VALUE"
MISSING = "RESOURCE_DOES_NOT_EXIST"


async def test_a_created_experiment_is_read_by_id_and_by_name(mlflow: MLflow) -> None:
    name = unique("experiment")
    created = await mlflow.call(
        "POST", "experiments/create", name=name, tags=[{"key": "team", "value": "red"}, {"key": "bare"}]
    )
    assert set(created) == {"experiment_id"}
    found = (await mlflow.call("GET", "experiments/get", experiment_id=created["experiment_id"]))["experiment"]
    assert found["experiment_id"].isdecimal()
    assert isinstance(found.pop("creation_time"), int)
    assert isinstance(found.pop("last_update_time"), int)
    tags = sorted(found.pop("tags"), key=lambda tag: str(tag["key"]))
    assert tags == [{"key": "bare", "value": ""}, {"key": "team", "value": "red"}]
    assert found == {
        "experiment_id": created["experiment_id"],
        "name": name,
        "artifact_location": f"mlflow-artifacts:/{created['experiment_id']}",
        "lifecycle_stage": "active",
    }
    by_name = await mlflow.call("GET", "experiments/get-by-name", experiment_name=name)
    assert by_name["experiment"]["experiment_id"] == created["experiment_id"]


async def test_lists_that_are_empty_are_absent(mlflow: MLflow) -> None:
    found = await mlflow.call("GET", "experiments/get", experiment_id=await mlflow.experiment())
    assert "tags" not in found["experiment"]


async def test_both_prefixes_serve_the_same_experiments(mlflow: MLflow, http: httpx.AsyncClient) -> None:
    ajax = MLflow(http, "/ajax-api")
    number = await ajax.experiment()
    assert await mlflow.call("GET", "experiments/get", experiment_id=number) == await ajax.call(
        "GET", "experiments/get", experiment_id=number
    )


async def test_the_default_experiment_is_there(mlflow: MLflow) -> None:
    found = (await mlflow.call("GET", "experiments/get", experiment_id="0"))["experiment"]
    assert (found["name"], found["artifact_location"]) == ("Default", "mlflow-artifacts:/0")


async def test_a_chosen_artifact_location_is_kept(mlflow: MLflow) -> None:
    created = await mlflow.call("POST", "experiments/create", name=unique("e"), artifact_location="s3://b/x")
    found = await mlflow.call("GET", "experiments/get", **created)
    assert found["experiment"]["artifact_location"] == "s3://b/x"


async def test_a_taken_name_is_400_even_when_its_experiment_is_deleted(mlflow: MLflow) -> None:
    name, other = unique("taken"), await mlflow.experiment()
    number = await mlflow.experiment(name)
    taken = (400, "RESOURCE_ALREADY_EXISTS", f"Experiment(name={name}) already exists")
    await mlflow.refused(*taken, "POST", "experiments/create", name=name)
    await mlflow.refused(*taken, "POST", "experiments/update", experiment_id=other, new_name=name)
    await mlflow.call("POST", "experiments/delete", experiment_id=number)
    await mlflow.refused(*taken, "POST", "experiments/create", name=name)


@pytest.mark.parametrize(
    ("method", "path", "fields", "status", "code", "message"),
    [
        ("GET", "experiments/get", {"experiment_id": "99999999"}, 404, MISSING, "No Experiment with id=99999999"),
        ("GET", "experiments/get", {"experiment_id": "abc"}, 400, INVALID, "Invalid experiment ID"),
        ("GET", "experiments/get", {"experiment_id": "-1"}, 400, INVALID, "Invalid experiment ID"),
        ("GET", "experiments/get", {"experiment_id": "9" * 30}, 400, INVALID, "Invalid experiment ID"),
        ("GET", "experiments/get", {}, 400, INVALID, "Missing value for required parameter 'experiment_id'"),
        ("GET", "experiments/get-by-name", {"experiment_name": "nobody"}, 404, MISSING, "Could not find experiment"),
        ("GET", "experiments/get-by-name", {}, 400, INVALID, "'experiment_name'"),
        ("POST", "experiments/create", {}, 400, INVALID, "Missing value for required parameter 'name'"),
        ("POST", "experiments/create", {"name": ""}, 400, INVALID, "'name'"),
        ("POST", "experiments/create", {"name": "  "}, 400, INVALID, "name"),
        ("POST", "experiments/create", {"name": "x" * 501}, 400, INVALID, "501 characters"),
        ("POST", "experiments/create", {"name": 7}, 400, INVALID, "$.name"),
        ("POST", "experiments/create", {"name": None}, 400, INVALID, "Missing value for required parameter 'name'"),
        ("POST", "experiments/create", {"name": "x", "tags": "t"}, 400, INVALID, "$.tags"),
        ("POST", "experiments/create", {"name": "x", "tags": [{"value": "v"}]}, 400, INVALID, "key"),
        ("POST", "experiments/create", {"name": "x", "tags": [{"key": "../a"}]}, 400, INVALID, "Invalid tag name"),
        ("POST", "experiments/create", {"name": "a\0b"}, 400, INVALID, "NUL"),
        ("POST", "experiments/delete", {"experiment_id": "99999999"}, 404, MISSING, "Experiment with id=99999999"),
        ("POST", "experiments/restore", {"experiment_id": "0"}, 404, MISSING, "id=0"),
        ("POST", "experiments/update", {"experiment_id": "99999999", "new_name": "x"}, 404, MISSING, "id=99999999"),
        ("POST", "experiments/update", {"experiment_id": "0"}, 400, INVALID, "'new_name'"),
        ("POST", "experiments/set-experiment-tag", {"experiment_id": "0"}, 400, INVALID, "'key'"),
        ("POST", "experiments/set-experiment-tag", {"experiment_id": "0", "key": "/a"}, 400, INVALID, "Invalid tag"),
        ("POST", "experiments/delete-experiment-tag", {"experiment_id": "0", "key": "no"}, 404, MISSING, "No tag with"),
        ("POST", "experiments/search", {}, 400, INVALID, "required parameter 'max_results'"),
        ("POST", "experiments/search", {"max_results": 1, "filter": "x = 'y'"}, 400, INVALID, "Invalid attribute key"),
        ("POST", "experiments/search", {"max_results": 1, "order_by": ["tags"]}, 400, INVALID, "Invalid attribute key"),
        ("POST", "experiments/search", {"max_results": 0}, 400, INVALID, "'max_results'"),
        ("POST", "experiments/search", {"max_results": 50_001}, 400, INVALID, "'max_results'"),
        ("POST", "experiments/search", {"max_results": "many"}, 400, INVALID, "$.max_results"),
        ("POST", "experiments/search", {"max_results": 1, "page_token": "!"}, 400, INVALID, "Invalid page token"),
        ("POST", "experiments/search", {"max_results": 1, "view_type": "SOME"}, 400, INVALID, "Invalid view type"),
        ("POST", "experiments/search", {"max_results": 1, "view_type": 4}, 400, INVALID, "Invalid view type"),
    ],
)  # fmt: skip
async def test_a_bad_request_says_what_is_wrong(
    mlflow: MLflow, method: str, path: str, fields: dict[str, Any], status: int, code: str, message: str
) -> None:
    await mlflow.refused(status, code, message, method, path, **fields)


async def test_deleting_and_restoring_answer_empty_objects_and_take_the_runs_along(mlflow: MLflow) -> None:
    number = await mlflow.experiment()
    run = await mlflow.run(number)

    async def stages() -> tuple[str, str]:
        experiment = (await mlflow.call("GET", "experiments/get", experiment_id=number))["experiment"]
        info = (await mlflow.call("GET", "runs/get", run_id=run))["run"]["info"]
        return experiment["lifecycle_stage"], info["lifecycle_stage"]

    assert await mlflow.call("POST", "experiments/delete", experiment_id=number) == {}
    assert await stages() == ("deleted", "deleted")
    await mlflow.refused(404, MISSING, f"id={number}", "POST", "experiments/delete", experiment_id=number)
    await mlflow.refused(400, INVALID, "'active' state", "POST", "runs/create", experiment_id=number)
    await mlflow.refused(400, INVALID, "'active'", "POST", "experiments/update", experiment_id=number, new_name="x")
    assert await mlflow.call("POST", "experiments/restore", experiment_id=number) == {}
    assert await stages() == ("active", "active")


async def test_renaming_and_tagging(mlflow: MLflow) -> None:
    number, name = await mlflow.experiment(), unique("renamed")
    assert await mlflow.call("POST", "experiments/update", experiment_id=number, new_name=name) == {}
    tag = {"experiment_id": number, "key": "a"}
    assert await mlflow.call("POST", "experiments/set-experiment-tag", **tag, value="1") == {}
    assert await mlflow.call("POST", "experiments/set-experiment-tag", **tag, value="2") == {}
    found = (await mlflow.call("GET", "experiments/get-by-name", experiment_name=name))["experiment"]
    assert (found["experiment_id"], found["tags"]) == (number, [{"key": "a", "value": "2"}])
    assert await mlflow.call("POST", "experiments/delete-experiment-tag", **tag) == {}
    assert "tags" not in (await mlflow.call("GET", "experiments/get", experiment_id=number))["experiment"]


async def test_search_pages_through_everything_newest_first(mlflow: MLflow) -> None:
    numbers = [await mlflow.experiment() for _ in range(5)]
    seen: list[str] = []
    fields: dict[str, Any] = {"max_results": 2, "view_type": "ALL"}
    while True:
        answer = await mlflow.call("POST", "experiments/search", **fields)
        assert 1 <= len(answer["experiments"]) <= 2
        seen += [found["experiment_id"] for found in answer["experiments"]]
        if "next_page_token" not in answer:
            break
        fields["page_token"] = answer["next_page_token"]
    assert seen[:5] == numbers[::-1]
    assert len(set(seen)) == len(seen)


async def test_search_filters_and_orders(mlflow: MLflow) -> None:
    prefix = unique("found")
    for name in ("b", "a", "c"):
        number = await mlflow.experiment(f"{prefix}-{name}")
        await mlflow.call("POST", "experiments/set-experiment-tag", experiment_id=number, key="odd", value=name)
    fields = {"max_results": 10, "filter": f"name LIKE '{prefix}%' AND tags.odd != 'c'"}
    for method in ("POST", "GET"):
        answer = await mlflow.call(method, "experiments/search", **fields, order_by=["name"])
        assert [found["name"] for found in answer["experiments"]] == [f"{prefix}-a", f"{prefix}-b"]


@pytest.mark.parametrize(
    ("view", "shown"),
    [(None, "active"), ("ACTIVE_ONLY", "active"), (1, "active"), ("1", "active"), ("DELETED_ONLY", "deleted"),
     (2, "deleted"), ("ALL", "both"), (3, "both"), ("3", "both")],
)  # fmt: skip
async def test_search_views_are_named_or_numbered(mlflow: MLflow, view: str | int | None, shown: str) -> None:
    active, deleted = await mlflow.experiment(), await mlflow.experiment()
    await mlflow.call("POST", "experiments/delete", experiment_id=deleted)
    answer = await mlflow.call("POST", "experiments/search", max_results=2, view_type=view)
    found = {entry["experiment_id"] for entry in answer["experiments"]}
    assert (active in found, deleted in found) == (shown != "deleted", shown != "active")
    if isinstance(view, str):
        by_get = await mlflow.call("GET", "experiments/search", max_results="2", view_type=view)
        assert {entry["experiment_id"] for entry in by_get["experiments"]} == found


async def test_fields_that_are_unknown_are_ignored(mlflow: MLflow) -> None:
    created = await mlflow.call("POST", "experiments/create", name=unique("e"), surprise={"a": [1]})
    await mlflow.call("GET", "experiments/get", **created, surprise="x")


async def test_a_null_is_a_field_that_is_not_set(mlflow: MLflow) -> None:
    tags = [{"key": "a", "value": None}, {"key": "b", "value": "null"}]
    created = await mlflow.call(
        "POST", "experiments/create", name=unique("e"), artifact_location=None, tags=tags, extra={"a": None}
    )  # fmt: skip
    found = (await mlflow.call("GET", "experiments/get", **created))["experiment"]
    assert {tag["key"]: tag["value"] for tag in found["tags"]} == {"a": "", "b": "null"}
    await mlflow.refused(400, INVALID, "$.tags", "POST", "experiments/create", name=None, tags=[None])


@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b'"x"', b"7", b'{"name": NaN}', b"\xff", b'{"name":"a\x00"}'])
async def test_a_body_that_is_no_json_object_is_400(mlflow: MLflow, body: bytes) -> None:
    expect_error(await mlflow.raw("experiments/create", body), 400, INVALID, "")


async def test_names_of_any_script_come_back(mlflow: MLflow) -> None:
    name = unique("Ünï 🧪 <b>'\"&%_\\ 日本")
    number = await mlflow.experiment(name)
    found = await mlflow.call("GET", "experiments/get-by-name", experiment_name=name)
    assert (found["experiment"]["experiment_id"], found["experiment"]["name"]) == (number, name)
