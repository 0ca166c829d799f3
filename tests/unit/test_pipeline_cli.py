"""``mlplat pipeline``: what needs no platform."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlplat.cli import app
from mlplat.cli.pipelines import states_of
from mlplat.pipelines.graph import StepState

YAML = """\
name: small
steps:
  load: {uses: "json:dumps", with: {obj: 1}}
  show: {command: "echo $X", with: {X: "${{ steps.load.output }}"}}
"""
PYTHON = """\
from mlplat import pipeline, step

@step
def load(n: int) -> int:
    return n

@pipeline
def inner(n: int):
    load(n)

@pipeline
def outer(n: int = 1):
    inner(n)
"""


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["pipeline", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    file = tmp_path / "p.yaml"
    file.write_text(YAML)
    return file


def test_the_schema_knows_every_field_by_the_name_that_it_has_in_yaml() -> None:
    code, text = run("schema")
    schema = json.loads(text)
    assert code == 0
    assert schema["$ref"] == "#/$defs/PipelineSpec"
    assert set(schema["$defs"]["PipelineSpec"]["properties"]) >= {"name", "steps", "finally", "outputs", "concurrency"}
    assert set(schema["$defs"]["Step"]["properties"]) >= {"with", "when", "foreach", "retry", "pipeline", "approval"}
    assert schema["$defs"]["Step"]["additionalProperties"] is False
    assert {"type": "string"}.items() <= schema["$defs"]["Step"]["properties"]["pipeline"]["anyOf"][-1].items()


def test_a_sound_definition(yaml_file: Path) -> None:
    code, text = run("validate", yaml_file)
    assert (code, "small is sound: 2 steps" in text) == (0, True)


def test_each_problem_has_a_line(yaml_file: Path) -> None:
    yaml_file.write_text(YAML.replace("load.output", "laod.output").replace("obj: 1", "obj: '${{ params.n }}'"))
    assert run("validate", yaml_file) == (
        1,
        f"{yaml_file}:3: steps.load.with.obj: unknown parameter 'n'; there is none\n"
        f"{yaml_file}:4: steps.show.with.X: unknown step 'laod'; did you mean 'load'?\n",
    )
    assert run("validate", yaml_file.with_name("none.yaml"))[0] == 1


def test_a_python_file_with_a_pipeline_in_a_pipeline(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(PYTHON)
    assert "outer is sound" in run("validate", file)[1]
    assert "inner is sound" in run("validate", f"{file}:inner")[1]
    code, text = run("validate", f"{file}:other")
    assert (code, "found inner, outer; train.py:NAME names the one you mean" in text) == (1, True)
    file.write_text(PYTHON.replace("    inner(n)\n", "    load(n)\n"))
    assert "expected one @pipeline function that is no part of another" in run("validate", file)[1]


def test_a_python_file_that_fails_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "fails.py"
    file.write_text("x = 1\nx / 0\n")
    assert run("validate", file) == (1, f"{file}:2: cannot be imported: ZeroDivisionError: division by zero\n")


def test_graphs(yaml_file: Path, tmp_path: Path) -> None:
    assert run("graph", yaml_file) == (0, "load\nshow  ← load  (command)\n")
    assert run("graph", yaml_file, "--format", "mermaid")[1].startswith("flowchart TD\n")
    assert run("graph", yaml_file, "-o", tmp_path / "p.svg") == (0, "")
    assert (tmp_path / "p.svg").read_text().startswith("<svg ")
    assert run("graph", yaml_file, "-o", tmp_path / "p.mmd")[0] == 0
    assert (tmp_path / "p.mmd").read_text().startswith("flowchart TD\n")


def test_states_of_a_run_and_of_those_inside_it() -> None:
    child = {"attempts": [], "steps": {"deep": {"state": "FAILED", "items": None}}}
    status = {
        "attempts": [
            {"step": "sub", "item": None, "child_id": "c1"},
            {"step": "sub", "item": None, "child_id": "c2"},
            {"step": "fan", "item": 0, "child_id": None},
            {"step": "fan", "item": None, "child_id": None},
        ],
        "steps": {
            "sub": {"state": "FAILED", "items": None},
            "fan": {"state": "RUNNING", "items": [{"state": "SUCCEEDED"}, {"state": "RUNNING"}]},
        },
    }
    assert states_of(status, {"c2": child}.__getitem__) == {
        "sub": StepState("FAILED", None, {"deep": StepState("FAILED")}),
        "fan": StepState("RUNNING", (1, 2)),
    }
