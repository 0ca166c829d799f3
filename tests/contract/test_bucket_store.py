"""The artifact store in a bucket: what differs from a folder, and that the rest does not."""

from __future__ import annotations

import hashlib
import os
import time

import httpx
import pytest

from mlplat.artifacts.blobs import Blobs
from mlplat.artifacts.bucket import Bucket
from mlplat.artifacts.chunking import MAX_CHUNK_BYTES
from mlplat.artifacts.collector import SCRATCH_S, Collected, Collector
from mlplat.artifacts.digests import s3_checksum
from mlplat.artifacts.direct import DirectTransfers
from mlplat.artifacts.parts import PartUploads
from mlplat.artifacts.store import ArtifactStore, MissingChunks
from mlplat.errors import Corrupted, InvalidInput, NotFound, Unavailable
from tests.s3 import S3Server

GRACE_S = 3_600.0
LARGE = os.urandom(12_000_000)


@pytest.fixture
def store(s3_url: str) -> ArtifactStore:
    store = ArtifactStore(f"{s3_url}/artifacts")
    store.blobs = Blobs(store.objects, max_look_age_s=0)
    return store


def _read(store: ArtifactStore, path: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join(store.read(path, start, end))


def _blobs(store: ArtifactStore) -> int:
    return len(list(store.objects.walk(".blobs")))


def test_files_are_kept_as_in_a_folder(store: ArtifactStore) -> None:
    files = {"1/run/a": b"", "1/run/ü %41 #?.txt": b"small", "1/run/sub/large": LARGE, "1/run/same": LARGE}
    for path, body in files.items():
        assert store.write(path, [body[:1_000_000], body[1_000_000:]]).size == len(body)
    for path, body in files.items():
        assert _read(store, path) == body
    assert _read(store, "1/run/same", 5_000_000, 5_000_010) == LARGE[5_000_000:5_000_010]
    assert _blobs(store) == len(store.entry("1/run/same").chunks) > 1
    assert [(entry.path, entry.is_dir, entry.size) for entry in store.list("1/run")] == [
        ("a", False, 0), ("same", False, len(LARGE)), ("sub", True, None), ("ü %41 #?.txt", False, 5),
    ]  # fmt: skip
    assert store.usage("1") == (4, 2 * len(LARGE) + 5)
    store.delete("1/run/sub")
    assert [file.path for file in store.files("1/run")] == ["a", "same", "ü %41 #?.txt"]
    with pytest.raises(NotFound):
        store.entry("1/run/sub/large")


def test_a_damaged_or_lost_object_is_named(store: ArtifactStore) -> None:
    entry = store.write("1/run/large", [LARGE])
    key = f".blobs/{entry.chunks[0].sha256[:2]}/{entry.chunks[0].sha256}"
    store.objects.write(key, b"?" * entry.chunks[0].size)
    with pytest.raises(Corrupted, match="1/run/large"):
        _read(store, "1/run/large")
    store.objects.delete(key)
    with pytest.raises(Corrupted, match="is gone"):
        _read(store, "1/run/large")


def test_collections_free_what_nothing_refers_to(store: ArtifactStore) -> None:
    later = 0.0

    def collect() -> Collected:
        return Collector(store.objects, lambda: [kept], GRACE_S, lambda: time.time() + later).collect()

    kept = store.put_blob(b"kept")
    store.write("1/run/gone", [LARGE])
    store.write("1/run/stays", [LARGE[:3_000_000]])
    store.delete("1/run/gone")
    uploads = PartUploads(store)
    uploads.put(uploads.begin(), 1, [b"x" * 100_000])
    assert collect().condemned == 0
    later = GRACE_S + 1
    condemned = collect().condemned
    assert condemned > 0
    later = 2 * GRACE_S + 2
    assert collect().freed == condemned
    later = SCRATCH_S + 1
    assert collect().scratch == 2
    assert _read(store, "1/run/stays") == LARGE[:3_000_000]
    assert store.get_blob(kept) == b"kept"


def test_chunks_straight_to_the_bucket_become_blobs_when_their_bytes_are_right(store: ArtifactStore) -> None:
    direct = DirectTransfers(store, allowed=True)
    body, other = LARGE[:2_000_000], LARGE[2_000_000:4_000_000]
    digest = hashlib.sha256(body).hexdigest()
    with pytest.raises(MissingChunks):
        store.assemble("1/run/file", len(body), digest, [(digest, len(body))])
    urls = direct.urls_to_write([digest])
    headers = s3_checksum(digest)
    assert httpx.put(urls[digest], content=body).status_code == 403, "the checksum is part of what was signed"
    assert httpx.put(urls[digest], content=other, headers=headers).status_code in {200, 400}
    with pytest.raises((InvalidInput, NotFound)):
        direct.accept([(digest, len(body))])
    assert store.missing([digest]) == [digest]
    assert httpx.put(urls[digest], content=body, headers=headers).status_code == 200
    assert store.missing([digest]) == [digest], "not before it is accepted"
    direct.accept([(digest, len(body))])
    entry = store.assemble("1/run/file", len(body), digest, [(digest, len(body))])
    [url] = direct.urls_to_read(entry)
    assert httpx.get(url).content == body == _read(store, "1/run/file")
    assert list(store.objects.walk(".uploads")) == []
    assert not DirectTransfers(store, allowed=False).are_possible


def test_a_chunk_that_two_send_at_once_is_accepted_of_both(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(store.objects, Bucket)
    body, real = LARGE[:1_000_000], store.objects.checked_size
    digest = hashlib.sha256(body).hexdigest()
    [url] = DirectTransfers(store, allowed=True).urls_to_write([digest]).values()
    assert httpx.put(url, content=body, headers=s3_checksum(digest)).status_code == 200

    def looked(key: str, sha256: str) -> int | None:
        """The other one is accepted between the look and what follows."""
        found = real(key, sha256)
        monkeypatch.undo()
        DirectTransfers(store, allowed=True).accept([(digest, len(body))])
        return found or len(body)

    monkeypatch.setattr(store.objects, "checked_size", looked)
    DirectTransfers(store, allowed=True).accept([(digest, len(body))])
    assert store.missing([digest]) == []


@pytest.mark.parametrize("size", [-1, 0, MAX_CHUNK_BYTES + 1])
def test_what_is_no_chunk_is_not_accepted(store: ArtifactStore, size: int) -> None:
    with pytest.raises(InvalidInput, match="chunks have at most"):
        DirectTransfers(store, allowed=True).accept([("0" * 64, size)])


def test_a_server_that_is_away_or_refuses_is_unavailable(
    store: ArtifactStore, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(store.objects, Bucket)
    with pytest.raises(Unavailable, match="no-such-bucket"):
        ArtifactStore("s3://no-such-bucket/x").write("1/file", [b"x"])
    store.write("1/file", [b"x"])
    s3_server.kill_gateway()
    try:
        with pytest.raises(Unavailable):
            store.write("1/file", [b"y"])
    finally:
        s3_server.start()
    assert _read(store, "1/file") == b"x"
