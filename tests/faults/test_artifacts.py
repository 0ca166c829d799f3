"""Artifacts in a bucket while S3, the gateway or the client fails: no torn file, nothing lost, orphans collected.

Each fault prints a line: fault → how often it fired → what became of the transfer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from mlplat.errors import NotFound
from mlplat.sdk.client import Client
from mlplat.sdk.transfer import download, upload
from tests.conftest import short_folder
from tests.faults.s3_faults import Fault, S3Faults
from tests.platform import Platform, eventually
from tests.platforms import Platforms
from tests.s3 import S3Server

SIZE = 24_000_000
PUT_BLOB = r"^PUT .*/\.blobs/"
GET_BLOB = r"^GET .*/\.blobs/"
_UPLOAD = """
import sys
from pathlib import Path
from mlplat.sdk.client import Client
from mlplat.sdk.transfer import upload
upload(Client(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), progress=lambda done, total: print(done, flush=True))
"""


@dataclass(frozen=True)
class Bucketed:
    """A platform whose artifacts are in a bucket, behind a proxy that fails requests."""

    platform: Platform
    server: S3Server
    faults: S3Faults
    bucket: str

    @property
    def client(self) -> Client:
        return Client(self.platform.url)

    def condemn(self, digests: list[str]) -> None:
        """Has blobs condemned long ago."""
        keys = {f".blobs/{digest[:2]}/{digest}": 0.0 for digest in digests}
        where = {"Bucket": self.bucket, "Key": "artifacts/.collector/condemned.json"}
        self.server.client().put_object(**where, Body=json.dumps({"keys": keys}).encode())

    def blobs(self) -> set[str]:
        """The digests of all blobs."""
        pages = self.server.client().get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=self.bucket, Prefix="artifacts/.blobs/")
        return {each["Key"].rpartition("/")[2].partition(".")[0] for page in found for each in page.get("Contents", ())}


@pytest.fixture(scope="module")
def s3_platform(s3_server: S3Server, platforms: Platforms) -> Iterator[Bucketed]:
    """The module's platform."""
    faults = S3Faults(s3_server.port)
    bucket = s3_server.new_bucket()
    with short_folder() as folder:
        extra = s3_server.environment_for(faults.url) | {"MLPLAT_ARTIFACTS_URL": f"s3://{bucket}/artifacts"}
        platform = Platform(folder, extra=extra)
        platforms.run(platform)
        yield Bucketed(platform, s3_server, faults, bucket)
        platforms.stop()
    faults.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file that nobody has stored before."""
    file = tmp_path / "source"
    file.write_bytes(os.urandom(SIZE))
    return file


STRIKES: dict[str, Callable[[S3Faults], Fault]] = {
    "503 SlowDown to five PUTs": lambda faults: faults.answer(PUT_BLOB, 503, times=5),
    "500 to three PUTs": lambda faults: faults.answer(PUT_BLOB, 500, times=3),
    "500 to three PUTs that were done": lambda faults: faults.answer(PUT_BLOB, 500, times=3, done=True),
    "reset in the middle of three PUTs": lambda faults: faults.break_request(PUT_BLOB, times=3),
    "reset before the answers to three PUTs": lambda faults: faults.break_answer(PUT_BLOB, times=3),
    "PUTs of 500 kB/s": lambda faults: faults.slow_down(PUT_BLOB, 500_000, times=3),
    "answers of 500 kB/s": lambda faults: faults.slow_down(GET_BLOB, 500_000, times=3),
    "reset in the middle of three GETs": lambda faults: faults.break_answer(GET_BLOB, times=3),
    "503 SlowDown to five GETs": lambda faults: faults.answer(GET_BLOB, 503, times=5),
}


@pytest.mark.parametrize("name", STRIKES)
def test_s3_fails_requests(s3_platform: Bucketed, source: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"faults/{source.parent.name}"
    fault = STRIKES[name](s3_platform.faults)
    try:
        upload(s3_platform.client, path, source)
        _expect(s3_platform, path, source)
        assert fault.fired > 0
    finally:
        s3_platform.faults.heal()
    _tell(capsys, name, fault.fired, "whole")


def test_s3_is_killed_in_the_middle(s3_platform: Bucketed, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"faults/{source.parent.name}"
    s3_platform.faults.slow_down(PUT_BLOB, 2_000_000)
    begun = threading.Event()
    problems = list[BaseException]()

    def send() -> None:
        try:
            upload(s3_platform.client, path, source, progress=lambda _done, _total: begun.set())
        except BaseException as error:
            problems.append(error)

    sending = threading.Thread(target=send)
    sending.start()
    try:
        assert begun.wait(60), problems
        s3_platform.server.kill_gateway()
        s3_platform.faults.heal()
    finally:
        s3_platform.server.start()
        s3_platform.faults.heal()
        sending.join()
    assert problems == []
    _expect(s3_platform, path, source)
    _tell(capsys, "kill -9 of the S3 server during an upload", 1, "whole")


def test_the_gateway_is_killed_in_the_middle(
    s3_platform: Bucketed, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"faults/{source.parent.name}"
    killed = list[int]()

    def kill_once(done: int, _total: int) -> None:
        if done and not killed:
            killed.extend(_kill_gateway(s3_platform.platform))

    upload(s3_platform.client, path, source, progress=kill_once)
    assert killed
    _expect(s3_platform, path, source)
    killed.clear()
    target = source.with_name("download")
    download(s3_platform.client, path, target, progress=kill_once)
    assert killed
    assert target.read_bytes() == source.read_bytes()
    _tell(capsys, "kill -9 of the gateway during an upload and a download", 2, "whole")


def test_the_client_is_killed_in_the_middle(
    s3_platform: Bucketed, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"faults/{source.parent.name}"
    s3_platform.faults.slow_down(PUT_BLOB, 2_000_000)
    code = [sys.executable, "-c", _UPLOAD, s3_platform.platform.url, path, str(source)]
    with subprocess.Popen(code, stdout=subprocess.PIPE, text=True, env=s3_platform.platform.environment) as victim:
        assert victim.stdout is not None
        assert int(victim.stdout.readline()) > 0
        victim.send_signal(signal.SIGKILL)
    s3_platform.faults.heal()
    with pytest.raises(NotFound):
        s3_platform.client.get(f"/api/v1/artifacts/files/{path}")
    client = s3_platform.client
    sent = list[int]()
    real = client.post_parts

    def counted(path: str, parts: Sequence[bytes], content_type: str) -> object:
        sent.append(sum(map(len, parts)))
        return real(path, parts, content_type)

    monkeypatch.setattr(client, "post_parts", counted)
    upload(client, path, source)
    assert sum(sent) < SIZE, "what had arrived was not sent again"
    _expect(s3_platform, path, source)
    _tell(capsys, "kill -9 of the client during an upload", 1, f"went on; {sum(sent) / SIZE:.0%} sent again")


def test_two_writers_of_the_same_bytes(s3_platform: Bucketed, source: Path) -> None:
    paths = [f"faults/{source.parent.name}-{number}" for number in range(4)]
    writers = [threading.Thread(target=upload, args=(s3_platform.client, path, source)) for path in paths]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for path in paths:
        _expect(s3_platform, path, source)


@pytest.mark.parametrize(
    ("when", "request_"),
    [
        ("looking at what refers to blobs", r"^GET .*/artifacts/faults/"),
        ("removing blobs", r"^DELETE .*/\.blobs/"),
        ("saying what is condemned", r"^PUT .*/condemned\.json"),
    ],
)
def test_the_gateway_is_killed_in_the_middle_of_a_collection(
    s3_platform: Bucketed, source: Path, when: str, request_: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"faults/{source.parent.name}"
    upload(s3_platform.client, path, source)
    needed = s3_platform.client.get(f"/api/v1/artifacts/files/{path}")["chunks"][0][0]
    orphans = [
        s3_platform.client.post_bytes("/api/v1/blobs", os.urandom(1_000), "application/octet-stream")["digest"]
        for _ in range(8)
    ]
    s3_platform.condemn([*orphans, needed])
    before = s3_platform.client.get("/api/v1/storage/collections")
    fault = s3_platform.faults.delay(request_, 300)
    try:
        collecting = threading.Thread(target=_collect, args=(s3_platform,))
        collecting.start()
        eventually(lambda: fault.fired, 60, when)
        assert _kill_gateway(s3_platform.platform)
    finally:
        s3_platform.faults.heal()
        collecting.join()
    report = eventually(lambda: _collect(s3_platform), 120, "another collection comes to its end")
    assert report["damaged"] == []
    assert not set(orphans) & s3_platform.blobs(), "what nothing refers to is gone"
    assert needed in s3_platform.blobs()
    _expect(s3_platform, path, source)
    made = s3_platform.client.get("/api/v1/storage/collections")
    assert [each["report"] is None for each in made[: len(made) - len(before)]].count(True) == 1
    _tell(capsys, f"kill -9 of the gateway that is {when}", fault.fired, "collected by the next one, nothing lost")


def test_at_the_end_nothing_is_damaged_and_nothing_half_done_is_left(s3_platform: Bucketed) -> None:
    report = s3_platform.client.post("/api/v1/storage/collections", {})["report"]
    assert report["damaged"] == []
    assert "0 damaged" in s3_platform.platform.mlplat("artifacts", "verify")
    client = s3_platform.server.client()
    assert not client.list_multipart_uploads(Bucket=s3_platform.bucket).get("Uploads")


def _expect(s3_platform: Bucketed, path: str, source: Path) -> None:
    target = source.with_name(f"{source.name}-copy")
    download(s3_platform.client, path, target)
    assert target.read_bytes() == source.read_bytes()
    target.unlink()


def _collect(s3_platform: Bucketed) -> Any:
    """The report of a collection; None when it did not come to its end."""
    url = f"{s3_platform.platform.url}/api/v1/storage/collections"
    with suppress(httpx.TransportError):
        answer = httpx.post(url, json={}, timeout=120, trust_env=False)
        return answer.json()["report"] if answer.is_success else None
    return None


def _kill_gateway(platform: Platform) -> list[int]:
    """Kills the replicas of the gateway; their pids."""
    replicas = [process for process in platform.processes() if "ServeReplica" in " ".join(process.cmdline())]
    for replica in replicas:
        replica.kill()
    psutil.wait_procs(replicas, timeout=10)
    return [replica.pid for replica in replicas]


def _tell(capsys: pytest.CaptureFixture[str], fault: str, fired: int, outcome: str) -> None:
    with capsys.disabled():
        print(f"\n{fault} → fired {fired} → {outcome}")
