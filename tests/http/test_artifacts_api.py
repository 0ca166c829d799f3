"""Files as lists of chunks, and what HTTP says of files: digests, versions, conditions, bodies that lie."""

from __future__ import annotations

import asyncio
import base64
import gc
import hashlib
import logging
import random
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlplat.artifacts.chunking import MAX_CHUNK_BYTES, cut, pack
from mlplat.artifacts.digests import sha256
from mlplat.artifacts.folder import Folder
from mlplat.artifacts.frames import MEDIA_TYPE, Frame, encode_frame
from mlplat.http.bodies import MAX_BATCH_BYTES
from mlplat.http.routes.artifacts import MAX_ASKED
from tests.contract.chdb import unique
from tests.faults.disks import MIB
from tests.http.conftest import Stack, expect_error
from tests.platform import eventually

API = "/api/v1/artifacts"
FILES = "/api/2.0/mlflow-artifacts/artifacts"
INVALID = "INVALID_PARAMETER_VALUE"
NOISE = random.Random(11).randbytes(5 * 1024 * 1024)
TEXT = b"epoch 17 loss 0.123 accuracy 0.987\n" * 60_000


def digest_header(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def frames_of(chunks: Sequence[bytes | memoryview]) -> bytes:
    frames = [Frame(sha256(chunk), len(chunk), pack(chunk) or chunk) for chunk in chunks]
    return b"".join(part for frame in frames for part in encode_frame(frame))


def described(body: bytes) -> dict[str, Any]:
    chunks = [(sha256(chunk), len(chunk)) for chunk in cut([body], Folder.chunk_bytes)]
    return {"size": len(body), "sha256": sha256(body), "chunks": [list(chunk) for chunk in chunks]}


async def send(http: httpx.AsyncClient, body: bytes) -> httpx.Response:
    """Posts the chunks of a file."""
    return await http.post(
        f"{API}/chunks", content=frames_of(list(cut([body], Folder.chunk_bytes))), headers={"Content-Type": MEDIA_TYPE}
    )


async def put(http: httpx.AsyncClient, path: str, body: bytes) -> None:
    response = await http.put(f"{FILES}/{path}", content=body)
    assert response.status_code == 200, response.text


async def absent(http: httpx.AsyncClient, path: str) -> bool:
    folder, _slash, name = path.rpartition("/")
    listed = (await http.get(FILES, params={"path": folder})).json().get("files", [])
    found = await http.get(f"{FILES}/{path}")
    return found.status_code == 404 and name not in {entry["path"] for entry in listed}


def fresh(size: int = len(NOISE)) -> bytes:
    """Bytes that the platform does not have."""
    return unique("fresh").encode().ljust(64) + NOISE[64:size]


async def test_a_file_is_sent_as_its_missing_chunks(http: httpx.AsyncClient) -> None:
    body = fresh() + TEXT
    file = described(body)
    digests = [digest for digest, _size in file["chunks"]]
    asked = await http.post(f"{API}/missing", json={"sha256": digests})
    assert asked.status_code == 200
    assert digests[0] in asked.json()["missing"]
    sent = await send(http, body)
    assert (sent.status_code, sent.json()) == (200, {"chunks": len(digests)})
    assert (await http.post(f"{API}/missing", json={"sha256": digests})).json()["missing"] == []
    path = f"{unique('run')}/a b/ü%41.bin"
    url = f"{API}/files/{path.replace('%', '%25')}"
    made = await http.put(url, json=file)
    assert (made.status_code, made.json()) == (200, file)
    assert (await http.get(url)).json() == file
    got = await http.get(f"{FILES}/{path.replace('%', '%25')}")
    assert (got.status_code, got.content == body, got.headers["etag"]) == (200, True, f'"{file["sha256"]}"')


@pytest.mark.parametrize("body", [b"", b"small", NOISE[:64_000]], ids=len)
async def test_a_small_file_tells_its_bytes_as_one_chunk(http: httpx.AsyncClient, body: bytes) -> None:
    path = unique("small")
    await put(http, path, body)
    chunks = [[sha256(body), len(body)]] if body else []
    assert (await http.get(f"{API}/files/{path}")).json() == {
        "size": len(body),
        "sha256": sha256(body),
        "chunks": chunks,
    }


async def test_a_file_that_went_through_the_proxy_has_the_chunks_that_clients_cut(http: httpx.AsyncClient) -> None:
    path, body = unique("cut"), fresh()
    await put(http, path, body)
    assert (await http.get(f"{API}/files/{path}")).json() == described(body)


async def test_a_file_of_missing_chunks_is_409(http: httpx.AsyncClient) -> None:
    path, body = f"{unique('missing')}/file", fresh()
    response = await http.put(f"{API}/files/{path}", json=described(body))
    expect_error(response, 409, "RESOURCE_CONFLICT", "chunks of")
    assert await absent(http, path)
    await send(http, body)
    assert (await http.put(f"{API}/files/{path}", json=described(body))).status_code == 200


async def test_chunks_with_wrong_digests_are_400(http: httpx.AsyncClient) -> None:
    good, bad = fresh(1_000), fresh(2_000)
    body = frames_of([good]) + b"".join(encode_frame(Frame(sha256(good + bad), len(bad), bad)))
    expect_error(await http.post(f"{API}/chunks", content=body), 400, INVALID, "do not have the SHA-256")
    asked = [sha256(good), sha256(bad), sha256(good + bad)]
    missing = (await http.post(f"{API}/missing", json={"sha256": asked})).json()["missing"]
    assert missing == asked[1:]


@pytest.mark.parametrize(
    "body",
    [
        b"x",
        b"x" * 40,
        struct.pack(">32sII", b"d" * 32, 10, 10) + b"short",
        struct.pack(">32sII", b"d" * 32, 10, 0),
        struct.pack(">32sII", b"d" * 32, 10, 5) + b"bytes",
        struct.pack(">32sII", b"d" * 32, MAX_CHUNK_BYTES + 1, 10) + b"x" * 10,
        struct.pack(">32sII", b"d" * 32, 10, 11) + b"x" * 11,
        struct.pack(">32sII", b"d" * 32, MAX_CHUNK_BYTES, 12) + zlib.compress(b"abc")[:12].ljust(12),
        frames_of([TEXT[:100_000]])[:-1],
    ],
)
async def test_a_body_of_something_else_is_400(http: httpx.AsyncClient, body: bytes) -> None:
    response = await http.post(f"{API}/chunks", content=body)
    assert (response.status_code, response.json()["error_code"]) == (400, INVALID)


async def test_no_chunks_are_no_chunks(http: httpx.AsyncClient) -> None:
    response = await http.post(f"{API}/chunks", content=b"")
    assert (response.status_code, response.json()) == (200, {"chunks": 0})


async def test_questions_are_bounded_and_checked(http: httpx.AsyncClient) -> None:
    assert (await http.post(f"{API}/missing", json={"sha256": []})).json()["missing"] == []
    many = ["0" * 64] * MAX_ASKED
    assert (await http.post(f"{API}/missing", json={"sha256": many})).json()["missing"] == ["0" * 64]
    for asked in (
        [*many, "0" * 64],
        ["0" * 63],
        ["A" * 64],
        ["../" + "0" * 61],
        ["0" * 64 + "\n"],
        [5],
        "0" * 64,
        None,
    ):
        response = await http.post(f"{API}/missing", json={"sha256": asked})
        assert (response.status_code, response.json()["error_code"]) == (400, INVALID), asked


@pytest.mark.parametrize(
    "change",
    [
        {"size": 4},
        {"size": 6},
        {"size": -5},
        {"size": 10**30},
        {"size": "x"},
        {"sha256": "0" * 63},
        {"sha256": None},
        {"chunks": []},
        {"chunks": [[sha256(b"12345"), 4]]},
        {"chunks": [[sha256(b"12345"), 10], [sha256(b"12345"), -5]]},
        {"chunks": [[sha256(b"12345"), 5], [sha256(b"12345"), 0]]},
        {"chunks": [["x" * 64, 5]]},
        {"chunks": [[sha256(b"12345")]]},
        {"chunks": [[sha256(b"12345"), 5, ""]]},
        {"size": 2**40, "chunks": [[sha256(b"12345"), 2**40]]},
        {"size": 10**30, "chunks": [[sha256(b"12345"), 10**30]]},
    ],
)
async def test_a_file_that_cannot_be_is_400(http: httpx.AsyncClient, change: dict[str, Any]) -> None:
    await http.post(f"{API}/chunks", content=frames_of([b"12345"]))
    path = f"{unique('lies')}/file"
    file = {"size": 5, "sha256": sha256(b"12345"), "chunks": [[sha256(b"12345"), 5]]}
    response = await http.put(f"{API}/files/{path}", json=file | change)
    assert (response.status_code, response.json()["error_code"]) == (400, INVALID), response.text
    assert await absent(http, path)
    assert (await http.put(f"{API}/files/{path}", json=file)).status_code == 200


async def test_sizes_of_chunks_that_lie_are_no_short_bodies(http: httpx.AsyncClient) -> None:
    parts = fresh(1_000), fresh(2_000)
    await http.post(f"{API}/chunks", content=frames_of(parts))
    path, body = unique("lies"), b"".join(parts)
    file = {"size": 3_000, "sha256": sha256(body), "chunks": [[sha256(part), 1_500] for part in parts]}
    assert (await http.put(f"{API}/files/{path}", json=file)).status_code == 200
    for headers in ({}, {"Range": "bytes=0-9"}, {"Range": "bytes=2000-"}):
        expect_error(await http.get(f"{FILES}/{path}", headers=headers), 409, "INVALID_STATE", path)


@pytest.mark.parametrize(
    "path",
    ["%2e%2e/x", "a/%2e%2e/%2e%2e/x", "%252e%252e/x", "%2fetc/passwd", "a%00b", ".blobs/x", ".uploads/x", "%5c", ""],
)
async def test_a_path_that_could_lead_elsewhere_is_400(stack: Stack, http: httpx.AsyncClient, path: str) -> None:
    before = sorted(stack.artifact_folder.parent.rglob("*"))
    url = httpx.URL(f"http://localhost{API}/files/").copy_with(raw_path=f"{API}/files/{path}".encode())
    empty = {"size": 0, "sha256": sha256(b""), "chunks": []}
    expect_error(await http.send(http.build_request("PUT", url, json=empty)), 400, INVALID, "Invalid path")
    assert (await http.send(http.build_request("GET", url))).status_code == (404 if not path else 400)
    assert sorted(stack.artifact_folder.parent.rglob("*")) == before


async def test_what_is_no_file_is_404(http: httpx.AsyncClient) -> None:
    folder = unique("folder")
    await put(http, f"{folder}/file", b"x")
    for path in (folder, f"{folder}/none", f"{folder}/file/below"):
        expect_error(await http.get(f"{API}/files/{path}"), 404, "RESOURCE_DOES_NOT_EXIST", "No such artifact")


@pytest.mark.parametrize("header", ["Content-Digest", "Repr-Digest"])
@pytest.mark.parametrize("body", [b"", b"small", NOISE[:200_000]], ids=len)
async def test_a_body_with_its_digest_is_stored(http: httpx.AsyncClient, header: str, body: bytes) -> None:
    path = unique("digest")
    response = await http.put(f"{FILES}/{path}", content=body, headers={header: digest_header(body)})
    assert response.status_code == 200, response.text
    assert response.headers["repr-digest"] == digest_header(body)
    got = await http.get(f"{FILES}/{path}")
    assert (got.content == body, got.headers["repr-digest"]) == (True, digest_header(body))
    assert got.headers["etag"] == response.headers["etag"] == f'"{sha256(body)}"'


async def test_sha_256_is_found_among_other_digests(http: httpx.AsyncClient) -> None:
    path = unique("digest")
    header = f"sha-512=:{base64.b64encode(bytes(64)).decode()}:, {digest_header(b'x')}"
    assert (await http.put(f"{FILES}/{path}", content=b"x", headers={"Content-Digest": header})).status_code == 200
    refused = await http.put(f"{FILES}/{path}", content=b"y", headers={"Content-Digest": header})
    assert refused.status_code == 400


@pytest.mark.parametrize("header", ["md5=:AAAA:", f"sha-512=:{'A' * 86}==:, md5=:AAAA:"])
async def test_other_digests_alone_are_not_looked_at(http: httpx.AsyncClient, header: str) -> None:
    path = unique("digest")
    assert (await http.put(f"{FILES}/{path}", content=b"x", headers={"Content-Digest": header})).status_code == 200


@pytest.mark.parametrize("name", ["file", "mlplat/console/host-1/000001.log"])
@pytest.mark.parametrize("body", [b"small", NOISE[:200_000]], ids=len)
async def test_a_body_with_another_digest_is_400_and_leaves_nothing(
    http: httpx.AsyncClient, name: str, body: bytes
) -> None:
    path = f"{unique('digest')}/{name}"
    headers = {"Content-Digest": digest_header(b"other")}
    expect_error(await http.put(f"{FILES}/{path}", content=body, headers=headers), 400, INVALID, "SHA-256")
    assert await absent(http, path)
    await put(http, path, b"before")
    assert (await http.put(f"{FILES}/{path}", content=body, headers=headers)).status_code == 400
    assert (await http.get(f"{FILES}/{path}")).content == b"before"


@pytest.mark.parametrize(
    "header",
    [
        "x",
        "sha-256",
        "sha-256=",
        "sha-256=::",
        sha256(b"x"),
        "sha-256=:" + sha256(b"x") + ":",
        "sha-256=:" + "A" * 44 + ":",
        "sha-256=:" + "=" * 44 + ":",
        "sha-256=:" + "A" * 42 + "==:",
        digest_header(b"x")[:-1],
    ],
)
async def test_a_digest_that_is_none_is_400(http: httpx.AsyncClient, header: str) -> None:
    path = f"{unique('digest')}/file"
    response = await http.put(f"{FILES}/{path}", content=b"x", headers={"Content-Digest": header})
    expect_error(response, 400, INVALID, "not a digest")
    assert await absent(http, path)


@pytest.mark.parametrize("body", [b"0123456789", NOISE[:300_000]], ids=len)
async def test_conditions_name_the_version(http: httpx.AsyncClient, body: bytes) -> None:
    path = f"{FILES}/{unique('conditions')}"
    tag, other = f'"{sha256(body)}"', f'"{sha256(b"other")}"'
    await http.put(path, content=body)

    async def answer(method: str = "GET", **headers: str) -> tuple[int, int]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        response = await http.request(method, path, headers=named)
        assert response.headers.get("etag", tag) == tag
        return response.status_code, len(response.content)

    whole, ranged = (200, len(body)), (206, 4)
    for good in (tag, "*", f"{other}, {tag}", f"{other},{tag}"):
        assert await answer(if_match=good) == whole
        assert await answer(if_match=good, range="bytes=2-5") == ranged
        assert await answer(if_none_match=good) == (304, 0)
        assert await answer(if_none_match=f"W/{good}") == (304, 0)
        assert await answer("HEAD", if_none_match=good) == (304, 0)
    for bad in (other, sha256(body), '""', ""):
        expect_error(await http.get(path, headers={"If-Match": bad}), 412, "RESOURCE_CONFLICT", "another version")
        assert await answer(if_none_match=bad) == whole
    assert (await answer("HEAD", if_match=other))[0] == 412
    assert await answer(if_range=tag, range="bytes=2-5") == ranged
    assert await answer(if_range=other, range="bytes=2-5") == whole
    assert await answer(if_range="Wed, 21 Oct 2015 07:28:00 GMT", range="bytes=2-5") == whole


async def test_head_tells_what_get_would(http: httpx.AsyncClient) -> None:
    path, body = f"{FILES}/{unique('head')}.json", NOISE[:300_000]
    await http.put(path, content=body)
    for headers in ({}, {"Range": "bytes=5-99"}, {"Range": "bytes=-7"}, {"Range": "bytes=300000-"}):
        got, head = await http.get(path, headers=headers), await http.head(path, headers=headers)
        assert (head.status_code, dict(head.headers), head.content) == (got.status_code, dict(got.headers), b"")
    assert (await http.head(f"{FILES}/{unique('none')}")).status_code == 404


async def test_ranges_go_across_chunks(http: httpx.AsyncClient) -> None:
    path, body = f"{FILES}/{unique('ranges')}", fresh()
    await http.put(path, content=body)
    edges = [0]
    for _digest, size in described(body)["chunks"]:
        edges.append(edges[-1] + size)
    assert len(edges) > 2
    for edge in edges:
        start, end = max(0, edge - 3), min(len(body), edge + 4)
        response = await http.get(path, headers={"Range": f"bytes={start}-{end - 1}"})
        assert (response.status_code, response.content) == (206, body[start:end])
        assert response.headers["content-range"] == f"bytes {start}-{end - 1}/{len(body)}"


def blob_of(stack: Stack, chunk: list[Any]) -> Path:
    [blob] = (stack.artifact_folder / ".blobs").rglob(f"{chunk[0]}*")
    return blob


async def test_a_corrupt_blob_is_409_before_any_byte(stack: Stack, http: httpx.AsyncClient) -> None:
    path, body = unique("corrupt"), fresh()
    await put(http, path, body)
    chunks = described(body)["chunks"]
    blob = blob_of(stack, chunks[0])
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for headers in ({}, {"Range": "bytes=0-0"}, {"Range": "bytes=10-"}):
        response = await http.get(f"{FILES}/{path}", headers=headers)
        expect_error(response, 409, "INVALID_STATE", f"The artifact '{path}' is corrupt: blob {chunks[0][0]}")
    start = chunks[0][1]
    response = await http.get(f"{FILES}/{path}", headers={"Range": f"bytes={start}-"})
    assert (response.status_code, response.content == body[start:]) == (206, True)
    blob.unlink()
    expect_error(await http.get(f"{FILES}/{path}"), 409, "INVALID_STATE", "is gone")


async def test_a_corrupt_entry_is_409(stack: Stack, http: httpx.AsyncClient) -> None:
    path = unique("corrupt")
    await put(http, path, b"some bytes")
    file = stack.artifact_folder / path
    file.write_bytes(file.read_bytes().replace(b"some", b"same"))
    for url in (f"{FILES}/{path}", f"{API}/files/{path}"):
        expect_error(await http.get(url), 409, "INVALID_STATE", f"The artifact '{path}' is corrupt")
    await put(http, path, b"again")
    assert (await http.get(f"{FILES}/{path}")).content == b"again"


def _spoken(url: str, request: bytes) -> bytes:
    """Sends bytes to a server and ends; what it answers."""
    host, _colon, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65_536):
            answer += part
        return answer


@pytest.mark.parametrize("body", [b"too short", NOISE[:3_000_000]], ids=len)
@pytest.mark.parametrize("how", ["length", "chunked"])
async def test_a_body_that_is_shorter_than_it_says_leaves_nothing(
    server_url: str, how: str, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    gc.collect()
    caplog.clear()  # of what other tests left
    path = f"{unique('short')}/file"
    head = f"PUT {FILES}/{path} HTTP/1.1\r\nHost: localhost\r\n".encode()
    if how == "length":
        request = head + f"Content-Length: {len(body) + 1}\r\n\r\n".encode() + body
    else:
        request = head + f"Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode() + body + b"\r\n"
    answer = await asyncio.to_thread(_spoken, server_url, request)
    assert not answer.startswith(b"HTTP/1.1 200")
    async with httpx.AsyncClient(base_url=server_url) as client:
        assert await absent(client, path)
        await put(client, path, body)
        assert (await client.get(f"{FILES}/{path}")).content == body
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_of_a_body_that_is_longer_than_it_says_no_more_is_stored(server_url: str) -> None:
    path = unique("long")
    request = f"PUT {FILES}/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nfour and more".encode()
    await asyncio.to_thread(_spoken, server_url, request)
    async with httpx.AsyncClient(base_url=server_url) as client:
        found = await client.get(f"{FILES}/{path}")
        assert found.status_code == 404 or found.content == b"four"


async def test_chunks_that_come_before_a_connection_breaks_are_kept(server_url: str) -> None:
    first, second = fresh(100_000), fresh(3_000_000)
    body = frames_of([first, second])
    head = f"POST {API}/chunks HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    answer = await asyncio.to_thread(_spoken, server_url, head + body[:-1])
    assert not answer.startswith(b"HTTP/1.1 200")
    async with httpx.AsyncClient(base_url=server_url) as client:
        asked = {"sha256": [sha256(first), sha256(second)]}

        def missing() -> Any:
            return httpx.post(f"{server_url}{API}/missing", json=asked).json()["missing"]

        await asyncio.to_thread(eventually, lambda: missing() == [sha256(second)])
        assert (await client.post(f"{API}/chunks", content=frames_of([second]))).status_code == 200
        assert await asyncio.to_thread(missing) == []


async def test_many_uploads_at_once_wait_for_one_another(http: httpx.AsyncClient) -> None:
    folder = unique("many")
    bodies = {f"{folder}/{number}": fresh(1_500_000) for number in range(20)}
    await asyncio.gather(*(put(http, path, body) for path, body in bodies.items()))
    answers = await asyncio.gather(*(http.get(f"{FILES}/{path}") for path in bodies))
    assert [answer.content for answer in answers] == list(bodies.values())


async def test_a_body_without_end_is_413(http: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'{"sha256": ["'
        while sent < 2 * MAX_BATCH_BYTES:
            sent += MIB
            yield b"0" * MIB

    response = await http.post(f"{API}/missing", content=endless(), headers={"Content-Type": "application/json"})
    expect_error(response, 413, "BAD_REQUEST", "more than")
    assert sent <= MAX_BATCH_BYTES + MIB
