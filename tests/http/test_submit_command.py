"""What ``mlplat submit`` says of bad input; nothing of it is submitted."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlplat.cli import app
from mlplat.errors import InvalidInput
from mlplat.sdk.client import Client
from tests.sums import CODE, GOOD, HELPER


def _edit(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("definition", "arguments", "expected"),
    [
        (GOOD, ["-p", "name=x", "-p", "colour=red"], "parameters.colour: unknown"),
        (GOOD, ["-p", "name=x", "-p", "count=many"], "parameters.count: expected int, got 'many'"),
        (GOOD, ["-p", "name=x", "-p", "count=0"], "parameters.count: must be at least 1"),
        (GOOD, [], "parameters.name: required"),
        (
            _edit("    uses: sums:numbers\n", "    uses: sums:numbers\n    needs: [report]\n"),
            ["-p", "name=x"],
            "wait for one another",
        ),
        (
            _edit("    uses: sums:numbers\n", "    uses: sums:numbers\n    needs: [fetch]\n"),
            ["-p", "name=x"],
            "sums.yaml:8: steps.numbers.needs.0: unknown step 'fetch'",
        ),
        (
            _edit("steps.double.output", "steps.doubel.output"),
            ["-p", "name=x"],
            "sums.yaml:16: steps.report.with.values: unknown step 'doubel'; did you mean 'double'?",
        ),
        (_edit("name: sums", "name: [sums"), ["-p", "name=x"], "not readable as YAML"),
        (
            _edit("uses: sums:report", "uses: sums:repport"),
            ["-p", "name=x"],
            "steps.report: module 'sums' has no function 'repport'",
        ),
    ],
)
def test_bad_input_is_refused(
    server_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    definition: str,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.setenv("MLPLAT_URL", server_url)
    monkeypatch.chdir(tmp_path)
    module = f"sums_{uuid.uuid4().hex[:8]}"  # two modules of one name in a process would be one another's
    (tmp_path / "sums.yaml").write_text(definition.replace("uses: sums:", f"uses: {module}:"))
    (tmp_path / f"{module}.py").write_text(CODE)
    (tmp_path / "helper.py").write_text(HELPER)
    client = Client(server_url)
    before = client.get("/api/v1/pipeline-runs")
    result = CliRunner().invoke(app, ["submit", "sums.yaml", *arguments])
    assert isinstance(result.exception, InvalidInput), result.output
    assert expected.replace("module 'sums'", f"module {module!r}") in str(result.exception)
    assert client.get("/api/v1/pipeline-runs") == before
