"""The artifact store on a local folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlplat.artifacts.model import ArtifactInfo
from mlplat.artifacts.store import CHUNK_BYTES, ArtifactStore
from mlplat.errors import Corrupted, InvalidInput, NotFound


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> ArtifactStore:
    return ArtifactStore(f"file://{root}")


def _read(store: ArtifactStore, path: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join(store.read(path, start, end))


def _files(folder: Path) -> list[str]:
    """Every file below a folder but blobs."""
    files = (str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    return sorted(file for file in files if not file.startswith(".blobs/"))


def _blobs(folder: Path) -> list[str]:
    """Every blob of a store."""
    return sorted(str(path.relative_to(folder)) for path in (folder / ".blobs").rglob("*") if not path.is_dir())


@pytest.mark.parametrize("path", ["a", "0/run/artifacts/model.pkl", "deep/er/ü n/🧪.bin", "a b%41", "-x", "a..b", ".x"])
def test_what_was_written_is_read(store: ArtifactStore, path: str) -> None:
    assert store.write(path, [b"one ", b"", b"two"]).size == 7
    assert _read(store, path) == b"one two"
    assert store.size(path) == 7


def test_an_empty_file_is_a_file(store: ArtifactStore) -> None:
    assert store.write("empty", []).size == 0
    assert (_read(store, "empty"), store.size("empty")) == (b"", 0)


def test_large_files_come_in_bounded_chunks(store: ArtifactStore) -> None:
    body = bytes(range(256)) * (CHUNK_BYTES // 256 * 2 + 4)
    store.write("big", (body[start : start + 70_000] for start in range(0, len(body), 70_000)))
    chunks = list(store.read("big"))
    assert b"".join(chunks) == body
    assert max(map(len, chunks)) <= CHUNK_BYTES


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, None, b"0123456789"), (3, None, b"3456789"), (0, 4, b"0123"), (3, 4, b"3"), (9, 10, b"9"),
        (3, 3, b""), (5, 2, b""), (8, 99, b"89"), (10, None, b""), (99, None, b""),
    ],
)  # fmt: skip
def test_a_range_is_read(store: ArtifactStore, start: int, end: int | None, expected: bytes) -> None:
    store.write("digits", [b"01234", b"56789"])
    assert _read(store, "digits", start, end) == expected


def test_a_range_across_chunks_is_read(store: ArtifactStore) -> None:
    body = bytes(index % 251 for index in range(2 * CHUNK_BYTES + 17))
    store.write("big", [body])
    assert _read(store, "big", CHUNK_BYTES - 3, 2 * CHUNK_BYTES + 5) == body[CHUNK_BYTES - 3 : 2 * CHUNK_BYTES + 5]


def test_writing_again_replaces(store: ArtifactStore) -> None:
    store.write("a/b", [b"a longer first version"])
    store.write("a/b", [b"second"])
    assert _read(store, "a/b") == b"second"
    assert [entry.path for entry in store.list("a")] == ["b"]


def test_a_write_that_breaks_off_leaves_nothing(store: ArtifactStore, root: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x" * 100_000
        raise ConnectionResetError("the client went away")

    with pytest.raises(ConnectionResetError):
        store.write("new/file", broken())
    assert _files(root) == []
    assert store.list("") == []
    store.write("new/file", [b"old"])
    with pytest.raises(ConnectionResetError):
        store.write("new/file", broken())
    assert _read(store, "new/file") == b"old"
    assert _files(root) == ["new/file"]


def test_a_file_is_not_visible_before_it_is_complete(store: ArtifactStore) -> None:
    seen: list[object] = []

    def chunks() -> Iterator[bytes]:
        yield b"half"
        seen.append([entry.path for entry in store.list("dir")])
        with pytest.raises(NotFound):
            store.size("dir/file")
        yield b" and half"

    store.write("dir/file", chunks())
    assert seen == [[]]
    assert _read(store, "dir/file") == b"half and half"


def test_a_reader_of_a_replaced_file_sees_one_version(store: ArtifactStore) -> None:
    old, new = b"o" * 3 * CHUNK_BYTES, b"n" * 3 * CHUNK_BYTES
    store.write("f", [old])
    reading = store.read("f")
    first = next(reading)
    store.write("f", [new])
    assert first + b"".join(reading) == old
    assert _read(store, "f") == new


def test_concurrent_writers_of_one_path_leave_one_whole_version(store: ArtifactStore, root: Path) -> None:
    bodies = [bytes([number]) * 300_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda body: store.write("deep/f", [body[:100_000], body[100_000:]]).size, bodies))
    assert sizes == [300_000] * 8
    assert _read(store, "deep/f") in bodies
    assert _files(root) == ["deep/f"]


def test_a_file_and_a_folder_cannot_have_the_same_path(store: ArtifactStore, root: Path) -> None:
    store.write("a/b", [b"file"])
    for path in ("a", "a/b/c", "a/b/c/d"):
        with pytest.raises(InvalidInput):
            store.write(path, [b"x"])
    assert _files(root) == ["a/b"]


def test_a_listing_has_the_direct_children_by_name(store: ArtifactStore) -> None:
    for path in ("run/b.txt", "run/a.txt", "run/sub/c.txt", "run/sub/deeper/d", "runner/x"):
        store.write(path, [path.encode()])
    assert store.list("run") == [
        ArtifactInfo("a.txt", False, 9),
        ArtifactInfo("b.txt", False, 9),
        ArtifactInfo("sub", True, None),
    ]
    assert [entry.path for entry in store.list("run/sub/")] == ["c.txt", "deeper"]
    assert [entry.path for entry in store.list("")] == ["run", "runner"]


def test_listing_a_file_or_nothing_gives_nothing(store: ArtifactStore) -> None:
    assert store.list("") == []
    store.write("a/b", [b"x"])
    assert store.list("a/b") == []
    assert store.list("nothing/here") == []


def test_a_listing_is_never_stale(store: ArtifactStore) -> None:
    for number in range(3):
        store.write(f"d/{number}", [b"x"])
        assert len(store.list("d")) == number + 1
    store.delete("d/0")
    assert [entry.path for entry in store.list("d")] == ["1", "2"]


def test_missing_files_and_folders_are_not_found(store: ArtifactStore) -> None:
    store.write("folder/file", [b"x"])
    for path in ("missing", "folder", "folder/missing", "folder/file/more"):
        with pytest.raises(NotFound):
            store.size(path)
        with pytest.raises(NotFound):
            _read(store, path)


def test_deleting_removes_a_file_or_a_folder_and_repeats_are_fine(store: ArtifactStore) -> None:
    for path in ("keep/me", "gone/a", "gone/b/c", "single"):
        store.write(path, [b"x"])
    for path in ("gone", "single", "single", "never/was"):
        store.delete(path)
    assert [entry.path for entry in store.list("")] == ["keep"]
    assert _read(store, "keep/me") == b"x"


@pytest.mark.parametrize("name", ["*", "?", "a*", "[ab]", "**"])
def test_a_name_that_looks_like_a_pattern_is_a_name(store: ArtifactStore, name: str) -> None:
    for path in ("a", "b", "ab"):
        store.write(path, [path.encode()])
    store.delete(name)
    assert len(store.list("")) == 3
    store.write(name, [b"pattern"])
    assert _read(store, name) == b"pattern"
    store.delete(name)
    assert [_read(store, path) for path in ("a", "b", "ab")] == [b"a", b"b", b"ab"]


def test_the_root_itself_is_no_file(store: ArtifactStore) -> None:
    store.write("a", [b"x"])
    for path in ("", ".", "./", "./.", ".//"):
        with pytest.raises(InvalidInput):
            store.write(path, [b"x"])
        with pytest.raises(InvalidInput):
            store.delete(path)
    assert _read(store, "a") == b"x"


TRAVERSALS = (
    "..", "../x", "a/../x", "a/../../x", "a/..", "/etc/passwd", "//etc", "C:/x", "c:x", "..\\x", "a\\..\\b",
    "%2e%2e/x", "%2E%2e%2Fx", "a/%2e%2e/x", "%252e%252e/x", "%2fetc/passwd", "..%5cx", "%5c",
    "a\x00b", "a\nb", "%00", "a%0ab", "x" * 256, "a/" * 65 + "a", "é" * 600, "x/" + "y" * 256,
)  # fmt: skip


@pytest.mark.parametrize("path", TRAVERSALS)
def test_a_path_that_could_lead_elsewhere_is_refused(store: ArtifactStore, root: Path, path: str) -> None:
    (root.parent / "x").write_bytes(b"outside")
    for call in (
        lambda: store.write(path, [b"bad"]),
        lambda: _read(store, path),
        lambda: store.size(path),
        lambda: store.list(path),
        lambda: store.delete(path),
    ):
        with pytest.raises(InvalidInput):
            call()
    assert _files(root.parent) == ["x"]
    assert (root.parent / "x").read_bytes() == b"outside"


def test_links_out_of_the_store_are_refused(store: ArtifactStore, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    store.write("run/file", [b"x"])
    (root / "run" / "dir").symlink_to(outside)
    (root / "run" / "link").symlink_to(outside / "secret")
    (root / "run" / "dangling").symlink_to(outside / "new")
    for path in ("run/dir", "run/dir/secret", "run/link", "run/dangling"):
        for call in (
            lambda path=path: store.write(path, [b"bad"]),
            lambda path=path: _read(store, path),
            lambda path=path: store.size(path),
            lambda path=path: store.list(path),
            lambda path=path: store.delete(path),
        ):
            with pytest.raises(InvalidInput, match="a link leads out of the store"):
                call()
    assert _files(outside) == ["secret"]


def test_deleting_a_folder_does_not_follow_the_links_in_it(store: ArtifactStore, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    store.write("run/file", [b"x"])
    (root / "run" / "dir").symlink_to(outside)
    store.delete("run")
    assert not (root / "run").exists()
    assert _files(outside) == ["secret"]


@pytest.mark.parametrize("path", [".blobs", ".blobs/ab/c", "./.blobs/x", ".uploads", ".uploads/x", ".//.uploads/x"])
def test_the_names_of_the_store_itself_are_reserved(store: ArtifactStore, path: str) -> None:
    digest = store.put_blob(b"kept")
    for call in (
        lambda: store.write(path, [b"bad"]),
        lambda: _read(store, path),
        lambda: store.list(path),
        lambda: store.delete(path),
    ):
        with pytest.raises(InvalidInput, match="reserved"):
            call()
    assert store.get_blob(digest) == b"kept"
    assert store.list("") == []


def test_reserved_names_are_free_further_down(store: ArtifactStore) -> None:
    store.write("run/.blobs", [b"x"])
    assert _read(store, "run/.blobs") == b"x"


def test_a_blob_is_found_by_its_digest(store: ArtifactStore, root: Path) -> None:
    body = b"some bytes" * 1000
    digest = store.put_blob(body)
    assert digest == hashlib.sha256(body).hexdigest()
    assert store.get_blob(digest) == body
    blobs = _blobs(root)
    assert store.put_blob(body) == digest
    assert _blobs(root) == blobs
    assert len(blobs) == 1
    assert _files(root) == []
    assert store.get_blob(store.put_blob(b"")) == b""


def test_concurrent_stores_of_one_blob_agree(store: ArtifactStore, root: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(store.put_blob, [b"same" * 50_000] * 8))
    assert len(digests) == 1
    assert (len(_blobs(root)), _files(root)) == (1, [])
    assert store.get_blob(digests.pop()) == b"same" * 50_000


def test_a_corrupt_blob_is_noticed(store: ArtifactStore, root: Path) -> None:
    digest = store.put_blob(b"honest bytes")
    [file] = _blobs(root)
    for damaged in (b"honest bytez", b"honest byte", b""):
        (root / file).write_bytes(damaged)
        with pytest.raises(Corrupted, match="corrupt"):
            store.get_blob(digest)


def test_an_unknown_blob_is_not_found(store: ArtifactStore) -> None:
    with pytest.raises(NotFound, match="No such blob"):
        store.get_blob("0" * 64)


@pytest.mark.parametrize("digest", ["", "abc", "G" * 64, "A" * 64, "0" * 63, "../" + "0" * 61, "0" * 65, "٠" * 64])
def test_what_is_no_digest_is_refused(store: ArtifactStore, digest: str) -> None:
    with pytest.raises(InvalidInput, match="not a SHA-256"):
        store.get_blob(digest)


def test_checking_that_the_store_is_writable_leaves_nothing(store: ArtifactStore, root: Path) -> None:
    store.check_writable()
    assert _files(root) == []


def test_a_store_that_cannot_be_written_is_noticed(root: Path) -> None:
    root.mkdir()
    (root / ".uploads").write_bytes(b"a file where a folder should be")
    with pytest.raises(InvalidInput, match="cannot have the same path"):
        ArtifactStore(f"file://{root}").check_writable()
