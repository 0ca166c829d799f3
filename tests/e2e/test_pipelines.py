"""Pipelines as their users run them: the CLI, Python files, a notebook, a Ray job."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from mlplat.demo.show import PIPELINE
from mlplat.sdk.client import Client
from tests.platform import ROOT, Platform
from tests.sums import CODE, GOOD, HELPER


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder as a user has it: a definition, its code, a helper, and an unlucky file name."""
    (tmp_path / "sums.yaml").write_text(GOOD)
    (tmp_path / "sums.py").write_text(CODE)
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "actors.py").write_text("raise ImportError('shadowed')\n")
    return tmp_path


def test_submit_wait_runs_and_logs(platform: Platform, project: Path) -> None:
    output = platform.mlplat("submit", "sums.yaml", "-p", "name=Ada", "-p", "count=4", "--wait", cwd=project)
    assert "succeeded" in output
    assert "retrying after: RuntimeError: flaky on purpose" in output or "SUCCEEDED 4/4" in output
    run_id = output.split("submitted sums: ")[1].split()[0]
    assert run_id in platform.mlplat("runs")
    logs = platform.mlplat("logs", run_id)
    assert "making 4" in logs
    assert "hello Ada [0, 2, 4, 6]" in logs
    assert "double[1] · attempt 1 · FAILED" in logs
    assert "double[1] · attempt 2 · SUCCEEDED" in logs
    assert "making" not in platform.mlplat("logs", run_id, "--step", "report")


def test_a_python_file_with_a_pipeline(platform: Platform, project: Path) -> None:
    (project / "flow.py").write_text(
        textwrap.dedent("""\
        import helper
        from mlplat import pipeline, step

        @step
        def one(start: int) -> dict:
            return {"values": [start, helper.twice(start)]}

        @step
        def add(values: list, extra: object) -> int:
            print("sum of", values, type(extra).__name__)
            return sum(values)

        @step
        def opaque() -> object:
            return {1, 2, 3}

        @pipeline(name="flow")
        def flow(start: int = 5):
            add(one(start)["values"], opaque())
        """)
    )
    output = platform.mlplat("submit", "flow.py", "-p", "start=7", "--wait", cwd=project)
    run_id = output.split("submitted flow: ")[1].split()[0]
    assert "sum of [7, 14] set" in platform.mlplat("logs", run_id)


def test_a_step_that_logs_loads_nothing_of_the_server(platform: Platform, project: Path) -> None:
    """It holds handles of the executor's and the shard's actors."""
    (project / "light.py").write_text(
        textwrap.dedent("""\
        import sys

        import mlplat
        from mlplat import pipeline, step

        @step
        def train() -> None:
            with mlplat.start_run() as run:
                run.log({"loss": 0.5})
            loaded = {"sqlalchemy", "psycopg", "alembic", "fastapi", "clickhouse_connect"} & set(sys.modules)
            print("loaded of the server:", sorted(loaded), "of Ray:", "ray" in sys.modules)

        @pipeline(name="light")
        def light():
            train()
        """)
    )
    output = platform.mlplat("submit", "light.py", "--wait", cwd=project)
    run_id = output.split("submitted light: ")[1].split()[0]
    assert "loaded of the server: [] of Ray: True" in platform.mlplat("logs", run_id)


def test_one_idempotency_key_gives_one_run(platform: Platform, project: Path) -> None:
    arguments = ("submit", "sums.yaml", "-p", "name=Bo", "--key", "once")
    first, second = (platform.mlplat(*arguments, cwd=project) for _ in range(2))
    assert first == second
    other = platform.run("submit", "sums.yaml", "-p", "name=Cy", "--key", "once", cwd=project)
    assert other.returncode == 1
    assert "idempotency key 'once' belongs to run" in other.stderr


def test_a_failing_pipeline_says_what_failed(platform: Platform, project: Path) -> None:
    (project / "sums.py").write_text(CODE.replace("return list(range(count))", "raise ValueError('no numbers today')"))
    done = platform.run("submit", "sums.yaml", "-p", "name=Ada", "--wait", cwd=project)
    assert done.returncode == 1
    assert "step 'numbers' failed: ValueError: no numbers today" in done.stderr
    assert "Traceback" not in done.stderr
    run_id = done.stdout.split("submitted sums: ")[1].split()[0]
    logs = platform.mlplat("logs", run_id)
    assert 'sums.py", line 6, in numbers' in logs
    assert "attempt.py" not in logs


@pytest.mark.parametrize(
    ("uses", "expected"),
    [
        ("no_such_module:report", "steps.report.uses: cannot import 'no_such_module'"),
        (
            "mlplat.demo.digits:nothing",
            "steps.report.uses: module 'mlplat.demo.digits' has no function 'nothing'",
        ),
    ],
)
def test_what_the_platform_cannot_import_is_refused_at_submit(
    platform: Platform, project: Path, uses: str, expected: str
) -> None:
    (project / "sums.yaml").write_text(GOOD.replace("sums:report", uses))
    client = Client(platform.url)
    before = client.get("/api/v1/pipeline-runs")
    done = platform.run("submit", "sums.yaml", "-p", "name=x", cwd=project)
    assert done.returncode == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert client.get("/api/v1/pipeline-runs") == before


def test_the_notebook_runs(platform: Platform) -> None:
    notebook = nbformat.reads((ROOT / "notebooks" / "01_quickstart.ipynb").read_text(), as_version=4)
    environment = platform.environment | {"MLPLAT_URL": platform.url}
    client = NotebookClient(notebook, timeout=150, kernel_name="python3")
    saved = dict(os.environ)
    try:
        os.environ.update(environment)  # the kernel inherits this process' environment
        client.execute()
    finally:
        os.environ.clear()
        os.environ.update(saved)
    outputs = [
        output.get("data", {}).get("text/plain", "") for cell in notebook.cells for output in cell.get("outputs", [])
    ]
    assert "('SUCCEEDED', 285)" in outputs
    assert any("'alias': 'champion'" in text for text in outputs)


def test_the_demo_pipeline_runs_as_a_ray_job(platform: Platform) -> None:
    exports = platform.mlplat("env")
    environment = platform.environment
    for line in exports.splitlines():
        name, _equals, value = line.removeprefix("export ").partition("=")
        environment[name] = value.strip("'")
    command = [sys.executable, "-m", "mlplat.cli", "submit", str(PIPELINE), "--wait", "-p", "trials=2", "-p", "folds=2"]
    ray = Path(sys.executable).with_name("ray")
    done = subprocess.run(
        [str(ray), "job", "submit", "--", *command],
        env=environment,
        cwd=platform.state_dir,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
