"""Disks that fill up: what was acknowledged stays, reads go on, and service is back once there is room.

Each fault prints a line: fault → what fired → acknowledged, lost, twice, longest gap.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import mlplat
from mlplat.artifacts.frames import Frame, encode_frame
from mlplat.artifacts.model import proxied_path
from mlplat.sdk.client import API, ARTIFACTS, Client
from mlplat.sdk.process import this_process
from mlplat.sdk.transfer import NATIVE, download, upload
from tests.conftest import short_folder
from tests.faults import full_disks as faults
from tests.faults.disks import MIB, SmallDisk, small_disk
from tests.faults.rounds import strike
from tests.faults.stage import Disks
from tests.platform import Platform
from tests.platforms import Platforms

POSTGRES_BYTES, METRICS_BYTES, ARTIFACTS_BYTES = 640 * MIB, 256 * MIB, 96 * MIB
FOLDER = "1/run/artifacts"


@dataclass(frozen=True)
class Cramped:
    """A platform on small disks."""

    platform: Platform
    disks: Disks


@pytest.fixture(scope="module")
def cramped(platforms: Platforms) -> Iterator[Cramped]:
    """The module's platform."""
    with (
        short_folder() as folder,
        small_disk(folder / "postgres" / "data", POSTGRES_BYTES) as postgres,
        small_disk(folder / "chdb", METRICS_BYTES) as metrics,
        small_disk(folder / "files", ARTIFACTS_BYTES) as artifacts,
    ):
        # Below the disk's own folder: the store takes all files of its folder for artifacts.
        platform = Platform(folder, extra={"MLPLAT_ARTIFACTS_URL": f"file://{artifacts.folder}/store"})
        platforms.run(platform)
        yield Cramped(platform, Disks(postgres, metrics, artifacts))
        platforms.stop()


def test_full_disks_lose_nothing(cramped: Cramped, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sequence = [faults.postgres_disk_fills_up, faults.metrics_disk_full, faults.postgres_disk_full_at_once]
    strike(cramped.platform, sequence, tmp_path, capsys, disks=cramped.disks)


@pytest.fixture
def sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which the SDK of this process keeps what the platform does not take."""
    monkeypatch.setenv("MLPLAT_SPOOL_DIR", str(tmp_path / "spool"))
    monkeypatch.setenv("MLPLAT_CAPTURE", "false")
    yield tmp_path / "spool"
    this_process().close()


def test_a_full_disk_takes_no_artifact_and_loses_none(
    cramped: Cramped, sdk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, client = cramped.disks.artifacts, Client(cramped.platform.url)
    kept, large = tmp_path / "kept", tmp_path / "large"
    kept.write_bytes(os.urandom(5 * MIB))
    large.write_bytes(os.urandom(20 * MIB))
    upload(client, f"{FOLDER}/kept", kept)
    upload(client, f"{FOLDER}/large", large)
    before = client.get(ARTIFACTS, path=FOLDER)
    run = mlplat.start_run("full-disk", url=cramped.platform.url)
    run.flush()
    disk.fill(leave_bytes=2 * MIB)
    try:
        refused = _refused(cramped, os.urandom(8 * MIB))
        disk.fill()
        assert _refused(cramped, b"small") == refused
        assert client.get(ARTIFACTS, path=FOLDER) == before, "nothing partial can be seen"
        assert [path for path in (disk.folder / "store" / ".uploads").iterdir() if path.is_file()] == [], (
            "nothing half written is left"
        )
        assert client.get(f"{API}/runs/get", run_id=run.run_id)["run"]["info"]["status"] == "RUNNING"
        _expect(client, f"{FOLDER}/kept", kept)
        _expect(client, f"{FOLDER}/large", large)
        run.log_artifact(kept, "later")
        assert [
            path.read_bytes() == kept.read_bytes() for path in sdk.rglob("*") if path.stat().st_size == 5 * MIB
        ] == [True]
        client.delete(f"{ARTIFACTS}/{FOLDER}/large")
        # What is condemned has to be written down before anything goes: that takes a little room.
        disk.free()
        disk.fill(leave_bytes=MIB)
        freed = _collect_all(client, disk)
        assert freed > 20 * MIB
        run.log_artifact(tmp_path / "kept", "now")
    finally:
        disk.free()
    run.flush()
    assert run.finish().delivered
    root = proxied_path(run.artifact_uri)
    for path in (f"{FOLDER}/kept", f"{root}/later/kept", f"{root}/now/kept"):
        _expect(client, path, kept)
    assert "0 damaged" in cramped.platform.mlplat("artifacts", "verify")
    with capsys.disabled():
        print(f"\nartifact disk full → 507 → {freed / MIB:.0f} MiB freed by a collection, nothing lost")


def _refused(cramped: Cramped, body: bytes) -> str:
    """How the platform refuses a file by every way that it could come."""
    digest = hashlib.sha256(body).hexdigest()
    said = set[str]()
    with httpx.Client(base_url=cramped.platform.url, timeout=60, trust_env=False) as http:
        begun = http.post("/api/2.0/mlflow-artifacts/mpu/create/1/run", json={"path": "parts", "num_parts": 1})
        ways = {
            "PUT": ("PUT", f"{ARTIFACTS}/{FOLDER}/new", body),
            "blob": ("POST", "/api/v1/blobs", body),
            "frame": ("POST", f"{NATIVE}/chunks", b"".join(map(bytes, encode_frame(Frame(digest, len(body), body))))),
        }
        if begun.is_success:
            ways["part"] = ("PUT", begun.json()["credentials"][0]["url"], body)
        for way, (method, path, content) in ways.items():
            answer = http.request(method, path, content=content)
            assert answer.status_code == 507, f"{way}: {answer.text}"
            assert answer.json()["error_code"] == "RESOURCE_EXHAUSTED", way
            said.add(answer.json()["message"])
        assert http.get(f"{ARTIFACTS}/{FOLDER}/new").status_code == 404
    [message] = said
    assert message.startswith("no room for artifacts: the disk of ")
    assert "Free some, or delete and purge runs" in message
    return message


def _expect(client: Client, path: str, source: Path) -> None:
    copy = source.with_name(f"{source.name}-{uuid.uuid4().hex}")
    download(client, path, copy)
    assert copy.read_bytes() == source.read_bytes()
    copy.unlink()


def _collect_all(client: Client, disk: SmallDisk) -> int:
    """Collects as if two days went by; the bytes that are free afterwards."""
    for _ in range(2):
        for path in disk.folder.rglob("*"):
            if path.is_file() and ".blobs" in path.parts:
                os.utime(path, (0, 0))
        assert client.post("/api/v1/storage/collections", {})["report"]["damaged"] == []
        condemned = disk.folder / "store" / ".collector" / "condemned.json"
        since = dict.fromkeys(json.loads(condemned.read_bytes())["keys"], 0.0)
        # In place: there is room for nothing more.
        condemned.write_text(json.dumps({"keys": since}))
    return disk.free_bytes
