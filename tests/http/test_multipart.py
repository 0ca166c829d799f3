"""MLflow's multipart uploads and presigned downloads: by hand, and by the unmodified mlflow client."""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import mlflow
import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository

from mlplat.artifacts.digests import sha256
from mlplat.artifacts.parts import MAX_PARTS
from tests.contract.chdb import unique
from tests.http.conftest import Stack, expect_error

PREFIXES = ("/api/2.0/mlflow-artifacts", "/ajax-api/2.0/mlflow-artifacts")
BASE = PREFIXES[0]
INVALID = "INVALID_PARAMETER_VALUE"
MISSING = "RESOURCE_DOES_NOT_EXIST"
MIB = 1024 * 1024
NOISE = random.Random(13).randbytes(7 * MIB + 5)


class Upload:
    """An upload to ``folder``, as MLflow's client makes one of a file on its disk."""

    def __init__(self, http: httpx.AsyncClient, folder: str, name: str = "model.bin", base: str = BASE) -> None:
        self._http = http
        self._base = base
        self._folder = folder
        self.local = f"/data/{name}"
        self.path = f"{folder}/{name}"
        self.id = ""
        self.urls: list[str] = []

    async def call(self, what: str, **fields: Any) -> httpx.Response:
        return await self._http.post(f"{self._base}/mpu/{what}/{self._folder}", json={"path": self.local, **fields})

    async def create(self, parts: int) -> Upload:
        response = await self.call("create", num_parts=parts)
        assert response.status_code == 200, response.text
        answer = response.json()
        assert [each["part_number"] for each in answer["credentials"]] == list(range(1, parts + 1))
        self.id, self.urls = answer["upload_id"], [each["url"] for each in answer["credentials"]]
        return self

    async def put(self, number: int, body: bytes, **headers: str) -> str:
        """Sends a part; its ETag."""
        response = await self._http.put(self.urls[number - 1], content=body, headers=headers)
        assert response.status_code == 200, response.text
        return response.headers["etag"]

    async def complete(self, etags: Sequence[str], numbers: Sequence[int] | None = None) -> httpx.Response:
        found = zip(numbers or range(1, len(etags) + 1), etags, strict=True)
        parts = [{"part_number": number, "etag": etag, "url": "http://elsewhere"} for number, etag in found]
        return await self.call("complete", upload_id=self.id, parts=parts)

    async def content(self) -> bytes | None:
        """What is there; None: nothing."""
        found = await self._http.get(f"{BASE}/artifacts/{self.path}")
        assert found.status_code in {200, 404}
        return found.content if found.status_code == 200 else None


@pytest.mark.parametrize("base", PREFIXES)
async def test_a_file_comes_in_parts(stack: Stack, http: httpx.AsyncClient, base: str) -> None:
    upload = await Upload(http, unique("run"), "ü a.bin", base).create(3)
    bodies = [NOISE[:MIB], NOISE[MIB : 3 * MIB], b"end"]
    etags = {number: await upload.put(number, bodies[number - 1]) for number in (3, 1, 2)}
    assert etags[3] == f'"{sha256(b"end")}"'
    assert await upload.content() is None
    done = await upload.complete([etags[number] for number in (1, 2, 3)])
    assert (done.status_code, done.json()) == (200, {})
    assert await upload.content() == b"".join(bodies)
    listed = (await http.get(f"{BASE}/artifacts", params={"path": upload.path.partition("/")[0]})).json()
    assert listed == {"files": [{"path": "ü a.bin", "is_dir": False, "file_size": 3 * MIB + 3}]}
    assert [file.name for file in (stack.artifact_folder / ".uploads" / upload.id).iterdir()] == ["0"]
    again = await upload.complete([etags[number] for number in (1, 2, 3)])
    assert (again.status_code, again.json()) == (200, {}), "a client that has not heard of the first time asks again"


@pytest.mark.parametrize("local", ["model.bin", "./model.bin", "C:\\work\\model.bin", "/tmp/x/../model.bin"])
async def test_the_name_is_that_of_the_local_file(http: httpx.AsyncClient, local: str) -> None:
    upload = Upload(http, unique("name"))
    upload.local = local
    await upload.create(1)
    assert (await upload.complete([await upload.put(1, b"x")])).status_code == 200
    assert await upload.content() == b"x"


async def test_a_file_may_be_at_the_root(http: httpx.AsyncClient) -> None:
    name = unique("root")
    created = (await http.post(f"{BASE}/mpu/create", json={"path": f"/x/{name}", "num_parts": 1})).json()
    await http.put(created["credentials"][0]["url"], content=b"x")
    body = {"path": f"/x/{name}", "upload_id": created["upload_id"], "parts": [{"part_number": 1}]}
    assert (await http.post(f"{BASE}/mpu/complete", json=body)).status_code == 200
    assert (await http.get(f"{BASE}/artifacts/{name}")).content == b"x"


async def test_a_part_that_is_sent_twice_counts_once(http: httpx.AsyncClient) -> None:
    upload = await Upload(http, unique("twice")).create(2)
    first = await upload.put(1, b"first")
    assert await upload.put(1, b"first") == first
    second = await upload.put(2, b"wrong")
    assert await upload.put(2, b" second") != second
    assert (await upload.complete([first, f'"{sha256(b" second")}"'])).status_code == 200
    assert await upload.content() == b"first second"


async def test_a_wrong_etag_is_400_and_leaves_nothing(http: httpx.AsyncClient) -> None:
    upload = await Upload(http, unique("etag")).create(2)
    etags = [await upload.put(1, b"one"), await upload.put(2, b"two")]
    for wrong in ([etags[0], etags[0]], list(reversed(etags)), [etags[0], '"x"']):
        expect_error(await upload.complete(wrong), 400, INVALID, "has the SHA-256")
        assert await upload.content() is None
    assert (await upload.complete(etags)).status_code == 200
    assert await upload.content() == b"onetwo"


async def test_missing_parts_are_404_and_may_follow(http: httpx.AsyncClient) -> None:
    upload = await Upload(http, unique("missing")).create(3)
    etags = [await upload.put(1, b"one"), "", await upload.put(3, b"three")]
    expect_error(await upload.complete(etags), 404, MISSING, "No such part")
    assert await upload.content() is None
    etags[1] = await upload.put(2, b"two")
    assert (await upload.complete(etags)).status_code == 200
    assert await upload.content() == b"onetwothree"


async def test_a_part_with_another_digest_is_none(http: httpx.AsyncClient) -> None:
    upload = await Upload(http, unique("digest")).create(1)
    digest = f"sha-256=:{base64.b64encode(hashlib.sha256(b'right').digest()).decode()}:"
    refused = await http.put(upload.urls[0], content=b"wrong", headers={"Content-Digest": digest})
    expect_error(refused, 400, INVALID, "should have")
    expect_error(await upload.complete([""]), 404, MISSING, "No such part")
    etag = await upload.put(1, b"right", **{"Content-Digest": digest})
    assert (await upload.complete([etag])).status_code == 200
    assert await upload.content() == b"right"


async def test_an_aborted_upload_is_over(stack: Stack, http: httpx.AsyncClient) -> None:
    upload = await Upload(http, unique("abort")).create(2)
    etag = await upload.put(1, NOISE[:200_000])
    for _ in range(2):
        aborted = await upload.call("abort", upload_id=upload.id)
        assert (aborted.status_code, aborted.json()) == (200, {})
    assert not (stack.artifact_folder / ".uploads" / upload.id).exists()
    expect_error(await http.put(upload.urls[1], content=b"x"), 404, MISSING, "No such upload")
    expect_error(await upload.complete([etag]), 404, MISSING, "No such upload")
    assert await upload.content() is None


@pytest.mark.parametrize("upload_id", ["", "x", "../../../etc", "0" * 32, "A" * 32, "0" * 31 + "/", "%2e%2e"])
async def test_an_id_that_nobody_gave_is_404(http: httpx.AsyncClient, upload_id: str) -> None:
    upload = await Upload(http, unique("unknown")).create(1)
    await upload.put(1, b"x")
    known, upload.id = upload.id, upload_id
    expect_error(await upload.complete([""]), 404, MISSING, "No such upload")
    if upload_id != "0" * 32:
        expect_error(await upload.call("abort", upload_id=upload_id), 404, MISSING, "No such upload")
    part = await http.put(f"/api/v1/artifact-uploads/{upload_id or 'none'}/1", content=b"x")
    assert part.status_code == 404
    upload.id = known
    assert (await upload.complete([""])).status_code == 200


@pytest.mark.parametrize("count", [0, -1, MAX_PARTS + 1, 10**20])
async def test_the_number_of_parts_is_bounded(http: httpx.AsyncClient, count: int) -> None:
    upload = Upload(http, unique("count"))
    response = await upload.call("create", num_parts=count)
    assert (response.status_code, response.json()["error_code"]) == (400, INVALID)
    await upload.create(1)
    part = await http.put(f"/api/v1/artifact-uploads/{upload.id}/{count}", content=b"x")
    assert part.status_code in {400, 404}
    assert (await upload.complete([""] * (MAX_PARTS + 1))).status_code == 400


@pytest.mark.parametrize(
    ("folder", "local"),
    [
        ("%2e%2e", "x"), ("a/%2e%2e/b", "x"), ("%252e%252e/a", "x"), (".uploads", "x"), (".blobs/ab", "x"), ("a", ""),
        ("a", "x/"), ("a", ".."), ("a", "/x/.."), ("a", "a\nb"), ("a", "%2e%2e"), ("a", "..\\.."), ("a", "y" * 256),
    ],
)  # fmt: skip
async def test_a_path_that_could_lead_elsewhere_is_400(
    stack: Stack, http: httpx.AsyncClient, folder: str, local: str
) -> None:
    good = await Upload(http, unique("paths")).create(1)
    await good.put(1, b"x")
    before = sorted(stack.artifact_folder.parent.rglob("*"))
    body = {"path": local, "num_parts": 1, "upload_id": good.id, "parts": [{"part_number": 1, "etag": ""}]}
    for what in ("complete", "create"):
        url = httpx.URL("http://localhost/").copy_with(raw_path=f"{BASE}/mpu/{what}/{folder}".encode())
        response = await http.send(http.build_request("POST", url, json=body))
        assert response.status_code == 400, response.text
        assert sorted(stack.artifact_folder.parent.rglob("*")) == before
    assert (await good.complete([""])).status_code == 200


async def test_presigned_urls_lead_to_the_file(http: httpx.AsyncClient) -> None:
    path = f"{unique('run')}/ü a.bin"
    await http.put(f"{BASE}/artifacts/{path}", content=NOISE[:200_000])
    found = (await http.get(f"{BASE}/presigned/{path}")).json()
    assert (found["headers"], found["file_size"]) == ({}, 200_000)
    assert (await http.get(found["url"])).content == NOISE[:200_000]
    expect_error(await http.get(f"{BASE}/presigned/{unique('none')}"), 404, MISSING, "No such artifact")
    expect_error(await http.get(f"{BASE}/presigned/"), 400, INVALID, "a file needs a name")


@pytest.fixture
def in_parts(mlflow_client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """The stock client, to which a megabyte is large."""
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "true")
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "true")
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", str(MIB))
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE", str(MIB))
    monkeypatch.setenv("MLFLOW_MULTIPART_DOWNLOAD_MINIMUM_FILE_SIZE", str(MIB))
    monkeypatch.setenv("MLFLOW_MULTIPART_DOWNLOAD_CHUNK_SIZE", str(MIB))
    return mlflow_client


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The requests that the client of this process sends: method and path, with the range that it wants."""
    seen = list[tuple[str, str]]()
    send = requests.Session.send

    def watched(session: requests.Session, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        seen.append((str(request.method), " ".join([request.path_url, str(request.headers.get("Range", ""))])))
        return send(session, request, **options)

    monkeypatch.setattr(requests.Session, "send", watched)
    return seen


def count(sent: Sequence[tuple[str, str]], method: str, part: str) -> int:
    return sum(each == method and part in path for each, path in sent)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    file = tmp_path / "large model.bin"
    file.write_bytes(NOISE)
    return file


def test_the_stock_client_sends_parts_and_fetches_ranges(
    in_parts: MlflowClient, sent: list[tuple[str, str]], large: Path, tmp_path: Path
) -> None:
    run = in_parts.create_run("0").info
    in_parts.log_artifact(run.run_id, str(large), "models/deep")
    assert count(sent, "PUT", "/api/v1/artifact-uploads/") == 8
    assert count(sent, "PUT", "/mlflow-artifacts/artifacts/") == 0
    [found] = in_parts.list_artifacts(run.run_id, "models/deep")
    assert (found.path, found.file_size) == ("models/deep/large model.bin", len(NOISE))
    local = mlflow.artifacts.download_artifacts(
        run_id=run.run_id, artifact_path=found.path, dst_path=str(tmp_path / "copy")
    )
    assert Path(local).read_bytes() == NOISE
    assert count(sent, "GET", " bytes=") == 8
    in_parts.log_artifact(run.run_id, str(large), "models/deep")
    assert len(in_parts.list_artifacts(run.run_id, "models/deep")) == 1


def test_the_stock_client_finds_out_that_large_files_may_come_in_parts(
    in_parts: MlflowClient, sent: list[tuple[str, str]], large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD")
    monkeypatch.delenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD")
    small = tmp_path / "small.txt"
    small.write_text("small")
    run = in_parts.create_run("0").info
    in_parts.log_artifact(run.run_id, str(small))
    in_parts.log_artifact(run.run_id, str(large))
    assert count(sent, "PUT", "/api/v1/artifact-uploads/") == 8
    assert count(sent, "PUT", "/mlflow-artifacts/artifacts/") == 1
    local = mlflow.artifacts.download_artifacts(run_id=run.run_id, dst_path=str(tmp_path / "copy"))
    assert (Path(local) / large.name).read_bytes() == NOISE
    assert (Path(local) / "small.txt").read_text() == "small"


def _repository(client: MlflowClient, run_id: str) -> Any:
    """The client's own half of an upload. Any: its methods have no types."""
    repository = get_artifact_repository(client.get_run(run_id).info.artifact_uri)
    assert isinstance(repository, HttpArtifactRepository)
    return repository


def test_the_stock_client_gives_up_an_upload(in_parts: MlflowClient, large: Path) -> None:
    run = in_parts.create_run("0").info
    repository = _repository(in_parts, run.run_id)
    created = repository.create_multipart_upload(str(large), 2, "models")
    repository._upload_part(created.credentials[0], str(large), MIB, 0)
    repository.abort_multipart_upload(str(large), created.upload_id, "models")
    with pytest.raises(requests.HTTPError, match="No such upload"):
        repository._upload_part(created.credentials[1], str(large), MIB, MIB)
    assert in_parts.list_artifacts(run.run_id) == []


def test_the_stock_client_sends_a_part_twice(in_parts: MlflowClient, large: Path) -> None:
    run = in_parts.create_run("0").info
    repository = _repository(in_parts, run.run_id)
    created = repository.create_multipart_upload(str(large), 2)
    half = len(NOISE) // 2 + 1
    parts = [
        repository._upload_part(created.credentials[number], str(large), half, number * half) for number in (1, 0, 1)
    ]
    assert parts[0].etag == parts[2].etag
    repository.complete_multipart_upload(str(large), created.upload_id, parts[1:])
    local = mlflow.artifacts.download_artifacts(run_id=run.run_id, artifact_path=large.name)
    assert Path(local).read_bytes() == NOISE


def test_the_stock_client_is_told_of_a_wrong_etag(in_parts: MlflowClient, large: Path) -> None:
    run = in_parts.create_run("0").info
    repository = _repository(in_parts, run.run_id)
    created = repository.create_multipart_upload(str(large), 1)
    part = repository._upload_part(created.credentials[0], str(large), len(NOISE), 0)
    part.etag = f'"{sha256(b"other")}"'
    with pytest.raises((requests.HTTPError, MlflowException), match="has the SHA-256"):
        repository.complete_multipart_upload(str(large), created.upload_id, [part])
    assert in_parts.list_artifacts(run.run_id) == []
