"""The state of the code, by the ``git`` program.

Not by GitPython: it runs the same program, but has no time limit on Linux that covers reading the
answer, and no bound on the answer's size. No external diff, text conversion or file system monitor
that the user may have configured is run.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from mlplat.sdk.capture.redact import strip_credentials

TIMEOUT_S = 10.0
MAX_DIFF_BYTES = 5 * 1024 * 1024
MAX_LISTED_FILES = 1_000
_OPTIONS = ("--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.quotePath=true")
_DIFF = ("diff", "--no-color", "--no-ext-diff", "--no-textconv", "--find-renames", "--submodule=short")
_FILE_START = b"\ndiff --git "


@dataclass(frozen=True)
class GitState:
    """A working tree. ``diff`` is against ``commit``; ``cut`` says that it was longer than it may be."""

    commit: str
    branch: str | None
    remote: str | None
    diff: bytes
    cut: bool
    untracked: tuple[str, ...]

    @property
    def dirty(self) -> bool:
        """Whether tracked files differ from the commit, or untracked ones lie about."""
        return bool(self.diff or self.untracked)

    def tags(self) -> dict[str, str]:
        """MLflow's tags."""
        values = {
            "mlflow.source.git.commit": self.commit,
            "mlflow.source.git.branch": self.branch,
            "mlflow.source.git.repoURL": self.remote,
            "mlflow.source.git.dirty": str(self.dirty).lower(),
        }
        return {key: value for key, value in values.items() if value}

    def diff_file(self) -> bytes:
        """The diff under a heading that ``git apply`` skips."""
        lines = [f"# against commit {self.commit}"]
        if self.cut:
            lines.append(f"# cut: the diff has more than {MAX_DIFF_BYTES} bytes; files at its end are left out")
        if self.untracked:
            lines.append("# untracked, not in here:")
            lines += [f"#   {name}" for name in self.untracked[:MAX_LISTED_FILES]]
            if len(self.untracked) > MAX_LISTED_FILES:
                lines.append("#   …")
        return "\n".join(lines).encode() + b"\n" + self.diff


def read_git(folder: Path) -> GitState | None:
    """The working tree that a folder is in; None without git, a repository or a commit."""
    program = shutil.which("git")
    if program is None:
        return None
    git = _Git(program, folder)
    commit, root = git.line("rev-parse", "--verify", "HEAD"), git.line("rev-parse", "--show-toplevel")
    if commit is None or root is None:
        return None
    git = _Git(program, Path(root))
    diff = git.output(*_DIFF, commit, limit=MAX_DIFF_BYTES + 1) or b""
    return GitState(
        commit=commit,
        branch=git.line("symbolic-ref", "--short", "--quiet", "HEAD"),
        remote=_remote(git),
        diff=bounded_diff(diff, MAX_DIFF_BYTES),
        cut=len(diff) > MAX_DIFF_BYTES,
        untracked=_untracked(git),
    )


def bounded_diff(diff: bytes, limit: int) -> bytes:
    """At most ``limit`` bytes of a diff: whole files if possible, else whole lines."""
    if len(diff) <= limit:
        return diff
    kept = diff[:limit]
    last_file = kept.rfind(_FILE_START)
    end = last_file if last_file > 0 else kept.rfind(b"\n")
    return kept[: end + 1]


def _remote(git: _Git) -> str | None:
    url = git.line("remote", "get-url", "origin")
    if url is None:
        first = git.line("remote")
        url = None if first is None else git.line("remote", "get-url", "--", first)
    return None if url is None else strip_credentials(url)


def _untracked(git: _Git) -> tuple[str, ...]:
    listed = git.output(
        "ls-files", "--others", "--exclude-standard", "--directory", "--no-empty-directory", limit=512 * 1024
    )
    return tuple((listed or b"").decode(errors="replace").splitlines())[: MAX_LISTED_FILES + 1]


class _Git:
    """Runs git in a folder, with bounds on time and answer."""

    def __init__(self, program: str, folder: Path) -> None:
        self._command = (program, "-C", str(folder), *_OPTIONS)

    def line(self, *arguments: str) -> str | None:
        """The first line of the answer; None when git refuses or has nothing to say."""
        output = self.output(*arguments, limit=64 * 1024)
        lines = (output or b"").decode(errors="replace").splitlines()
        return lines[0].strip() if lines else None

    def output(self, *arguments: str, limit: int) -> bytes | None:
        """Up to ``limit`` bytes of the answer; None when git refuses or takes too long."""
        with subprocess.Popen(
            [*self._command, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            timer = threading.Timer(TIMEOUT_S, process.kill)
            timer.start()
            try:
                assert process.stdout is not None
                output = process.stdout.read(limit)
                if len(output) == limit:
                    process.kill()
                    return output
                return output if process.wait() == 0 else None
            finally:
                timer.cancel()
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
