"""docs/artifacts.md: its snippets run; those with Ray do so in ``tests/e2e/test_ray_storage.py``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.http.sdk import user
from tests.http.served import Served

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "artifacts.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


async def test_the_snippets_run(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = [body for body in SNIPPETS if "ray" not in body]
    assert own

    def run_all() -> None:
        for body in own:
            exec(compile(body, "docs/artifacts.md", "exec"), {})

    await user(run_all)
    assert (tmp_path / "copy" / "notes.txt").read_text() == "three rows"
