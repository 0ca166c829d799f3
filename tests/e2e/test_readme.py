"""The README's Python runs, and its commands exist."""

from __future__ import annotations

import re

import pytest

from tests.platform import ROOT, Platform

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.split("\n")[2][:20] or "snippet")
def test_a_snippet_runs(platform: Platform, snippet: str) -> None:
    platform.python(snippet)


def test_the_snippets_are_found() -> None:
    assert len(SNIPPETS) == 4


def test_the_commands_exist(platform: Platform) -> None:
    named = set(re.findall(r"`mlplat ([a-z |]+)", README))
    commands = {word for text in named for word in re.split(r"[| ]+", text.strip()) if word}
    assert commands
    for command in commands:
        assert "Usage:" in platform.mlplat(command, "--help")


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE)) <= targets
