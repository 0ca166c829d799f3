"""Paths made to lead elsewhere, to every route that takes one, as they stand on the wire: clients would tidy them up.

Each is refused or found nowhere, and a file beside the store, which some of them name, is neither read nor changed.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import unicodedata
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from tests.contract.chdb import unique
from tests.http.conftest import Stack
from tests.http.serving import served

PROXY = "/api/2.0/mlflow-artifacts/artifacts"
MULTIPART = "/api/2.0/mlflow-artifacts/mpu"
NATIVE = "/api/v1/artifacts/files"
CANARY = b"nobody may read this"
EMPTY = json.dumps(
    {"size": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "chunks": []}
)
JOIN = json.dumps({"path": "/home/me/file", "upload_id": "0" * 32, "parts": []})
BEGIN = json.dumps({"path": "/home/me/file", "num_parts": 1})

#: Method, target and body; ``PATH`` is where the path comes, as it is, and ``VALUE`` where it comes percent-encoded.
ROUTES = {
    "proxy, GET": ("GET", f"{PROXY}/PATH", ""),
    "proxy, HEAD": ("HEAD", f"{PROXY}/PATH", ""),
    "proxy, PUT": ("PUT", f"{PROXY}/PATH", "changed"),
    "proxy, DELETE": ("DELETE", f"{PROXY}/PATH", ""),
    "proxy, listing": ("GET", f"{PROXY}?path=VALUE", ""),
    "chunks of a file": ("GET", f"{NATIVE}/PATH", ""),
    "a file of chunks": ("PUT", f"{NATIVE}/PATH", EMPTY),
    "parts, create": ("POST", f"{MULTIPART}/create/PATH", BEGIN),
    "parts, complete": ("POST", f"{MULTIPART}/complete/PATH", JOIN),
    "parts, abort": ("POST", f"{MULTIPART}/abort/PATH", json.dumps({"path": "x", "upload_id": "none"})),
    "presigned": ("GET", "/api/2.0/mlflow-artifacts/presigned/PATH", ""),
    "file of a run": ("GET", "/get-artifact?run_id=RUN&path=VALUE", ""),
    "files of a run": ("GET", "/api/2.0/mlflow/artifacts/list?run_id=RUN&path=VALUE", ""),
    "upload": ("POST", "/api/2.0/mlflow/upload-artifact?run_uuid=RUN&path=VALUE", "changed"),
    "file of a version": ("GET", "/model-versions/get-artifact?name=MODEL&version=1&path=VALUE", ""),
    "file of a logged model": (
        "GET", "/api/2.0/mlflow/logged-models/LOGGED/artifacts/files?artifact_file_path=VALUE", "",
    ),
    "files of a logged model": (
        "GET", "/api/2.0/mlflow/logged-models/LOGGED/artifacts/directories?artifact_directory_path=VALUE", "",
    ),
    "scrubbing": ("GET", "/api/v1/storage/verify?path=VALUE", ""),
}  # fmt: skip

#: As they stand in the URL. From a run's folder, the canary is four levels up.
PATHS = {
    "4 kB": "x" * 4_096,
    "4 kB of letters with two bytes": quote("ü" * 2_048),
    "1,000 levels": "/".join("a" * 1_000),
    "up, plain": "../canary",
    "up from a folder": "a/../../canary",
    "up from a run": "../../../../canary",
    "up, encoded": "%2e%2e%2fcanary",
    "up from a run, encoded": "%2E%2E/%2E%2E/%2E%2E/%2E%2E/canary",
    "up, encoded twice": "%252e%252e%252fcanary",
    "up from a run, encoded twice": "%252e%252e/%252e%252e/%252e%252e/%252e%252e/canary",
    "up, encoded thrice": "%25252e%25252e%25252fcanary",
    "up, half encoded": ".%2e/canary",
    "up, with backslashes": "..%5ccanary",
    "up, with backslashes, encoded twice": "..%255c..%255ccanary",
    "absolute": "FOLDER/canary",
    "absolute, encoded": "%2Fetc%2Fpasswd",
    "absolute, encoded twice": "%252Fetc%252Fpasswd",
    "a drive": "C:/canary",
    "a NUL": "canary%00.txt",
    "a NUL, encoded twice": "canary%2500.txt",
    "a line break": "a%0d%0ab",
}  # fmt: skip

_WORD = re.compile("[A-Z]+")
RESERVED = (".blobs/aa", ".uploads/x", ".collector/condemned.json", "%2eblobs/aa", "./.blobs/aa")
OF_THE_STORE = [
    name
    for name, (_method, target, _body) in ROUTES.items()
    if not {"RUN", "MODEL", "LOGGED"} & set(_WORD.findall(target))
]


@dataclass(frozen=True)
class Target:
    """A served platform with a canary beside its store, and what belongs to the run, version and logged model."""

    url: str
    names: dict[str, str]
    canary: Path

    def send(self, route: str, path: str) -> tuple[int, bytes]:
        """Status and everything else of the answer."""
        method, target, body = ROUTES[route]
        path = path.replace("FOLDER", str(self.canary.parent))
        # In a query, an encoded path is a value that is encoded once, too: both have the same to decode.
        target = target.replace("PATH", path).replace("VALUE", path)
        for name, value in self.names.items():
            target = target.replace(name, value)
        return said(self.url, method, target, body.encode())


def said(url: str, method: str, target: str, body: bytes) -> tuple[int, bytes]:
    """Status and everything else of the answer to a request that is written as it is."""
    host, _colon, port = url.removeprefix("http://").partition(":")
    headers = f"Host: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    head = f"{method} {target} HTTP/1.1\r\n{headers}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + body)
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer.split(b" ", 2)[1]), answer


@pytest.fixture
async def target(stack: Stack) -> AsyncIterator[Target]:
    canary = stack.artifact_folder.parent / "canary"
    canary.write_bytes(CANARY)
    async with served(stack.app) as url, httpx.AsyncClient(base_url=url) as http:

        async def made(path: str, **body: object) -> dict[str, dict[str, dict[str, str]]]:
            answer = await http.post(f"/api/2.0/mlflow/{path}", json=body)
            assert answer.status_code == 200, answer.text
            found: dict[str, dict[str, dict[str, str]]] = answer.json()
            return found

        run = (await made("runs/create", experiment_id="0", start_time=1))["run"]["info"]
        await http.put(f"{PROXY}/0/{run['run_id']}/artifacts/model/MLmodel", content=b"flavors: {}")
        model = unique("model")
        await made("registered-models/create", name=model)
        await made("model-versions/create", name=model, source=f"runs:/{run['run_id']}/model", run_id=run["run_id"])
        logged = (await made("logged-models", experiment_id="0", name="logged"))["model"]["info"]
        names = {"RUN": run["run_id"], "MODEL": model, "LOGGED": logged["model_id"]}
        yield Target(url, names, canary)
    canary.unlink()


def outside(target: Target) -> list[tuple[str, int]]:
    """What lies beside the store, with its size."""
    return sorted((path.name, path.stat().st_size) for path in target.canary.parent.iterdir() if path.is_file())


@pytest.mark.parametrize("route", ROUTES)
async def test_a_path_that_could_lead_elsewhere_leads_nowhere(target: Target, route: str) -> None:
    before = outside(target)
    wrong = dict[str, int]()
    for name, path in PATHS.items():
        status, answer = await asyncio.to_thread(target.send, route, path)
        assert CANARY not in answer, name
        assert b"root:" not in answer, name
        if status not in {400, 404}:
            wrong[name] = status
    assert wrong == {}
    assert target.canary.read_bytes() == CANARY
    assert outside(target) == before


@pytest.mark.parametrize("route", OF_THE_STORE)
async def test_what_the_store_keeps_for_itself_is_out_of_reach(stack: Stack, target: Target, route: str) -> None:
    kept = stack.artifact_folder / ".blobs" / "aa"
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "file").write_bytes(CANARY)
    for path in (*RESERVED, ".blobs/aa/file"):
        status, answer = await asyncio.to_thread(target.send, route, path)
        assert status in {400, 404}, (path, answer)
        assert CANARY not in answer, path
    assert (kept / "file").read_bytes() == CANARY
    (kept / "file").unlink()


async def test_names_that_look_alike_are_kept_apart(target: Target) -> None:
    composed, decomposed = (unicodedata.normalize(form, "modèle-ångström") for form in ("NFC", "NFD"))
    assert composed != decomposed
    folder = f"0/{target.names['RUN']}/artifacts/{unique('alike')}"
    async with httpx.AsyncClient(base_url=target.url) as http:
        for name in (composed, decomposed):
            answer = await http.put(f"{PROXY}/{quote(f'{folder}/{name}')}", content=name.encode())
            assert answer.status_code == 200, answer.text
        for name in (composed, decomposed):
            assert (await http.get(f"{PROXY}/{quote(f'{folder}/{name}')}")).content == name.encode()
            below = f"{folder}/{name}".split("/artifacts/")[1]
            query = {"run_id": target.names["RUN"], "path": below}
            assert (await http.get("/get-artifact", params=query)).content == name.encode()
            assert (await http.get(f"{NATIVE}/{quote(f'{folder}/{name}')}")).json()["size"] == len(name.encode())
        found = (await http.get(PROXY, params={"path": folder})).json()["files"]
        assert {each["path"] for each in found} == {composed, decomposed}
        await http.delete(f"{PROXY}/{quote(f'{folder}/{composed}')}")
        assert (await http.get(f"{PROXY}/{quote(f'{folder}/{decomposed}')}")).content == decomposed.encode()


@pytest.mark.parametrize("name", ["..", "/", "a/..", "C:\\x\\..", "%2e%2e", "%252e%252e", "a\0b", "x" * 4_096, ""])
@pytest.mark.parametrize("which", ["create", "complete"])
async def test_the_name_of_a_file_in_parts_leads_nowhere(target: Target, which: str, name: str) -> None:
    body = {"path": name, "num_parts": 1, "upload_id": "0" * 32, "parts": []}
    answer = await asyncio.to_thread(said, target.url, "POST", f"{MULTIPART}/{which}/0", json.dumps(body).encode())
    assert answer[0] == 400, answer[1]


async def test_a_hold_is_not_got_round_by_another_spelling(target: Target) -> None:
    async with httpx.AsyncClient(base_url=target.url) as http:
        made = await http.post("/api/2.0/mlflow/experiments/create", json={"name": unique("held")})
        experiment = made.json()["experiment_id"]
        begun = await http.post("/api/2.0/mlflow/runs/create", json={"experiment_id": experiment, "start_time": 1})
        run_id = begun.json()["run"]["info"]["run_id"]
        folder = f"{experiment}/{run_id}/artifacts"
        await http.put(f"{PROXY}/{folder}/held", content=b"as it was")
        answer = await http.put(f"/api/v1/storage/holds/run/{run_id}", json={"reason": "for a test"})
        assert answer.status_code == 200, answer.text
    same = (f"./{folder}/held", f"{experiment}/./{run_id}/artifacts/held", f"{experiment}//{run_id}/artifacts/held")
    for spelling in (f"{folder}/held", *same):
        for route in ("proxy, PUT", "proxy, DELETE", "a file of chunks"):
            status, answered = await asyncio.to_thread(target.send, route, spelling)
            assert status == 403, (route, spelling, answered)
    for above in (experiment, f"{experiment}/{run_id}", f"./{experiment}", f"{experiment}/", folder):
        status, answered = await asyncio.to_thread(target.send, "proxy, DELETE", above)
        assert status == 403, (above, answered)
    async with httpx.AsyncClient(base_url=target.url) as http:
        assert (await http.get(f"{PROXY}/{folder}/held")).content == b"as it was"
        await http.delete(f"/api/v1/storage/holds/run/{run_id}")
        assert (await http.delete(f"{PROXY}/{experiment}")).status_code == 200
