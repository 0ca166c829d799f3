"""Manifests of folders: what counts as a change, on a disk and in a bucket."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mlplat.artifacts.manifest import Difference, Frozen, differences, freeze, stamp_of
from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import Corrupted
from mlplat.registry.frozen import MAX_SHOWN, FrozenFiles, told
from mlplat.registry.model import ModelVersion
from mlplat.registry.semver import SemanticVersion


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(f"file://{tmp_path}")
    for name in ("MLmodel", "data/model.pkl", "data/ünïcode %.txt"):
        store.write(f"1/models/m/{name}", [name.encode()])
    store.write("1/models/m/mlplat/console/1", [b"written later, too"])
    return store


def frozen(store: ArtifactStore) -> Frozen:
    found = freeze(store, "1/models/m")
    assert found is not None
    return found


def test_the_same_files_have_the_same_manifest(store: ArtifactStore) -> None:
    first = frozen(store)
    for name in ("MLmodel", "data/model.pkl", "data/ünïcode %.txt"):
        store.write(f"2/other/{name}", [name.encode()])
    second = freeze(store, "2/other")
    assert second is not None
    assert second.digest == first.digest
    assert second.stamp != first.stamp
    assert differences(store, "2/other", first.digest) == []


def test_every_change_of_a_file_is_found(store: ArtifactStore, tmp_path: Path) -> None:
    was = frozen(store)
    file = tmp_path / "1/models/m/data/model.pkl"
    before = file.stat()
    file.write_bytes(file.read_bytes()[:-1] + b"X")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert stamp_of(store, "1/models/m") != was.stamp
    [difference] = differences(store, "1/models/m", was.digest)
    assert difference.path == "data/model.pkl"
    assert "another SHA-256" in difference.what
    store.write("1/models/m/data/model.pkl", [b"data/model.pkX"])
    [difference] = differences(store, "1/models/m", was.digest)
    assert difference.what.startswith("has the SHA-256 ")
    store.write("1/models/m/data/model.pkl", [b"longer than it was"])
    assert differences(store, "1/models/m", was.digest) == [Difference("data/model.pkl", "has 18 bytes and had 14")]
    store.delete("1/models/m/data/model.pkl")
    assert differences(store, "1/models/m", was.digest) == [Difference("data/model.pkl", "is gone")]


def test_the_same_bytes_written_again_are_no_change_and_neither_are_new_files(store: ArtifactStore) -> None:
    was = frozen(store)
    store.write("1/models/m/MLmodel", [b"MLmodel"])
    store.write("1/models/m/new", [b"x"])
    store.write("1/models/m/mlplat/console/1", [b"other"])
    assert stamp_of(store, "1/models/m") != was.stamp
    assert differences(store, "1/models/m", was.digest) == []


def test_what_the_platform_writes_itself_is_none_of_the_files(store: ArtifactStore) -> None:
    was = frozen(store)
    store.write("1/models/m/mlplat/console/1", [b"other"])
    assert stamp_of(store, "1/models/m") == was.stamp


def test_a_folder_without_files_is_not_frozen(store: ArtifactStore) -> None:
    assert freeze(store, "1/models/nothing") is None
    assert freeze(store, "1/models/m/MLmodel") is None


def test_a_manifest_that_is_corrupt_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    was = frozen(store)
    [blob] = (tmp_path / ".blobs").rglob(was.digest)
    blob.write_bytes(blob.read_bytes().replace(b"MLmodel", b"MLmodeX"))
    with pytest.raises(Corrupted, match="corrupt"):
        differences(store, "1/models/m", was.digest)


def test_many_differences_are_told_in_few_words() -> None:
    version = ModelVersion(
        "m", 1, "", "", "", None, None, "", datetime.now(UTC), datetime.now(UTC), SemanticVersion(1, 0, 0), "", ""
    )
    found = [Difference(str(number), "is gone") for number in range(MAX_SHOWN + 2)]
    assert told(version, found).startswith("Model Version (name=m, version=1) is not what was registered: 0 is gone; ")
    assert told(version, found).endswith("4 is gone; and 2 more")


async def test_files_that_are_elsewhere_are_not_frozen(store: ArtifactStore) -> None:
    files = FrozenFiles(store)
    for uri in ("s3://bucket/m", "mlflow-artifacts:/../x", "mlflow-artifacts:/", "file:///etc"):
        assert await files.freeze(uri) is None
