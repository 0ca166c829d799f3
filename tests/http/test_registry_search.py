"""Search of models and versions: MLflow's endpoints, its client, and what nobody should send."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import httpx
import pytest
from mlflow import MlflowClient
from sqlalchemy import text

from mlplat.registry.model import PROMPT_TAG
from tests.contract.chdb import unique
from tests.http.conftest import MLflow, Stack, expect_error

INVALID = "INVALID_PARAMETER_VALUE"
MODELS, VERSIONS = "registered-models/search", "model-versions/search"


async def _found(mlflow: MLflow, path: str, filter_text: str, *orders: str, **fields: Any) -> list[str]:
    kind, key = ("registered_models", "name") if path == MODELS else ("model_versions", "version")
    answer = await mlflow.call("GET", path, filter=filter_text, order_by=list(orders), **fields)
    return [item[key] for item in answer.get(kind, [])]


async def _model(mlflow: MLflow, name: str, **tags: str) -> str:
    pairs = [{"key": key, "value": value} for key, value in tags.items()]
    await mlflow.call("POST", "registered-models/create", name=name, tags=pairs)
    return name


async def _version(mlflow: MLflow, name: str, **fields: Any) -> None:
    tags = [{"key": key, "value": value} for key, value in fields.pop("tags", {}).items()]
    await mlflow.call("POST", "model-versions/create", name=name, source="s3://b/m", tags=tags, **fields)


async def test_models_are_found_by_name_tags_and_aliases(mlflow: MLflow) -> None:
    prefix = unique("m")
    red = await _model(mlflow, f"{prefix}-red", team="red")
    blue = await _model(mlflow, f"{prefix}-Blue", team="blue")
    plain = await _model(mlflow, f"{prefix}-plain")
    await _version(mlflow, red)
    await mlflow.call("POST", "registered-models/alias", name=red, alias="champion", version="1")
    mine = f"name LIKE '{prefix}%' AND "
    for filter_text, names in (
        ("tags.team = 'red'", [red]), ("tags.team != 'red'", [blue]), ("tag.team ILIKE 'BL%'", [blue]),
        ("tags.team IN ('red', 'blue')", [blue, red]), ("NOT tags.team = 'red'", [blue, plain]),
        ("tags.team IS NULL OR tags.team = 'red'", [plain, red]) , (f"name ILIKE '{prefix}-b%'", [blue]),
        (f"name IN ('{red}', 'x')", [red]), (f"name != '{red}'", [blue, plain]), ("alias = 'champion'", [red]),
        ("alias IS NULL", [blue, plain]), ("creation_timestamp > '5'", [blue, plain, red]),
        ("last_updated_timestamp < 5", []),
    ):  # fmt: skip
        assert await _found(mlflow, MODELS, f"{mine}({filter_text})") == names, filter_text
    for orders, names in (
        (["name DESC"], [red, plain, blue]), (["last_updated_timestamp DESC"], [red, plain, blue]),
        (["timestamp ASC"], [blue, plain, red]), (["creation_timestamp ASC"], [red, blue, plain]),
        (["tags.team ASC"], [blue, red, plain]),
    ):  # fmt: skip
        seen, token = list[str](), dict[str, str]()
        for _page in range(3):
            query = {"filter": f"{mine}creation_timestamp > 0", "order_by": orders, "max_results": 1}
            answer = await mlflow.call("GET", MODELS, **query, **token)
            seen += [model["name"] for model in answer["registered_models"]]
            token = {"page_token": answer["next_page_token"]} if "next_page_token" in answer else {}
        assert (seen, token) == (names, {}), orders


async def test_versions_are_found_by_what_mlflow_knows(mlflow: MLflow) -> None:
    name, other = await _model(mlflow, unique("m")), await _model(mlflow, unique("m"))
    run_id = await mlflow.run()
    await _version(mlflow, name, run_id=run_id, tags={"kind": "a"})
    await _version(mlflow, name, tags={"kind": "b"})
    await _version(mlflow, other, run_id=run_id)
    for filter_text, versions in (
        (f"name = '{name}'", ["2", "1"]), (f"name = '{name}' and run_id = '{run_id}'", ["1"]),
        (f"run_id IN ('{run_id}', 'x')", ["1", "1"]), (f"name = '{name}' AND version_number > 1", ["2"]),
        (f"name = '{name}' AND version_number = '1'", ["1"]), (f"name = '{name}' AND version_number = 1.5", []),
        (f"name = '{name}' AND source_path LIKE 's3://%'", ["2", "1"]), (f"name IN ('{name}')", ["2", "1"]),
        (f"name = '{name}' AND tags.kind = 'a'", ["1"]), (f"name = '{name}' AND tags.kind != 'a'", ["2"]),
        (f"name = '{name}' AND run_id IS NULL", ["2"]),
        (f"name = '{name}' AND tags.`mlplat.semantic_version` LIKE '1.0%'", ["2", "1"]),
    ):  # fmt: skip
        assert await _found(mlflow, VERSIONS, filter_text) == versions, filter_text
    mine = f"name IN ('{name}', '{other}')"
    both = await mlflow.call("GET", VERSIONS, filter=mine, order_by=["name ASC", "version_number ASC"])
    expected = [(name, "1"), (name, "2"), (other, "1")] if name < other else [(other, "1"), (name, "1"), (name, "2")]
    assert [(item["name"], item["version"]) for item in both["model_versions"]] == expected
    await mlflow.call("PATCH", "model-versions/update", name=name, version="1", description="newest")
    assert await _found(mlflow, VERSIONS, f"name = '{name}'") == ["1", "2"]
    assert await _found(mlflow, VERSIONS, f"name = '{name}'", "creation_timestamp DESC") == ["2", "1"]


async def test_prompts_are_hidden_unless_the_filter_names_their_tag(mlflow: MLflow) -> None:
    prefix = unique("p")
    plain = await _model(mlflow, f"{prefix}-model")
    prompt = await _model(mlflow, f"{prefix}-prompt", **{PROMPT_TAG: "true"})
    for name in (plain, prompt):
        await _version(mlflow, name)
    await _version(mlflow, prompt, tags={PROMPT_TAG: "true"})
    mine = f"name LIKE '{prefix}%'"
    for filter_text, names in (
        (mine, [plain]), (f"{mine} AND tags.`{PROMPT_TAG}` != 'true'", [plain]),
        (f"{mine} AND tags.{PROMPT_TAG} = 'false'", [plain]), (f"{mine} AND tag.`{PROMPT_TAG}` = 'true'", [prompt]),
        (f"{mine} AND tags.`{PROMPT_TAG}` != 'false'", [prompt]), (f"name = '{prompt}'", []),
        (f"{mine} AND tags.`{PROMPT_TAG}` IN ('true', 'false')", [plain, prompt]),
        (f"{mine} AND tags.`{PROMPT_TAG}` IS NULL", [plain]),
    ):  # fmt: skip
        assert await _found(mlflow, MODELS, filter_text) == names, filter_text
    for filter_text, versions in (
        (mine, [(plain, "1")]), (f"name = '{prompt}'", []),
        (f"{mine} AND tags.`{PROMPT_TAG}` = 'true'", [(prompt, "2")]),
        (f"{mine} AND tags.`{PROMPT_TAG}` != 'true'", [(plain, "1")]),
    ):  # fmt: skip
        answer = await mlflow.call("GET", VERSIONS, filter=filter_text)
        rows = [(item["name"], item["version"]) for item in answer.get("model_versions", [])]
        assert rows == versions, filter_text


def test_the_stock_client_searches_and_pages(mlflow_client: MlflowClient) -> None:
    prefix = unique("stock")
    names = [f"{prefix}-{letter}" for letter in "abc"]
    for name in names:
        mlflow_client.create_registered_model(name, tags={"team": "red"})
        mlflow_client.create_model_version(name, "s3://b/m", tags={"stage": name[-1]})
    mine = f"name LIKE '{prefix}%' AND tags.team = 'red'"
    first = mlflow_client.search_registered_models(mine, max_results=2, order_by=["name DESC"])
    assert [model.name for model in first] == names[:0:-1]
    rest = mlflow_client.search_registered_models(mine, max_results=2, order_by=["name DESC"], page_token=first.token)
    assert ([model.name for model in rest], rest.token) == (names[:1], "")
    assert [model.name for model in mlflow_client.search_registered_models(f"name = '{names[1]}'")] == [names[1]]
    found = mlflow_client.search_model_versions(f"name LIKE '{prefix}%' AND tags.stage IN ('a', 'c')")
    assert [(version.name, int(version.version)) for version in found] == [(names[2], 1), (names[0], 1)]
    page = mlflow_client.search_model_versions(f"name LIKE '{prefix}%'", max_results=1, order_by=["name ASC"])
    page = mlflow_client.search_model_versions(
        f"name LIKE '{prefix}%'", max_results=1, order_by=["name ASC"], page_token=page.token
    )
    assert [version.name for version in page] == [names[1]]


async def test_a_token_belongs_to_its_search_and_new_rows_do_not_move_it(mlflow: MLflow) -> None:
    name = await _model(mlflow, unique("m"))
    for _ in range(3):
        await _version(mlflow, name)
    search = {"filter": f"name = '{name}'", "max_results": 1}
    token = (await mlflow.call("GET", VERSIONS, **search))["next_page_token"]
    await _version(mlflow, name)
    answer = await mlflow.call("GET", VERSIONS, **search, page_token=token)
    assert [version["version"] for version in answer["model_versions"]] == ["2"]
    another = {"filter": f"name = '{name}' ", "max_results": 1, "page_token": token}
    await mlflow.refused(400, INVALID, "another filter", "GET", VERSIONS, **another)
    await mlflow.refused(400, INVALID, "Invalid page token", "GET", MODELS, page_token="Mw==")


@pytest.mark.parametrize(
    ("path", "filter_text", "message"),
    [
        (MODELS, "name", "Invalid filter string"),
        (MODELS, "metrics.a > 1", "Invalid entity type 'metrics'. Valid values are attributes, tags."),
        (MODELS, "run_id = 'x'", "Invalid attribute key 'run_id' specified. Valid keys are alias, creation_timestamp"),
        (MODELS, "tags.a > 'x'", "Invalid comparator '>' for tag 'a'"),
        (MODELS, "name = 5", "Expected a quoted string value for attribute 'name'"),
        (VERSIONS, "status = 'x'", "Invalid attribute key 'status' specified"),
        (VERSIONS, "version_number = 'one'", "Expected numeric value type for numeric attribute: version_number"),
        (VERSIONS, "creation_timestamp > 1e300", "Invalid time"),
        (VERSIONS, "tags.a = 1", "Expected a quoted string value for tag 'a'"),
        (VERSIONS, "alias > 'x'", "Invalid comparator '>' for attribute 'alias'"),
        (VERSIONS, "stage = 'live'", "Value must be one of None, Staging, Production, Archived."),
        (VERSIONS, "semantic_version = '1.2.3.4'", "Invalid version range: '1.2.3.4'"),
        (VERSIONS, "semantic_version < '^1'", "Invalid semantic version: '^1'"),
        (VERSIONS, "semantic_version LIKE '1%'", "Invalid comparator 'LIKE' for attribute 'semantic_version'"),
        (VERSIONS, "params.lr > 'x'", "compare with a bare number"),
        (VERSIONS, "name = 'a' name = 'b'", "Invalid filter string, not understood here"),
    ],
)  # fmt: skip
async def test_a_bad_filter_is_told_what_is_wrong(mlflow: MLflow, path: str, filter_text: str, message: str) -> None:
    await mlflow.refused(400, INVALID, message, "GET", path, filter=filter_text)


@pytest.mark.parametrize(
    ("path", "order", "message"),
    [
        (MODELS, "size", "Invalid attribute key 'size'"),
        (MODELS, "alias", "there may be many of 'alias'"),
        (VERSIONS, "name UP", "Invalid order_by clause"),
        (VERSIONS, "metrics.a DESC", "versions cannot be ordered by metrics"),
        (VERSIONS, "dataset.name", "many datasets"),
        (VERSIONS, "name; DROP TABLE model_version", "Invalid order_by clause"),
    ],
)
async def test_a_bad_order_is_told_what_is_wrong(mlflow: MLflow, path: str, order: str, message: str) -> None:
    await mlflow.refused(400, INVALID, message, "GET", path, order_by=[order])


#: Filters, and whether they are legal.
HOSTILE = [
    ("name = 'x\\' OR 1=1 --'", False),
    ("name = 'x'; DROP TABLE model_version; --", False),
    ("name = \"x'; DROP TABLE model_version; --\"", True),
    ("tags.`k') OR 1=1 --` = \"' OR '1'='1\"", True),
    ("alias = \"a' UNION SELECT * FROM lease --\"", True),
    ("name LIKE \"%' ESCAPE '\"", True),
    ("params.`\x01` = 'x'", True),
    ("name = 'a\0b'", False),
    ("name LIKE 'a\\'", True),
    ("run_id IN ('" + "', '".join("x" * 30 for _ in range(500)) + "')", True),
    ("name = '" + "x" * 20_000 + "'", False),
    ("(" * 3_000 + "name = 'x'" + ")" * 3_000, True),
    ("NOT " * 200 + "name = 'x'", False),
    ("(NOT (tags.a = 'b' OR " * 60 + "name = 'x'" + "))" * 60, False),
    (" OR ".join(f"tags.k{number} = 'v'" for number in range(700)), True),
    ("name = 'é' AND \ud800 = 'x'", False),
]  # fmt: skip


@pytest.mark.parametrize("path", [MODELS, VERSIONS])
@pytest.mark.parametrize(("filter_text", "is_legal"), HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_filters_find_and_change_nothing(
    mlflow: MLflow, http: httpx.AsyncClient, stack: Stack, path: str, filter_text: str, is_legal: bool
) -> None:
    name = await _model(mlflow, unique("kept"))
    await _version(mlflow, name)
    if path == MODELS and ("params" in filter_text or "run_id" in filter_text):
        is_legal = False
    response = await http.get(f"{mlflow.prefix}{path}?filter={quote(filter_text, errors='surrogatepass')}")
    if is_legal:
        assert (response.status_code, response.json()) == (200, {}), response.text
    else:
        assert response.status_code == 400, response.text
        expect_error(response, 400, response.json()["error_code"], "")
    async with stack.engine.connect() as connection:
        count = text("SELECT count(*) FROM model_version JOIN registered_model USING (name) WHERE name = :name")
        assert (await connection.execute(count, {"name": name})).scalar_one() == 1
