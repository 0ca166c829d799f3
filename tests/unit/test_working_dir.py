"""The folder that comes with a definition: unpacked, importable, and nothing outside of it."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from pathlib import Path

import pytest

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput
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
