"""Scrubbing a store that is in use meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

from mlplat.artifacts.store import ArtifactStore
from mlplat.artifacts.verify import verify, verify_folder

BODY = os.urandom(100_000)


def test_a_repair_takes_no_blob_that_was_healed_before_it_was_told(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}")
    bodies = [BODY, BODY[::-1]]
    chunks = [store.write(f"1/{number}", [body]).chunks[0] for number, body in enumerate(bodies)]
    blobs = [tmp_path / ".blobs" / chunk.sha256[:2] / f"{chunk.sha256}{chunk.suffix}" for chunk in chunks]
    for blob in blobs:
        blob.write_bytes(b"?")
    found = verify(store, repair=True)
    assert next(found).problem
    deadline = time.monotonic() + 30
    while any(blob.exists() for blob in blobs):
        assert time.monotonic() < deadline
    for number, body in enumerate(bodies):
        store.write(f"2/{number}", [body])
    assert [bool(each.problem) for each in found] == [True] * 5, "as it was"
    for number, body in enumerate(bodies):
        assert b"".join(store.read(f"1/{number}")) == b"".join(store.read(f"2/{number}")) == body


def test_a_file_that_is_deleted_while_its_folder_is_read_is_no_problem(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}")
    for name in ("a", "b"):
        store.write(f"1/{name}", [BODY])
    found = verify_folder(store, "1")
    assert next(found).size == len(BODY)
    store.delete("1/b")
    assert [(each.name, each.size, each.problem) for each in found] == [("1/b", 0, "")]
