"""Scrubbing a store that is in use meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

from mlplat.artifacts.store import ArtifactStore
from mlplat.artifacts.verify import verify, verify_folder

BODY = os.urandom(100_000)


def test_a_damaged_blob_is_gone_before_it_is_told_so_that_what_heals_it_stays(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}")
    [chunk] = store.write("1/file", [BODY]).chunks
    blob = tmp_path / ".blobs" / chunk.sha256[:2] / f"{chunk.sha256}{chunk.suffix}"
    blob.write_bytes(b"?")
    found = verify(store, repair=True)
    assert next(found).problem
    store.write("1/again", [BODY])
    assert [each.problem for each in found] == ["blob " + chunk.sha256 + " is corrupt"] * 2
    assert b"".join(store.read("1/file")) == b"".join(store.read("1/again")) == BODY


def test_a_file_that_is_deleted_while_its_folder_is_read_is_no_problem(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}")
    for name in ("a", "b"):
        store.write(f"1/{name}", [BODY])
    found = verify_folder(store, "1")
    assert next(found).size == len(BODY)
    store.delete("1/b")
    assert [(each.name, each.size, each.problem) for each in found] == [("1/b", 0, "")]
