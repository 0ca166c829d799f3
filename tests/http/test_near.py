"""Uploads and downloads of processes that have the platform's folder, too: chunks do not go over the wire."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.concurrency import run_in_threadpool

from mlplat.artifacts.digests import sha256
from mlplat.artifacts.layout import BLOBS, PLACE_KEY
from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import Corrupted, Overloaded, StorageFull, Unavailable
from mlplat.sdk import near
from mlplat.sdk.client import ARTIFACTS
from mlplat.sdk.transfer import download, upload
from tests.databases import Databases
from tests.http.conftest import Stack, open_stack
from tests.http.serving import served
from tests.http.test_transfer import Watched

BODY = random.Random(23).randbytes(20_000_000)
TEXT = b"epoch 17 loss 0.123 accuracy 0.987\n" * 200_000


class Place:
    """A platform and a client beside it."""

    def __init__(self, stack: Stack, url: str, folder: Path) -> None:
        self.stack = stack
        self.store = ArtifactStore(f"file://{stack.artifact_folder}")
        self.client = Watched(url)
        self.file, self.copy = folder / "file", folder / "copy"

    async def up(self, path: str, body: bytes = BODY) -> str:
        """Uploads."""
        self.file.write_bytes(body)
        return await run_in_threadpool(upload, self.client, path, self.file)

    async def down(self, path: str) -> bytes:
        """Downloads."""
        await run_in_threadpool(download, self.client, path, self.copy)
        return self.copy.read_bytes()

    async def kept(self, path: str) -> bytes:
        """What anybody else gets."""
        return await run_in_threadpool(self.client.get_bytes, f"{ARTIFACTS}/{path}")


@asynccontextmanager
async def _place(databases: Databases, folder: Path, *, prepared: bool = True) -> AsyncIterator[Place]:
    (folder / "client").mkdir()
    async with open_stack(databases, folder / "store") as stack:
        if prepared:
            stack.services.artifacts.prepare()
        async with served(stack.app) as url:
            yield Place(stack, url, folder / "client")


@pytest.fixture
async def place(databases: Databases, tmp_path: Path) -> AsyncIterator[Place]:
    async with _place(databases, tmp_path) as place:
        yield place


@pytest.mark.parametrize("body", [BODY, TEXT], ids=["noise", "text"])
async def test_chunks_go_by_way_of_the_folder(place: Place, body: bytes) -> None:
    assert await place.up("run/a b/ü.bin", body) == sha256(body)
    assert await place.kept("run/a b/ü.bin") == body
    assert await place.down("run/a b/ü.bin") == body
    assert (place.client.sent_bytes, place.client.fetched_bytes, place.client.asked) == (0, 0, 0)
    stored = sum(info.size for info in place.store.objects.walk(BLOBS))
    assert stored <= len(body) + 1_000_000
    assert (stored < len(body) / 2) == (body is TEXT), "packed where that pays, as on any way"
    await place.up("run/again", body)
    assert sum(info.size for info in place.store.objects.walk(BLOBS)) == stored


async def test_small_files_go_over_the_wire(place: Place) -> None:
    await place.up("run/small", b"small")
    assert await place.down("run/small") == b"small"
    assert place.client.sent_bytes == 5


@pytest.mark.parametrize("why", ["not prepared", "another folder", "gone", "somebody else's"])
async def test_who_does_not_have_the_folder_sends_everything(
    databases: Databases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    async with _place(databases, tmp_path, prepared=why != "not prepared") as place:
        if why == "another folder":
            told = await run_in_threadpool(place.client.chunking)
            assert told.folder is not None
            monkeypatch.setattr(place.client, "_chunking", told._replace(folder=(told.folder[0], "0" * 32)))
        elif why == "gone":
            await run_in_threadpool(place.client.chunking)
            place.store.objects.delete(PLACE_KEY)
        elif why == "somebody else's":
            monkeypatch.setattr(os, "geteuid", lambda: 12_345)
        await place.up("run/file")
        assert await place.down("run/file") == BODY
        assert place.client.sent_bytes >= len(BODY)
        assert place.client.fetched_bytes == len(BODY)


async def test_a_platform_that_moved_gets_everything_by_wire(place: Place, tmp_path: Path) -> None:
    """Another folder, with another text, is what the platform has since the client asked."""
    other = ArtifactStore(f"file://{tmp_path / 'old'}")
    other.prepare()
    told = await run_in_threadpool(place.client.chunking)
    place.client._chunking = told._replace(folder=other.place())
    await place.up("run/file")
    assert await place.kept("run/file") == BODY
    assert place.client.sent_bytes >= len(BODY)


async def test_a_folder_that_cannot_be_written_is_gone_around(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any) -> None:
        raise Unavailable("permission denied")

    monkeypatch.setattr("mlplat.artifacts.blobs.Blobs.put", refuse)
    await place.up("run/file")
    assert await place.kept("run/file") == BODY
    assert place.client.sent_bytes >= len(BODY)


async def test_a_full_disk_is_what_the_platform_would_say(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any) -> None:
        raise StorageFull("no room")

    monkeypatch.setattr("mlplat.artifacts.blobs.Blobs.put", refuse)
    with pytest.raises(Overloaded, match="no room"):
        await place.up("run/file")
    assert not place.store.has("run/file")


async def test_damage_is_told_by_the_platform(place: Place) -> None:
    await place.up("run/file")
    victim = next(iter(place.store.objects.walk(BLOBS)))
    damaged = Path(place.stack.artifact_folder, victim.key)
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    with pytest.raises((Corrupted, Unavailable)):
        await place.down("run/file")
    assert not place.copy.exists()


def test_nothing_is_made_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert near.open_near(str(tmp_path / "nowhere"), "x") is None
    assert not (tmp_path / "nowhere").exists()
