"""Archives from strangers: nothing of them is used before names, kinds, sizes and digests are right."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplat.errors import AlreadyExists, InvalidInput, NotFound
from mlplat.sdk import archive_files
from mlplat.sdk.archive_files import open_archive
from mlplat.sdk.archive_writer import ArchiveWriter, writing
from mlplat.tracking.archive import (
    DATASETS,
    EXPERIMENT,
    INPUTS,
    MODEL_METRICS,
    MODEL_PARAMS,
    MODEL_TAGS,
    MODELS,
    PARAMS,
    RUN_MODELS,
    RUNS,
    TAGS,
    parse_experiment,
    parse_manifest,
)

FILES = {EXPERIMENT: b"{}", RUNS: b"r", PARAMS: b"p", TAGS: b"t", "artifacts/run1/a/b.txt": b"hello" * 1000}

#: What version 2 has more.
NEWER_FILES = {
    DATASETS: b"d", INPUTS: b"i", RUN_MODELS: b"l", MODELS: b"m", MODEL_PARAMS: b"p", MODEL_TAGS: b"t",
    MODEL_METRICS: b"x", "models/m-1/c/d.bin": b"weights",
}  # fmt: skip


def _manifest(content: dict[str, bytes] = FILES, /, **changes: Any) -> dict[str, Any]:
    entries = {name: {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)} for name, body in content.items()}
    return {"format": "mlplat-experiment", "version": 1, "runs": 0, "points": 0, "files": entries} | changes


def _folder(root: Path, files: dict[str, bytes] = FILES, manifest: dict[str, Any] | None = None) -> Path:
    for name, body in (files | {"manifest.json": json.dumps(manifest or _manifest(files)).encode()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body)
    return root


def _tar(path: Path, add: Callable[[tarfile.TarFile], None] | None = None, files: dict[str, bytes] = FILES) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, body in (files | {"manifest.json": json.dumps(_manifest(files)).encode()}).items():
            _member(tar, name, body)
        if add is not None:
            add(tar)
    return path


def _member(tar: tarfile.TarFile, name: str, body: bytes = b"", **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(body)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(body))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_what_was_written_is_read(tmp_path: Path, kind: str) -> None:
    target = tmp_path / ("x.tar" if kind == "tar" else "x")
    long = "artifacts/run1/" + "/".join(["ä" * 40] * 6)
    content = FILES | NEWER_FILES | {long: b"deep"}
    with writing(target) as writer:
        for name, body in content.items():
            writer.add_bytes(name, body)
        assert not target.exists()
        writer.finish(runs=0, points=0)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    archive = open_archive(target)
    archive.verify()
    assert {name: archive.open(name).read() for name in archive.manifest.files} == content
    with archive.open("artifacts/run1/a/b.txt") as file:
        assert file.seek(-3, os.SEEK_END) == 4997
        assert (file.read(), file.read()) == (b"llo", b"")
    assert ("artifacts/run1/a/b.txt", "run1", "a/b.txt") in archive.manifest.artifacts
    assert archive.manifest.model_artifacts == [("models/m-1/c/d.bin", "m-1", "c/d.bin")]


def test_a_writer_that_fails_leaves_nothing_and_overwrites_nothing(tmp_path: Path) -> None:
    for name in ("x", "y.tar"):
        with pytest.raises(FileNotFoundError), writing(tmp_path / name) as writer:
            writer.add(RUNS, tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(AlreadyExists):
        ArchiveWriter(tmp_path / "there")


def test_a_tar_made_by_other_tools_is_fine(tmp_path: Path) -> None:
    _folder(tmp_path / "x")
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(tmp_path / "x", ".")
    open_archive(tmp_path / "x.tar").verify()


@pytest.mark.parametrize(
    "name",
    [
        "../evil", "/etc/passwd", "artifacts/run1/../../evil", "artifacts/run1/..", "artifacts/../x", "artifacts/run1",
        "artifacts/run1/", "artifacts/run1//a", "artifacts/run1/a\\b", "artifacts/run1/%2e%2e/x", "artifacts/r un/a",
        "artifacts/run1/a\nb", "metrics/1.parquet", "metrics/../runs.parquet", "manifest.json", "other.txt", "",
        "artifacts/run1/" + "a" * 300, "./runs.parquet",
    ],
)  # fmt: skip
def test_names_that_a_manifest_may_not_list(name: str) -> None:
    files = _manifest()["files"] | {name: {"sha256": "0" * 64, "bytes": 0}}
    with pytest.raises(InvalidInput, match="may not have the name"):
        parse_manifest(json.dumps(_manifest(files=files)).encode())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "zip"}, "the format is 'zip'"),
        ({"version": 3}, "a newer mlplat"),
        ({"version": 0}, "a newer mlplat"),
        ({"version": 2}, "does not list datasets.parquet"),
        ({"files": _manifest()["files"] | {"models.parquet": {"sha256": "0" * 64, "bytes": 1}}}, "may not have"),
        ({"version": "1"}, "not the manifest"),
        ({"files": {}}, "does not list experiment.json"),
        ({"files": [1]}, "not the manifest"),
        ({"files": _manifest()["files"] | {RUNS: {"sha256": "x", "bytes": 1}}}, "malformed"),
        ({"files": _manifest()["files"] | {RUNS: {"sha256": "0" * 64, "bytes": -1}}}, "malformed"),
    ],
)
def test_manifests_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_manifest(json.dumps(_manifest(**changes)).encode())


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_manifest_or_a_clear_error(body: bytes) -> None:
    for parse in (parse_manifest, parse_experiment):
        with pytest.raises(InvalidInput):
            parse(body)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "artifacts/run1/link", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is neither"),
        ({"name": "artifacts/run1/hard", "type": tarfile.LNKTYPE, "linkname": "runs.parquet"}, "is neither"),
        ({"name": "artifacts/run1/dev", "type": tarfile.CHRTYPE}, "is neither"),
        ({"name": "artifacts/run1/disk", "type": tarfile.BLKTYPE}, "is neither"),
        ({"name": "artifacts/run1/fifo", "type": tarfile.FIFOTYPE}, "is neither"),
        ({"name": "artifacts/run1/sparse", "type": tarfile.GNUTYPE_SPARSE}, "is neither"),
        ({"name": "../evil"}, "does not list"),
        ({"name": "/tmp/evil"}, "does not list"),
        ({"name": "runs.parquet"}, "twice"),
        ({"name": "./runs.parquet"}, "twice"),
    ],
)
def test_members_that_a_tar_may_not_have(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        open_archive(_tar(tmp_path / "x.tar", lambda tar: _member(tar, **fields)))
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_a_header_that_asks_for_memory_is_refused(tmp_path: Path) -> None:
    path = _tar(tmp_path / "x.tar")
    huge = tarfile.TarInfo("pax")
    huge.type, huge.size = tarfile.XHDTYPE, 8 * 1024**3 - 1
    path.write_bytes(huge.tobuf(tarfile.USTAR_FORMAT) + path.read_bytes())
    with pytest.raises(InvalidInput, match="no archive needs"):
        open_archive(path)


def test_tars_that_end_early_or_are_compressed_or_no_tars_are_refused(tmp_path: Path) -> None:
    body = _tar(tmp_path / "x.tar").read_bytes()
    for changed in (body[:3000], body[: len(body) // 2], gzip.compress(body), b"", b"\xff" * 5000):
        (tmp_path / "x.tar").write_bytes(changed)
        with pytest.raises(InvalidInput):
            open_archive(tmp_path / "x.tar")
    with pytest.raises(NotFound):
        open_archive(tmp_path / "nowhere")


def test_folders_with_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(FILES[RUNS])
    _folder(tmp_path / "x")
    (tmp_path / "x" / RUNS).unlink()
    (tmp_path / "x" / RUNS).symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidInput, match="is neither"):
        open_archive(tmp_path / "x")
    _folder(tmp_path / "y")
    (tmp_path / "y" / "metrics").symlink_to(tmp_path)
    with pytest.raises(InvalidInput, match="is neither"):
        open_archive(tmp_path / "y")


def test_files_too_many_missing_or_changed_are_refused(tmp_path: Path) -> None:
    _folder(tmp_path / "x", FILES | {"artifacts/run1/more": b"x"}, _manifest())
    with pytest.raises(InvalidInput, match="does not list: 'artifacts/run1/more'"):
        open_archive(tmp_path / "x")
    _folder(tmp_path / "y")
    (tmp_path / "y" / TAGS).unlink()
    with pytest.raises(InvalidInput, match=r"lacks 'tags\.parquet'"):
        open_archive(tmp_path / "y")
    _folder(tmp_path / "z")
    (tmp_path / "z" / TAGS).write_bytes(b"longer")
    with pytest.raises(InvalidInput, match="has 6 bytes"):
        open_archive(tmp_path / "z")
    (tmp_path / "z" / TAGS).write_bytes(b"T")
    with pytest.raises(InvalidInput, match="corrupt"):
        open_archive(tmp_path / "z").verify()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=r"no manifest\.json"):
        open_archive(tmp_path / "empty")


def test_rows_that_would_not_fit_into_memory_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many equal numbers are a small file."""
    monkeypatch.setattr(archive_files, "MAX_ROW_GROUP_BYTES", 1_000_000)
    packed = io.BytesIO()
    table = pa.table({"n": pa.array(np.zeros(200_000, np.int64))})
    pq.write_table(table, packed, use_dictionary=False, compression="zstd")
    assert len(packed.getvalue()) < 10_000
    archive = open_archive(_folder(tmp_path / "x", FILES | {RUNS: packed.getvalue()}))
    with pytest.raises(InvalidInput, match="a row group has"):
        next(archive.batches(RUNS, table.schema, 10))
