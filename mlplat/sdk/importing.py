"""``mlplat import``: an archive becomes an experiment, over HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlplat.artifacts.model import served_path
from mlplat.errors import InvalidInput
from mlplat.sdk.archive_files import Archive, Progress, no_progress, open_archive
from mlplat.sdk.client import Client
from mlplat.sdk.import_target import ENTITIES_PER_CALL, ROWS_PER_CALL, Imported, ImportTarget, bounded_pool
from mlplat.tracking.archive import (
    DATASETS,
    DATASETS_SCHEMA,
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
)

POINTS_PER_CALL = 100_000
#: Datasets in memory at once: each may have 16 MB.
DATASETS_TOGETHER = 20
TRANSFERS = 4


def import_archive(client: Client, path: Path, name: str | None = None, progress: Progress = no_progress) -> Imported:
    """Imports an archive as experiment ``name`` (default: as it was called).

    The archive is verified as a whole before anything is sent, and the experiment is seen when it is
    complete. The same archive again goes on with an import that broke off, or changes nothing.

    Raises:
        NotFound: no archive there.
        InvalidInput: it is malformed, corrupt or hostile.
        AlreadyExists: another experiment has the name.
    """
    archive = open_archive(path)
    archive.verify(progress)
    info = archive.experiment()
    name = name or info.name
    origin = f"archive:{hashlib.sha256(f'{archive.digest} {name}'.encode()).hexdigest()}"
    target = ImportTarget(client, origin, name, info)
    if target.result.already_there:
        return target.result
    run_ids = _ids(archive, RUNS, RUNS_SCHEMA, archive.manifest.runs)
    model_ids = _ids(archive, MODELS, MODELS_SCHEMA, archive.manifest.models)
    target.assign(run_ids)
    target.assign_models(model_ids)
    runs = _send_runs(target, archive, progress)
    _send_points(target, archive, progress)
    models = _send_models(target, archive, progress)
    _send_links(target, archive, progress)
    _send_artifacts(target, archive, runs, models, progress)
    target.complete(run_ids)
    target.complete_models(model_ids)
    return target.finish()


def _ids(archive: Archive, name: str, schema: pa.Schema, expected: int) -> list[str]:
    """The ids in a table's first column."""
    found = [row_id for batch in _batches(archive, name, schema, 10_000) for row_id in batch.column(0).to_pylist()]
    if len(found) != expected or len(set(found)) != len(found):
        raise InvalidInput(f"{name} has {len(set(found))} rows, the manifest says {expected}")
    return found


def _batches(archive: Archive, name: str, schema: pa.Schema, rows: int) -> Iterator[pa.RecordBatch]:
    """The rows of a table; none when the archive is of a version that did not have it."""
    if name in archive.manifest.files:
        yield from archive.batches(name, schema, rows)


class _Grouped:
    """Rows of params or tags, handed out owner by owner in the order of the table of these."""

    def __init__(self, archive: Archive, name: str, schema: pa.Schema, owners: str) -> None:
        self._name, self._owners = name, owners
        self._rows = (
            row
            for batch in _batches(archive, name, schema, 10_000)
            for row in zip(*batch.to_pydict().values(), strict=True)
        )
        self._next = next(self._rows, None)

    def of(self, owner: str) -> dict[str, str]:
        found: dict[str, str] = {}
        while self._next is not None and self._next[0] == owner:
            _owner, key, value = self._next
            found[key] = value
            self._next = next(self._rows, None)
        return found

    def check_end(self) -> None:
        if self._next is not None:
            raise InvalidInput(f"{self._name} is not in the order of {self._owners}, at {self._next[0][:100]!r}")


def _send_runs(target: ImportTarget, archive: Archive, progress: Progress) -> dict[str, str]:
    params, tags = _Grouped(archive, PARAMS, PAIRS_SCHEMA, RUNS), _Grouped(archive, TAGS, PAIRS_SCHEMA, RUNS)
    uris: dict[str, str] = {}
    for batch in archive.batches(RUNS, RUNS_SCHEMA, ENTITIES_PER_CALL):
        uris |= target.put_runs([_with_pairs(row, row["run_id"], params, tags) for row in batch.to_pylist()])
        progress("runs", len(uris), archive.manifest.runs)
    params.check_end()
    tags.check_end()
    return uris


def _with_pairs(row: dict[str, Any], owner: str, params: _Grouped, tags: _Grouped) -> dict[str, Any]:
    """A row with params and tags, and with an artifact URI only where the artifacts do not come along."""
    uri = row["artifact_uri"]
    is_here = served_path(uri) is not None
    return row | {"params": params.of(owner), "tags": tags.of(owner), "artifact_uri": None if is_here else uri}


def _send_models(target: ImportTarget, archive: Archive, progress: Progress) -> dict[str, str]:
    params = _Grouped(archive, MODEL_PARAMS, MODEL_PAIRS_SCHEMA, MODELS)
    tags = _Grouped(archive, MODEL_TAGS, MODEL_PAIRS_SCHEMA, MODELS)
    uris: dict[str, str] = {}
    for batch in _batches(archive, MODELS, MODELS_SCHEMA, ENTITIES_PER_CALL):
        uris |= target.put_models([_with_pairs(row, row["model_id"], params, tags) for row in batch.to_pylist()])
        progress("logged models", len(uris), archive.manifest.models)
    params.check_end()
    tags.check_end()
    for batch in _batches(archive, MODEL_METRICS, MODEL_METRICS_SCHEMA, ROWS_PER_CALL):
        target.put_model_metrics(batch.to_pylist())
    return uris


def _send_links(target: ImportTarget, archive: Archive, progress: Progress) -> None:
    for batch in _batches(archive, DATASETS, DATASETS_SCHEMA, DATASETS_TOGETHER):
        target.put_datasets(batch.to_pylist())
        target.result.datasets += batch.num_rows
        progress("datasets", target.result.datasets, None)
    for batch in _batches(archive, INPUTS, INPUTS_SCHEMA, ROWS_PER_CALL):
        target.put_inputs([row | {"tags": dict(row["tags"])} for row in batch.to_pylist()])
    for batch in _batches(archive, RUN_MODELS, RUN_MODELS_SCHEMA, ROWS_PER_CALL):
        target.put_run_models(batch.to_pylist())


def _send_points(target: ImportTarget, archive: Archive, progress: Progress) -> None:
    with bounded_pool(TRANSFERS) as run:
        sent = run(
            lambda batch: target.put_points(pa.Table.from_batches([batch])),
            (
                batch
                for name in archive.manifest.metrics
                for batch in archive.batches(name, POINTS_SCHEMA, POINTS_PER_CALL)
            ),
        )
        for points in sent:
            target.result.points += points
            progress("points", target.result.points, archive.manifest.points)
    if target.result.points != archive.manifest.points:
        raise InvalidInput(
            f"the archive has {target.result.points} points, its manifest says {archive.manifest.points}"
        )


def _send_artifacts(
    target: ImportTarget, archive: Archive, runs: Mapping[str, str], models: Mapping[str, str], progress: Progress
) -> None:
    artifacts = [(runs, entry) for entry in archive.manifest.artifacts]
    artifacts += [(models, entry) for entry in archive.manifest.model_artifacts]

    def send(uris: Mapping[str, str], entry: tuple[str, str, str]) -> None:
        name, owner, path = entry
        if owner not in uris:
            raise InvalidInput(f"an artifact belongs to something that is not there: {name[:200]!r}")
        target.put_artifact(uris[owner], path, lambda: archive.open(name))

    with bounded_pool(TRANSFERS) as run:
        for _done in run(lambda each: send(*each), artifacts):
            target.result.artifacts += 1
            progress("artifacts", target.result.artifacts, len(artifacts))
