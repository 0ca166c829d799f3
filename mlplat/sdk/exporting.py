"""``mlplat export``: an experiment with all that is in it as an open archive, over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from mlplat.artifacts.model import served_path
from mlplat.errors import InvalidInput
from mlplat.sdk.archive_files import Progress, no_progress
from mlplat.sdk.archive_rows import (
    dataset_rows,
    input_rows,
    model_files,
    run_files,
    run_model_rows,
    run_pages,
    run_row,
)
from mlplat.sdk.archive_writer import ArchiveWriter, writing
from mlplat.sdk.client import API, Client, artifact_root
from mlplat.sdk.listing import pages, pairs, slices
from mlplat.tracking.archive import (
    DATASETS,
    DATASETS_SCHEMA,
    EXPERIMENT,
    INPUTS,
    INPUTS_SCHEMA,
    MODEL_METRICS,
    MODEL_METRICS_SCHEMA,
    MODEL_PAIRS_SCHEMA,
    MODEL_PARAMS,
    MODEL_TAGS,
    MODELS,
    MODELS_SCHEMA,
    PAIRS_SCHEMA,
    PARAMS,
    POINTS_SCHEMA,
    RUN_MODELS,
    RUN_MODELS_SCHEMA,
    RUNS,
    RUNS_SCHEMA,
    TAGS,
    ExperimentInfo,
    artifact_name,
    model_artifact_name,
)

MODEL_PAGE = 1_000
MODEL_POINT_PAGE = 10_000
#: Runs whose points are read together, and points in one page.
POINT_RUNS = 200
POINT_PAGE = 200_000
POINTS_PER_FILE = 2_000_000
#: Requests for artifacts under way at once.
TRANSFERS = 8


_RUN_TABLES = {
    RUNS: RUNS_SCHEMA, PARAMS: PAIRS_SCHEMA, TAGS: PAIRS_SCHEMA, DATASETS: DATASETS_SCHEMA, INPUTS: INPUTS_SCHEMA,
    RUN_MODELS: RUN_MODELS_SCHEMA,
}  # fmt: skip
_MODEL_TABLES = {
    MODELS: MODELS_SCHEMA, MODEL_PARAMS: MODEL_PAIRS_SCHEMA, MODEL_TAGS: MODEL_PAIRS_SCHEMA,
    MODEL_METRICS: MODEL_METRICS_SCHEMA,
}  # fmt: skip


@dataclass(frozen=True)
class ArtifactKind:
    """Whose artifacts: what lists the files of one, and what they are called in an archive."""

    noun: str
    files: Callable[[Client, str], list[str]]
    name: Callable[[str, str], str]


_OF_RUNS = ArtifactKind("run", run_files, artifact_name)
_OF_MODELS = ArtifactKind("logged model", model_files, model_artifact_name)


@dataclass
class Exported:
    """What an archive holds now."""

    experiment: str
    runs: int = 0
    points: int = 0
    datasets: int = 0
    models: int = 0
    artifacts: int = 0
    #: ``run …`` or ``logged model …`` whose artifacts the platform does not serve, with their URIs: left out.
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
        runs = _write_runs(client, found["experiment_id"], writer, exported, progress)
        _write_points(client, list(runs), writer, exported, progress)
        models = _write_models(client, found["experiment_id"], writer, exported, progress)
        _write_artifacts(client, _OF_RUNS, runs, writer, exported, progress)
        _write_artifacts(client, _OF_MODELS, models, writer, exported, progress)
        writer.finish(exported.runs, exported.points, exported.models)
    return exported


def _info(found: dict[str, Any]) -> ExperimentInfo:
    return ExperimentInfo(
        found["experiment_id"], found["name"], found["creation_time"], found["last_update_time"],
        pairs(found.get("tags")),
    )  # fmt: skip


def _write_runs(
    client: Client, experiment_id: str, writer: ArchiveWriter, exported: Exported, progress: Progress
) -> dict[str, str]:
    """Writes runs with all that goes with them but points and files; returns each run's artifact URI, in order."""
    places: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    with _tables(writer, _RUN_TABLES) as add:
        for page in run_pages(client, experiment_id):
            rows = [run_row(run) for run in page]
            add(RUNS, rows)
            add(PARAMS, _pair_rows(rows, "run_id", "params"))
            add(TAGS, _pair_rows(rows, "run_id", "tags"))
            for run in page:
                # One by one: a dataset's profile may have megabytes.
                new = [row for row in dataset_rows(run) if (row["name"], row["digest"]) not in seen]
                seen.update((row["name"], row["digest"]) for row in new)
                add(DATASETS, new)
            inputs = [row for run in page for row in input_rows(run)]
            add(INPUTS, [row | {"tags": list(row["tags"].items())} for row in inputs])
            add(RUN_MODELS, [row for run in page for row in run_model_rows(run)])
            places.update((row["run_id"], row["artifact_uri"]) for row in rows)
            progress("runs", len(places), None)
    exported.runs, exported.datasets = len(places), len(seen)
    return places


def _write_models(
    client: Client, experiment_id: str, writer: ArchiveWriter, exported: Exported, progress: Progress
) -> dict[str, str]:
    """Writes logged models but for their files; returns the artifact URI of each."""
    places: dict[str, str] = {}
    path = f"/api/v1/experiments/{experiment_id}"
    with _tables(writer, _MODEL_TABLES) as add:
        for rows in pages(lambda page: client.get(f"{path}/logged-models", max_results=MODEL_PAGE, **page), "models"):
            add(MODELS, rows)
            add(MODEL_PARAMS, _pair_rows(rows, "model_id", "params"))
            add(MODEL_TAGS, _pair_rows(rows, "model_id", "tags"))
            places.update((row["model_id"], row["artifact_uri"]) for row in rows)
            progress("logged models", len(places), None)
        points = f"{path}/logged-model-metrics"
        for rows in pages(lambda page: client.get(points, max_results=MODEL_POINT_PAGE, **page), "metrics"):
            add(MODEL_METRICS, [row | {"value": float(row["value"])} for row in rows])
    exported.models = len(places)
    return places


@contextmanager
def _tables(
    writer: ArchiveWriter, schemas: Mapping[str, pa.Schema]
) -> Iterator[Callable[[str, Sequence[dict[str, Any]]], None]]:
    """Parquet files of an archive, open together; yields what adds rows to one of them."""
    files = {name: writer.new_path() for name in schemas}
    with ExitStack() as stack:
        out = {
            name: stack.enter_context(pq.ParquetWriter(files[name], schema, compression="zstd"))
            for name, schema in schemas.items()
        }

        def add(name: str, rows: Sequence[dict[str, Any]]) -> None:
            if rows:
                out[name].write_table(pa.Table.from_pylist(rows, schemas[name]))

        yield add
    for name, file in files.items():
        writer.add(name, file)


def _pair_rows(rows: Sequence[dict[str, Any]], owner: str, kind: str) -> list[dict[str, str]]:
    return [{owner: row[owner], "key": key, "value": value} for row in rows for key, value in sorted(row[kind].items())]


def point_pages(client: Client, run_ids: Sequence[str]) -> Iterator[pa.Table]:
    """All points of the runs, as tables of ``POINTS_SCHEMA``."""
    for some in slices(run_ids, POINT_RUNS):
        body: dict[str, Any] = {"run_ids": some, "limit": POINT_PAGE}
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
    client: Client,
    kind: ArtifactKind,
    places: Mapping[str, str],
    writer: ArchiveWriter,
    exported: Exported,
    progress: Progress,
) -> None:
    """Writes the files of runs or models, whose artifact URIs are ``places``."""
    served = {owner: uri for owner, uri in places.items() if served_path(uri) is not None}
    exported.without_artifacts += [(f"{kind.noun} {each}", uri) for each, uri in places.items() if each not in served]

    def fetch(owner: str, path: str) -> tuple[str, Path]:
        file = writer.new_path()
        with file.open("wb") as into:
            client.download(f"{artifact_root(served[owner])}/{path}", into)
        return kind.name(owner, path), file

    with ThreadPoolExecutor(TRANSFERS, "export") as pool:
        for batch in slices(list(served), 10 * TRANSFERS):
            found = pool.map(lambda owner: [(owner, path) for path in kind.files(client, owner)], batch)
            files = [entry for paths in found for entry in paths]
            for few in slices(files, TRANSFERS):
                for name, file in pool.map(lambda entry: fetch(*entry), few):
                    writer.add(name, file)
                    exported.artifacts += 1
                    progress("artifacts", exported.artifacts, None)
