"""Storage over HTTP and by the commands: collections, scrubbing, legal holds, quotas, usage."""

from __future__ import annotations

import asyncio
import base64
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from sqlalchemy import insert, text
from typer.testing import CliRunner, Result

from mlplat.artifacts.collector import Collector
from mlplat.artifacts.layout import ARCHIVED_METRICS, CONDEMNED_KEY
from mlplat.artifacts.objects import ObjectInfo
from mlplat.artifacts.store import ArtifactStore
from mlplat.cli import app
from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.db.removals import REMOVALS, removing
from mlplat.db.tables import artifact_collection
from mlplat.errors import PlatformError
from mlplat.metrics.archive import archive_path
from mlplat.storage import upkeep
from mlplat.storage.model import Retention
from mlplat.storage.upkeep import Upkeep
from tests.databases import Databases
from tests.http.conftest import MLflow, Stack, expect_error, open_stack
from tests.http.serving import served

FILES = "/api/2.0/mlflow-artifacts/artifacts"
STORAGE = "/api/v1/storage"
BODY = os.urandom(300_000)


async def _run(mlflow: MLflow, **tags: str) -> tuple[str, str, str]:
    """Experiment, run, and the folder of its artifacts."""
    experiment = await mlflow.experiment()
    for key, value in tags.items():
        await mlflow.call("POST", "experiments/set-experiment-tag", experiment_id=experiment, key=key, value=value)
    run_id = await mlflow.run(experiment)
    return experiment, run_id, f"{experiment}/{run_id}/artifacts"


@asynccontextmanager
async def _alone(databases: Databases, folder: Path) -> AsyncIterator[tuple[Stack, httpx.AsyncClient]]:
    """A platform that no other test has, and a client."""
    async with open_stack(databases, folder) as stack:
        transport = httpx.ASGITransport(app=stack.app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            yield stack, http


async def _put(http: httpx.AsyncClient, path: str, body: bytes = BODY) -> httpx.Response:
    return await http.put(f"{FILES}/{path}", content=body)


async def test_nothing_under_a_legal_hold_is_replaced_removed_or_purged(
    http: httpx.AsyncClient, mlflow: MLflow
) -> None:
    experiment, run_id, folder = await _run(mlflow)
    await _put(http, f"{folder}/model.bin")
    hold = {"reason": "case 42", "user": "counsel"}
    made = (await http.put(f"{STORAGE}/holds/run/{run_id}", json=hold)).json()
    assert (made["kind"], made["id"], made["reason"], made["user"]) == ("run", run_id, "case 42", "counsel")
    for refused in (
        await _put(http, f"{folder}/model.bin", b"other"),
        await http.delete(f"{FILES}/{folder}/model.bin"),
        await http.delete(f"{FILES}/{folder}"),
    ):
        expect_error(refused, 403, "PERMISSION_DENIED", "case 42")
    assert (await _put(http, f"{folder}/new.bin")).status_code == 200, "the run may go on"
    assert (await http.get(f"{FILES}/{folder}/model.bin")).content == BODY
    await mlflow.call("POST", "runs/delete", run_id=run_id)
    purge = (await http.post("/api/v1/purge", json={"runs": [run_id]})).json()
    assert (purge["runs"], [kept["id"] for kept in purge["kept"]]) == (0, [run_id])
    assert "case 42" in purge["kept"][0]["reason"]
    assert run_id in [each["id"] for each in (await http.get(f"{STORAGE}/holds")).json()]
    assert (await http.delete(f"{STORAGE}/holds/run/{run_id}")).status_code == 200
    assert (await http.post("/api/v1/purge", json={"runs": [run_id]})).json()["runs"] == 1
    expect_error(await http.delete(f"{STORAGE}/holds/run/{run_id}"), 404, "RESOURCE_DOES_NOT_EXIST", "no legal hold")
    assert experiment


async def test_a_held_experiment_holds_its_runs(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    experiment, run_id, folder = await _run(mlflow)
    await _put(http, f"{folder}/a")
    await http.put(f"{STORAGE}/holds/experiment/{experiment}", json={"reason": "audit"})
    expect_error(await http.delete(f"{FILES}/{folder}/a"), 403, "PERMISSION_DENIED", "audit")
    await mlflow.call("POST", "experiments/delete", experiment_id=experiment)
    name = (await mlflow.call("GET", "experiments/get", experiment_id=experiment))["experiment"]["name"]
    purge = (await http.post("/api/v1/purge", json={"experiments": [name]})).json()
    assert (purge["runs"], purge["experiments"]) == (0, 0)
    assert run_id in [kept["id"] for kept in purge["kept"]]


@pytest.mark.parametrize("disguise", ["{0}//{1}", "%2E/{0}/{1}"])
async def test_no_spelling_of_a_path_gets_around_a_hold_or_a_quota(
    http: httpx.AsyncClient, mlflow: MLflow, disguise: str
) -> None:
    experiment, run_id, folder = await _run(mlflow)
    await _put(http, f"{folder}/model.bin")
    await _put(http, f"{folder}/other.bin", BODY[::-1])
    other = (await http.get(f"/api/v1/artifacts/files/{folder}/other.bin")).json()
    await http.put(f"{STORAGE}/holds/run/{run_id}", json={"reason": "case 42"})
    path = httpx.URL("http://localhost").copy_with(
        raw_path=f"/api/v1/artifacts/files/{disguise.format(experiment, run_id)}/artifacts/model.bin".encode()
    )
    expect_error(await http.put(path, json=other), 403, "PERMISSION_DENIED", "case 42")
    assert (await http.get(f"{FILES}/{folder}/model.bin")).content == BODY
    await http.delete(f"{STORAGE}/holds/run/{run_id}")
    await http.put(f"{STORAGE}/quotas/{experiment}", json={"limit_bytes": 1})
    assert (await http.put(path, json=other)).status_code == 507


async def test_a_folder_with_something_held_in_it_stays(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    experiment, run_id, folder = await _run(mlflow)
    await _put(http, f"{folder}/model.bin")
    await http.put(f"{STORAGE}/holds/run/{run_id}", json={"reason": "case 42"})
    for path in (experiment, f"{experiment}/{run_id}"):
        expect_error(await http.delete(f"{FILES}/{path}"), 403, "PERMISSION_DENIED", "case 42")
    assert (await http.get(f"{FILES}/{folder}/model.bin")).content == BODY
    await http.delete(f"{STORAGE}/holds/run/{run_id}")
    assert (await http.delete(f"{FILES}/{experiment}")).status_code == 200


async def test_a_hold_finds_the_files_of_runs_wherever_they_are(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    location = f"elsewhere-{os.urandom(4).hex()}/x"
    made = await mlflow.call(
        "POST", "experiments/create", name=location, artifact_location=f"mlflow-artifacts:/{location}"
    )
    run_id = await mlflow.run(made["experiment_id"])
    await _put(http, f"{location}/{run_id}/artifacts/a")
    await http.put(f"{STORAGE}/holds/run/{run_id}", json={"reason": "case 42"})
    for path in (f"{location}/{run_id}/artifacts/a", location):
        expect_error(await http.delete(f"{FILES}/{path}"), 403, "PERMISSION_DENIED", "case 42")
    await http.delete(f"{STORAGE}/holds/run/{run_id}")
    other = await mlflow.experiment()
    await http.post("/api/v1/runs/move", json={"run_ids": [run_id], "experiment_id": other})
    await http.put(f"{STORAGE}/holds/experiment/{other}", json={"reason": "audit"})
    expect_error(await _put(http, f"{location}/{run_id}/artifacts/a", b"b"), 403, "PERMISSION_DENIED", "audit")
    assert (await _put(http, f"{location}/{run_id}/artifacts/b", b"b")).status_code == 200


async def test_a_run_is_not_purged_after_it_left_a_held_experiment(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    experiment, run_id, folder = await _run(mlflow)
    await _put(http, f"{folder}/a")
    await http.put(f"{STORAGE}/holds/experiment/{experiment}", json={"reason": "audit"})
    body = {"run_ids": [run_id], "experiment_id": await mlflow.experiment()}
    assert (await http.post("/api/v1/runs/move", json=body)).status_code == 200
    await mlflow.call("POST", "runs/delete", run_id=run_id)
    purge = (await http.post("/api/v1/purge", json={"runs": [run_id]})).json()
    assert (purge["runs"], [kept["id"] for kept in purge["kept"]]) == (0, [run_id])
    assert (await http.get(f"{FILES}/{folder}/a")).content == BODY


async def test_a_held_console_grows_and_is_not_replaced(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    _experiment, run_id, folder = await _run(mlflow)
    segment = f"{folder}/mlplat/console/host-1-1/000001.log"
    await _put(http, segment, b"one\n")
    await http.put(f"{STORAGE}/holds/run/{run_id}", json={"reason": "case 42"})
    assert (await _put(http, segment, b"one\ntwo\n")).status_code == 200
    expect_error(await _put(http, segment, b"other"), 403, "PERMISSION_DENIED", "case 42")
    assert (await _put(http, segment.replace("000001", "000002"), b"three\n")).status_code == 200
    assert (await http.get(f"{FILES}/{segment}")).content == b"one\ntwo\n"


@pytest.mark.parametrize(
    ("kind", "id_", "status"),
    [
        ("model", "m", 400),
        ("run", "a b", 400),
        ("experiment", "x", 400),
        ("run", "0" * 32, 404),
        ("experiment", "987654321", 404),
    ],
)
async def test_what_cannot_be_held_is_refused(http: httpx.AsyncClient, kind: str, id_: str, status: int) -> None:
    assert (await http.put(f"{STORAGE}/holds/{kind}/{id_}", json={"reason": "x"})).status_code == status


async def test_an_experiment_with_a_quota_takes_no_more_than_that(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    experiment, _run_id, folder = await _run(mlflow)
    await _put(http, f"{folder}/first")
    answer = await http.put(f"{STORAGE}/quotas/{experiment}", json={"limit_bytes": 700_000})
    assert answer.json() == {"used_bytes": 300_000}
    assert (await _put(http, f"{folder}/second")).status_code == 200
    expect_error(await _put(http, f"{folder}/third"), 507, "RESOURCE_EXHAUSTED", "600000")
    mpu = "/api/2.0/mlflow-artifacts/mpu"
    upload = (await http.post(f"{mpu}/create/{folder}", json={"path": "/x/third", "num_parts": 1})).json()
    part = await http.put(upload["credentials"][0]["url"], content=BODY)
    parts = [{"part_number": 1, "etag": part.headers["ETag"]}]
    body = {"path": "/x/third", "upload_id": upload["upload_id"], "parts": parts}
    expect_error(await http.post(f"{mpu}/complete/{folder}", json=body), 507, "RESOURCE_EXHAUSTED", "300000 more")

    async def of_unknown_length() -> AsyncIterator[bytes]:
        for start in range(0, len(BODY), 50_000):
            yield BODY[start : start + 50_000]

    refused = await http.put(f"{FILES}/{folder}/third", content=of_unknown_length())
    expect_error(refused, 507, "RESOURCE_EXHAUSTED", "room for 100000 bytes more")
    entry = (await http.get(f"/api/v1/artifacts/files/{folder}/first")).json()
    refused = await http.put(f"/api/v1/artifacts/files/{folder}/third", json=entry)
    expect_error(refused, 507, "RESOURCE_EXHAUSTED", "300000 more do not fit")
    assert (await http.get(f"{FILES}/{folder}/third")).status_code == 404
    [quota] = [each for each in (await http.get(f"{STORAGE}/quotas")).json() if each["experiment_id"] == experiment]
    assert quota == {"experiment_id": experiment, "limit_bytes": 700_000, "used_bytes": 600_000}
    await http.put(f"{STORAGE}/quotas/{experiment}", json={"limit_bytes": None})
    assert (await _put(http, f"{folder}/third")).status_code == 200
    assert (await http.put(f"{STORAGE}/quotas/987654321", json={"limit_bytes": 1})).status_code == 404


async def test_uploads_at_once_share_a_quota(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    experiment, _run_id, folder = await _run(mlflow)
    await http.put(f"{STORAGE}/quotas/{experiment}", json={"limit_bytes": 700_000})
    answers = await asyncio.gather(*(_put(http, f"{folder}/{number}", os.urandom(300_000)) for number in range(8)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, *[507] * 6]
    digest = {"Content-Digest": f"sha-256=:{base64.b64encode(bytes(32)).decode()}:"}
    wrong = await http.put(f"{FILES}/{folder}/wrong", content=BODY[:100_000], headers=digest)
    assert wrong.status_code == 400
    [quota] = [each for each in (await http.get(f"{STORAGE}/quotas")).json() if each["experiment_id"] == experiment]
    assert quota["used_bytes"] == 600_000, "what was refused takes no room"


async def test_a_collection_measures_and_corrects_quotas(databases: Databases, tmp_path: Path) -> None:
    async with _alone(databases, tmp_path) as (stack, http):
        mlflow = MLflow(http)
        assert (await http.get(f"{STORAGE}/usage")).json()["measured_at"] is None
        experiment, _run_id, folder = await _run(mlflow, team="vision")
        await http.put(f"{STORAGE}/quotas/{experiment}", json={"limit_bytes": 10**9})
        for name in ("a", "b", "a"):
            await _put(http, f"{folder}/{name}")
        digest = (await http.post("/api/v1/blobs", content=b"nothing refers to it")).json()["digest"]
        done = (await http.post(f"{STORAGE}/collections", json={})).json()
        assert done["finished_at"] is not None
        assert (done["report"]["freed"], done["report"]["damaged"]) == (0, [])
        usage = (await http.get(f"{STORAGE}/usage")).json()
        [row] = usage["experiments"]
        assert (row["experiment_id"], row["team"], row["files"], row["bytes"]) == (experiment, "vision", 2, 600_000)
        assert usage["teams"] == {"vision": 600_000}
        assert usage["stored_bytes"] == 300_000 + len(b"nothing refers to it")
        assert (await http.get(f"{STORAGE}/quotas")).json()[0]["used_bytes"] == 600_000
        assert len((await http.get(f"{STORAGE}/collections")).json()) == 1
        assert stack.services.artifacts.get_blob(digest)


async def test_models_are_measured_by_their_versions(databases: Databases, tmp_path: Path) -> None:
    async with _alone(databases, tmp_path) as (stack, http):
        mlflow = MLflow(http)
        _experiment, run_id, folder = await _run(mlflow)
        for name, size in (("one", 1_000), ("two", 3_000)):
            await _put(http, f"{folder}/{name}/model.bin", BODY[:size])
        for name, sources in (("small", ["one", "one"]), ("large", ["one", "two", "two"]), ("empty", [])):
            await mlflow.call("POST", "registered-models/create", name=name)
            for source in sources:
                await mlflow.call(
                    "POST", "model-versions/create", name=name, source=f"mlflow-artifacts:/{folder}/{source}",
                    run_id=run_id,
                )  # fmt: skip
        async with stack.engine.begin() as connection:  # as earlier versions of the platform registered them
            await connection.execute(text("UPDATE model_version SET size_bytes = NULL WHERE name = 'large'"))
        await http.post(f"{STORAGE}/collections", json={})
        usage = (await http.get(f"{STORAGE}/usage")).json()
        assert usage["models"] == [
            {"name": "large", "versions": 3, "bytes": 4_000},
            {"name": "small", "versions": 2, "bytes": 1_000},
        ]
        async with served(stack.app) as url:
            shown = await asyncio.to_thread(_invoke, url, "storage", "usage")
        assert "large" in shown.output


async def test_logs_that_are_to_be_kept_for_less_time_go_with_the_next_collection(
    databases: Databases, tmp_path: Path
) -> None:
    async with _alone(databases, tmp_path) as (stack, http):
        mlflow = MLflow(http)
        _experiment, run_id, folder = await _run(mlflow)
        await _put(http, f"{folder}/mlplat/console/host-1-1/000001.log", b"line\n")
        ended = int((time.time() - 100 * 86_400) * 1000)
        await mlflow.call("POST", "runs/update", run_id=run_id, status="FINISHED", end_time=ended)
        store = stack.services.artifacts
        for days, expected in ((365, 0), (365, 0), (30, 1), (30, 0)):
            retention = Retention(logs=timedelta(days=days))
            collection = await Upkeep(
                stack.engine, store, stack.services.guard, stack.services.metrics, retention
            ).collect()
            assert collection.report is not None
            assert collection.report["expired_logs"] == expected
        assert not store.files(folder)


async def test_metrics_of_old_runs_are_archived_and_still_read(databases: Databases, tmp_path: Path) -> None:
    async with _alone(databases, tmp_path) as (stack, http):
        mlflow = MLflow(http)
        experiment, run_id, _folder = await _run(mlflow)
        points = [{"key": "loss", "value": step, "timestamp": 1, "step": step} for step in range(5)]
        await mlflow.call("POST", "runs/log-batch", run_id=run_id, metrics=points)
        ended = int((time.time() - 400 * 86_400) * 1000)
        await mlflow.call("POST", "runs/update", run_id=run_id, status="FINISHED", end_time=ended)
        report = (await http.post(f"{STORAGE}/collections", json={})).json()["report"]
        assert (report["archived_runs"], report["archived_points"], report["not_archived"]) == (1, 5, None)
        again = (await http.post(f"{STORAGE}/collections", json={})).json()["report"]
        assert again["archived_runs"] == 0
        path = archive_path(run_id)
        assert stack.services.artifacts.has(path)
        for response in (
            await _put(http, path, b"somebody's own"),
            await http.delete(f"{FILES}/{path}"),
            await http.delete(f"{FILES}/{ARCHIVED_METRICS}"),
        ):
            expect_error(response, 403, "PERMISSION_DENIED", "only the platform writes and removes there")
        found = await mlflow.call(
            "POST", "runs/search", experiment_ids=[experiment], filter="metrics.loss > 3", order_by=["metrics.loss"]
        )
        assert [run["info"]["run_id"] for run in found["runs"]] == [run_id]
        history = await mlflow.call("GET", "metrics/get-history", run_id=run_id, metric_key="loss")
        assert [row["value"] for row in history["metrics"]] == [0, 1, 2, 3, 4]


async def test_a_collection_that_is_cut_short_is_over(databases: Databases, tmp_path: Path) -> None:
    async with _alone(databases, tmp_path) as (stack, http):
        objects = stack.services.artifacts.objects
        objects.write(CONDEMNED_KEY, b"?")
        expect_error(await http.post(f"{STORAGE}/collections", json={}), 409, "INVALID_STATE", "damaged")
        objects.delete(CONDEMNED_KEY)
        async with stack.engine.begin() as connection:  # of a process that was killed
            await connection.execute(insert(artifact_collection).values(dry_run=False))
        assert (await http.post(f"{STORAGE}/collections", json={})).json()["report"] is not None
        found = (await http.get(f"{STORAGE}/collections")).json()
        assert [each["report"] is not None for each in found] == [True, False, False]
        assert all(each["finished_at"] is not None for each in found)


async def test_a_collection_ends_when_it_may_not_be_the_only_one_any_more(
    databases: Databases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "ALONE_EVERY_S", 0.01)
    async with open_stack(databases, tmp_path) as stack:
        release, begun, walk = threading.Event(), threading.Event(), stack.services.artifacts.objects.walk

        def slow(folder: str) -> Iterator[ObjectInfo]:
            begun.set()
            assert release.wait(30)
            yield from walk(folder)

        given_up, give_up = threading.Event(), Collector.give_up

        def told(collector: Collector) -> None:
            give_up(collector)
            given_up.set()

        monkeypatch.setattr(stack.services.artifacts.objects, "walk", slow)
        monkeypatch.setattr(Collector, "give_up", told)
        collecting = asyncio.create_task(stack.services.upkeep.collect())
        assert await asyncio.to_thread(begun.wait, 20)
        lost = text("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = :key "
                    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())")  # fmt: skip
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            async with stack.engine.begin() as connection:
                if (await connection.execute(lost, {"key": REMOVALS})).all():
                    break
        assert await asyncio.to_thread(given_up.wait, 20)
        release.set()
        with pytest.raises((PlatformError, *CONNECTION_ERRORS)):
            await collecting
        monkeypatch.undo()
        assert (await stack.services.upkeep.last())[0].report is None
        assert (await stack.services.upkeep.collect()).report is not None


async def test_a_collection_waits_for_a_purge_or_a_backup(stack: Stack, http: httpx.AsyncClient) -> None:
    async with removing(stack.engine):
        for url, body in ((f"{STORAGE}/collections", {}), ("/api/v1/purge", {"runs": ["0" * 32]})):
            refused = await http.post(url, json=body)
            expect_error(refused, 429, "RESOURCE_EXHAUSTED", "a purge, a collection or a backup is under way")
            assert refused.headers["Retry-After"] == "1"
    assert (await http.post(f"{STORAGE}/collections", json={"dry_run": True})).json()["finished_at"] is not None


async def test_what_is_damaged_is_named_and_healed_by_the_same_bytes(databases: Databases, tmp_path: Path) -> None:
    async with open_stack(databases, tmp_path / "store") as stack, served(stack.app) as url:
        store = stack.services.artifacts
        for name in ("sound", "damaged", "same"):
            store.write(f"1/run/artifacts/{name}", [BODY if name != "sound" else BODY[::-1]])
        store.write("1/run/artifacts/small", [b"small"])
        [blob] = store.entry("1/run/artifacts/damaged").chunks
        file = tmp_path / "store" / ".blobs" / blob.sha256[:2] / f"{blob.sha256}{blob.suffix}"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        small = tmp_path / "store" / "1/run/artifacts/small"
        small.write_bytes(small.read_bytes()[:-1] + b"?")
        first = await asyncio.to_thread(_invoke, url, "artifacts", "verify", "--repair")
        assert first.exit_code == 1
        for name in ("1/run/artifacts/damaged", "1/run/artifacts/same", "1/run/artifacts/small", blob.sha256):
            assert name in first.output
        assert "artifacts/sound" not in first.output
        store.write("1/run/artifacts/other", [BODY])
        assert b"".join(store.read("1/run/artifacts/damaged")) == BODY
        store.write("1/run/artifacts/small", [b"small"])
        second = await asyncio.to_thread(_invoke, url, "artifacts", "verify")
        assert (second.exit_code, "0 damaged" in second.output) == (0, True), second.output


async def test_the_commands_move_files_and_show_storage(
    stack: Stack, mlflow: MLflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, run_id, folder = await _run(mlflow)
    name = (await mlflow.call("GET", "experiments/get", experiment_id=experiment))["experiment"]["name"]
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "big.bin").write_bytes(os.urandom(3_000_000))
    (source / "sub" / "small ü.txt").write_text("text")
    monkeypatch.setenv("MLPLAT_STATE_DIR", str(tmp_path / "state"))
    async with served(stack.app) as url:

        def invoke(*arguments: str) -> str:
            result = _invoke(url, *arguments)
            assert result.exit_code == 0, result.output
            return result.output

        def use() -> None:
            assert "2 files" in invoke("artifacts", "upload", run_id, str(source), "--to", "data")
            assert "2 files" in invoke("artifacts", "download", run_id, "data", "--to", str(tmp_path / "copy"))
            assert "2 objects" in invoke("artifacts", "verify", run_id)
            assert "may have 1.0 GiB" in invoke("storage", "quota", name, "1GiB")
            assert "has no limit" in invoke("storage", "quota", name, "none")
            invoke("storage", "hold", "run", run_id, "--reason", "for a test")
            assert run_id in invoke("storage", "holds")
            invoke("storage", "lift", "run", run_id)
            assert "go after the grace period" in invoke("storage", "collect", "--dry-run")
            for wrong in (["artifacts", "download", run_id, "nothing"], ["storage", "quota", name, "much"]):
                assert _invoke(url, *wrong).exit_code != 0

        await asyncio.to_thread(use)
    for path in ("big.bin", "sub/small ü.txt"):
        assert (tmp_path / "copy" / "data" / path).read_bytes() == (source / path).read_bytes()
    assert ArtifactStore(f"file://{stack.artifact_folder}").has(f"{folder}/data/big.bin")


def _invoke(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"MLPLAT_URL": url})
