"""Artifacts in a backup: copied once, kept apart per backup, and never taken for what they are not."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from mlplat.backup.artifacts import artifacts_of, check_artifacts, dump_artifacts, load_artifacts
from mlplat.backup.catalog import open_place
from mlplat.backup.model import INDEX, UPLOADS, Backup
from mlplat.backup.tree import CHUNK_BYTES, Tree
from mlplat.errors import Corrupted, InvalidInput, Unavailable
from tests.contract.backups import backup_of

LARGE = bytes(range(256)) * 4 * (CHUNK_BYTES // 1024) * 9  # more than is kept in memory


def sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def zstd(body: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.output_stream(sink, compression="zstd") as out:
        out.write(body)
    return bytes(sink.getvalue())


def blob_key(body: bytes, suffix: str = "") -> str:
    return f".blobs/{sha(body)[:2]}/{sha(body)}{suffix}"


FILES = {
    "1/run/artifacts/model.pkl": b"weights",
    "1/run/artifacts/same.pkl": b"weights",
    "1/run/artifacts/é 漢 %41#?.txt": b"name",
    "1/run/artifacts/empty": b"",
    "1/run/artifacts/large": LARGE,
    ".blobs/odd": b"no digest in its name",
    blob_key(b"plain"): b"plain",
    blob_key(b"packed", ".zst"): zstd(b"packed"),
    blob_key(b"packed", ".zst.3"): zstd(b"packed"),
    blob_key(b"again", ".7"): b"again",
    blob_key(LARGE, ".zst"): zstd(LARGE),
}


@pytest.fixture(params=["disk", "objects"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A URL below which trees lie; objects are fsspec's, in memory: the calls are those of a bucket."""
    if request.param == "disk":
        yield f"file://{tmp_path}"
        return
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    memory = fsspec.filesystem("memory")
    for name in memory.find(url.removeprefix("memory:/")):
        memory.rm_file(name)


@pytest.fixture
def source(root: str) -> Tree:
    tree = Tree(f"{root}/artifacts", scratch=UPLOADS)
    put(tree, FILES)
    return tree


@pytest.fixture
def place(root: str) -> Tree:
    return open_place(f"{root}/backups")


@pytest.fixture
def target(root: str) -> Tree:
    return Tree(f"{root}/restored", scratch=UPLOADS)


def put(tree: Tree, files: dict[str, bytes]) -> None:
    for key, body in files.items():
        with tree.writing(key) as sink:
            sink.write(body)


def everything(tree: Tree) -> dict[str, bytes]:
    return {key: b"".join(tree.read(key)) for key in tree.sizes()}


def backup(source: Tree, place: Tree) -> tuple[Backup, int]:
    copied, index = dump_artifacts(source, place, "b/")
    return backup_of(artifacts=copied.artifacts, files={INDEX: index}), copied.copied_bytes


def test_artifacts_come_back_as_they_were(source: Tree, place: Tree, target: Tree) -> None:
    made, _copied = backup(source, place)
    assert made.artifacts == len(FILES)
    assert target.is_empty()
    assert load_artifacts(place, made, target) == []
    assert everything(target) == FILES
    assert not target.is_empty()
    assert list(check_artifacts(place, made)) == []


def test_the_next_backup_copies_what_is_new(source: Tree, place: Tree) -> None:
    _made, copied = backup(source, place)
    assert copied == sum(map(len, FILES.values()))
    before = place.sizes("artifacts/")
    assert backup(source, place)[1] == 0
    put(source, {"1/run/artifacts/more": b"four", blob_key(b"seven77"): b"seven77"})
    assert backup(source, place)[1] == 4 + 7
    assert before.items() <= place.sizes("artifacts/").items()


def test_each_backup_has_the_files_of_its_time(source: Tree, place: Tree, target: Tree) -> None:
    first, _copied = backup(source, place)
    index = b"".join(place.read(f"b/{INDEX}"))
    put(source, {"1/run/artifacts/model.pkl": b"retrained"})
    source.delete("1/run/artifacts/large")
    backup(source, place)
    put(place, {f"b/{INDEX}": index})  # the first one's
    load_artifacts(place, first, target)
    assert everything(target) == FILES


def test_a_blob_that_was_compressed_anew_is_the_same_to_earlier_backups(
    source: Tree, place: Tree, target: Tree
) -> None:
    key, body = blob_key(LARGE, ".zst"), bytes(pa.Codec("zstd", compression_level=19).compress(LARGE, asbytes=True))
    assert len(body) != len(FILES[key])
    first, _copied = backup(source, place)
    index = b"".join(place.read(f"b/{INDEX}"))
    put(source, {key: body})
    backup(source, place)
    put(place, {f"b/{INDEX}": index})  # the first one's
    assert list(check_artifacts(place, first)) == []
    assert load_artifacts(place, first, target) == []
    assert everything(target).keys() == FILES.keys()


def test_uploads_stay_behind(tmp_path: Path) -> None:
    source, place = Tree(f"file://{tmp_path}/artifacts", scratch=UPLOADS), open_place(f"file://{tmp_path}/backups")
    folder = tmp_path / "artifacts" / ".uploads"
    folder.mkdir(parents=True)
    (folder / "half").write_bytes(b"half")
    assert source.is_empty()
    assert source.sizes() == {}
    assert backup(source, place)[0].artifacts == 0


def test_no_artifacts_are_a_backup_too(root: str, place: Tree, target: Tree) -> None:
    made, _copied = backup(Tree(f"{root}/nowhere", scratch=UPLOADS), place)
    assert made.artifacts == 0
    assert load_artifacts(place, made, target) == []
    assert target.is_empty()


def test_a_restore_is_repeated_and_leaves_nothing_of_an_earlier_attempt(
    source: Tree, place: Tree, target: Tree
) -> None:
    made, _copied = backup(source, place)
    put(target, {"1/run/artifacts/model.pkl": b"half", "of/another/backup": b"x", blob_key(b"plain"): b"plain"})
    load_artifacts(place, made, target)
    assert everything(target) == FILES


@pytest.mark.parametrize(
    ("key", "body"),
    [
        (blob_key(b"plain"), b"plaiN"),
        (blob_key(b"plain"), b"plain and more"),
        (blob_key(b"packed", ".zst"), zstd(b"paCked")),
        (blob_key(b"packed", ".zst"), b"x" * len(zstd(b"packed"))),
        (blob_key(LARGE, ".zst"), zstd(LARGE)[:-9]),
        ("1/run/artifacts/model.pkl", b"Weights"),
        ("1/run/artifacts/large", LARGE[:-1] + b"!"),
        ("1/run/artifacts/model.pkl", None),
    ],
)
def test_damaged_bytes_are_found_and_never_restored(
    source: Tree, place: Tree, target: Tree, key: str, body: bytes | None
) -> None:
    made, _copied = backup(source, place)
    where = next(artifact.place for artifact in artifacts_of(place, made) if artifact.key == key)
    if body is None:
        place.delete(where)
    else:
        put(place, {where: body})
    problems = set(check_artifacts(place, made))
    assert len(problems) == 1
    assert where in problems.pop()
    with pytest.raises(Corrupted, match=where):
        load_artifacts(place, made, target)
    sharing = {artifact.key for artifact in artifacts_of(place, made) if artifact.place == where}
    if place.folder is not None:  # objects in memory are there at once
        assert sharing.isdisjoint(everything(target))
        left_out = load_artifacts(place, made, target, skip_damaged=True)
        assert len(left_out) == len(sharing)
        assert everything(target) == {name: content for name, content in FILES.items() if name not in sharing}


def test_an_index_that_is_cut_off_is_found_out(source: Tree, place: Tree, target: Tree) -> None:
    made, _copied = backup(source, place)
    sink = pa.BufferOutputStream()
    with pa.output_stream(sink, compression="zstd") as out:
        out.write(b'["a",1,"')
    put(place, {f"b/{INDEX}": bytes(sink.getvalue())})
    with pytest.raises(Corrupted, match="in the middle of a line"):
        load_artifacts(place, made, target)


@pytest.mark.parametrize("key", ["../evil", "/tmp/evil-of-mlplat", "a/../../evil", "", "a/./b"])
def test_an_index_that_leads_elsewhere_writes_nothing(source: Tree, place: Tree, target: Tree, key: str) -> None:
    made, _copied = backup(source, place)
    evil = b"evil"
    put(place, {f"artifacts/files/{sha(evil)[:2]}/{sha(evil)}": evil, f"b/{INDEX}": zstd(_line(key, evil))})
    before = everything(place)
    for skip_damaged in (False, True):
        with pytest.raises(InvalidInput, match="has a damaged line"):
            load_artifacts(place, made, target, skip_damaged=skip_damaged)
    assert everything(target) == {}
    assert everything(place) == before
    assert not Path("/tmp/evil-of-mlplat").exists()


def test_an_index_that_unpacks_to_one_endless_line_is_refused(source: Tree, place: Tree, target: Tree) -> None:
    made, _copied = backup(source, place)
    put(place, {f"b/{INDEX}": zstd(bytes(64 * 1024 * 1024))})
    tracemalloc.start()
    try:
        with pytest.raises(Corrupted, match="has a line of more than"):
            load_artifacts(place, made, target)
        assert tracemalloc.get_traced_memory()[1] < 40 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert everything(target) == {}


def _line(key: str, body: bytes) -> bytes:
    return json.dumps([key, len(body), sha(body)]).encode() + b"\n"


@pytest.mark.parametrize("key", ["", "/x", "a/../../x", "..", "a//b", "a/./b", "a\0b"])
def test_keys_do_not_leave_their_tree(target: Tree, key: str) -> None:
    with pytest.raises(InvalidInput, match="does not name a file below"), target.writing(key):
        pass


def test_a_file_that_is_written_all_the_time_is_no_backup(tmp_path: Path) -> None:
    class Restless(Tree):
        """Each read finds other bytes."""

        def read(self, key: str) -> Iterator[bytes]:
            for count in range(10):
                yield uuid.uuid4().bytes * (CHUNK_BYTES // 16) + bytes(count)

    source, place = Restless(f"file://{tmp_path}/artifacts", scratch=UPLOADS), open_place(f"file://{tmp_path}/backups")
    put(source, {"restless": b"x"})
    with pytest.raises(Unavailable, match="restless is written all the time"):
        backup(source, place)
    assert not list((tmp_path / "backups" / ".partial").iterdir())


def test_what_breaks_off_is_not_there(tmp_path: Path) -> None:
    place = open_place(f"file://{tmp_path}/backups")
    put(place, {"b/file": b"before"})

    def break_off() -> None:
        with place.writing("b/file") as sink:
            sink.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    assert everything(place) == {"b/file": b"before"}
    place.settle()


def test_backups_are_closed_to_others(tmp_path: Path) -> None:
    place = open_place(f"file://{tmp_path}/new/backups")
    put(place, {"b/postgres/x": b"secrets"})
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_dir()}
    assert set(modes.values()) == {0o700}
