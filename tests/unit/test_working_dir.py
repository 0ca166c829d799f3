"""The folder that comes with a definition: unpacked, importable, and nothing outside of it."""

from __future__ import annotations

import io
import os
import stat
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput
from mlplat.steps import working_dir
from mlplat.steps.functions import import_function
from mlplat.steps.working_dir import inside_working_dir


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(f"file://{tmp_path / 'artifacts'}")


def zip_of(artifacts: ArtifactStore, **files: str) -> str:
    """The digest of an archive; ``__`` in a name is a dot."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "."), text)
    return artifacts.put_blob(body.getvalue())


def test_the_block_runs_in_the_folder_and_imports_from_it(artifacts: ArtifactStore) -> None:
    digest = zip_of(artifacts, working_dir_mod__py="def f(): return 7", data__txt="data")
    before, path = Path.cwd(), list(sys.path)
    with inside_working_dir(digest, artifacts):
        assert Path("data.txt").read_text() == "data"
        assert import_function("working_dir_mod:f")() == 7
    assert (Path.cwd(), sys.path) == (before, path)


def test_each_folder_has_its_own_code_in_one_process(artifacts: ArtifactStore) -> None:
    """Workers stay: a module of an earlier pipeline may not stand in for that of a later one."""
    for answer in (1, 2, 1):
        digest = zip_of(artifacts, working_dir_same__py="from working_dir_part import x\ndef f(): return x",
                        working_dir_part__py=f"x = {answer}")  # fmt: skip
        with inside_working_dir(digest, artifacts):
            assert import_function("working_dir_same:f")() == answer
    assert not {"working_dir_same", "working_dir_part"} & sys.modules.keys()


def test_without_a_folder_nothing_changes(artifacts: ArtifactStore) -> None:
    before = Path.cwd()
    with inside_working_dir(None, artifacts):
        assert Path.cwd() == before


def test_an_error_inside_leaves_the_folder_too(artifacts: ArtifactStore) -> None:
    before, path = Path.cwd(), list(sys.path)

    def run() -> None:
        with inside_working_dir(zip_of(artifacts, a="a"), artifacts):
            sys.path.clear()  # code may do what it likes
            os.chdir("/")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert Path.cwd() == before
    sys.path[:] = path


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil-of-mlplat", "a/b/../../../evil"])
def test_a_file_outside_of_the_folder_is_refused(name: str, artifacts: ArtifactStore) -> None:
    with (
        pytest.raises(InvalidInput, match="a file outside of itself"),
        inside_working_dir(zip_of(artifacts, **{name: "x"}), artifacts),
    ):
        raise AssertionError
    assert not Path("/tmp/evil-of-mlplat").exists()


def test_a_link_in_the_archive_is_no_link(artifacts: ArtifactStore) -> None:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        entry = zipfile.ZipInfo("link")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc")
        archive.writestr("link2/passwd", "x")
    with inside_working_dir(artifacts.put_blob(body.getvalue()), artifacts):
        assert not Path("link").is_symlink()


def test_what_is_no_archive_is_refused(artifacts: ArtifactStore) -> None:
    digest = artifacts.put_blob(b"text")
    with pytest.raises(InvalidInput, match="is no zip archive"), inside_working_dir(digest, artifacts):
        raise AssertionError


def _zip(*entries: tuple[zipfile.ZipInfo, bytes]) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for entry, content in entries:
            archive.writestr(entry, content)
    return body.getvalue()


def _refused(artifacts: ArtifactStore, body: bytes, match: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Unpacking is refused, and leaves nothing where it unpacks."""
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(InvalidInput, match=match), inside_working_dir(artifacts.put_blob(body), artifacts):
        raise AssertionError
    assert list(folder.iterdir()) == []


def test_more_bytes_than_a_folder_may_have_are_refused_before_any_is_unpacked(
    artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(working_dir, "MAX_UNPACKED_BYTES", 1_000_000)
    entries = [(zipfile.ZipInfo(f"zeros{number}"), bytes(600_000)) for number in range(2)]
    body = _zip(*entries)
    _refused(artifacts, body, "more than", monkeypatch, tmp_path / "unpacked")


def test_more_files_than_a_folder_may_have_are_refused(
    artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(working_dir, "MAX_FILES", 10)
    body = _zip(*((zipfile.ZipInfo(f"{number}"), b"") for number in range(11)))
    _refused(artifacts, body, "more than", monkeypatch, tmp_path / "unpacked")


def test_a_bomb_that_says_that_it_is_small_does_not_become_large(
    artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bomb = zipfile.ZipInfo("bomb")
    bomb.compress_type = zipfile.ZIP_DEFLATED
    body = _zip((bomb, bytes(50_000_000)))
    size = (50_000_000).to_bytes(4, "little")
    assert body.count(size) == 2, "in the header and in the directory"
    _refused(artifacts, body.replace(size, (10).to_bytes(4, "little")), "no zip", monkeypatch, tmp_path / "unpacked")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil-of-mlplat"])
def test_what_is_refused_for_a_name_leaves_nothing(
    artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    body = _zip((zipfile.ZipInfo("sound"), b"x"), (zipfile.ZipInfo(name), b"x"))
    _refused(artifacts, body, "outside of itself", monkeypatch, tmp_path / "unpacked")
    assert not (tmp_path / "evil").exists()


def test_damaged_and_encrypted_archives_are_refused(
    artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packed = zipfile.ZipInfo("text")
    packed.compress_type = zipfile.ZIP_DEFLATED
    body = _zip((packed, b"text " * 1_000))
    damaged = body[:40] + bytes([body[40] ^ 0xFF, body[41] ^ 0xFF]) + body[42:]
    encrypted = bytearray(body)
    for start in (body.index(b"PK\x03\x04") + 6, body.index(b"PK\x01\x02") + 8):
        encrypted[start] |= 1
    unknown = bytearray(body)
    for start in (body.index(b"PK\x03\x04") + 8, body.index(b"PK\x01\x02") + 10):
        unknown[start : start + 2] = (77).to_bytes(2, "little")
    both = _zip((zipfile.ZipInfo("a"), b"a file"), (zipfile.ZipInfo("a/b"), b"in a folder"))
    for number, bad in enumerate((damaged, bytes(encrypted), bytes(unknown), both)):
        _refused(artifacts, bad, "is no zip archive", monkeypatch, tmp_path / f"unpacked{number}")


@pytest.mark.parametrize("mode", [0o120777, 0o060666, 0o020666, 0o010666, 0o140777])
def test_links_devices_pipes_and_sockets_are_files_with_text(artifacts: ArtifactStore, mode: int) -> None:
    entry = zipfile.ZipInfo("special")
    entry.create_system, entry.external_attr = 3, mode << 16
    with inside_working_dir(artifacts.put_blob(_zip((entry, b"/etc/passwd"))), artifacts):
        assert stat.S_ISREG(Path("special").lstat().st_mode)
        assert Path("special").read_text() == "/etc/passwd"
