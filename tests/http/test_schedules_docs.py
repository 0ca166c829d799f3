"""docs/schedules.md: its snippets run, in their order."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlplat.cli import app
from tests.http.conftest import Stack
from tests.http.served import Served

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "schedules.md").read_text()
SNIPPETS = re.findall(r"```(yaml|sh|python)\n(.*?)```", TEXT, re.DOTALL)


def run_command(line: str) -> None:
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, timeout=10).stdout
    command, *arguments = words.decode().rstrip("\0").split("\0")
    assert command == "mlplat"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (line, result.output, result.exception)


def run_all() -> None:
    for kind, body in SNIPPETS:
        if kind == "yaml":
            Path("report.yaml").write_text(body)
        elif kind == "python":
            exec(compile(body, "docs/schedules.md", "exec"), {})
        else:
            for line in body.splitlines():
                run_command(line)


@pytest.fixture
async def nothing_left(stack: Stack) -> AsyncIterator[None]:
    """Other tests register models too."""
    yield
    store = stack.services.automation
    for trigger in await store.find_triggers(1_000, 0):
        if f" {trigger.name} " in TEXT or f'"{trigger.name}"' in TEXT:
            await store.delete_trigger(trigger.name)
    await store.delete_schedule("nightly")


@pytest.mark.usefixtures("nothing_left")
async def test_the_snippets_run(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [kind for kind, _body in SNIPPETS] == ["yaml", "sh", "python", "sh", "python", "sh", "python"]
    await asyncio.to_thread(run_all)
