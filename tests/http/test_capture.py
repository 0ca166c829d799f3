"""Runs that record by themselves, from their own processes through a real port to the stores and back."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import uvicorn

from mlplat.artifacts.console import FOLDER, Cursor, decode_cursor, encode_cursor
from mlplat.artifacts.segments import Place
from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput
from mlplat.execution.capture import log_folder
from mlplat.sdk.capture.environment import installed_packages
from mlplat.tracking.model import ATTEMPT_TAG
from tests.contract.chdb import unique
from tests.http.conftest import MLflow, Stack, expect_error

INVALID = "INVALID_PARAMETER_VALUE"
#: Waits until the platform has what was printed, then is killed.
KILLED = """
import os, signal, sys, time
import mlplat
from mlplat.sdk.console import console_text
run = mlplat.start_run("crashes")
print(run.run_id, flush=True)
print("épreuve")
print("to stderr", file=sys.stderr)
deadline = time.monotonic() + 60
while "to stderr" not in "".join(console_text(run._client, run.run_id)) and time.monotonic() < deadline:
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""
RAISES = """
import mlplat
with mlplat.start_run("crashes") as run:
    print(run.run_id)
    for percent in range(100):
        print(f"\\r{percent}%", end="")
    raise ValueError("the reason")
"""
NEVER_FINISHED = """
import mlplat
run = mlplat.start_run("crashes")
print(run.run_id)
raise ValueError("at top level")
"""
NOTEBOOK = """
import sys
import nbformat
from nbclient import NotebookClient
code = (
    "import mlplat, sys\\n"
    "with mlplat.start_run('notebook') as run:\\n"
    "    print('from a cell')\\n"
    "    print('to stderr', file=sys.stderr)\\n"
    "print(run.run_id)"
)
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
NotebookClient(notebook, timeout=100, kernel_name="python3").execute()
outputs = [output.text for output in notebook.cells[0].outputs if output.name == "stdout"]
print("".join(outputs).split()[-1])
"""
RICH = """
import sys
import numpy as np
import mlplat
from matplotlib.figure import Figure
with mlplat.start_run("rich") as run:
    print(run.run_id)
    run.log_text("grüße", "notes/a.txt")
    run.log_dict({"a": [1]}, "config.json")
    run.log_figure(Figure(), "plots/empty.svg")
    run.log_image(np.zeros((2, 3), np.uint8), "images/black.png")
    print(run.log_table("predictions", [{"x": 1}, {"x": 2, "y": "b"}], step=3))
    run.log_table("predictions", {"x": [7]}, step=4)
    for path in ("../x", "/x", "a/../../x"):
        try:
            run.log_text("x", path)
        except mlplat.errors.InvalidInput:
            continue
        raise AssertionError(path)
"""
PLAIN = """
import mlplat
with mlplat.start_run("plain", tags={"mlflow.source.name": "mine"}) as run:
    print(run.run_id)
"""
NOTHING = """
import mlplat
with mlplat.start_run("nothing", capture=mlplat.Capture.nothing()) as run:
    print(run.run_id)
"""


IN_A_STEP = """
import mlplat
from mlplat.sdk.context import StepContext, enter_step
other = mlplat.start_run("step", capture=mlplat.Capture.nothing())
other.finish()
enter_step(StepContext("p", "0" * 32, "train", None, 1, 1, other._outbox.url, None, print))
with mlplat.start_run("step") as plain:
    print(plain.run_id)
with mlplat.start_run("step", capture=mlplat.Capture(console=True)) as asked:
    print(asked.run_id)
with mlplat.resume_run(other.run_id, capture=mlplat.Capture()) as joined:
    print(joined.run_id)
"""


@pytest.fixture(scope="module")
async def url(stack: Stack) -> AsyncIterator[str]:
    """The stack's app on a port."""
    server = uvicorn.Server(uvicorn.Config(stack.app, host="127.0.0.1", port=0, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
        assert not serving.done()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await serving


async def python(
    program: str, url: str, folder: Path, *arguments: str, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program against the app."""
    script = folder / "train.py"
    script.write_text(program)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "MLPLAT_URL": url, "HOME": str(folder)}
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(script), *arguments],
        env=environment | extra, cwd=folder, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip


async def run_data(mlflow: MLflow, run_id: str) -> tuple[dict[str, Any], dict[str, str]]:
    run = (await mlflow.call("GET", "runs/get", run_id=run_id))["run"]
    return run["info"], {tag["key"]: tag["value"] for tag in run["data"].get("tags", [])}


class Files:
    """A run's artifacts."""

    def __init__(self, store: ArtifactStore, info: dict[str, Any]) -> None:
        self._store = store
        self._root = info["artifact_uri"].removeprefix("mlflow-artifacts:/")

    def names(self, folder: str = "") -> list[str]:
        return [entry.path for entry in self._store.list(f"{self._root}/{folder}".rstrip("/"))]

    def read(self, path: str) -> bytes:
        return b"".join(self._store.read(f"{self._root}/{path}"))


async def console(http: httpx.AsyncClient, run_id: str, **query: Any) -> dict[str, Any]:
    response = await http.get(f"/api/v1/runs/{run_id}/console", params=query)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_a_killed_process_leaves_what_it_had_sent(
    url: str, http: httpx.AsyncClient, mlflow: MLflow, tmp_path: Path
) -> None:
    done = await python(KILLED, url, tmp_path)
    assert done.returncode == -9, done.stderr
    run_id = done.stdout.split()[0]
    assert (await console(http, run_id))["text"].split("\n")[:3] == [run_id, "épreuve", "to stderr"]
    assert (await console(http, run_id))["running"]


async def test_an_error_that_ends_a_run_is_in_its_console(
    url: str, http: httpx.AsyncClient, mlflow: MLflow, tmp_path: Path
) -> None:
    done = await python(RAISES, url, tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("ValueError: the reason") == 1
    run_id = done.stdout.split()[0]
    answer = await console(http, run_id)
    assert not answer["running"]
    assert answer["text"].startswith(f"{run_id}\n99%")
    assert answer["text"].endswith("ValueError: the reason\n")
    assert (await run_data(mlflow, run_id))[0]["status"] == "FAILED"


async def test_a_process_that_never_finishes_its_run_still_sends_its_last_words(
    url: str, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    done = await python(NEVER_FINISHED, url, tmp_path)
    assert done.returncode == 1
    assert (await console(http, done.stdout.split()[0]))["text"].endswith("ValueError: at top level\n")


async def test_a_notebook_is_recorded_like_a_script(
    url: str, http: httpx.AsyncClient, mlflow: MLflow, tmp_path: Path
) -> None:
    done = await python(NOTEBOOK, url, tmp_path, JPY_SESSION_NAME="study.ipynb")
    assert done.returncode == 0, done.stderr
    run_id = done.stdout.split()[-1]
    assert (await console(http, run_id))["text"] == "from a cell\nto stderr\n"
    _info, tags = await run_data(mlflow, run_id)
    assert (tags["mlflow.source.name"], tags["mlflow.source.type"]) == ("study.ipynb", "NOTEBOOK")


async def test_code_and_environment(url: str, stack: Stack, mlflow: MLflow, tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t.test"]
    (tmp_path / "train.py").write_text("old\n")
    for arguments in (["init", "-q", "-b", "trunk"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    done = await python(PLAIN, url, tmp_path, "--token", "secret-value", "--rate=1")
    assert done.returncode == 0, done.stderr
    info, tags = await run_data(mlflow, done.stdout.split()[0])
    files = Files(stack.services.artifacts, info)
    assert files.names("mlplat") == ["code.diff", "console", "environment.json", "requirements.txt"]
    assert b"+import mlplat" in files.read("mlplat/code.diff")
    environment = json.loads(files.read("mlplat/environment.json"))
    assert environment["working_directory"] == str(tmp_path)
    assert environment["command"].endswith("train.py --token '[hidden]' --rate=1")
    assert "secret-value" not in json.dumps(environment)
    lines = files.read("mlplat/requirements.txt").decode().splitlines()
    assert len(lines) == len(environment["packages"]) == len(installed_packages())
    assert tags["mlflow.source.name"] == "mine"
    assert tags["mlflow.source.type"] == "LOCAL"
    assert tags["mlflow.user"] == environment["user"]
    assert tags["mlflow.source.git.branch"] == "trunk"
    assert tags["mlflow.source.git.dirty"] == "true"
    assert len(tags["mlflow.source.git.commit"]) == 40


async def test_rich_values(url: str, stack: Stack, mlflow: MLflow, tmp_path: Path) -> None:
    done = await python(RICH, url, tmp_path, MLPLAT_CAPTURE="false")
    assert done.returncode == 0, done.stderr
    run_id, path = done.stdout.split()
    info, tags = await run_data(mlflow, run_id)
    files = Files(stack.services.artifacts, info)
    assert files.names() == ["config.json", "images", "notes", "plots", "tables"]
    assert files.read("notes/a.txt").decode() == "grüße"
    assert json.loads(files.read("config.json")) == {"a": [1]}
    assert b"<svg" in files.read("plots/empty.svg")
    assert files.read("images/black.png").startswith(b"\x89PNG")
    assert path == "tables/predictions/000000000003.parquet"
    assert pq.read_table(io.BytesIO(files.read(path))).to_pydict() == {"x": [1, 2], "y": [None, "b"]}
    newest = {"path": "tables/predictions/000000000004.parquet", "type": "table"}
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [newest]


async def test_nothing_is_recorded_where_it_is_off(url: str, stack: Stack, mlflow: MLflow, tmp_path: Path) -> None:
    done = await python(NOTHING, url, tmp_path)
    info, tags = await run_data(mlflow, done.stdout.split()[0])
    assert Files(stack.services.artifacts, info).names() == []
    assert set(tags) == {"mlflow.runName"}


async def test_system_metrics_arrive(url: str, mlflow: MLflow, tmp_path: Path) -> None:
    program = (
        "import time, mlplat\n"
        "with mlplat.start_run('system', capture=mlplat.Capture(console=False, node='n1')) as run:\n"
        "    print(run.run_id)\n"
        "    deadline = time.monotonic() + 60\n"
        "    while time.monotonic() < deadline:\n"
        "        found = run._client.get('/api/2.0/mlflow/runs/get', run_id=run.run_id)['run']['data']\n"
        "        if found.get('metrics'):\n"
        "            break\n"
        "        time.sleep(0.1)\n"
        "    run.log({'loss': 1.0})\n"
    )
    done = await python(program, url, tmp_path, MLPLAT_CAPTURE_SYSTEM_INTERVAL_S="1")
    assert done.returncode == 0, done.stderr
    metrics = (await mlflow.data(done.stdout.split()[0]))["metrics"]
    assert metrics["system/n1/system_memory_usage_megabytes"] > 0
    assert 0 <= metrics["system/n1/cpu_utilization_percentage"] <= 100
    history = await mlflow.call("GET", "metrics/get-history", run_id=done.stdout.split()[0], metric_key="loss")
    assert history["metrics"][0]["step"] == 0


async def test_a_run_goes_on_without_files_it_cannot_write(url: str, tmp_path: Path) -> None:
    program = (
        "import mlplat\n"
        "from mlplat.sdk.files import RunFiles\n"
        "def refuse(*arguments): raise mlplat.errors.InvalidInput('no')\n"
        "RunFiles.put = refuse\n"
        "with mlplat.start_run('refused') as run:\n"
        "    print('fine')\n"
    )
    done = await python(program, url, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


@pytest.fixture
async def printed(stack: Stack, mlflow: MLflow) -> tuple[str, str]:
    """A run and its console's folder in the store."""
    run_id = await mlflow.run()
    info, _tags = await run_data(mlflow, run_id)
    return run_id, f"{info['artifact_uri'].removeprefix('mlflow-artifacts:/')}/{FOLDER}"


async def test_a_console_is_read_in_parts(stack: Stack, http: httpx.AsyncClient, printed: tuple[str, str]) -> None:
    run_id, folder = printed
    assert (await console(http, run_id))["text"] == ""
    text = "".join(f"zeile ä{number}\n" for number in range(1_000))
    body = text.encode()
    cut = 5_000
    for number, part in enumerate((body[:cut], body[cut:]), 1):
        stack.services.artifacts.write(f"{folder}/host-1/{number:06d}.log", [part])
    found, cursor = [], ""
    while True:
        answer = await console(http, run_id, after=cursor, limit=1_024)
        found.append(answer["text"])
        cursor = answer["cursor"]
        if not answer["more"]:
            break
    assert "".join(found) == text
    assert len(found) > 10
    assert (await console(http, run_id, after=cursor))["text"] == ""
    stack.services.artifacts.write(f"{folder}/host-1/000002.log", [body[cut:] + b"more \xc3"])
    answer = await console(http, run_id, after=cursor)
    assert answer["text"] == "more "
    stack.services.artifacts.write(f"{folder}/host-1/000002.log", [body[cut:] + b"more \xc3\xbc\n"])
    assert (await console(http, run_id, after=answer["cursor"]))["text"] == "ü\n"


async def test_each_process_is_named_where_its_part_begins(
    stack: Stack, http: httpx.AsyncClient, printed: tuple[str, str]
) -> None:
    run_id, folder = printed
    for process in ("a-1", "b-2"):
        stack.services.artifacts.write(f"{folder}/{process}/000001.log", [f"{process}: hello".encode()])
    answer = await console(http, run_id)
    assert answer["text"] == "── a-1\na-1: hello\n── b-2\nb-2: hello"
    stack.services.artifacts.write(f"{folder}/b-2/000002.log", [b" again\n"])
    assert (await console(http, run_id, after=answer["cursor"]))["text"] == " again\n"
    assert (await console(http, run_id, process="a-1"))["text"] == "a-1: hello"


async def test_the_log_of_the_attempt_is_the_console_of_its_runs(
    stack: Stack, http: httpx.AsyncClient, mlflow: MLflow
) -> None:
    pipeline_run = unique("p").replace("-", "")
    label = f"{pipeline_run}/train/-1/2"
    run_id = await mlflow.run("0", tags=[{"key": ATTEMPT_TAG, "value": label}])
    artifacts = stack.services.artifacts
    artifacts.write(f"{log_folder(pipeline_run, 'train', -1, 2)}/000001.log", [b"of the step\n"])
    artifacts.write(f"{log_folder(pipeline_run, 'train', -1, 1)}/000001.log", [b"of another attempt\n"])
    answer = await console(http, run_id)
    assert answer["text"] == "of the step\n"
    info, _tags = await run_data(mlflow, run_id)
    artifacts.write(f"{info['artifact_uri'].removeprefix('mlflow-artifacts:/')}/{FOLDER}/rank-1/000001.log", [b"1\n"])
    assert (await console(http, run_id, after=answer["cursor"]))["text"] == "── rank-1\n1\n"
    assert (await console(http, run_id, process=label))["text"] == "of the step\n"


@pytest.mark.parametrize("label", ["", "x", "../../a/b/1/1", "a/b/c/1", "a/../-1/1", "a/b/-1/1/2"])
async def test_a_tag_that_names_no_attempt_gives_no_log(http: httpx.AsyncClient, mlflow: MLflow, label: str) -> None:
    run_id = await mlflow.run("0", tags=[{"key": ATTEMPT_TAG, "value": label}])
    assert (await console(http, run_id))["text"] == ""


async def test_inside_of_a_step_the_console_is_off_unless_asked_for(
    url: str, stack: Stack, mlflow: MLflow, tmp_path: Path
) -> None:
    done = await python(IN_A_STEP, url, tmp_path)
    assert done.returncode == 0, done.stderr
    plain, asked, joined = done.stdout.split()
    for run_id, expected in ((plain, False), (asked, True), (joined, True)):
        info, _tags = await run_data(mlflow, run_id)
        assert ("console" in Files(stack.services.artifacts, info).names("mlplat")) is expected


@pytest.mark.parametrize("after", ["nonsense", "bnVsbA", "W10", "WyIiLCB7ImEiOiBbLTEsIDBdfV0", "x" * 13_000])
async def test_a_bad_cursor_is_400(http: httpx.AsyncClient, printed: tuple[str, str], after: str) -> None:
    response = await http.get(f"/api/v1/runs/{printed[0]}/console", params={"after": after})
    assert (response.status_code, response.json()["error_code"]) == (400, INVALID)


async def test_an_unknown_run_is_404(http: httpx.AsyncClient) -> None:
    response = await http.get(f"/api/v1/runs/{unique('none')}/console")
    expect_error(response, 404, "RESOURCE_DOES_NOT_EXIST", "not found")


def test_cursors_survive_as_text() -> None:
    cursor = Cursor({"host-1": Place(3, 17), "ü-2": Place()}, "host-1")
    assert decode_cursor(encode_cursor(cursor)) == cursor
    assert decode_cursor("") == Cursor()
    with pytest.raises(InvalidInput, match="not a cursor"):
        decode_cursor(encode_cursor(cursor)[:-3])


async def test_the_command_follows_a_run_to_its_end(
    url: str, printed: tuple[str, str], stack: Stack, mlflow: MLflow
) -> None:
    run_id, folder = printed
    stack.services.artifacts.write(f"{folder}/host-1/000001.log", [b"first\n"])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mlplat.cli", "console", run_id, "--follow",
        stdout=asyncio.subprocess.PIPE, env={"PYTHONPATH": ":".join(sys.path), "MLPLAT_URL": url},
    )  # fmt: skip
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 100) == b"first\n"
    stack.services.artifacts.write(f"{folder}/host-1/000002.log", [b"second\n"])
    await mlflow.call("POST", "runs/update", run_id=run_id, status="FINISHED", end_time=5)
    assert await asyncio.wait_for(process.stdout.read(), 100) == b"second\n"
    assert await process.wait() == 0
