"""Storage over HTTP and by the commands: collections, scrubbing, legal holds, quotas, usage."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from mlplat.artifacts.store import ArtifactStore
from mlplat.cli import app
from mlplat.db.removals import removing
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


@pytest.mark.parametrize(
    ("kind", "id_", "status"),
    [
        ("model", "m", 400),
        ("run", "a b", 400),
        ("experiment", "x", 400),
        ("run", "0" * 32, 404),
        ("experiment", "99", 404),
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
    entry = (await http.get(f"/api/v1/artifacts/files/{folder}/first")).json()
    refused = await http.put(f"/api/v1/artifacts/files/{folder}/third", json=entry)
    expect_error(refused, 507, "RESOURCE_EXHAUSTED", "300000 more do not fit")
    assert (await http.get(f"{FILES}/{folder}/third")).status_code == 404
    [quota] = [each for each in (await http.get(f"{STORAGE}/quotas")).json() if each["experiment_id"] == experiment]
    assert quota == {"experiment_id": experiment, "limit_bytes": 700_000, "used_bytes": 600_000}
    await http.put(f"{STORAGE}/quotas/{experiment}", json={"limit_bytes": None})
    assert (await _put(http, f"{folder}/third")).status_code == 200
    assert (await http.put(f"{STORAGE}/quotas/987654321", json={"limit_bytes": 1})).status_code == 404


async def test_a_collection_measures_and_corrects_quotas(databases: Databases, tmp_path: Path) -> None:
    async with open_stack(databases, tmp_path) as stack:
        transport = httpx.ASGITransport(app=stack.app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
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

        await asyncio.to_thread(use)
    for path in ("big.bin", "sub/small ü.txt"):
        assert (tmp_path / "copy" / "data" / path).read_bytes() == (source / path).read_bytes()
    assert ArtifactStore(f"file://{stack.artifact_folder}").has(f"{folder}/data/big.bin")
    for arguments in (["artifacts", "download", run_id, "nothing"], ["storage", "quota", name, "much"]):
        result: Any = await asyncio.to_thread(_invoke, "http://127.0.0.1:9", *arguments)
        assert result.exit_code != 0


def _invoke(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"MLPLAT_URL": url})
