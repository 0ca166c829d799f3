"""``mlplat export``: an experiment with runs, points and artifacts as an open archive, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from mlplat.errors import InvalidInput
from mlplat.sdk.archive_files import Progress, no_progress
from mlplat.sdk.archive_writer import ArchiveWriter, writing
from mlplat.sdk.client import API, ARTIFACTS, Client
from mlplat.tracking.archive import (
    EXPERIMENT,
    PAIRS_SCHEMA,
    PARAMS,
    POINTS_SCHEMA,
    RUNS,
    RUNS_SCHEMA,
    TAGS,
    ExperimentInfo,
    artifact_name,
)

RUN_PAGE = 1_000
#: Runs whose points are read together, and points in one page.
POINT_RUNS = 200
POINT_PAGE = 200_000
POINTS_PER_FILE = 2_000_000
#: Requests for artifacts under way at once.
TRANSFERS = 8


@dataclass
class Exported:
    """What an archive holds now."""

    experiment: str
    runs: int = 0
    points: int = 0
    artifacts: int = 0
    #: Runs whose artifacts the platform does not serve, with their URIs: those were left out.
    without_artifacts: list[tuple[str, str]] = field(default_factory=list)


def export_experiment(client: Client, name: str, target: Path, progress: Progress = no_progress) -> Exported:
    """Writes the experiment to ``target``: a folder, or a tar if it ends in ``.tar``. Memory is bounded.

    Raises:
        NotFound: no such experiment.
        AlreadyExists: there is a file or folder already.
        InvalidInput: the experiment is deleted.
    """
    found = client.get(f"{API}/experiments/get-by-name", experiment_name=name)["experiment"]
    if found["lifecycle_stage"] == "deleted":
        raise InvalidInput(f"experiment {name!r} is deleted; restore it first")
    with writing(target) as writer:
        writer.add_bytes(EXPERIMENT, msgspec.json.encode(_info(found)))
        exported = Exported(name)
        places = _write_runs(client, found["experiment_id"], writer, exported, progress)
        _write_points(client, list(places), writer, exported, progress)
        _write_artifacts(client, places, writer, exported, progress)
        writer.finish(exported.runs, exported.points)
    return exported


def pairs(entries: Sequence[dict[str, str]] | None) -> dict[str, str]:
    """MLflow's list of keys and values as a dict."""
    return {entry["key"]: entry.get("value", "") for entry in entries or ()}


def run_pages(client: Client, experiment_id: str, page: int = RUN_PAGE) -> Iterator[list[dict[str, Any]]]:
    """All runs of an experiment as MLflow writes them, deleted ones included, each once."""
    seen: set[str] = set()
    token: str | None = None
    while True:
        body = {"experiment_ids": [experiment_id], "run_view_type": "ALL", "max_results": page}
        answer = client.post(f"{API}/runs/search", body | ({"page_token": token} if token else {}))
        # A run that starts meanwhile can push others to the next page, where they come again.
        runs = [run for run in answer.get("runs", ()) if run["info"]["run_id"] not in seen]
        seen.update(run["info"]["run_id"] for run in runs)
        if runs:
            yield runs
        token = answer.get("next_page_token")
        if not token:
            return


def _info(found: dict[str, Any]) -> ExperimentInfo:
    return ExperimentInfo(
        found["experiment_id"], found["name"], found["creation_time"], found["last_update_time"],
        pairs(found.get("tags")),
    )  # fmt: skip


def run_row(run: dict[str, Any]) -> dict[str, Any]:
    """A row of ``runs.parquet``."""
    info = run["info"]
    return {
        "run_id": info["run_id"],
        "name": info.get("run_name", ""),
        "status": info["status"],
        "user_id": info.get("user_id", ""),
        "started_at": info.get("start_time", 0),
        "ended_at": info.get("end_time"),
        "deleted": info["lifecycle_stage"] == "deleted",
        "artifact_uri": info["artifact_uri"],
    }


def _write_runs(
    client: Client, experiment_id: str, writer: ArchiveWriter, exported: Exported, progress: Progress
) -> dict[str, str]:
    """Writes runs, params and tags; returns the artifact URI of each run, in their order."""
    places: dict[str, str] = {}
    files = {name: writer.new_path() for name in (RUNS, PARAMS, TAGS)}
    with (
        pq.ParquetWriter(files[RUNS], RUNS_SCHEMA, compression="zstd") as runs_file,
        pq.ParquetWriter(files[PARAMS], PAIRS_SCHEMA, compression="zstd") as params_file,
        pq.ParquetWriter(files[TAGS], PAIRS_SCHEMA, compression="zstd") as tags_file,
    ):
        for page in run_pages(client, experiment_id):
            rows = [run_row(run) for run in page]
            runs_file.write_table(pa.Table.from_pylist(rows, RUNS_SCHEMA))
            params_file.write_table(_pairs_table(page, "params"))
            tags_file.write_table(_pairs_table(page, "tags"))
            places.update((row["run_id"], row["artifact_uri"]) for row in rows)
            progress("runs", len(places), None)
    for name, file in files.items():
        writer.add(name, file)
    exported.runs = len(places)
    return places


def _pairs_table(page: Sequence[dict[str, Any]], kind: str) -> pa.Table:
    rows = [
        {"run_id": run["info"]["run_id"], "key": key, "value": value}
        for run in page
        for key, value in pairs(run.get("data", {}).get(kind)).items()
    ]
    return pa.Table.from_pylist(rows, PAIRS_SCHEMA)


def point_pages(client: Client, run_ids: Sequence[str]) -> Iterator[pa.Table]:
    """All points of the runs, as tables of ``POINTS_SCHEMA``."""
    for start in range(0, len(run_ids), POINT_RUNS):
        body: dict[str, Any] = {"run_ids": run_ids[start : start + POINT_RUNS], "limit": POINT_PAGE}
        while True:
            with pa.ipc.open_stream(client.post_for_bytes("/api/v1/metrics/read", body)) as reader:
                table = reader.read_all().cast(POINTS_SCHEMA)
            if table.num_rows:
                yield table
            if table.num_rows < POINT_PAGE:
                break
            last = table.slice(table.num_rows - 1).to_pylist()[0]
            # JSON has no NaN and no infinity.
            body["after"] = [last["run_id"], last["key"], last["step"], last["timestamp"], str(last["value"])]


def _write_points(
    client: Client, run_ids: Sequence[str], writer: ArchiveWriter, exported: Exported, progress: Progress
) -> None:
    pages = point_pages(client, run_ids)
    page = next(pages, None)
    number = 0
    while page is not None:
        file, rows = writer.new_path(), 0
        with pq.ParquetWriter(file, POINTS_SCHEMA, compression="zstd") as out:
            while page is not None and rows < POINTS_PER_FILE:
                out.write_table(page)
                rows += page.num_rows
                progress("points", exported.points + rows, None)
                page = next(pages, None)
        writer.add(f"metrics/{number:05}.parquet", file)
        exported.points += rows
        number += 1


def _write_artifacts(
    client: Client, places: dict[str, str], writer: ArchiveWriter, exported: Exported, progress: Progress
) -> None:
    served = {run_id: uri for run_id, uri in places.items() if uri.startswith("mlflow-artifacts:")}
    exported.without_artifacts = [(run_id, uri) for run_id, uri in places.items() if run_id not in served]

    def fetch(run_id: str, path: str) -> tuple[str, Path]:
        file = writer.new_path()
        root = served[run_id].partition(":")[2].strip("/")
        with file.open("wb") as into:
            client.download(f"{ARTIFACTS}/{root}/{path}", into)
        return artifact_name(run_id, path), file

    with ThreadPoolExecutor(TRANSFERS, "export") as pool:
        for batch in _batches(list(served), 10 * TRANSFERS):
            found = pool.map(lambda run_id: [(run_id, path) for path in artifact_paths(client, run_id)], batch)
            files = [entry for paths in found for entry in paths]
            for few in _batches(files, TRANSFERS):
                for name, file in pool.map(lambda entry: fetch(*entry), few):
                    writer.add(name, file)
                    exported.artifacts += 1
                    progress("artifacts", exported.artifacts, None)


def artifact_paths(client: Client, run_id: str) -> list[str]:
    """All files below a run's artifacts."""
    files: list[str] = []
    folders = [""]
    while folders:
        query: dict[str, str] = {"run_id": run_id} | ({"path": folder} if (folder := folders.pop()) else {})
        while True:
            answer = client.get(f"{API}/artifacts/list", **query)
            for entry in answer.get("files", ()):
                (folders if entry["is_dir"] else files).append(entry["path"])
            if not answer.get("next_page_token"):
                break
            query["page_token"] = answer["next_page_token"]
    return sorted(files)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
