"""``mlplat backup`` and ``mlplat restore``: what they take and what they refuse, before anything is started."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.backing_up import back_up
from mlplat.cli import app
from mlplat.errors import BringUpError, InvalidInput
from mlplat.settings import Settings

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "backup.md").read_text()
LINES = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", LINES)
def test_the_documented_commands_are_understood(line: str) -> None:
    command, *arguments = shlex.split(line, comments=True)
    assert command == "mlplat"
    result = CliRunner().invoke(app, [*arguments, "--help"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["backup", "x", "--list", "--verify"], "are two commands"),
        (["backup", "x", "--at", "2026-01-31"], "--at is for --verify"),
        (["backup", "x", "--verify", "--at", "soon"], "--at: expected a backup's name or a time"),
        (["restore", "x", "--at", "soon"], "--at: expected a backup's name or a time"),
        (["backup", "http://x/y"], "a folder or at s3://"),
        (["restore", "ftp://x"], "a folder or at s3://"),
        (["backup", "x", "--verify"], "x: there is no complete backup"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, InvalidInput)
    assert expected in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_no_backups_are_an_empty_list(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["backup", str(tmp_path), "--list", "--json"])
    assert (result.exit_code, result.stdout) == (0, "[]\n")


@pytest.mark.parametrize(
    ("artifacts", "place", "refused"),
    [
        ("s3://bucket/all", "s3://bucket/all/backups", True),
        ("s3://bucket/artifacts", "s3://bucket", True),
        ("s3://bucket/a/artifacts/x", "s3://bucket/a", True),
        ("s3://bucket/a", "s3://bucket/ab", False),
        ("s3://bucket/files", "s3://bucket", False),
        ("file:///nowhere/artifacts", "file:///nowhere", True),
        ("file:///nowhere/files", "file:///nowhere", False),
    ],
)
def test_backups_and_artifacts_do_not_lie_in_one_another(
    artifacts: str, place: str, refused: bool, tmp_path: Path
) -> None:
    settings = Settings(state_dir=tmp_path / "state", artifacts_url=artifacts)
    with pytest.raises(InvalidInput if refused else BringUpError, match="one would go" if refused else "not running"):
        back_up(settings, place)
