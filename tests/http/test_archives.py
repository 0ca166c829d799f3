"""Export and import over HTTP: what comes out is what went in, or nothing."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import math
import re
import tarfile
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mlplat
from mlplat.artifacts.model import proxied_path
from mlplat.errors import AlreadyExists, InvalidInput, NotFound, PlatformError
from mlplat.sdk.archive_files import open_archive
from mlplat.sdk.client import Client
from mlplat.sdk.exporting import export_experiment
from mlplat.sdk.importing import import_archive
from mlplat.sdk.lifecycle import purge
from mlplat.sdk.transfer import upload_from
from tests.contract.chdb import unique
from tests.http.conftest import Stack
from tests.http.serving import served

API = "/api/2.0/mlflow"


@pytest.fixture(scope="session")
async def url(stack: Stack) -> AsyncIterator[str]:
    async with served(stack.app) as address:
        yield address


@pytest.fixture
def client(url: str) -> Client:
    return Client(url, retry_for_s=5)


def _fill(client: Client, name: str) -> list[str]:
    """An experiment with three runs: one nested and failed, one deleted, with points of all kinds and files."""
    start = partial(mlplat.start_run, name, url=client.url, capture=mlplat.Capture.nothing())
    with start(name="first", params={"rate": 0.1, "text": "ä" * 300}) as first:
        for step in range(50):
            first.log({"loss": 1 / (step + 1), "acc/train": step / 50}, step=step)
        first.log({"odd": math.nan}, step=-3)
        first.log({"odd": math.inf}, step=-2)
        first.log({"odd": -0.0}, step=-1)
        first.set_tags({"team": "vision", "empty": ""})
    child = start(parent=first)
    child.log({"loss": 7.5}, step=1)
    child.finish("FAILED")
    with start(params={"rate": 0.2}) as gone:
        pass
    for run, path, body in (
        (first, "model/weights ä.bin", b"\x00\xff" * 700),
        (first, "notes.txt", b""),
        (child, "a/b/c", b"x"),
    ):
        upload_from(client, f"{proxied_path(run.artifact_uri)}/{path}", partial(io.BytesIO, body))
    found = client.get(f"{API}/experiments/get-by-name", experiment_name=name)["experiment"]
    client.post(
        f"{API}/experiments/set-experiment-tag",
        {"experiment_id": found["experiment_id"], "key": "owner", "value": "me"},
    )
    _link(client, found["experiment_id"], first.run_id, child.run_id)
    client.post(f"{API}/runs/delete", {"run_id": gone.run_id})
    return [first.run_id, child.run_id, gone.run_id]


def _link(client: Client, experiment_id: str, first: str, child: str) -> None:
    """Two datasets with and without all parts, a model that is ready and one that is deleted, with points and files."""
    whole = {"name": "digits", "digest": "d1", "source_type": "local", "source": "{}", "schema": "[]", "profile": "{ä}"}
    bare = {"name": "other", "digest": "d2", "source_type": "code", "source": ""}
    uses = [
        {"dataset": whole, "tags": [{"key": "mlflow.data.context", "value": "train"}, {"key": "k", "value": ""}]},
        {"dataset": bare},
    ]
    client.post(f"{API}/runs/log-inputs", {"run_id": first, "datasets": uses})
    client.post(f"{API}/runs/log-inputs", {"run_id": child, "datasets": uses[:1]})
    models = []
    for name in ("kept", "dropped"):
        new = {"experiment_id": experiment_id, "name": name, "model_type": "tree", "source_run_id": first}
        pairs = {"params": [{"key": "depth", "value": "3"}], "tags": [{"key": "t", "value": name}]}
        model = client.post(f"{API}/logged-models", new | pairs)["model"]["info"]
        models.append(model["model_id"])
        where = f"{proxied_path(model['artifact_uri'])}/flavor/MLmodel"
        upload_from(client, where, partial(io.BytesIO, name.encode()))
    _send(client, "PATCH", f"logged-models/{models[0]}", status="LOGGED_MODEL_READY")
    outputs = [{"model_id": models[0], "step": 7}, {"model_id": models[1], "step": -1}]
    client.post(f"{API}/runs/outputs", {"run_id": first, "models": outputs})
    client.post(f"{API}/runs/log-inputs", {"run_id": child, "models": [{"model_id": models[0]}]})
    # More points of a model than MLflow's answers have.
    points = [
        {"key": "score", "value": step / 7, "timestamp": 5, "step": step, "model_id": models[0],
         "dataset_name": "digits", "dataset_digest": "d1"}
        for step in range(150)
    ]  # fmt: skip
    points.append({"key": "score", "value": "NaN", "timestamp": 5, "step": 1, "model_id": models[1]})
    client.post(f"{API}/runs/log-batch", {"run_id": child, "metrics": points})
    _send(client, "DELETE", f"logged-models/{models[1]}")


def _send(client: Client, method: str, path: str, **fields: Any) -> None:
    with httpx.Client(base_url=client.url, trust_env=False) as http:
        http.request(method, f"{API}/{path}", json=fields).raise_for_status()


def _known(known: dict[str, Any], value: Any) -> Any:
    return known.get(value, value) if isinstance(value, str) else value


def _content(folder: Path) -> dict[str, Any]:
    """Everything that an archive says, but for ids and places."""
    manifest = json.loads((folder / "manifest.json").read_text())
    runs = pq.read_table(folder / "runs.parquet").to_pylist()
    # In the place of ids, of which a copy has others: the numbers of runs, the names of models.
    known = {run["run_id"]: index for index, run in enumerate(runs)}
    known |= {model["model_id"]: model["name"] for model in pq.read_table(folder / "models.parquet").to_pylist()}

    def rows(name: str) -> list[str]:
        table = pq.read_table(folder / name)
        table = table.drop_columns([column for column in ("artifact_uri",) if column in table.column_names])
        return sorted(str([_known(known, value) for value in row.values()]) for row in table.to_pylist())

    files = {
        (kind, known[owner], path): entry
        for name, entry in manifest["files"].items()
        if name.startswith(("artifacts/", "models/"))
        for kind, owner, path in [name.split("/", 2)]
    }
    experiment = json.loads((folder / "experiment.json").read_text())
    tables = {name: rows(name) for name in manifest["files"] if name.endswith(".parquet") and name.count("/") < 2}
    numbers = {key: manifest[key] for key in ("version", "runs", "points", "models")}
    experiment = {k: v for k, v in experiment.items() if k not in {"experiment_id", "name"}}
    order = [(known[row["run_id"]], row["name"]) for row in pq.read_table(folder / "inputs.parquet").to_pylist()]
    return tables | {"files": files, "experiment": experiment, "numbers": numbers, "order": order}


async def test_a_round_trip_under_another_name_is_equal_in_everything(client: Client, tmp_path: Path) -> None:
    name = unique("experiment")
    run_ids = await asyncio.to_thread(_fill, client, name)
    exported = await asyncio.to_thread(export_experiment, client, name, tmp_path / "first")
    assert (exported.runs, exported.points, exported.artifacts) == (3, 255, 5)
    assert (exported.datasets, exported.models, exported.without_artifacts) == (2, 2, [])
    imported = await asyncio.to_thread(import_archive, client, tmp_path / "first", f"{name}-copy")
    assert (imported.runs, imported.points, imported.artifacts) == (3, 255, 5)
    assert (imported.datasets, imported.models, imported.left_out) == (2, 2, [])
    assert set(imported.renamed) == set(run_ids)
    assert len(imported.renamed_models) == 2
    await asyncio.to_thread(export_experiment, client, f"{name}-copy", tmp_path / "second.tar")
    with tarfile.open(tmp_path / "second.tar") as tar:
        tar.extractall(tmp_path / "second", filter="data")
    assert _content(tmp_path / "second") == _content(tmp_path / "first")
    first = _content(tmp_path / "first")
    assert [len(first[f"{name}.parquet"]) for name in ("inputs", "run_models", "model_metrics")] == [3, 3, 151]
    (parent,) = (row for row in first["tags.parquet"] if "parentRunId" in row)
    assert re.fullmatch(r"\[\d, 'mlflow.parentRunId', \d\]", parent)
    again = await asyncio.to_thread(import_archive, client, tmp_path / "first", f"{name}-copy")
    assert again.already_there
    with pytest.raises(AlreadyExists, match="import under another name"):
        await asyncio.to_thread(import_archive, client, tmp_path / "first")
    with pytest.raises(AlreadyExists, match="exists already"):
        await asyncio.to_thread(export_experiment, client, name, tmp_path / "first")


async def test_ids_are_kept_when_they_are_free(client: Client, tmp_path: Path) -> None:
    name = unique("experiment")
    run_ids = await asyncio.to_thread(_fill, client, name)
    await asyncio.to_thread(export_experiment, client, name, tmp_path / "x.tar")
    before = client_get_all(await _runs(client, name))
    experiment_id = (await _experiment(client, name))["experiment_id"]
    await asyncio.to_thread(client.post, f"{API}/experiments/delete", {"experiment_id": experiment_id})
    report = await asyncio.to_thread(purge, client, experiments=[name])
    assert (report["runs"], report["experiments"], report["artifact_files"]) == (3, 1, 3)
    imported = await asyncio.to_thread(import_archive, client, tmp_path / "x.tar")
    assert (imported.experiment_id, imported.renamed) == (experiment_id, {})
    assert client_get_all(await _runs(client, name)) == before
    assert set(before) == set(run_ids)
    # Later experiments get later ids.
    later = await asyncio.to_thread(client.post, f"{API}/experiments/create", {"name": unique("later")})
    assert int(later["experiment_id"]) > int(experiment_id)


async def _experiment(client: Client, name: str) -> dict[str, Any]:
    answer = await asyncio.to_thread(client.get, f"{API}/experiments/get-by-name", experiment_name=name)
    found: dict[str, Any] = answer["experiment"]
    return found


async def _runs(client: Client, name: str) -> list[dict[str, Any]]:
    body = {"experiment_ids": [(await _experiment(client, name))["experiment_id"]], "run_view_type": "ALL"}
    answer = await asyncio.to_thread(client.post, f"{API}/runs/search", body)
    runs: list[dict[str, Any]] = answer["runs"]
    return runs


def client_get_all(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {run["info"]["run_id"]: run for run in runs}


async def test_an_import_that_breaks_off_is_hidden_and_goes_on(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = unique("experiment")
    await asyncio.to_thread(_fill, client, name)
    await asyncio.to_thread(export_experiment, client, name, tmp_path / "x.tar")
    copy, real = f"{name}-copy", client.put_bytes
    everything = await asyncio.to_thread(purge, client, dry_run=True, older_than="0s")

    def broken(path: str, body: bytes, sha256: str) -> None:
        if path.endswith("notes.txt"):
            raise PlatformError("the line went dead")
        real(path, body, sha256)

    monkeypatch.setattr(client, "put_bytes", broken)
    with pytest.raises(PlatformError, match="went dead"):
        await asyncio.to_thread(import_archive, client, tmp_path / "x.tar", copy)
    hidden = await _experiment(client, copy)
    assert hidden["lifecycle_stage"] == "deleted"
    body = {"experiment_ids": [hidden["experiment_id"]]}
    assert await asyncio.to_thread(client.post, f"{API}/runs/search", body) == {}
    with pytest.raises(InvalidInput, match="being imported"):
        await asyncio.to_thread(client.post, f"{API}/experiments/restore", {"experiment_id": hidden["experiment_id"]})
    with pytest.raises(InvalidInput, match="3 runs of this import"):
        await asyncio.to_thread(client.post, f"/api/v1/imports/{hidden['experiment_id']}/finish", {})
    # A purge of everything leaves an import alone that is under way.
    assert await asyncio.to_thread(purge, client, dry_run=True, older_than="0s") == everything
    monkeypatch.undo()
    imported = await asyncio.to_thread(import_archive, client, tmp_path / "x.tar", copy)
    assert imported.experiment_id == hidden["experiment_id"]
    await asyncio.to_thread(export_experiment, client, copy, tmp_path / "y")
    await asyncio.to_thread(export_experiment, client, name, tmp_path / "z")
    assert _content(tmp_path / "y") == _content(tmp_path / "z")


async def test_what_cannot_be_exported_leaves_nothing_behind(client: Client, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await asyncio.to_thread(export_experiment, client, "no such experiment", tmp_path / "x.tar")
    name = unique("experiment")
    made = await asyncio.to_thread(client.post, f"{API}/experiments/create", {"name": name})
    await asyncio.to_thread(client.post, f"{API}/experiments/delete", {"experiment_id": made["experiment_id"]})
    with pytest.raises(InvalidInput, match="is deleted"):
        await asyncio.to_thread(export_experiment, client, name, tmp_path / "x.tar")
    assert list(tmp_path.iterdir()) == []


async def test_an_empty_experiment_makes_the_round_trip(client: Client, tmp_path: Path) -> None:
    name = unique("experiment")
    await asyncio.to_thread(client.post, f"{API}/experiments/create", {"name": name})
    exported = await asyncio.to_thread(export_experiment, client, name, tmp_path / "x.tar")
    assert (exported.runs, exported.points) == (0, 0)
    imported = await asyncio.to_thread(import_archive, client, tmp_path / "x.tar", f"{name}-copy")
    assert (await _experiment(client, f"{name}-copy"))["experiment_id"] == imported.experiment_id


def _replace(folder: Path, name: str, body: bytes) -> None:
    """Puts another file in the place of one and makes the manifest agree."""
    (folder / name).write_bytes(body)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


async def test_archives_that_contradict_themselves_stay_invisible(client: Client, tmp_path: Path) -> None:
    name = unique("experiment")
    await asyncio.to_thread(_fill, client, name)
    await asyncio.to_thread(export_experiment, client, name, tmp_path / "good")
    points = pq.read_table(tmp_path / "good/metrics/00000.parquet")
    strangers = points.set_column(0, points.schema.field(0), pa.array(["stranger"] * len(points)))
    params = pq.read_table(tmp_path / "good/params.parquet")
    cases = {
        "metrics/00000.parquet": [
            (b"PAR1nonsense", "not a readable Parquet"),
            (_parquet(pa.table({"x": [1]})), "other columns"),
            (_parquet(strangers), "a run that is not there: 'stranger'"),
            (_parquet(points.slice(1)), "has 254 points, its manifest says 255"),
        ],
        "params.parquet": [(_parquet(pa.concat_tables([params, params])), "not in the order")],
        "experiment.json": [(b"[]", "malformed")],
    }
    number = 0
    for file, bodies in cases.items():
        original = (tmp_path / "good" / file).read_bytes()
        for body, message in bodies:
            _replace(tmp_path / "good", file, body)
            number += 1
            copy = f"{name}-{number}"
            with pytest.raises(InvalidInput, match=message):
                await asyncio.to_thread(import_archive, client, tmp_path / "good", copy)
            with suppress(NotFound):
                assert (await _experiment(client, copy))["lifecycle_stage"] == "deleted"
            _replace(tmp_path / "good", file, original)
    (tmp_path / "good/runs.parquet").write_bytes((tmp_path / "good/runs.parquet").read_bytes()[:-1] + b"\x00")
    with pytest.raises(InvalidInput, match="corrupt"):
        open_archive(tmp_path / "good").verify()


async def test_other_peoples_runs_and_finished_imports_are_out_of_reach(client: Client) -> None:
    other = await asyncio.to_thread(client.post, f"{API}/runs/create", {"experiment_id": "0"})
    run_id = other["run"]["info"]["run_id"]
    begin = {"origin": unique("origin"), "name": unique("experiment"), "created_at": 1, "updated_at": 1}
    target = await asyncio.to_thread(client.post, "/api/v1/imports", begin)
    path = f"/api/v1/imports/{target['experiment_id']}"
    row = {"run_id": run_id, "name": "n", "status": "FINISHED", "started_at": 1}
    assigned = await asyncio.to_thread(client.post, f"{path}/ids", {"run_ids": [run_id, unique("new")]})
    assigned = assigned["runs"]
    assert assigned[0]["new_id"] != run_id
    assert [entry["complete"] for entry in assigned] == [False, False]

    async def refused(message: str, where: str, body: dict[str, Any]) -> None:
        with pytest.raises((InvalidInput, NotFound), match=message):
            await asyncio.to_thread(client.post, where, body)

    await refused("not part of this import", f"{path}/runs", {"runs": [row]})
    mine = row | {"run_id": assigned[0]["new_id"]}
    await refused(
        "cannot claim artifacts", f"{path}/runs", {"runs": [mine | {"artifact_uri": "mlflow-artifacts:/0/x"}]}
    )
    await refused("Invalid param name", f"{path}/runs", {"runs": [mine | {"params": {"../x": "1"}}]})
    await refused("Invalid enum value", f"{path}/runs", {"runs": [mine | {"status": "DANCING"}]})
    await refused("were not sent yet", f"{path}/complete", {"run_ids": [mine["run_id"]]})
    await refused("Invalid id", f"{path}/ids", {"run_ids": ["../etc"]})
    await refused("each once", f"{path}/ids", {"run_ids": ["a", "a"]})
    await refused("No import", "/api/v1/imports/0/finish", {})
    await refused("decimal numbers", "/api/v1/imports/x/finish", {})


def _as_version_1(folder: Path) -> None:
    """Takes away what the first version of the format did not have."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tables = {"inputs", "datasets", "run_models", "models", "model_params", "model_tags", "model_metrics"}
    for name in list(manifest["files"]):
        if name.removesuffix(".parquet") in tables or name.startswith("models/"):
            del manifest["files"][name]
            (folder / name).unlink()
    del manifest["models"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 1}))


async def test_archives_of_the_first_version_are_read(client: Client, tmp_path: Path) -> None:
    name = unique("experiment")
    await asyncio.to_thread(_fill, client, name)
    await asyncio.to_thread(export_experiment, client, name, tmp_path / "x")
    _as_version_1(tmp_path / "x")
    imported = await asyncio.to_thread(import_archive, client, tmp_path / "x", f"{name}-copy")
    assert (imported.runs, imported.points, imported.artifacts) == (3, 255, 3)
    assert (imported.datasets, imported.models) == (0, 0)
    assert {(run["inputs"] == {}, run["outputs"] == {}) for run in await _runs(client, f"{name}-copy")} == {
        (True, True)
    }


async def test_what_archives_refer_to_and_is_nowhere_is_named(client: Client, tmp_path: Path) -> None:
    """A run that made a model of another experiment, which a run of a third one measured; both are purged later."""
    name, others = unique("experiment"), [unique("other"), unique("other")]
    (run_id, *_rest) = await asyncio.to_thread(_fill, client, name)
    made = [await asyncio.to_thread(client.post, f"{API}/experiments/create", {"name": each}) for each in others]
    new = {"experiment_id": made[0]["experiment_id"], "name": "elsewhere"}
    theirs = (await asyncio.to_thread(client.post, f"{API}/logged-models", new))["model"]["info"]["model_id"]
    link = {"run_id": run_id, "models": [{"model_id": theirs, "step": 1}]}
    await asyncio.to_thread(client.post, f"{API}/runs/outputs", link)
    mine = {"experiment_ids": [(await _experiment(client, name))["experiment_id"]]}
    (model,) = (await asyncio.to_thread(client.post, f"{API}/logged-models/search", mine))["models"]
    body = {"experiment_id": made[1]["experiment_id"], "start_time": 1}
    judge = (await asyncio.to_thread(client.post, f"{API}/runs/create", body))["run"]["info"]["run_id"]
    point = {"run_id": judge, "key": "score", "value": 1, "timestamp": 9, "model_id": model["info"]["model_id"]}
    await asyncio.to_thread(client.post, f"{API}/runs/log-metric", point)
    await asyncio.to_thread(export_experiment, client, name, tmp_path / "x")
    there = await asyncio.to_thread(import_archive, client, tmp_path / "x", f"{name}-whole")
    assert there.left_out == []
    for each in made:
        await asyncio.to_thread(client.post, f"{API}/experiments/delete", each)
    await asyncio.to_thread(purge, client, experiments=others)
    imported = await asyncio.to_thread(import_archive, client, tmp_path / "x", f"{name}-copy")
    assert imported.left_out == [
        f"1 metric points of logged models: run {judge}, which they name, is not here",
        f"output of run {imported.renamed[run_id]}: logged model {theirs} is not here",
    ]


async def test_pages_of_logged_models_are_bounded_and_of_one_experiment(client: Client) -> None:
    name = unique("experiment")
    await asyncio.to_thread(_fill, client, name)
    path = f"/api/v1/experiments/{(await _experiment(client, name))['experiment_id']}"
    found: list[str] = []
    page: dict[str, str] = {}
    while True:
        answer = await asyncio.to_thread(partial(client.get, f"{path}/logged-model-metrics", max_results=50, **page))
        found += [f"{point['model_id']}-{point['step']}-{point['value']}" for point in answer["metrics"]]
        if "next_page_token" not in answer:
            break
        page = {"page_token": answer["next_page_token"]}
    assert len(set(found)) == len(found) == 151
    for query in ({"max_results": 0}, {"max_results": 10_001}, {"page_token": "m-1:xyz"}):
        with pytest.raises(InvalidInput):
            await asyncio.to_thread(partial(client.get, f"{path}/logged-model-metrics", **query))
    with pytest.raises(NotFound):
        await asyncio.to_thread(client.get, "/api/v1/experiments/999999999/logged-models")
