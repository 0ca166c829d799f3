"""``mlplat backup`` and ``mlplat restore``, with a state folder that is destroyed between the two."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from mlplat.backup.connection import connected
from mlplat.sdk.client import Client
from tests.conftest import short_folder
from tests.e2e.installation import WORK, picture, write_definitions
from tests.platform import MLPLAT, Platform, eventually
from tests.platforms import Platforms


@pytest.fixture
def doomed(platforms: Platforms) -> Iterator[Platform]:
    """A platform whose state folder may be destroyed."""
    with short_folder() as folder:
        doomed = Platform(folder)
        platforms.run(doomed)
        yield doomed
        folder.mkdir(exist_ok=True)
        platforms.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the user is."""
    write_definitions(tmp_path)
    return tmp_path


def refused(platform: Platform, folder: Path, *arguments: str) -> str:
    done = platform.run(*arguments, cwd=folder)
    assert done.returncode == 1, done.stdout + done.stderr
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("mlplat: ")
    return line


def destroy(platform: Platform) -> None:
    """``kill -9`` of everything, and all its data is gone."""
    victims = platform.processes()
    for process in victims:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(victims, timeout=10)

    def gone() -> bool:
        shutil.rmtree(platform.state_dir, ignore_errors=True)  # the last of Postgres' processes clean up, too
        return not platform.state_dir.exists()

    eventually(gone, 30, "the state folder is gone")


@contextmanager
def table_locked(platform: Platform, table: str) -> Iterator[None]:
    """Whoever wants to read the table waits."""
    with connected(platform.config.postgres_url, "tests") as connection, connection.transaction():
        connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())
        yield


def kill_midway(platform: Platform, folder: Path, *arguments: str, when: Any) -> None:
    """Starts a command, and kills it when something is so."""
    started = subprocess.Popen(
        [str(MLPLAT), *arguments], env=platform.environment, cwd=folder, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        eventually(lambda: when() or started.poll() is not None, 60, "the command is in the middle of its work")
    finally:
        started.kill()
        _stdout, told = started.communicate(timeout=10)
    assert started.returncode == -signal.SIGKILL, told


def backup(platform: Platform, folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(platform.mlplat("backup", "backups", "--json", cwd=folder))
    return made


def listed(platform: Platform, folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(platform.mlplat("backup", "backups", "--list", "--json", cwd=folder))
    return found


def test_a_destroyed_installation_comes_back(doomed: Platform, folder: Path) -> None:
    waiting, cursor = fill(doomed, folder)
    slow = submit(doomed, folder, "slow.yaml", "-p", f"file={folder / 'arrived'}")
    eventually(lambda: step(doomed, slow, "only").get("state") == "RUNNING", 60, "a step runs")
    before = picture(doomed, slow)
    kill_a_backup(doomed, folder)
    first = backup(doomed, folder)
    assert (first["runs"], first["points"]) == (3, 500 * 2 + 2 + 1 + 1)
    assert picture(doomed, slow) == before  # a backup changes nothing
    second = backup(doomed, folder)
    assert second["copied_bytes"] == 0
    assert [each["complete"] for each in listed(doomed, folder)] == [False, True, True]
    assert "is sound" in doomed.mlplat("backup", "backups", "--verify", cwd=folder)
    assert "the platform is running" in refused(doomed, folder, "restore", "backups")
    assert "lies in what is to be backed up" in refused(doomed, folder, "backup", str(doomed.state_dir / "backups"))
    doomed.python("import mlplat; mlplat.start_run('too-late').finish()")
    lost = MlflowClient(doomed.url).get_experiment_by_name("too-late")
    assert lost is not None

    destroy(doomed)
    (folder / "arrived").touch()
    kill_a_restore(doomed, folder)
    assert "mlplat restore" in refused(doomed, folder, "up")
    assert "restored backup" in doomed.mlplat("restore", "backups", cwd=folder)
    doomed.mlplat("up", cwd=folder)
    assert picture(doomed, slow) == before
    goes_on(doomed, folder, waiting, cursor, str(lost.experiment_id))
    eventually(lambda: step(doomed, slow, "only").get("state") == "SUCCEEDED", 60, "what ran runs again")
    attempts = Client(doomed.url).get(f"/api/v1/pipeline-runs/{slow}")["attempts"]
    assert [attempt["state"] for attempt in attempts] == ["LOST", "SUCCEEDED"]
    doomed.mlplat("down", cwd=folder)
    assert "has a database" in refused(doomed, folder, "restore", "backups")


def fill(platform: Platform, folder: Path) -> tuple[str, str]:
    """Work of users; returns a pipeline run that waits for an approval, and a cursor behind all events."""
    platform.python(WORK)
    arguments = ("trigger", "set", "on-alias", "triggered.yaml", "--registry", "alias_set", "--model", "kept-model")
    platform.mlplat(*arguments, "-p", "version=${{ trigger.event.version }}", cwd=folder)
    platform.mlplat("schedule", "set", "yearly", "triggered.yaml", "--cron", "0 0 1 1 *", "-p", "version=7", cwd=folder)
    waiting = submit(platform, folder, "guarded.yaml")
    eventually(lambda: step(platform, waiting, "first").get("state") == "SUCCEEDED", 60, "the first step ends")
    eventually(lambda: step(platform, waiting, "sign_off").get("queued_at"), 60, "an approval is waited for")
    return waiting, str(Client(platform.url).get("/api/v1/models/events/log", limit=100)["next"])


def submit(platform: Platform, folder: Path, *arguments: str) -> str:
    """The id of the run."""
    return platform.mlplat("submit", *arguments, cwd=folder).split(": ")[1].split()[0]


def step(platform: Platform, run_id: str, name: str) -> dict[str, Any]:
    """A step of a pipeline run, as far as it is known."""
    found: dict[str, Any] = Client(platform.url).get(f"/api/v1/pipeline-runs/{run_id}")["steps"].get(name, {})
    return found


def kill_a_backup(platform: Platform, folder: Path) -> None:
    place = folder / "backups"
    with table_locked(platform, "webhook_delivery"):
        kill_midway(
            platform, folder, "backup", "backups",
            when=lambda: place.is_dir() and any(place.glob("*/postgres/*.zst")),
        )  # fmt: skip
    assert not list(place.glob("*/backup.json"))
    assert [each["complete"] for each in listed(platform, folder)] == [False]
    assert "there is no complete backup" in refused(platform, folder, "backup", "backups", "--verify")


def kill_a_restore(platform: Platform, folder: Path) -> None:
    """Bad backups first, then one that is killed when its database is being made."""
    place = folder / "backups"
    broken, first, second = (each["name"] for each in listed(platform, folder))
    assert "is incomplete" in refused(platform, folder, "restore", "backups", "--at", broken)
    assert "no complete backup is so old" in refused(platform, folder, "restore", "backups", "--at", "2020-01-01")
    assert "there is no complete backup" in refused(platform, folder, "restore", "elsewhere")
    manifest = place / first / "backup.json"
    body = manifest.read_text()
    manifest.write_text(body.replace('"schema": "', '"schema": "9'))
    assert "by a newer one" in refused(platform, folder, "restore", "backups", "--at", first)
    manifest.write_text(body)
    rows = place / first / "postgres" / "run.copy.zst"
    intact = rows.read_bytes()
    rows.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    assert "run.copy.zst is corrupt" in refused(platform, folder, "restore", "backups", "--at", first)
    rows.write_bytes(intact)
    assert not (platform.state_dir / "restore.json").exists()
    assert not (platform.state_dir / "postgres").exists()
    kill_midway(
        platform, folder, "restore", "backups", "--at", second, when=(platform.state_dir / "restore.json").exists
    )
    assert (platform.state_dir / "restore.json").exists()


def goes_on(platform: Platform, folder: Path, waiting: str, cursor: str, free_id: str) -> None:
    """The restored platform does what the old one would have done."""
    client, api = MlflowClient(platform.url), Client(platform.url)
    platform.mlplat("approve", waiting, "sign_off", cwd=folder)
    eventually(lambda: api.get(f"/api/v1/pipeline-runs/{waiting}")["state"] == "SUCCEEDED", 60, "the run goes on")
    assert "made after" in platform.mlplat("logs", waiting)

    assert api.get("/api/v1/models/events/log", limit=100, after=cursor)["events"] == []
    assert not [run for run in api.get("/api/v1/pipeline-runs") if run["pipeline"] == "triggered"]
    client.set_registered_model_alias("kept-model", "champion", "1")
    [event] = api.get("/api/v1/models/events/log", limit=100, after=cursor)["events"]
    assert event["kind"] == "alias_set"

    def triggered() -> list[dict[str, Any]]:
        return [run for run in api.get("/api/v1/pipeline-runs") if run["pipeline"] == "triggered"]

    eventually(lambda: [run["state"] for run in triggered()] == ["SUCCEEDED"], 60, "the trigger fires, once")
    assert client.create_experiment("after") != "0"
    run_id = client.create_run(free_id if client.get_experiment(free_id).name == "after" else "0").info.run_id
    client.log_metric(run_id, "loss", 1.0)
    assert [point.value for point in client.get_metric_history(run_id, "loss")] == [1.0]
    assert [run.info.run_id for run in client.search_runs(["0", free_id], "metrics.loss = 1")] == [run_id]
