"""Steering runs through the API: by the SDK's handle, and from the shell. Nothing executes runs here."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mlplat.cli import app
from mlplat.errors import InvalidInput, InvalidPipeline, NotFound
from mlplat.sdk.definition import pipeline, step
from mlplat.sdk.pipeline_runs import pipeline_run, submit


@step
def load(n: int) -> int:
    return n


@pipeline
def steered(n: int = 1, kind: str = "a") -> None:
    load(n)


Shell = Callable[..., tuple[int, str]]


@pytest.fixture
def shell(server_url: str, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("MLPLAT_URL", server_url)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: Any) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


@pytest.fixture
def name() -> str:
    return f"p-{uuid.uuid4().hex[:10]}"


def write(folder: Path, name: str, *, first: str = "json:dumps") -> Path:
    file = folder / "p.yaml"
    file.write_text(
        f"name: {name}\n"
        f"concurrency: {{key: {name}}}\n"
        "parameters:\n"
        "  n: {type: int, default: 1}\n"
        "  rate: {type: float, default: 0.5}\n"
        "steps:\n"
        f"  a: {{uses: '{first}', with: {{obj: '${{{{ params.n }}}}'}}}}\n"
        "  gate: {approval: {}, needs: [a]}\n"
    )
    return file


def submitted(shell: Shell, *arguments: Any) -> str:
    code, text = shell(*arguments)
    assert code == 0, text
    return text.split(": ")[1].split()[0]


def waiting(shell: Shell, file: Path, *arguments: Any) -> str:
    """A run that waits for another one to end, and so ends at once when it is cancelled."""
    submitted(shell, "submit", file)
    return submitted(shell, "submit", file, *arguments)


def test_submit_list_cancel_and_resume(shell: Shell, server_url: str, tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name)
    run_id = waiting(shell, file, "-p", "n=3", "--priority", "7")
    status = pipeline_run(run_id, server_url).status()
    assert (status["params"], status["priority"]) == ({"n": 3, "rate": 0.5}, 7)

    with pytest.raises(InvalidInput, match="cancel it, or wait for its end"):
        shell("resume", run_id)
    assert shell("cancel", run_id, "-m", "wrong data")[0] == 0
    assert pipeline_run(run_id, server_url).status()["state"] == "CANCELLED"

    edited = write(tmp_path, name, first="json:loads")
    again = submitted(shell, "resume", run_id, "--with", edited, "-p", "rate=1", "--from", "a")
    resumed = pipeline_run(again, server_url)
    assert resumed.status()["params"] == {"n": 3, "rate": 1.0}
    assert resumed.status()["resumed_from"] == run_id
    assert resumed.definition().steps["a"].uses == "json:loads"

    listed = shell("runs", "--pipeline", name)[1]
    assert run_id in listed
    assert again in listed
    only = shell("runs", "--pipeline", name, "--state", "cancelled")[1]
    assert (run_id in only, again in only) == (True, False)
    assert run_id not in shell("runs", "--pipeline", name, "--by", "nobody")[1]


def test_a_run_resumed_as_it_was_keeps_its_definition(shell: Shell, tmp_path: Path, name: str) -> None:
    run_id = waiting(shell, write(tmp_path, name), "-p", "n=3")
    shell("cancel", run_id)
    again = pipeline_run(run_id).resume(params={"n": 4})
    assert again.definition() == pipeline_run(run_id).definition()
    assert again.status()["params"] == {"n": 4, "rate": 0.5}


def test_the_same_key_resumes_once(shell: Shell, tmp_path: Path, name: str) -> None:
    run_id = waiting(shell, write(tmp_path, name))
    shell("cancel", run_id)
    key = uuid.uuid4().hex
    assert submitted(shell, "resume", run_id, "--key", key) == submitted(shell, "resume", run_id, "--key", key)


def test_what_cannot_be_done_is_told(shell: Shell, tmp_path: Path, name: str) -> None:
    run_id = submitted(shell, "submit", write(tmp_path, name))
    with pytest.raises(InvalidInput):
        shell("approve", run_id, "a")
    with pytest.raises((InvalidInput, NotFound), match="nothing"):
        shell("reject", run_id, "nothing")
    for command in ("cancel", "resume", "logs"):
        with pytest.raises(NotFound):
            shell(command, "0" * 12)
    with pytest.raises(InvalidInput, match="expected float"):
        shell("resume", run_id, "-p", "rate=fast")
    with pytest.raises(InvalidPipeline, match=r"parameters\.other: unknown"):
        shell("resume", run_id, "-p", "other=1")


def test_the_graph_of_a_run_has_its_states(shell: Shell, tmp_path: Path, name: str) -> None:
    run_id = submitted(shell, "submit", write(tmp_path, name))
    shell("cancel", run_id)
    code, text = shell("pipeline", "graph", run_id, "--format", "mermaid")
    assert code == 0
    assert '["a"]' in text


def test_a_python_pipeline_with_its_functions_and_priority(server_url: str) -> None:
    handle = submit(steered, {"n": 2}, priority=-3, url=server_url)
    assert (handle.status()["priority"], handle.status()["params"]) == (-3, {"n": 2, "kind": "a"})
    assert (handle.definition().steps["load"].uses or "").startswith("pickle:")
    handle.cancel("enough")
    (signal,) = handle.status()["signals"]
    assert (signal["kind"], signal["comment"]) == ("cancel", "enough")
    assert signal["by"] == handle.status()["submitted_by"] != ""
