"""The state of the code, on real repositories."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mlplat.sdk.capture import git
from mlplat.sdk.capture.git import GitState, bounded_diff, read_git

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
IDENTITY = ("-c", "user.name=t", "-c", "user.email=t@t.test")


def run(folder: Path, *arguments: str, stdin: bytes = b"") -> str:
    done = subprocess.run(["git", *IDENTITY, *arguments], cwd=folder, check=True, capture_output=True, input=stdin)
    return done.stdout.decode().strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    folder.mkdir()
    run(folder, "init", "-q", "-b", "trunk")
    (folder / "train.py").write_text("rate = 0.1\n")
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 10)
    run(folder, "add", ".")
    run(folder, "commit", "-q", "-m", "first")
    return folder


def read(folder: Path) -> GitState:
    state = read_git(folder)
    assert state is not None
    return state


def test_a_clean_tree(repository: Path) -> None:
    run(repository, "remote", "add", "origin", "https://me:secret@example.test/o/r.git")
    state = read(repository)
    assert not state.dirty
    assert state.tags() == {
        "mlflow.source.git.commit": run(repository, "rev-parse", "HEAD"),
        "mlflow.source.git.branch": "trunk",
        "mlflow.source.git.repoURL": "https://example.test/o/r.git",
        "mlflow.source.git.dirty": "false",
    }


def test_the_diff_restores_the_tree_and_names_what_it_lacks(repository: Path) -> None:
    (repository / "train.py").write_text("rate = 0.2\n")
    (repository / "weights.bin").write_bytes(b"\0secret weights")
    (repository / "new ü.txt").write_text("untracked")
    (repository / "data").mkdir()
    (repository / "data" / "x.csv").write_text("1")
    below = repository / "data"
    state = read(below)
    text = state.diff_file().decode()
    assert state.dirty
    assert state.tags()["mlflow.source.git.dirty"] == "true"
    assert state.untracked == ("data/", '"new \\303\\274.txt"')
    assert "+rate = 0.2" in text
    assert "Binary files a/weights.bin and b/weights.bin differ" in text
    assert "secret weights" not in text
    assert "#   data/\n" in text
    run(repository, "checkout", "-q", "--", ".")
    run(repository, "apply", "--exclude=weights.bin", stdin=state.diff_file())
    assert (repository / "train.py").read_text() == "rate = 0.2\n"


def test_staged_changes_count_and_untracked_files_alone_do(repository: Path) -> None:
    (repository / "staged.py").write_text("x = 1\n")
    assert (read(repository).diff, read(repository).dirty) == (b"", True)
    run(repository, "add", "staged.py")
    assert b"+x = 1" in read(repository).diff


def test_a_detached_head_has_no_branch(repository: Path) -> None:
    run(repository, "checkout", "-q", "--detach")
    state = read(repository)
    assert state.branch is None
    assert "mlflow.source.git.branch" not in state.tags()


def test_a_long_diff_is_cut(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git, "MAX_DIFF_BYTES", 2_000)
    (repository / "big.txt").write_text("line\n" * 1_000)
    (repository / "a.txt").write_text("small\n")
    run(repository, "add", ".")
    state = read(repository)
    assert state.cut
    assert b"+small" in state.diff
    assert b"big.txt" not in state.diff
    assert b"# cut: the diff has more than 2000 bytes" in state.diff_file()


def test_many_untracked_files_are_listed_in_part(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git, "MAX_LISTED_FILES", 3)
    for number in range(10):
        (repository / f"file{number}").touch()
    assert read(repository).diff_file().decode().splitlines()[-4:] == ["#   file0", "#   file1", "#   file2", "#   …"]


def test_an_external_diff_is_not_run(repository: Path) -> None:
    trap = repository.parent / "trap"
    trap.write_text(f"#!/bin/sh\ntouch {repository.parent}/ran\n")
    trap.chmod(0o755)
    run(repository, "config", "diff.external", str(trap))
    run(repository, "config", "core.fsmonitor", str(trap))
    (repository / "train.py").write_text("rate = 0.2\n")
    assert b"+rate = 0.2" in read(repository).diff
    assert not (repository.parent / "ran").exists()


def test_without_a_repository_or_a_commit_there_is_nothing(tmp_path: Path) -> None:
    assert read_git(tmp_path) is None
    run(tmp_path, "init", "-q")
    assert read_git(tmp_path) is None
    assert read_git(tmp_path / "missing") is None


def test_without_git_there_is_nothing(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert read_git(repository) is None


def test_a_git_that_hangs_is_given_up(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(slow.parent))
    monkeypatch.setattr(git, "TIMEOUT_S", 0.05)
    assert read_git(repository) is None


@pytest.mark.parametrize(
    ("diff", "limit", "kept"),
    [
        (b"", 10, b""),
        (b"diff --git a\n+1\n", 100, b"diff --git a\n+1\n"),
        (b"diff --git a\n+1\ndiff --git b\n+2\n", 30, b"diff --git a\n+1\n"),
        (b"diff --git a\n+1\n+2\n", 17, b"diff --git a\n+1\n"),
        (b"x" * 50, 10, b""),
    ],
)
def test_a_cut_diff_ends_with_a_whole_file_or_line(diff: bytes, limit: int, kept: bytes) -> None:
    assert bounded_diff(diff, limit) == kept
