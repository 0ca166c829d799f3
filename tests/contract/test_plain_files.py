"""A store from before files were entries is taken over as it is."""

from __future__ import annotations

import os
from pathlib import Path

from mlplat.artifacts.store import ArtifactStore
from mlplat.artifacts.upgrade import adopt_plain_files

FILES = {
    "0/run/artifacts/empty": b"",
    "0/run/artifacts/small ü.txt": b"text",
    "0/run/artifacts/sub/large.bin": os.urandom(3_000_000),
    "pipelines/run/logs/000001.log": b"a line\n" * 10_000,
}


def test_plain_files_become_entries_once(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}")
    for path, body in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(body)
    digest = store.put_blob(b"a blob of then")
    store.write("0/run/artifacts/new", [b"written before it was cut short"])
    assert adopt_plain_files(store) == len(FILES)
    for path, body in FILES.items():
        assert b"".join(store.read(path)) == body
    assert [(file.path, file.size) for file in store.files("0/run/artifacts")] == [
        ("empty", 0), ("new", 31), ("small ü.txt", 4), ("sub/large.bin", 3_000_000),
    ]  # fmt: skip
    assert store.get_blob(digest) == b"a blob of then"
    assert adopt_plain_files(store) == 0


def test_what_is_damaged_later_is_not_taken_for_a_plain_file(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}")
    assert adopt_plain_files(store) == 0
    (tmp_path / "1").mkdir()
    (tmp_path / "1/file").write_bytes(b"no entry")
    assert adopt_plain_files(store) == 0
    assert (tmp_path / "1/file").read_bytes() == b"no entry"
