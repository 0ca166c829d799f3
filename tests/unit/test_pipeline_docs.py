"""What docs/pipelines.md shows is true: its definitions are sound, its Python runs, its commands and fields exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlplat.cli import app
from mlplat.pipelines.loader import parse_yaml
from mlplat.pipelines.spec import Resources, Retry
from mlplat.sdk.pipeline_runs import check_pipeline
from mlplat.sdk.steps import StepOptions

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "pipelines.md").read_text()
BLOCKS = re.findall(r"(<!-- same: \w+ -->\n)?```(yaml|python)\n(.*?)```", TEXT, re.DOTALL)


def blocks(kind: str, *, same: bool | None = None) -> list[str]:
    return [text for mark, found, text in BLOCKS if found == kind and same in (None, bool(mark))]


def run_as_file(folder: Path, text: str) -> Path:
    file = folder / "example.py"
    file.write_text(text)
    return file


def test_the_blocks_are_found() -> None:
    assert (len(blocks("yaml")), len(blocks("python"))) == (2, 3)
    assert TEXT.count("```") == 2 * (len(BLOCKS) + 1)  # one shows what validate prints


@pytest.mark.parametrize("text", blocks("yaml"))
def test_definitions_are_sound(text: str) -> None:
    parse_yaml(text)


def test_both_forms_are_one_definition(tmp_path: Path) -> None:
    (yaml,), (python,) = blocks("yaml", same=True), blocks("python", same=True)
    assert check_pipeline(run_as_file(tmp_path, python)).to_json() == parse_yaml(yaml).to_json()


@pytest.mark.parametrize("text", blocks("python", same=False))
def test_the_python_runs(tmp_path: Path, text: str) -> None:
    namespace = {"__name__": "example"}
    exec(compile(text, str(run_as_file(tmp_path, text)), "exec"), namespace)
    assert "run" in namespace


def test_the_commands_exist() -> None:
    named = {tuple(words.split()) for words in re.findall(r"`mlplat ((?:pipeline )?[a-z]+)", TEXT)}
    assert len(named) >= 8
    for words in named:
        assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0, words


def test_the_fields_exist() -> None:
    retry = re.search(r"`retry: \{([\w, ]+)\}`", TEXT)
    resources = re.search(r"`resources: \{([\w, ]+)\}`", TEXT)
    assert retry is not None
    assert resources is not None
    assert retry[1].split(", ") == list(Retry.model_fields)
    assert resources[1].split(", ") == list(Resources.model_fields)
    for option in StepOptions.__annotations__:
        assert option in TEXT
