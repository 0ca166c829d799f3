"""``mlplat://``: files of a run by fsspec's methods, over real HTTP."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
from fsspec.callbacks import Callback

from mlplat.errors import Unavailable
from mlplat.sdk.filesystem import ArtifactFileSystem

#: More than one block of a reader, and not a multiple of it.
LARGE = bytes(range(256)) * 40_000 + b"end"
ODD_NAMES = [
    "ünï/çødé 日本.txt",
    "100%",
    "a%20b",
    "%41",
    "a#b",
    "why?",
    "a b",
    "a;b=c",
    "a+b&c",
    "[x]",
    "st*r",
    "~",
    "'q\"",
]


class Seen(Callback):  # type: ignore[misc]  # fsspec has no types
    """The values that a transfer told."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[int] = []

    def call(self, *_arguments: Any, **_options: Any) -> None:
        self.values.append(self.value)


def test_the_entry_point_names_the_class() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."fsspec.specs"]\nmlplat = "mlplat.sdk.filesystem:ArtifactFileSystem"\n' in text
    assert fsspec.get_filesystem_class("mlplat") is ArtifactFileSystem


def test_a_path_names_a_run_and_a_file_in_it(artifacts: ArtifactFileSystem, run_root: str, server_url: str) -> None:
    url = f"mlplat://{run_root}/model/weights.bin"
    with fsspec.open(url, "wb", url=server_url) as out:
        out.write(b"weights")
    assert artifacts.cat_file(url) == artifacts.cat_file(f"{run_root}//model/./weights.bin") == b"weights"
    listed = httpx.get(f"{server_url}/api/2.0/mlflow/artifacts/list", params={"run_id": run_root, "path": "model"})
    assert listed.json()["files"] == [{"path": "model/weights.bin", "is_dir": False, "file_size": 7}]


def test_ls_info_and_their_kin(artifacts: ArtifactFileSystem, run_root: str) -> None:
    assert artifacts.ls(run_root) == []
    artifacts.pipe({f"{run_root}/a.txt": b"1", f"{run_root}/sub/b.txt": b"22", f"{run_root}/sub/deep/c.txt": b""})
    assert artifacts.ls(f"mlplat://{run_root}/") == [
        {"name": f"{run_root}/a.txt", "size": 1, "type": "file"},
        {"name": f"{run_root}/sub", "size": 0, "type": "directory"},
    ]
    assert artifacts.ls(f"{run_root}/sub", detail=False) == [f"{run_root}/sub/b.txt", f"{run_root}/sub/deep"]
    assert artifacts.ls(f"{run_root}/a.txt", detail=False) == [f"{run_root}/a.txt"]
    assert artifacts.info(f"{run_root}/sub/deep/c.txt")["size"] == 0
    assert artifacts.info(f"{run_root}/sub")["type"] == artifacts.info(run_root)["type"] == "directory"
    for path, kind in (("a.txt", "file"), ("sub", "directory"), ("sub/deep", "directory"), ("none", None)):
        full = f"{run_root}/{path}"
        assert (artifacts.isfile(full), artifacts.isdir(full)) == (kind == "file", kind == "directory")
        assert artifacts.exists(full) is (kind is not None)
    assert artifacts.find(run_root) == [f"{run_root}/{name}" for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt")]
    assert artifacts.glob(f"{run_root}/*/*.txt") == [f"{run_root}/sub/b.txt"]
    assert artifacts.du(run_root) == 3
    for ask in (artifacts.ls, artifacts.info, artifacts.cat_file, artifacts.open, artifacts.rm):
        with pytest.raises(FileNotFoundError):
            ask(f"{run_root}/none")


def test_a_run_that_is_not_there_is_told(artifacts: ArtifactFileSystem) -> None:
    path = f"mlplat://{'0' * 32}/x"
    asks: list[Callable[[str], Any]] = [
        artifacts.ls, artifacts.info, artifacts.cat_file, artifacts.open, artifacts.mkdir, artifacts.rm,
        lambda path: artifacts.open(path, "wb"), lambda path: artifacts.pipe_file(path, b""),
        lambda path: artifacts.put_file(__file__, path),
    ]  # fmt: skip
    for ask in asks:
        with pytest.raises(FileNotFoundError, match="has no such run"):
            ask(path)
    assert not artifacts.exists(path)
    assert not artifacts.exists(f"mlplat://{'0' * 32}")


def test_the_root_has_no_listing_and_no_files(artifacts: ArtifactFileSystem) -> None:
    assert artifacts.ls("mlplat://") == []
    assert artifacts.isdir("mlplat://")
    with pytest.raises(ValueError, match="begins with a run"):
        artifacts.pipe_file("", b"")
    with pytest.raises(ValueError, match="begins with a run"):
        artifacts.rm("mlplat://", recursive=True)


@pytest.mark.parametrize("path", ["../x", "a/../../x", "%2e%2e/x", "a/%252e%252e/b", "a\\b", "a\0b", "n" * 256])
def test_a_path_that_could_lead_elsewhere_is_refused(artifacts: ArtifactFileSystem, run_root: str, path: str) -> None:
    full = f"{run_root}/{path}"
    asks: list[Callable[[], Any]] = [
        lambda: artifacts.ls(full), lambda: artifacts.info(full), lambda: artifacts.cat_file(full),
        lambda: artifacts.open(full, "wb"), lambda: artifacts.pipe_file(full, b""), lambda: artifacts.mkdir(full),
        lambda: artifacts.rm(full, recursive=True), lambda: artifacts.exists(full),
    ]  # fmt: skip
    for ask in asks:
        with pytest.raises(ValueError, match="Invalid path"):
            ask()


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_is_taken_as_it_is(artifacts: ArtifactFileSystem, run_root: str, tmp_path: Path, name: str) -> None:
    path = f"{run_root}/odd/{name}"
    artifacts.pipe_file(path, name.encode())
    artifacts.pipe_file(f"{run_root}/odd/str", b"not meant")
    with fsspec.open(f"mlplat://{path}", url=artifacts.url) as file:
        assert file.read() == name.encode()
    artifacts.get_file(path, tmp_path / "got")
    assert (tmp_path / "got").read_text() == name
    assert path in artifacts.find(f"{run_root}/odd")
    assert artifacts.info(path)["name"] == path
    artifacts.rm(path)
    assert artifacts.find(f"{run_root}/odd") == [f"{run_root}/odd/str"]


def test_slices_of_a_file(artifacts: ArtifactFileSystem, run_root: str) -> None:
    path, body = f"{run_root}/digits", b"0123456789"
    artifacts.pipe_file(path, body)
    artifacts.pipe_file(f"{run_root}/empty", b"")
    for start in (None, 0, 3, 10, 12, -3, -20):
        for end in (None, 0, 5, 10, 99, -2, -20):
            assert artifacts.cat_file(path, start, end) == body[start:end], (start, end)
            assert artifacts.cat_file(f"{run_root}/empty", start, end) == b"", (start, end)
    assert artifacts.cat_ranges([path] * 2, [0, 8], [2, None]) == [b"01", b"89"]
    assert (artifacts.head(path, 2), artifacts.tail(path, 2)) == (b"01", b"89")


def test_a_large_file_is_read_in_blocks_and_pieces(
    artifacts: ArtifactFileSystem, run_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, here = f"{run_root}/large", tmp_path / "large"
    here.write_bytes(LARGE)
    artifacts.put_file(here, path)
    monkeypatch.setattr("mlplat.sdk.artifact_bytes.PIECE_BYTES", 1_000_003)
    assert artifacts.cat_file(path) == LARGE
    assert artifacts.cat_file(path, 5, -5) == LARGE[5:-5]
    with artifacts.open(path, block_size=1_000_000) as file:
        assert file.size == len(LARGE)
        assert file.seek(-3, os.SEEK_END) == len(LARGE) - 3
        assert file.read() == b"end"
        file.seek(0)
        assert b"".join(iter(lambda: file.read(700_001), b"")) == LARGE
        copy = pickle.loads(pickle.dumps(file))
        copy.seek(1_000)
        assert copy.read(10) == LARGE[1_000:1_010]


def test_a_file_that_is_replaced_while_it_is_read_is_told(artifacts: ArtifactFileSystem, run_root: str) -> None:
    path = f"{run_root}/changing"
    artifacts.pipe_file(path, LARGE)
    with artifacts.open(path, block_size=1_000) as file:
        file.read(10)
        artifacts.pipe_file(path, LARGE + b"more")
        with pytest.raises(OSError, match="replaced while it was read"):
            file.read()


def test_what_is_written_appears_when_it_is_closed(artifacts: ArtifactFileSystem, run_root: str) -> None:
    path = f"{run_root}/written"
    file = artifacts.open(path, "wb")
    assert file.write(b"0123") == 4
    file.flush()
    assert not artifacts.exists(path)
    file.seek(1)
    file.write(b"x")
    assert file.tell() == 2
    file.close()
    file.close()
    assert artifacts.cat_file(path) == b"0x23"
    with pytest.raises(ValueError, match="closed"):
        file.write(b"")
    with artifacts.open(path, "w", encoding="utf-16", newline="\r\n") as text:
        text.write("ü\n")
    with artifacts.open(path, "r", encoding="utf-16", newline="") as text:
        assert text.read() == "ü\r\n"
    with fsspec.open(f"mlplat://{path}.gz", "wb", compression="gzip", url=artifacts.url) as out:
        out.write(LARGE)
    assert gzip.decompress(artifacts.cat_file(f"{path}.gz")) == LARGE
    artifacts.touch(path)
    assert artifacts.cat_file(path) == b""


def test_a_with_that_ends_by_an_exception_writes_nothing(artifacts: ArtifactFileSystem, run_root: str) -> None:
    path = f"{run_root}/half"
    opens: list[Callable[[], Any]] = [
        lambda: artifacts.open(path, "wb"),
        lambda: artifacts.open(path, "w"),
        lambda: fsspec.open(f"mlplat://{path}", "wb", url=artifacts.url),
        lambda: fsspec.open(f"mlplat://{path}", "wt", url=artifacts.url),
        lambda: fsspec.open(f"mlplat://{path}", "wb", compression="gzip", url=artifacts.url),
    ]

    def fail(number: int) -> None:
        with opens[number]() as file:
            file.write("half" if number in {1, 3} else b"half")
            raise ZeroDivisionError

    for number in range(len(opens)):
        with pytest.raises(ZeroDivisionError):
            fail(number)
        assert not artifacts.exists(path), number


def test_a_file_that_is_written_while_an_exception_is_handled_is_kept(
    artifacts: ArtifactFileSystem, run_root: str
) -> None:
    before = artifacts.open(f"{run_root}/before", "wb")
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        with fsspec.open(f"mlplat://{run_root}/report", "wt", url=artifacts.url) as file:
            file.write("it failed")
        before.write(b"x")
        before.close()
    assert artifacts.cat_file(f"{run_root}/report") == b"it failed"
    assert artifacts.cat_file(f"{run_root}/before") == b"x"


def test_files_of_a_transaction_appear_at_its_end(artifacts: ArtifactFileSystem, run_root: str) -> None:
    with artifacts.transaction:
        with artifacts.open(f"{run_root}/t/a", "wb") as file:
            file.write(b"a")
        assert not artifacts.exists(f"{run_root}/t/a")
    assert artifacts.cat_file(f"{run_root}/t/a") == b"a"

    def fail() -> None:
        with artifacts.transaction:
            artifacts.open(f"{run_root}/t/b", "wb").close()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not artifacts.exists(f"{run_root}/t/b")


def test_modes_that_there_are_not(artifacts: ArtifactFileSystem, run_root: str) -> None:
    artifacts.pipe_file(f"{run_root}/f", b"x")
    for mode in ("ab", "a", "r+b", "w+b"):
        with pytest.raises(NotImplementedError, match="written as a whole"):
            artifacts.open(f"{run_root}/f", mode)
    with pytest.raises(FileExistsError):
        artifacts.open(f"{run_root}/f", "xb")
    with pytest.raises(FileExistsError):
        artifacts.put_file(__file__, f"{run_root}/f", mode="create")
    assert artifacts.cat_file(f"{run_root}/f") == b"x"


def test_folders_and_files_do_not_take_each_others_place(artifacts: ArtifactFileSystem, run_root: str) -> None:
    artifacts.pipe_file(f"{run_root}/folder/file", b"x")
    folder = f"{run_root}/folder"
    asks: list[Callable[[], Any]] = [
        lambda: artifacts.cat_file(folder), lambda: artifacts.open(folder), lambda: artifacts.rm_file(folder),
        lambda: artifacts.pipe_file(folder, b""), lambda: artifacts.rm(folder), lambda: artifacts.open(run_root, "wb"),
        lambda: artifacts.put_file(__file__, folder),
    ]  # fmt: skip
    for ask in asks:
        with pytest.raises(IsADirectoryError):
            ask()
    with pytest.raises(NotADirectoryError):
        artifacts.pipe_file(f"{folder}/file/below", b"")
    with pytest.raises(NotADirectoryError):
        artifacts.rmdir(f"{folder}/file")
    with pytest.raises(FileExistsError):
        artifacts.makedirs(f"{folder}/file", exist_ok=True)
    with pytest.raises(OSError, match="not empty"):
        artifacts.rmdir(folder)
    assert artifacts.cat_file(f"{folder}/file") == b"x"


def test_folders_are_made_and_removed(artifacts: ArtifactFileSystem, run_root: str) -> None:
    artifacts.makedirs(f"{run_root}/new/deep")
    assert artifacts.isdir(f"{run_root}/new")
    assert artifacts.ls(f"{run_root}/new", detail=False) == [f"{run_root}/new/deep"]
    assert artifacts.ls(f"{run_root}/new/deep") == []
    with pytest.raises(FileExistsError):
        artifacts.mkdir(f"{run_root}/new")
    artifacts.makedirs(f"{run_root}/new", exist_ok=True)
    artifacts.rmdir(f"{run_root}/new/deep")
    artifacts.pipe({f"{run_root}/new/{name}": b"x" for name in ("a", "b", "c/d", "c/e")})
    artifacts.rm(f"{run_root}/new/[ab]")
    assert artifacts.find(f"{run_root}/new") == [f"{run_root}/new/c/d", f"{run_root}/new/c/e"]
    artifacts.rm(f"mlplat://{run_root}/new/", recursive=True)
    assert not artifacts.exists(f"{run_root}/new")
    assert artifacts.isdir(run_root)


def test_moving_and_copying_lose_nothing(artifacts: ArtifactFileSystem, run_root: str) -> None:
    artifacts.pipe({f"{run_root}/m/a": b"a", f"{run_root}/m/sub/b": b"b"})
    artifacts.mv(f"{run_root}/m/a", f"mlplat://{run_root}/m/a")
    with pytest.raises(shutil.SameFileError):
        artifacts.mv(f"{run_root}/m/a", f"{run_root}/m/")
    with pytest.raises(ValueError, match="into itself"):
        artifacts.mv(f"{run_root}/m", f"{run_root}/m/sub/m", recursive=True)
    with pytest.raises(ValueError, match="into itself"):
        artifacts.mv(f"{run_root}/*", f"{run_root}/m/sub", recursive=True)
    with pytest.raises(FileNotFoundError):
        artifacts.mv(f"{run_root}/none", f"{run_root}/other")
    assert artifacts.cat(artifacts.find(run_root)) == {f"{run_root}/m/a": b"a", f"{run_root}/m/sub/b": b"b"}
    artifacts.mv(f"{run_root}/m", f"{run_root}/n", recursive=True)
    artifacts.cp(f"{run_root}/n/a", f"{run_root}/c")
    assert artifacts.find(run_root) == [f"{run_root}/{name}" for name in ("c", "n/a", "n/sub/b")]


def test_progress_is_told(artifacts: ArtifactFileSystem, run_root: str, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(LARGE)
    up, down = Seen(), Seen()
    artifacts.put_file(tmp_path / "up", f"{run_root}/f", callback=up)
    artifacts.get_file(f"{run_root}/f", tmp_path / "new" / "down", callback=down)
    assert (tmp_path / "new" / "down").read_bytes() == LARGE
    for seen in (up, down):
        assert seen.size == seen.values[-1] == len(LARGE)
        assert len(set(seen.values)) > 2
        assert seen.values == sorted(seen.values)


def test_a_download_that_fails_leaves_what_was_there(
    artifacts: ArtifactFileSystem, run_root: str, tmp_path: Path
) -> None:
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        artifacts.get_file(f"{run_root}/none", tmp_path / "old")
    artifacts.pipe_file(f"{run_root}/f", b"new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        artifacts.get_file(f"{run_root}/f", tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_an_upload_that_breaks_off_leaves_what_was_there(artifacts: ArtifactFileSystem, run_root: str) -> None:
    class Breaks:
        """A file whose disk fails."""

        def seek(self, position: int) -> int:
            return position

        def read(self, size: int) -> bytes:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls > 3:
                raise ZeroDivisionError
            return b"x" * size

    artifacts.pipe_file(f"{run_root}/f", b"old")
    for name in ("f", "new"):
        with pytest.raises(ZeroDivisionError):
            artifacts._upload(f"{run_root}/{name}", Breaks(), 10_000_000)
    assert artifacts.find(run_root) == [f"{run_root}/f"]
    assert artifacts.cat_file(f"{run_root}/f") == b"old"


def test_of_two_writers_the_last_one_wins_as_a_whole(artifacts: ArtifactFileSystem, run_root: str) -> None:
    path, bodies = f"{run_root}/contested", [bytes([number]) * 3_000_000 for number in range(4)]
    barrier = threading.Barrier(len(bodies))

    def write(body: bytes) -> None:
        barrier.wait(timeout=30)
        with artifacts.open(path, "wb") as file:
            file.write(body)

    with ThreadPoolExecutor(len(bodies)) as threads:
        list(threads.map(write, bodies))
    assert artifacts.cat_file(path) in bodies
    first, second = artifacts.open(path, "wb"), artifacts.open(path, "wb")
    first.write(b"first")
    second.write(b"second")
    second.close()
    first.close()
    assert artifacts.cat_file(path) == b"first"


def test_thousands_of_files_are_listed(artifacts: ArtifactFileSystem, run_root: str) -> None:
    names = [f"{run_root}/many/{number:05d}" for number in range(3_000)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: artifacts.pipe_file(name, b"x"), names))
    assert artifacts.ls(f"{run_root}/many", detail=False) == names
    assert artifacts.find(run_root) == names
    artifacts.rm(f"{run_root}/many", recursive=True)
    assert artifacts.find(run_root) == []


def test_a_copy_elsewhere_talks_to_the_same_platform(
    artifacts: ArtifactFileSystem, run_root: str, server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLPLAT_URL", server_url)
    default = fsspec.filesystem("mlplat")
    assert default == artifacts
    assert hash(default) == hash(artifacts)
    pickled, described = pickle.dumps(default), default.to_json()
    monkeypatch.setenv("MLPLAT_URL", "http://127.0.0.1:1")
    artifacts.pipe_file(f"{run_root}/f", b"x")
    for copy in (pickle.loads(pickled), fsspec.AbstractFileSystem.from_json(described)):
        assert copy == artifacts
        assert copy.cat_file(f"{run_root}/f") == b"x"
    other = fsspec.filesystem("mlplat", retry_for_s=0)
    assert other != artifacts
    for ask in (other.exists, other.isdir, other.isfile, other.find, other.ls):
        with pytest.raises(Unavailable):  # and not: there is nothing
            ask(f"{run_root}/f")


def test_a_forked_child_has_connections_of_its_own(artifacts: ArtifactFileSystem, run_root: str) -> None:
    artifacts.pipe_file(f"{run_root}/f", LARGE)
    writing = artifacts.open(f"{run_root}/w", "wb")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            writing.close()  # the parent's, who goes on with it
            for _round in range(10):
                assert artifacts.cat_file(f"{run_root}/f") == LARGE
            artifacts.pipe_file(f"{run_root}/child", b"x")
            status = 0
        finally:
            os._exit(status)
    for _round in range(10):
        assert artifacts.cat_file(f"{run_root}/f") == LARGE
    assert os.waitpid(child, 0)[1] == 0
    assert artifacts.exists(f"{run_root}/child")
    assert not artifacts.exists(f"{run_root}/w")
    writing.write(b"x")
    writing.close()
    assert artifacts.cat_file(f"{run_root}/w") == b"x"


def test_a_cache_of_fsspec_sees_new_versions(artifacts: ArtifactFileSystem, run_root: str, tmp_path: Path) -> None:
    options = {"url": artifacts.url}
    for body in (b"first", b"secnd"):
        artifacts.pipe_file(f"{run_root}/f", body)
        cached = fsspec.open(
            f"filecache::mlplat://{run_root}/f",
            mlplat=options,
            filecache={"cache_storage": str(tmp_path), "check_files": True},
        )
        with cached as file:
            assert file.read() == body
    assert artifacts.ukey(f"{run_root}/f") == artifacts.ukey(f"{run_root}/f")
    assert isinstance(artifacts.checksum(f"{run_root}/f"), int)
