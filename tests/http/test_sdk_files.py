"""Files of runs, logged and recorded, while the platform is away, comes back, or falters halfway."""

from __future__ import annotations

import asyncio
import getpass
import json
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest

import mlplat
from mlplat.errors import InvalidInput, Unavailable
from mlplat.sdk.capture.node import host_name
from mlplat.sdk.process import this_process
from mlplat.sdk.spool import folder_bytes
from tests.contract.chdb import unique
from tests.http.conftest import MLflow, Stack
from tests.http.sdk import ended, history, info, python, sync, user
from tests.http.served import Served

#: Records all that a run records, and logs files, whatever the state of the platform.
EVERYTHING = """
import sys, mlplat
with mlplat.start_run(sys.argv[1]) as run:
    print(run.run_id)
    print("printed")
    run.log_text("first", "notes/a.txt")
    run.log_text("second", "notes/a.txt")
    run.log_artifact(__file__, "code")
    run.log_table("t", {"x": [1]})
    run.log({"m": 1.0})
"""
RECORDED = ["console", "environment.json", "requirements.txt"]


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """Where the SDK of the test keeps what it cannot send."""
    return tmp_path / "spool"


@pytest.fixture
def script(tmp_path: Path) -> str:
    """The program as a file, outside of any repository."""
    file = tmp_path / "train.py"
    file.write_text(EVERYTHING)
    return str(file)


class Files:
    """What the platform has of a run's files."""

    def __init__(self, stack: Stack, found: Any) -> None:
        self._store = stack.services.artifacts
        self._root = found["artifact_uri"].removeprefix("mlflow-artifacts:/")

    def names(self, folder: str) -> list[str]:
        return [entry.path for entry in self._store.list(f"{self._root}/{folder}")]

    def read(self, path: str) -> bytes:
        return b"".join(self._store.read(f"{self._root}/{path}"))

    def console(self) -> str:
        (folder,) = self.names("mlplat/console")
        names = self.names(f"mlplat/console/{folder}")
        return b"".join(self.read(f"mlplat/console/{folder}/{name}") for name in names).decode()


async def assert_complete(stack: Stack, mlflow: MLflow, run_id: str) -> None:
    """The run has all that ``EVERYTHING`` logs and records."""
    found = await info(mlflow, run_id)
    assert found["status"] == "FINISHED"
    files = Files(stack, found)
    assert files.names("mlplat") == RECORDED
    assert "train.py" in json.loads(files.read("mlplat/environment.json"))["command"]
    assert b"pytest==" in files.read("mlplat/requirements.txt")
    assert files.console().endswith("printed\n")
    assert files.read("notes/a.txt") == b"second"
    assert files.read("code/train.py").decode() == EVERYTHING
    assert files.names("tables/t") == ["table.parquet"]
    data = await mlflow.data(run_id)
    assert "table.parquet" in data["tags"]["mlflow.loggedArtifacts"]
    assert await history(mlflow, run_id, "m") == [(0, 1.0)]


@pytest.mark.parametrize("mode", ["offline", "away"])
async def test_a_run_without_a_platform_records_and_keeps_everything(
    served: Served, stack: Stack, mlflow: MLflow, spool: Path, script: str, mode: str
) -> None:
    await served.stop()
    extra = {"MLPLAT_CAPTURE": "true"} | ({"MLPLAT_MODE": "offline"} if mode == "offline" else {})
    exit_code, output = await ended(await python(script, unique("exp"), **extra))
    assert exit_code == 0, output
    assert ("RunWarning" in output) is (mode == "away")
    run_id = output.split()[0]
    await served.start()
    assert served.requests == []
    exit_code, output = await ended(await python("-m", "mlplat.cli", "sync"))
    assert exit_code == 0, output
    assert "refused" not in output
    await assert_complete(stack, mlflow, run_id)
    assert list(spool.iterdir()) == []


async def test_files_follow_when_the_platform_is_back(
    served: Served, stack: Stack, mlflow: MLflow, tmp_path: Path, spool: Path
) -> None:
    run = await user(lambda: mlplat.start_run(unique("exp")))
    await user(lambda: run.log_text("at once", "b.txt"))
    assert Files(stack, await info(mlflow, run.run_id)).read("b.txt") == b"at once"
    await served.stop()
    model = tmp_path / "model.bin"
    model.write_bytes(b"weights")

    def code() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run.log_artifact(model)
            run.log_text("later", "b.txt")
            model.unlink()  # what was logged is the file as it was then
            for number in range(20):
                run.log_text(f"{number}", "again.txt")
        with pytest.raises(InvalidInput):
            run.log_text("x", "../escapes")
        with pytest.raises(Unavailable):
            run.flush(timeout_s=0.2)
        assert len(list(spool.glob("*.files/*"))) < 10  # one copy waits of a file that is written again and again

    await user(code)
    await served.start()
    await user(lambda: run.log_text("last", "b.txt"))  # in its turn, after those that wait
    assert (await user(run.finish)).delivered
    files = Files(stack, await info(mlflow, run.run_id))
    assert (files.read("model.bin"), files.read("b.txt"), files.read("again.txt")) == (b"weights", b"last", b"19")
    assert list(spool.glob("*.files/*")) == []


async def test_a_model_is_registered_once_its_files_are_there(
    served: Served, stack: Stack, mlflow: MLflow, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlplat.sdk.run.FILE_PATIENCE_S", 0.0)
    name = unique("model")

    def code() -> str:
        run = mlplat.start_run(unique("exp"))
        run.flush()
        served.moods = ["refuses"] * 3
        run.log_text("weights", "model/weights")
        assert len(list(spool.glob("*.files/*"))) == 1
        assert mlplat.register_model(name, run, "model", alias="champion") == 1
        assert list(spool.glob("*.files/*")) == []
        return run.run_id

    run_id = await user(code)
    assert Files(stack, await info(mlflow, run_id)).read("model/weights") == b"weights"
    assert (await stack.services.registry.get_version(name, 1)).user_id == getpass.getuser()
    changes = await stack.services.registry_history.changes(name, None, None, 10)
    assert {change.user_id for change in changes} == {getpass.getuser()}


async def test_a_file_without_room_is_told_and_costs_nothing_else(
    served: Served, stack: Stack, mlflow: MLflow, tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLPLAT_SPOOL_BYTES", str(2 * 1024 * 1024))
    (tmp_path / "large").write_bytes(bytes(1024 * 1024))
    (tmp_path / "small").write_bytes(bytes(512 * 1024))

    def code() -> str:
        run = mlplat.start_run(unique("exp"), mode="offline")
        run.log_artifact(tmp_path / "small")
        with pytest.warns(mlplat.RunWarning, match="large is lost.*MLPLAT_SPOOL_BYTES"):
            run.log_artifact(tmp_path / "large")
        run.set_tag("late", 1)
        assert folder_bytes(spool) < 1024 * 1024
        with pytest.warns(mlplat.RunWarning, match="found no room"):
            assert len(run.finish().refused) == 1
        this_process().close()
        return run.run_id

    run_id = await user(code)
    (left,) = await user(lambda: sync(spool))
    assert left.refusals == []
    assert Files(stack, await info(mlflow, run_id)).names("") == ["small"]
    assert (await mlflow.data(run_id))["tags"]["late"] == "1"


async def test_sending_again_goes_on_where_the_platform_faltered(
    served: Served, stack: Stack, mlflow: MLflow, spool: Path
) -> None:
    def code() -> str:
        run = mlplat.start_run(unique("exp"), mode="offline", params={"a": 1})
        for number in range(5):
            run.log({"m": number}, step=number)
            run.log_text(f"{number}", f"{number}.txt")
        run.finish()
        this_process().close()
        return run.run_id

    run_id = await user(code)
    for moods in (["refuses"], ["ok", "ok", "ok", "refuses"], ["ok", "ok", "breaks"], ["ok", "refuses"]):
        served.moods = list(moods)
        with pytest.raises(Unavailable):
            await user(lambda: sync(spool))
    await served.stop()
    with pytest.raises(Unavailable, match="no answer"):
        await user(lambda: sync(spool))
    await served.start()
    (left,) = await user(lambda: sync(spool))
    assert left.refusals == []
    files = Files(stack, await info(mlflow, run_id))
    assert [files.read(f"{number}.txt") for number in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
    assert await history(mlflow, run_id, "m") == [(number, float(number)) for number in range(5)]
    assert len([path for path in served.requests if path.endswith("/runs/create")]) == 1
    assert list(spool.iterdir()) == []


async def test_a_file_of_a_run_that_is_not_there_is_kept(
    served: Served, mlflow: MLflow, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def code() -> None:
        lost = mlplat.resume_run("0" * 32)
        lost.log_text("kept", "a.txt")
        with pytest.warns(mlplat.RunWarning, match=r"a\.txt.*not found"):
            lost.finish()
        this_process().close()

    await user(code)
    for _round in range(2):
        (copy,) = spool.glob("*.files/*")
        assert copy.read_bytes() == b"kept"
        (left,) = await user(lambda: sync(spool))
        assert len(left.refusals) == 2
    monkeypatch.setattr("mlplat.sdk.leftovers.KEEP_S", 0.0)
    await user(lambda: sync(spool))
    assert list(spool.iterdir()) == []


async def test_a_process_that_is_killed_leaves_its_files_to_sync(
    served: Served, stack: Stack, mlflow: MLflow, spool: Path
) -> None:
    code = """
import sys, time, mlplat
run = mlplat.start_run(sys.argv[1], mode="offline")
run.log_text("kept", "a.txt")
run.flush()
print(run.run_id, flush=True)
time.sleep(60)
"""
    process = await python("-c", code, unique("exp"))
    assert process.stdout is not None
    run_id = (await asyncio.wait_for(process.stdout.readline(), 60)).decode().strip()
    process.kill()
    await process.wait()
    (left,) = await user(lambda: sync(spool))
    assert left.refusals == []
    assert Files(stack, await info(mlflow, run_id)).read("a.txt") == b"kept"
    assert list(spool.iterdir()) == []


async def test_sync_watches_until_it_is_stopped(served: Served, mlflow: MLflow, spool: Path) -> None:
    def code() -> str:
        run = mlplat.start_run(unique("exp"), mode="offline")
        run.log({"m": 1.0})
        run.finish()
        this_process().close()
        return run.run_id

    await served.stop()
    process = await python("-m", "mlplat.cli", "sync", "--watch", "--every", "0.2")
    assert process.stdout is not None
    assert process.stderr is not None
    assert b"nothing to send" in await asyncio.wait_for(process.stdout.readline(), 60)
    run_id = await user(code)
    assert b"no answer from" in await asyncio.wait_for(process.stderr.readline(), 60)
    await served.start()
    assert b"1 points, 2 other records" in await asyncio.wait_for(process.stdout.readline(), 60)
    assert await history(mlflow, run_id, "m") == [(0, 1.0)]
    assert list(spool.iterdir()) == []
    process.send_signal(signal.SIGINT)
    exit_code, output = await ended(process)
    assert exit_code == 0
    assert "Traceback" not in output


JOINS = """
import sys, time, mlplat
def has_metrics(run_id, prefix):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = {key for key in mlplat.get_run(run_id).metrics if key.startswith("system/")}
        if any(key.startswith(prefix) for key in found):
            return sorted({key.count("/") for key in found})
        time.sleep(0.1)
"""


async def test_joined_processes_add_their_console_and_their_nodes_metrics(
    served: Served, stack: Stack, mlflow: MLflow, tmp_path: Path
) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(f"""
import multiprocessing, sys, time
import mlplat
{JOINS}
def rank(number, run):
    if isinstance(run, str):
        run = mlplat.resume_run(run)
    print("rank", number, flush=True)
    if number == 1:
        has_metrics(run.run_id, sys.argv[2])
    run.log({{"r": number}}, step=number)

if __name__ == "__main__":
    # An owner that does not speak for this node is one that is on another.
    owner = mlplat.Capture(system_metrics=sys.argv[2] == "system/system_")
    run = mlplat.start_run(sys.argv[1], capture=owner)
    print(run.run_id, flush=True)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank, args=arguments) for arguments in ((0, run), (1, run.run_id))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    print("levels", has_metrics(run.run_id, sys.argv[2]))
    run.finish()
""")
    for prefix, levels in (("system/system_", [1]), (f"system/{host_name()}/", [2])):
        process = await python(
            str(script), unique("exp"), prefix, MLPLAT_CAPTURE="true", MLPLAT_CAPTURE_SYSTEM_INTERVAL_S="1"
        )
        exit_code, output = await ended(process)
        assert exit_code == 0, output
        assert f"levels {levels}" in output
        run_id = output.split()[0]
        files = Files(stack, await info(mlflow, run_id))
        assert [name for name in files.names("mlplat") if name != "code.diff"] == RECORDED
        texts = []
        for folder in files.names("mlplat/console"):
            names = files.names(f"mlplat/console/{folder}")
            texts.append(b"".join(files.read(f"mlplat/console/{folder}/{name}") for name in names).decode())
        assert [text for text in sorted(texts) if text.startswith("rank")] == ["rank 0\n", "rank 1\n"]
        assert len(texts) == 3
