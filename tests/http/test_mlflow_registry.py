"""MLflow's model registry endpoints on the wire."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.contract.chdb import unique
from tests.http.conftest import MLflow

INVALID = "INVALID_PARAMETER_VALUE"
MISSING = "RESOURCE_DOES_NOT_EXIST"


@pytest.fixture
async def name(mlflow: MLflow) -> str:
    """A registered model."""
    name = unique("model")
    await mlflow.call("POST", "registered-models/create", name=name)
    return name


async def _version(mlflow: MLflow, name: str, source: str = "s3://bucket/m", **fields: Any) -> str:
    answer = await mlflow.call("POST", "model-versions/create", name=name, source=source, **fields)
    return str(answer["model_version"]["version"])


async def test_a_created_model_is_answered_and_read_back(mlflow: MLflow) -> None:
    name = unique("modèle")
    created = await mlflow.call(
        "POST", "registered-models/create", name=name, description="about", tags=[{"key": "a", "value": "1"}]
    )
    model = created["registered_model"]
    assert model["creation_timestamp"] <= model["last_updated_timestamp"]
    rest = {key: value for key, value in model.items() if not key.endswith("timestamp")}
    assert rest == {"name": name, "description": "about", "tags": [{"key": "a", "value": "1"}]}
    assert await mlflow.call("GET", "registered-models/get", name=name) == created


async def test_what_is_empty_is_absent(mlflow: MLflow, name: str) -> None:
    model = (await mlflow.call("GET", "registered-models/get", name=name))["registered_model"]
    assert set(model) == {"name", "creation_timestamp", "last_updated_timestamp"}
    assert await mlflow.call("GET", "registered-models/get-latest-versions", name=name) == {}
    assert await mlflow.call("POST", "registered-models/get-latest-versions", name=name) == {}
    assert await mlflow.call("GET", "model-versions/search", filter=f"name = '{name}'") == {}


async def test_a_taken_name_is_400(mlflow: MLflow, name: str) -> None:
    taken = (400, "RESOURCE_ALREADY_EXISTS", f"Registered Model (name={name}) already exists")
    await mlflow.refused(*taken, "POST", "registered-models/create", name=name)
    other = unique("model")
    await mlflow.call("POST", "registered-models/create", name=other)
    await mlflow.refused(*taken, "POST", "registered-models/rename", name=other, new_name=name)


async def test_a_version_is_answered_and_read_back(mlflow: MLflow, name: str) -> None:
    created = await mlflow.call(
        "POST", "model-versions/create", name=name, source="s3://bucket/m", description="first", run_link="http://x",
        tags=[{"key": "a", "value": "1"}],
    )  # fmt: skip
    version = created["model_version"]
    rest = {key: value for key, value in version.items() if not key.endswith("timestamp")}
    assert rest == {
        "name": name, "version": "1", "current_stage": "None", "description": "first", "source": "s3://bucket/m",
        "run_id": "", "status": "READY", "run_link": "http://x",
        "tags": [{"key": "a", "value": "1"}, {"key": "mlplat.semantic_version", "value": "1.0.0"}],
    }  # fmt: skip
    assert isinstance(version["creation_timestamp"], int)
    assert await mlflow.call("GET", "model-versions/get", name=name, version="1") == created
    assert (await mlflow.call("GET", "registered-models/get", name=name))["registered_model"]["latest_versions"] == [
        version
    ]


async def test_version_numbers_are_text_and_never_used_again(mlflow: MLflow, name: str) -> None:
    assert [await _version(mlflow, name) for _ in range(3)] == ["1", "2", "3"]
    assert await mlflow.call("DELETE", "model-versions/delete", name=name, version="3") == {}
    await mlflow.refused(404, MISSING, "version=3", "GET", "model-versions/get", name=name, version="3")
    await mlflow.refused(404, MISSING, "version=3", "DELETE", "model-versions/delete", name=name, version="3")
    for method in ("GET", "POST"):
        latest = await mlflow.call(method, "registered-models/get-latest-versions", name=name)
        assert [version["version"] for version in latest["model_versions"]] == ["2"]
    assert await _version(mlflow, name) == "4"


async def test_a_source_in_a_run_resolves_to_where_the_run_keeps_its_artifacts(mlflow: MLflow, name: str) -> None:
    experiment = await mlflow.experiment()
    run_id = await mlflow.run(experiment)
    version = await _version(mlflow, name, f"runs:/{run_id}/model", run_id=run_id)
    found = (await mlflow.call("GET", "model-versions/get", name=name, version=version))["model_version"]
    assert (found["source"], found["run_id"]) == (f"runs:/{run_id}/model", run_id)
    uri = await mlflow.call("GET", "model-versions/get-download-uri", name=name, version=version)
    assert uri == {"artifact_uri": f"mlflow-artifacts:/{experiment}/{run_id}/artifacts/model"}
    other = await _version(mlflow, name, "s3://bucket/x")
    uri = await mlflow.call("GET", "model-versions/get-download-uri", name=name, version=other)
    assert uri == {"artifact_uri": "s3://bucket/x"}


async def test_a_source_that_does_not_fit_is_refused(mlflow: MLflow, name: str) -> None:
    run_id = await mlflow.run()
    create = ("POST", "model-versions/create")
    await mlflow.refused(
        400, INVALID, "another run", *create, name=name, source=f"runs:/{run_id}/m", run_id="someone-else"
    )
    await mlflow.refused(404, MISSING, "Run with id=nobody", *create, name=name, source="runs:/nobody/m")
    for source in (f"runs:/{run_id}/../x", f"runs:/{run_id}/%2e%2e/x", "s3://b/.%2E/x", "../x"):
        await mlflow.refused(400, INVALID, "'..'", *create, name=name, source=source)
    await mlflow.refused(400, INVALID, "'source'", *create, name=name)
    assert await _version(mlflow, name) == "1"


async def test_models_and_versions_change_in_place(mlflow: MLflow, name: str) -> None:
    await _version(mlflow, name)
    updated = await mlflow.call("PATCH", "registered-models/update", name=name, description="new")
    assert updated["registered_model"]["description"] == "new"
    version = await mlflow.call("PATCH", "model-versions/update", name=name, version="1", description="better")
    assert version["model_version"]["description"] == "better"
    tag = {"name": name, "key": "a"}
    for value in ("1", "2"):
        assert await mlflow.call("POST", "registered-models/set-tag", **tag, value=value) == {}
        assert await mlflow.call("POST", "model-versions/set-tag", **tag, version="1", value=value) == {}
    model = (await mlflow.call("GET", "registered-models/get", name=name))["registered_model"]
    assert model["tags"] == model["latest_versions"][0]["tags"][:1] == [{"key": "a", "value": "2"}]
    for _repeat in range(2):
        assert await mlflow.call("DELETE", "registered-models/delete-tag", **tag) == {}
        assert await mlflow.call("DELETE", "model-versions/delete-tag", **tag, version="1") == {}
    model = (await mlflow.call("GET", "registered-models/get", name=name))["registered_model"]
    assert "tags" not in model
    assert [tag["key"] for tag in model["latest_versions"][0]["tags"]] == ["mlplat.semantic_version"]


async def test_aliases_are_set_moved_read_and_deleted(mlflow: MLflow, name: str) -> None:
    for _ in range(2):
        await _version(mlflow, name)
    alias = {"name": name, "alias": "champion"}
    for version in ("1", "2"):
        assert await mlflow.call("POST", "registered-models/alias", **alias, version=version) == {}
        found = (await mlflow.call("GET", "registered-models/alias", **alias))["model_version"]
        assert (found["version"], found["aliases"]) == (version, ["champion"])
    model = (await mlflow.call("GET", "registered-models/get", name=name))["registered_model"]
    assert model["aliases"] == [{"alias": "champion", "version": "2"}]
    for _repeat in range(2):
        assert await mlflow.call("DELETE", "registered-models/alias", **alias) == {}
    await mlflow.refused(
        400, INVALID, "Registered model alias champion not found", "GET", "registered-models/alias", **alias
    )
    latest = await mlflow.call("GET", "registered-models/alias", name=name, alias="latest")
    assert latest["model_version"]["version"] == "2"


async def test_renaming_carries_everything_and_deleting_removes_it(mlflow: MLflow, name: str) -> None:
    await _version(mlflow, name)
    await mlflow.call("POST", "registered-models/alias", name=name, alias="a", version="1")
    new = unique("renamed")
    renamed = await mlflow.call("POST", "registered-models/rename", name=name, new_name=new)
    model = renamed["registered_model"]
    assert (model["name"], model["aliases"], model["latest_versions"][0]["name"]) == (
        new, [{"alias": "a", "version": "1"}], new,
    )  # fmt: skip
    await mlflow.refused(404, MISSING, f"name={name}", "GET", "registered-models/get", name=name)
    assert await mlflow.call("DELETE", "registered-models/delete", name=new) == {}
    await mlflow.refused(404, MISSING, f"name={new}", "GET", "registered-models/get", name=new)
    await mlflow.refused(404, MISSING, "version=1", "GET", "model-versions/get", name=new, version="1")


@pytest.mark.parametrize(
    ("method", "path", "fields"),
    [
        ("GET", "registered-models/get", {}),
        ("PATCH", "registered-models/update", {"description": "x"}),
        ("POST", "registered-models/rename", {"new_name": "x"}),
        ("DELETE", "registered-models/delete", {}),
        ("POST", "registered-models/set-tag", {"key": "a", "value": "1"}),
        ("DELETE", "registered-models/delete-tag", {"key": "a"}),
        ("GET", "registered-models/get-latest-versions", {}),
        ("GET", "registered-models/alias", {"alias": "a"}),
        ("DELETE", "registered-models/alias", {"alias": "a"}),
        ("POST", "model-versions/create", {"source": "s3://b"}),
    ],
)
async def test_every_endpoint_knows_unknown_and_unnamed_models(
    mlflow: MLflow, method: str, path: str, fields: dict[str, Any]
) -> None:
    await mlflow.refused(
        404, MISSING, "Registered Model with name=nobody not found", method, path, name="nobody", **fields
    )
    await mlflow.refused(400, INVALID, "Missing value for required parameter 'name'", method, path, **fields)


@pytest.mark.parametrize(
    ("method", "path", "fields"),
    [
        ("GET", "model-versions/get", {}),
        ("PATCH", "model-versions/update", {"description": "x"}),
        ("DELETE", "model-versions/delete", {}),
        ("POST", "model-versions/set-tag", {"key": "a", "value": "1"}),
        ("DELETE", "model-versions/delete-tag", {"key": "a"}),
        ("GET", "model-versions/get-download-uri", {}),
        ("POST", "registered-models/alias", {"alias": "a"}),
    ],
)
async def test_every_endpoint_knows_unknown_and_malformed_versions(
    mlflow: MLflow, name: str, method: str, path: str, fields: dict[str, Any]
) -> None:
    await mlflow.refused(404, MISSING, f"name={name}, version=7", method, path, name=name, version="7", **fields)
    for version in ("0", "-1", "one", "1.0", "", "9" * 40, "١"):
        await mlflow.refused(400, INVALID, "ersion", method, path, name=name, version=version, **fields)


@pytest.mark.parametrize("alias", ["latest", "LATEST", "v1", "V2", "a b", "a/b", "", "x" * 256])
async def test_reserved_and_malformed_aliases_are_400(mlflow: MLflow, name: str, alias: str) -> None:
    await _version(mlflow, name)
    await mlflow.refused(400, INVALID, "alias", "POST", "registered-models/alias", name=name, alias=alias, version="1")


@pytest.mark.parametrize("bad", ["", "a/b", "a:b", "x" * 251, "a\0b"])
async def test_malformed_model_names_are_400(mlflow: MLflow, name: str, bad: str) -> None:
    await mlflow.refused(400, INVALID, "", "POST", "registered-models/create", name=bad)
    await mlflow.refused(400, INVALID, "", "POST", "registered-models/rename", name=name, new_name=bad)


async def test_a_repeat_under_one_idempotency_key_acts_once(mlflow: MLflow, http: httpx.AsyncClient, name: str) -> None:
    body, headers = {"name": name, "source": "s3://b"}, {"Idempotency-Key": unique("key")}
    answers = [await http.post(mlflow.prefix + "model-versions/create", json=body, headers=headers) for _ in range(3)]
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.text for answer in answers} == {answers[0].text}
    assert await _version(mlflow, name) == "2"


async def test_models_are_searched_by_name_and_page(mlflow: MLflow) -> None:
    prefix = unique("search")
    names = [f"{prefix}-{letter}" for letter in ("a", "b_", "bx", "c")]
    for name in reversed(names):
        await mlflow.call("POST", "registered-models/create", name=name)

    async def found(**fields: Any) -> list[str]:
        answer = await mlflow.call("GET", "registered-models/search", **fields)
        return [model["name"] for model in answer.get("registered_models", [])]

    assert await found(filter=f"name LIKE '{prefix}%'") == names
    assert await found(filter=f'name like "{prefix}-b%"') == names[1:3]
    assert await found(filter=f"name = '{prefix}-b_'") == [names[1]]
    assert await found(filter=f"name='{prefix}'") == []
    assert set(names) <= set(await found(max_results="1000"))
    first = await mlflow.call("GET", "registered-models/search", filter=f"name LIKE '{prefix}%'", max_results=3)
    rest = await mlflow.call(
        "GET", "registered-models/search", filter=f"name LIKE '{prefix}%'", page_token=first["next_page_token"]
    )
    assert [model["name"] for model in first["registered_models"] + rest["registered_models"]] == names
    assert "next_page_token" not in rest


async def test_versions_are_searched_by_model_and_run_and_page(mlflow: MLflow, name: str) -> None:
    run_id = await mlflow.run()
    for index in range(4):
        await _version(mlflow, name, **({"run_id": run_id} if index == 1 else {}))

    async def found(**fields: Any) -> list[str]:
        answer = await mlflow.call("GET", "model-versions/search", **fields)
        return [version["version"] for version in answer.get("model_versions", [])]

    assert await found(filter=f"name='{name}'") == ["4", "3", "2", "1"]
    assert await found(filter=f'run_id = "{run_id}"') == ["2"]
    assert await found(filter="name = 'nobody'") == []
    of_model = {"filter": f"name='{name}'"}
    first = await mlflow.call("GET", "model-versions/search", **of_model, max_results=3)
    assert [version["version"] for version in first["model_versions"]] == ["4", "3", "2"]
    assert await found(**of_model, max_results=3, page_token=first["next_page_token"]) == ["1"]


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("registered-models/search", {"filter": "nonsense"}, "Invalid filter string"),
        ("registered-models/search", {"filter": "owner = 'x'"}, "Invalid attribute key 'owner' specified"),
        ("registered-models/search", {"max_results": "0"}, "'max_results'"),
        ("registered-models/search", {"max_results": "1001"}, "'max_results'"),
        ("registered-models/search", {"page_token": "x"}, "Invalid page token"),
        ("model-versions/search", {"filter": "nonsense"}, "Invalid filter string"),
        ("model-versions/search", {"max_results": "200001"}, "'max_results'"),
        ("model-versions/search", {"max_results": "few"}, "$.max_results"),
    ],
)
async def test_a_malformed_search_is_refused(mlflow: MLflow, path: str, fields: dict[str, str], message: str) -> None:
    await mlflow.refused(400, INVALID, message, "GET", path, **fields)


async def test_both_prefixes_serve_the_same_models(mlflow: MLflow, http: httpx.AsyncClient, name: str) -> None:
    ajax = MLflow(http, "/ajax-api")
    assert await ajax.call("GET", "registered-models/get", name=name) == await mlflow.call(
        "GET", "registered-models/get", name=name
    )


async def test_versions_go_through_stages(mlflow: MLflow, name: str) -> None:
    for _ in range(3):
        await _version(mlflow, name)

    async def move(version: str, stage: str, **fields: Any) -> Any:
        answer = await mlflow.call(
            "POST", "model-versions/transition-stage", name=name, version=version, stage=stage, **fields
        )
        return answer["model_version"]

    assert (await move("1", "STAGING"))["current_stage"] == "Staging"
    await move("2", "Staging")
    moved = await move("3", "staging", archive_existing_versions=True)
    assert await mlflow.call("GET", "model-versions/get", name=name, version="3") == {"model_version": moved}
    latest = await mlflow.call("POST", "registered-models/get-latest-versions", name=name)
    assert [(found["version"], found["current_stage"]) for found in latest["model_versions"]] == [
        ("3", "Staging"), ("2", "Archived")
    ]  # fmt: skip
    one = await mlflow.call("GET", "registered-models/get-latest-versions", name=name, stages=["archived"])
    assert [found["version"] for found in one["model_versions"]] == ["2"]
    model = (await mlflow.call("GET", "registered-models/get", name=name))["registered_model"]
    assert model["latest_versions"] == latest["model_versions"]
    assert model["last_updated_timestamp"] >= moved["last_updated_timestamp"] - 1_000


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"version": "1", "stage": "live"}, 400, "Value must be one of None, Staging, Production, Archived."),
        ({"version": "1"}, 400, "Missing value for required parameter 'stage'"),
        ({"version": "1", "stage": "None", "archive_existing_versions": True}, 400, "is not an Active stage"),
        ({"version": "x", "stage": "None"}, 400, "must be a positive integer"),
        ({"version": "9", "stage": "Staging"}, 404, "version=9"),
    ],
)
async def test_a_stage_that_cannot_be_is_refused(
    mlflow: MLflow, name: str, fields: dict[str, Any], status: int, message: str
) -> None:
    await _version(mlflow, name)
    code = MISSING if status == 404 else INVALID
    await mlflow.refused(status, code, message, "POST", "model-versions/transition-stage", name=name, **fields)
    found = await mlflow.call("GET", "model-versions/get", name=name, version="1")
    assert found["model_version"]["current_stage"] == "None"
