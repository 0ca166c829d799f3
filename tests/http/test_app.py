"""What holds for the app as a whole: who may come in, its pages, and the form of errors."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from tests.contract.chdb import unique
from tests.http.conftest import Stack, expect_error

PATHS = ("/", "/docs", "/openapi.json", "/health", "/api/v1/status", "/api/2.0/mlflow/experiments/get?experiment_id=0")


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
async def test_peers_on_this_machine_come_in(stack: Stack, peer: str) -> None:
    async with stack.client((peer, 1234)) as client:
        for path in PATHS:
            assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize(
    "peer", ["10.0.0.1", "192.168.1.5", "::2", "::ffff:10.0.0.1", "0.0.0.0", "", "localhost", "testclient"]
)
async def test_peers_elsewhere_get_403_whatever_they_say(stack: Stack, peer: str) -> None:
    claims = {
        "X-Forwarded-For": "127.0.0.1",
        "X-Real-IP": "127.0.0.1",
        "Forwarded": "for=127.0.0.1",
        "Host": "localhost",
    }
    async with stack.client((peer, 1234)) as client:
        for path in (*PATHS, "/no/such/path"):
            expect_error(await client.get(path, headers=claims), 403, "PERMISSION_DENIED", "its own machine only")
        response = await client.post("/api/2.0/mlflow/experiments/create", json={"name": unique("intruder")})
        expect_error(response, 403, "PERMISSION_DENIED", "its own machine only")
        blob = await client.post("/api/v1/blobs", content=b"intruder")
        expect_error(blob, 403, "PERMISSION_DENIED", "its own machine only")


async def test_a_peer_without_an_address_gets_403(stack: Stack) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    scope: dict[str, Any] = {
        "type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": "/health",
        "raw_path": b"/health", "query_string": b"", "headers": [(b"host", b"localhost")], "client": None,
    }  # fmt: skip
    await stack.app(scope, receive, send)
    assert sent[0]["status"] == 403


async def test_the_docs_need_no_other_host(http: httpx.AsyncClient) -> None:
    response = await http.get("/docs")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)["']""", response.text)
    assert links
    for link in links:
        assert link.startswith("/"), link
        assert not link.startswith("//")
        found = await http.get(link)
        assert (found.status_code, len(found.content) > 0) == (200, True)
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+", response.text)


async def test_the_document_describes_the_native_api_and_leaves_mlflow_out(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    assert document["info"]["title"] == "mlplat"
    paths = set(document["paths"])
    assert {"/api/v1/pipeline-runs", "/api/v1/pipeline-runs/{run_id}", "/api/v1/metrics", "/api/v1/blobs"} <= paths
    assert all(path.startswith("/api/v1/") for path in paths)


async def test_the_landing_page_escapes_what_it_shows(http: httpx.AsyncClient, stack: Stack) -> None:
    """Names that the API refuses are written straight into the tables."""
    evil = "<script>alert('x')</script>&amp;\""
    digest, run_id = unique("digest"), unique("<i>")
    async with stack.engine.begin() as connection:
        await connection.execute(
            text("INSERT INTO pipeline (digest, name, spec) VALUES (:digest, :name, '{}')"),
            {"digest": digest, "name": evil},
        )
        await connection.execute(
            text(
                "INSERT INTO pipeline_run (run_id, digest, name, params, state) VALUES (:run, :digest, :name, '{}', :s)"
            ),
            {"run": run_id, "digest": digest, "name": evil, "s": "FAILED"},
        )
    stack.actors.rows[:] = [{"actor": evil, "node": "<b>", "pid": 7, "restarts": 0, "health": "ok", "lag": "<u>1</u>"}]
    try:
        response = await http.get("/")
    finally:
        stack.actors.rows.clear()
        async with stack.engine.begin() as connection:
            await connection.execute(text("DELETE FROM pipeline_run WHERE run_id = :run"), {"run": run_id})
    assert response.headers["content-type"].startswith("text/html")
    shown = "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;amp;&quot;"
    assert response.text.count(shown) == 2
    for forbidden in ("<script", "<b>", "<u>", "<i>"):
        assert forbidden not in response.text
    assert run_id.replace("<i>", "&lt;i&gt;") in response.text
    assert "failed" in response.text


async def test_the_landing_page_links_only_to_what_is_there(http: httpx.AsyncClient) -> None:
    page = (await http.get("/")).text
    links = re.findall(r'href="([^"]+)"', page)
    assert {"/docs", "/api/v1/status"} <= set(links)
    for link in links:
        assert (await http.get(link)).status_code == 200
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/no/such/path", 404, "ENDPOINT_NOT_FOUND"),
        ("GET", "/api/2.0/mlflow/no/such", 404, "ENDPOINT_NOT_FOUND"),
        ("POST", "/api/2.0/mlflow/experiments/get", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/api/2.0/mlflow/experiments/create", 405, "METHOD_NOT_ALLOWED"),
        ("DELETE", "/api/v1/pipeline-runs", 405, "METHOD_NOT_ALLOWED"),
    ],
)
async def test_paths_and_methods_that_are_not_served_answer_in_the_same_form(
    http: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    expect_error(await http.request(method, path), status, code, "")


@pytest.mark.parametrize(
    "body",
    ['{"name": "a\\u0000b"}', '{"name": "fine", "tags": [{"key": "a", "value": "\\u0000"}]}', '{"name": "a\x00b"}'],
)
async def test_nul_characters_in_a_body_are_400(http: httpx.AsyncClient, body: str) -> None:
    response = await http.post("/api/2.0/mlflow/experiments/create", content=body)
    expect_error(response, 400, "INVALID_PARAMETER_VALUE", "")


async def test_an_error_inside_says_nothing_of_the_inside(stack: Stack, http: httpx.AsyncClient) -> None:
    async with stack.engine.begin() as connection:
        await connection.execute(text("ALTER TABLE experiment_tag RENAME TO experiment_tag_elsewhere"))
    try:
        response = await http.get("/api/2.0/mlflow/experiments/get?experiment_id=0")
    finally:
        async with stack.engine.begin() as connection:
            await connection.execute(text("ALTER TABLE experiment_tag_elsewhere RENAME TO experiment_tag"))
    expect_error(response, 500, "INTERNAL_ERROR", "internal error")
    assert "SELECT" not in response.text
    assert "experiment_tag" not in response.text
