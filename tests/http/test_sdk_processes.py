"""Processes that log and end in every way there is."""

from __future__ import annotations

import asyncio
import re
import signal
from asyncio.subprocess import Process
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlplat.sdk.spool import spooled_files
from tests.contract.chdb import unique
from tests.faults.disks import MIB, SmallDisk, small_disk
from tests.http.conftest import MLflow
from tests.http.sdk import check_oldest, ended, history, info, python
from tests.http.served import Served

START = """
import os, signal, sys, time, mlplat
from mlplat.errors import Unavailable
run = mlplat.start_run(sys.argv[1])
run.log({"m": 1.0}, step=0)
print(run.run_id, flush=True)
"""


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """Where the SDK of the test keeps what it cannot send."""
    return tmp_path / "spool"


async def started(code: str) -> tuple[Process, str]:
    """A process that has a run, and the run's id. ``code`` goes on from there."""
    process = await python("-c", START + code, unique("exp"))
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), 60)
    if not line:
        raise AssertionError((await process.communicate())[1].decode())
    return process, line.decode().strip()


@pytest.mark.parametrize(
    ("code", "exit_code", "status"),
    [
        ("", 0, "FINISHED"),
        ("sys.exit()", 0, "FINISHED"),
        ("sys.exit(0)", 0, "FINISHED"),
        ("sys.exit(3)", 3, "FAILED"),
        ("sys.exit('told')", 1, "FAILED"),
        ("import threading; t = threading.Thread(target=sys.exit, args=(3,)); t.start(); t.join()", 0, "FINISHED"),
        # Stopped in the middle: the main thread leaves while another is still at it.
        (
            "import threading as t; t.Thread(target=lambda: run.__enter__() and time.sleep(60), daemon=True).start()",
            0,
            "KILLED",
        ),
        ("1 / 0", 1, "FAILED"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KILLED"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM, "KILLED"),
    ],
)
async def test_the_end_of_a_process_ends_its_runs(
    served: Served, mlflow: MLflow, code: str, exit_code: int, status: str
) -> None:
    process, run_id = await started(code)
    assert (await ended(process))[0] == exit_code
    assert (await info(mlflow, run_id))["status"] == status
    assert await history(mlflow, run_id, "m") == [(0, 1.0)]


async def test_a_process_that_handles_sigterm_still_does(served: Served, mlflow: MLflow) -> None:
    script = START.replace("run = mlplat", "signal.signal(signal.SIGTERM, lambda *_: os._exit(7))\nrun = mlplat")
    process = await python("-c", script + "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", unique("exp"))
    exit_code, output = await ended(process)
    assert exit_code == 7
    assert (await info(mlflow, output.split()[0]))["status"] == "KILLED"


async def test_what_was_kept_survives_kill_9_and_arrives_by_sync(served: Served, mlflow: MLflow, spool: Path) -> None:
    code = """
sys.stdin.read()
for step in range(1, 5000):
    run.log({"m": step})
run.set_tag("late", 1)
try:
    run.flush(timeout_s=0.1)
except Unavailable:
    print("kept", flush=True)
time.sleep(60)
"""
    process, run_id = await started(code)
    assert process.stdout is not None
    assert process.stdin is not None
    await served.stop()
    process.stdin.close()
    assert await asyncio.wait_for(process.stdout.readline(), 60) == b"kept\n"

    blocked = await python("-m", "mlplat.cli", "sync")  # its owner lives: the file is the owner's to send
    assert "nothing to send" in (await ended(blocked))[1]
    process.kill()
    await process.wait()
    (left,) = spooled_files(spool)
    with left.open("ab") as file:
        file.write(b"torn")

    away = await python("-m", "mlplat.cli", "sync")
    exit_code, output = await ended(away)
    assert exit_code == 1
    assert "no answer from" in output
    await served.start()
    exit_code, output = await ended(await python("-m", "mlplat.cli", "sync"))
    assert exit_code == 0
    assert re.search(r": (4999|5000) points, 1 other records, 4 unreadable bytes", output), output
    assert await history(mlflow, run_id, "m") == [(0, 1.0), *((step, float(step)) for step in range(1, 5000))]
    assert (await mlflow.data(run_id))["tags"]["late"] == "1"
    assert spooled_files(spool) == []


async def test_a_spool_folder_that_cannot_be_written_costs_nothing(
    served: Served, mlflow: MLflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MLPLAT_SPOOL_DIR", str(tmp_path / "file"))
    process, run_id = await started("run.log({'m': 2.0}, step=1)")
    exit_code, output = await ended(process)
    assert (exit_code, "waits in memory" in output) == (0, True)
    assert await history(mlflow, run_id, "m") == [(0, 1.0), (1, 2.0)]


async def test_a_full_spool_keeps_the_oldest(served: Served, mlflow: MLflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPLAT_SPOOL_BYTES", str(2 * 1024 * 1024))
    monkeypatch.setenv("MLPLAT_MODE", "offline")
    code = """
for step in range(1, 100_000):
    run.log({"m": step}, step=step)
run.set_tag("late", 1)
print("dropped", run.finish().dropped_points)
"""
    process, run_id = await started(code)
    exit_code, output = await ended(process)
    dropped = int(output.split("dropped ")[-1].split()[0])
    assert exit_code == 0
    assert dropped > 0
    assert "RunWarning" in output
    assert (await ended(await python("-m", "mlplat.cli", "sync")))[0] == 0
    points = await history(mlflow, run_id, "m")
    assert len(points) == 100_000 - dropped
    check_oldest(points, 10_000)  # further on, a small frame may have found the room that a large one did not
    assert (await mlflow.data(run_id))["tags"]["late"] == "1"
    assert (await info(mlflow, run_id))["status"] == "FINISHED"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    """A small one under the spool folder, for runs that are offline."""
    monkeypatch.setenv("MLPLAT_SPOOL_DIR", str(tmp_path / "small"))
    monkeypatch.setenv("MLPLAT_MODE", "offline")
    with small_disk(tmp_path / "small", 4 * MIB) as small:
        yield small


LOG_TOO_MUCH = """
for step in range(1, 150_000):
    run.log({"m": step}, step=step)
run.set_tag("late", 1)
try:
    run.flush()
except Unavailable as error:
    print(error, flush=True)
sys.stdin.readline()
print("dropped", run.finish().dropped_points)
"""


async def test_a_full_disk_keeps_what_fits(
    served: Served, mlflow: MLflow, disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    process, run_id = await started(LOG_TOO_MUCH)
    exit_code, output = await ended(process)
    assert (exit_code, "dropped 0" in output) == (0, True), output
    assert output.count("waits in memory") == 1, "one warning while it logs"
    assert re.search(r"is full: \d+ records wait in memory", output), "one at the end of the run"
    lost = int(output.split(" records found no room in ")[0].split()[-1])
    full_with = MIB * 4 - disk.free_bytes
    assert (await ended(await python("-m", "mlplat.cli", "sync")))[0] == 0
    points = await history(mlflow, run_id, "m")
    check_oldest(points, 10_000)  # further on, a small frame may have found the room that a large one did not
    assert len(points) < 150_000
    assert (await mlflow.data(run_id))["tags"]["late"] == "1"
    assert (await info(mlflow, run_id))["status"] == "FINISHED"
    with capsys.disabled():
        print(
            f"\nspool's disk full → {full_with / MIB:.1f} of 4 MiB used → 150000 points logged, {len(points)} kept, "
            f"{lost} records told to be lost, twice 0, the training never waited"
        )


async def test_a_disk_that_was_full_for_a_while_costs_nothing(
    served: Served, mlflow: MLflow, disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.fill(MIB)  # what is left is for records other than points
    process, run_id = await started(LOG_TOO_MUCH.replace("150_000", "50_000"))
    assert process.stdout is not None
    assert b"no room" in await asyncio.wait_for(process.stdout.readline(), 60)
    disk.free()
    exit_code, output = await ended(process)
    assert (exit_code, "dropped 0" in output, "lost" in output) == (0, True, False), output
    assert output.count("waits in memory") == 1
    assert (await ended(await python("-m", "mlplat.cli", "sync")))[0] == 0
    points = await history(mlflow, run_id, "m")
    check_oldest(points, 50_000)
    assert len(points) == 50_000
    with capsys.disabled():
        print("\nspool's disk full for a while → 1 MiB left → 50000 points logged, lost 0, twice 0")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
async def test_a_child_process_writes_to_the_run_and_does_not_end_it(
    served: Served, mlflow: MLflow, tmp_path: Path, method: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"""
import multiprocessing, os, signal, sys, time, mlplat

def child(run):
    run.log({{"child": 1.0}}, step=2)
    with run:
        run.set_tag("child", "yes")

def sleeper(run):
    time.sleep(60)

if __name__ == "__main__":
    run = mlplat.start_run(sys.argv[1])
    run.log({{"m": 1.0}}, step=0)
    context = multiprocessing.get_context({method!r})
    process = context.Process(target=child, args=(run,))
    process.start()
    process.join(60)
    assert process.exitcode == 0, process.exitcode
    stopped = context.Process(target=sleeper, args=(run,))
    stopped.start()
    stopped.terminate()
    stopped.join(60)
    assert stopped.exitcode == -signal.SIGTERM, stopped.exitcode
    print(mlplat.get_run(run.run_id).status, run.run_id)
""")
    exit_code, output = await ended(await python(str(script), unique("exp")))
    assert exit_code == 0, output
    status, run_id = output.split()[:2]
    assert status == "RUNNING"
    assert (await info(mlflow, run_id))["status"] == "FINISHED"
    assert await history(mlflow, run_id, "child") == [(2, 1.0)]
    assert await history(mlflow, run_id, "m") == [(0, 1.0)]
    assert (await mlflow.data(run_id))["tags"]["child"] == "yes"
