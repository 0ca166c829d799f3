"""MLflow's artifact proxy, and the facts its client asks for."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.contract.chdb import unique
from tests.http.conftest import LOOPBACK, MLflow, Stack, expect_error

PREFIXES = ("/api/2.0/mlflow-artifacts", "/ajax-api/2.0/mlflow-artifacts")
FILES = f"{PREFIXES[0]}/artifacts"
INVALID = "INVALID_PARAMETER_VALUE"


async def _put(http: httpx.AsyncClient, path: str, body: bytes) -> None:
    response = await http.put(f"{FILES}/{path}", content=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("body", [b"", b"some bytes", bytes(range(256)) * 20_000])
async def test_a_file_that_was_put_is_got(http: httpx.AsyncClient, prefix: str, body: bytes) -> None:
    url = f"{prefix}/artifacts/{unique('0/run')}/artifacts/model.bin"
    assert (await http.put(url, content=body)).status_code == 200
    response = await http.get(url)
    assert (response.status_code, response.content) == (200, body)
    assert response.headers["content-length"] == str(len(body))


async def test_a_download_is_an_attachment_that_browsers_do_not_interpret(http: httpx.AsyncClient) -> None:
    folder = unique("headers")
    await _put(http, f"{folder}/page.html", b"<script>alert(1)</script>")
    response = await http.get(f"{FILES}/{folder}/page.html")
    assert response.headers["content-disposition"].startswith("attachment")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-type"].startswith("text/html")
    await _put(http, f"{folder}/no-suffix", b"x")
    assert (await http.get(f"{FILES}/{folder}/no-suffix")).headers["content-type"] == "application/octet-stream"


async def test_a_name_with_odd_characters_comes_back_encoded(http: httpx.AsyncClient) -> None:
    name = 'ü n "q"; x=1\u2028.txt'
    path = f"{unique('odd')}/{name}"
    await _put(http, path.replace("\u2028", "%E2%80%A8"), b"x")
    response = await http.get(f"{FILES}/{path}")
    assert response.status_code == 200
    assert response.headers["content-disposition"] == (
        "attachment; filename*=UTF-8''%C3%BC%20n%20%22q%22%3B%20x%3D1%E2%80%A8.txt"
    )


@pytest.mark.parametrize(
    ("wanted", "body", "content_range"),
    [
        ("bytes=0-3", b"0123", "bytes 0-3/10"),
        ("bytes=4-", b"456789", "bytes 4-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
        ("bytes=8-99", b"89", "bytes 8-9/10"),
        ("bytes=-99", b"0123456789", "bytes 0-9/10"),
        ("bytes=9-9", b"9", "bytes 9-9/10"),
    ],
)
async def test_a_range_is_answered_with_206(
    http: httpx.AsyncClient, wanted: str, body: bytes, content_range: str
) -> None:
    path = unique("range")
    await _put(http, path, b"0123456789")
    response = await http.get(f"{FILES}/{path}", headers={"Range": wanted})
    assert (response.status_code, response.content) == (206, body)
    assert response.headers["content-range"] == content_range
    assert response.headers["content-length"] == str(len(body))


@pytest.mark.parametrize("wanted", ["bytes=10-", "bytes=99-100", "bytes=-0"])
async def test_a_range_outside_of_the_file_is_416(http: httpx.AsyncClient, wanted: str) -> None:
    path = unique("range")
    await _put(http, path, b"0123456789")
    response = await http.get(f"{FILES}/{path}", headers={"Range": wanted})
    assert (response.status_code, response.content) == (416, b"")
    assert response.headers["content-range"] == "bytes */10"


@pytest.mark.parametrize("wanted", ["", "bytes=", "bytes=-", "bytes=a-b", "lines=1-2", "bytes=0-1,3-4"])
async def test_a_range_that_is_not_understood_is_ignored(http: httpx.AsyncClient, wanted: str) -> None:
    path = unique("range")
    await _put(http, path, b"0123456789")
    response = await http.get(f"{FILES}/{path}", headers={"Range": wanted})
    assert (response.status_code, response.content) == (200, b"0123456789")
    assert "content-range" not in response.headers


async def test_putting_again_replaces(http: httpx.AsyncClient) -> None:
    path = unique("twice")
    await _put(http, path, b"a longer first version")
    await _put(http, path, b"second")
    assert (await http.get(f"{FILES}/{path}")).content == b"second"


async def test_an_upload_that_breaks_off_leaves_nothing(stack: Stack, http: httpx.AsyncClient) -> None:
    path = f"{FILES}/{unique('broken')}/file"
    await _put(http, unique("scratch"), b"x")
    before = sorted((stack.artifact_folder / ".uploads").iterdir())
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": b"x" * 100_000, "more_body": True}] * 20
    left = iter([*messages, {"type": "http.disconnect"}])
    answers: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return next(left)

    async def send(message: Any) -> None:
        answers.append(dict(message))

    scope = {
        "type": "http", "http_version": "1.1", "method": "PUT", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "headers": [(b"host", b"localhost")],
        "client": LOOPBACK,
    }  # fmt: skip
    await stack.app(scope, receive, send)
    assert next(left, None) is None  # all of it was read, up to the disconnect
    assert all(answer.get("status", 400) == 400 for answer in answers)
    assert (await http.get(path)).status_code == 404
    assert sorted((stack.artifact_folder / ".uploads").iterdir()) == before


async def test_concurrent_uploads_do_not_mix(http: httpx.AsyncClient) -> None:
    folder = unique("many")
    bodies = {f"{folder}/{number}": bytes([number]) * 300_000 for number in range(12)}
    await asyncio.gather(*(_put(http, path, body) for path, body in bodies.items()))
    answers = await asyncio.gather(*(http.get(f"{FILES}/{path}") for path in bodies))
    assert [answer.content for answer in answers] == list(bodies.values())


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_a_listing_is_relative_to_the_folder_that_was_asked(http: httpx.AsyncClient, prefix: str) -> None:
    folder = unique("list")
    await _put(http, f"{folder}/sub/b.txt", b"12")
    await _put(http, f"{folder}/a.txt", b"1")
    response = await http.get(f"{prefix}/artifacts", params={"path": folder})
    assert response.json() == {
        "files": [{"path": "a.txt", "is_dir": False, "file_size": 1}, {"path": "sub", "is_dir": True}]
    }
    inner = await http.get(f"{prefix}/artifacts", params={"path": f"{folder}/sub"})
    assert inner.json() == {"files": [{"path": "b.txt", "is_dir": False, "file_size": 2}]}


async def test_a_listing_of_a_file_or_of_nothing_has_no_entries(http: httpx.AsyncClient) -> None:
    path = unique("single")
    await _put(http, path, b"x")
    for asked in (path, unique("nothing")):
        response = await http.get(FILES, params={"path": asked})
        assert response.status_code == 200
        assert response.json().get("files", []) == []


async def test_a_listing_of_everything_hides_the_stores_own_folders(http: httpx.AsyncClient) -> None:
    path = unique("visible")
    await _put(http, path, b"x")
    await http.post("/api/v1/blobs", content=b"a blob")
    names = {entry["path"] for entry in (await http.get(FILES)).json()["files"]}
    assert path in names
    assert not any(name.startswith(".") for name in names)


async def test_a_file_and_a_folder_are_deleted_and_repeats_are_fine(http: httpx.AsyncClient) -> None:
    folder = unique("gone")
    for name in ("a", "sub/b"):
        await _put(http, f"{folder}/{name}", b"x")
    for _repeat in range(2):
        assert (await http.delete(f"{FILES}/{folder}/a")).status_code == 200
    assert (await http.get(f"{FILES}/{folder}/a")).status_code == 404
    assert (await http.get(f"{FILES}/{folder}/sub/b")).status_code == 200
    assert (await http.delete(f"{FILES}/{folder}")).status_code == 200
    assert (await http.get(f"{FILES}/{folder}/sub/b")).status_code == 404


async def test_what_is_not_a_file_is_404(http: httpx.AsyncClient) -> None:
    folder = unique("folder")
    await _put(http, f"{folder}/file", b"x")
    for path in (folder, f"{folder}/missing", unique("missing"), f"{folder}/file/below"):
        response = await http.get(f"{FILES}/{path}")
        expect_error(response, 404, "RESOURCE_DOES_NOT_EXIST", "No such artifact")


async def test_a_file_cannot_take_the_place_of_a_folder(http: httpx.AsyncClient) -> None:
    folder = unique("folder")
    await _put(http, f"{folder}/file", b"x")
    for path in (folder, f"{folder}/file/below"):
        expect_error(await http.put(f"{FILES}/{path}", content=b"y"), 400, INVALID, "same path")
    assert (await http.get(f"{FILES}/{folder}/file")).content == b"x"


#: As they stand in the request line. The server decodes them once.
TRAVERSALS = (
    "%2e%2e/x", "%2e%2e/%2e%2e/etc/passwd", "a/%2e%2e/%2e%2e/x", "a/%2E%2E", "%2e%2e", "%252e%252e/x",
    "a/%252e%252e/%252e%252e/x", "..%2fx", "%2e%2e%2f%2e%2e%2fx", "..%252fx", "%2fetc/passwd", "%252fetc", "..%5cx",
    "%5c%5chost%5cx", "c:%5cx", "C:/x", "a%00b", "a%2500b", ".blobs/x", ".blobs", ".uploads/x", "%2eblobs/x",
    "x" * 256,
)  # fmt: skip


@pytest.mark.parametrize("path", TRAVERSALS)
async def test_a_path_that_could_lead_elsewhere_is_400(stack: Stack, http: httpx.AsyncClient, path: str) -> None:
    before = sorted(stack.artifact_folder.parent.rglob("*"))
    url = httpx.URL(f"http://localhost{FILES}/").copy_with(raw_path=f"{FILES}/{path}".encode())
    for request in (
        http.build_request("GET", url),
        http.build_request("PUT", url, content=b"bad"),
        http.build_request("DELETE", url),
    ):
        expect_error(await http.send(request), 400, INVALID, "Invalid path")
    assert sorted(stack.artifact_folder.parent.rglob("*")) == before


@pytest.mark.parametrize("path", ["..", "../..", "/etc", "a/../..", "%2e%2e", "%252e%252e", "\\", "a\0", ".blobs"])
async def test_a_listing_elsewhere_is_400(http: httpx.AsyncClient, path: str) -> None:
    expect_error(await http.get(FILES, params={"path": path}), 400, INVALID, "Invalid path")


async def test_a_link_out_of_the_store_is_400(stack: Stack, http: httpx.AsyncClient) -> None:
    folder = unique("links")
    await _put(http, f"{folder}/file", b"x")
    outside = stack.artifact_folder.parent / unique("outside")
    outside.write_bytes(b"secret")
    (stack.artifact_folder / folder / "link").symlink_to(outside)
    url = f"{FILES}/{folder}/link"
    for response in (await http.get(url), await http.put(url, content=b"bad"), await http.delete(url)):
        expect_error(response, 400, INVALID, "a link leads out of the store")
    assert outside.read_bytes() == b"secret"


async def test_a_file_needs_a_name(http: httpx.AsyncClient) -> None:
    for method in ("GET", "PUT", "DELETE"):
        expect_error(await http.request(method, f"{FILES}/"), 400, INVALID, "a file needs a name")


async def test_artifacts_put_through_the_proxy_are_listed_by_run(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    run = (await mlflow.call("POST", "runs/create", experiment_id="0"))["run"]["info"]
    root = run["artifact_uri"].removeprefix("mlflow-artifacts:/")
    await _put(http, f"{root}/model/weights", b"123")
    listed = await mlflow.call("GET", "artifacts/list", run_id=run["run_id"], path="model")
    assert listed["files"] == [{"path": "model/weights", "is_dir": False, "file_size": 3}]


async def test_the_server_states_its_facts(http: httpx.AsyncClient) -> None:
    health, version = await http.get("/health"), await http.get("/version")
    assert (health.status_code, health.text) == (200, "OK")
    assert version.status_code == 200
    assert [part.isdecimal() for part in version.text.split(".")] == [True] * 3
    for prefix in ("/api", "/ajax-api"):
        info = await http.get(f"{prefix}/3.0/mlflow/server-info")
        assert info.status_code == 200
        assert info.json()["workspaces_enabled"] is False
