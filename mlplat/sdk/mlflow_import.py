"""``mlplat import-mlflow``: experiments of an MLflow server, read over its REST.

Ids are kept where they are free. An import that broke off goes on with what has not arrived; a complete
one changes nothing any more. What cannot be taken along is named in the result. Traces, prompts and
evaluation datasets are none of these experiments' parts and stay behind.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa

from mlplat.errors import AlreadyExists, NotFound
from mlplat.sdk.archive_files import Progress, no_progress
from mlplat.sdk.archive_rows import (
    dataset_rows,
    input_rows,
    model_files,
    model_metric_rows,
    model_row,
    run_files,
    run_model_rows,
    run_pages,
    run_row,
)
from mlplat.sdk.client import API, Client
from mlplat.sdk.import_target import Imported, ImportTarget, bounded_pool
from mlplat.sdk.listing import every, pages, pairs
from mlplat.tracking.archive import POINTS_SCHEMA, ExperimentInfo
from mlplat.tracking.model import MAX_NAME_LENGTH

EXPERIMENT_PAGE = 1_000
#: What MLflow's own client asks for at a time.
HISTORY_PAGE = 25_000
#: Runs that are complete, and so are skipped by a later try, together.
RUNS_TOGETHER = 100
MODELS_TOGETHER = 50
POINTS_TOGETHER = 50_000
#: Requests to the MLflow server under way at once.
READERS = 8


def import_mlflow(
    client: Client, source_url: str, experiments: Sequence[str] | None = None, progress: Progress = no_progress
) -> Iterator[Imported]:
    """Imports experiments by name (default: all active ones), one after another.

    An experiment whose name is taken here is imported as ``<name> (from <host>)``.

    Raises:
        NotFound: the server has no experiment of a name.
        Unavailable: the server or the platform is out of reach; run it again to go on.
    """
    source = Client(source_url)
    for found in list(_experiments(source, experiments)):
        yield _import_one(client, source, found, progress)


def origin_of(source: Client, experiment: dict[str, Any]) -> str:
    """What an import of the experiment is called."""
    return f"mlflow:{without_password(source.url)}:{experiment['experiment_id']}:{experiment.get('creation_time', 0)}"


def without_password(url: str) -> str:
    """The URL as it may be shown."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def renamed(name: str, source: Client, limit: int) -> str:
    """What something is called here when its name is taken."""
    # An IPv6 address has colons, which some names may not have.
    suffix = f" (from {(urlsplit(source.url).hostname or '').replace(':', '-')})"
    return name[: limit - len(suffix)] + suffix


def _experiments(source: Client, names: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    if names is not None:
        for name in names:
            yield source.get(f"{API}/experiments/get-by-name", experiment_name=name)["experiment"]
        return
    body = {"max_results": EXPERIMENT_PAGE, "view_type": "ACTIVE_ONLY"}
    yield from every(lambda page: source.post(f"{API}/experiments/search", body | page), "experiments")


def _import_one(client: Client, source: Client, found: dict[str, Any], progress: Progress) -> Imported:
    target = _begin(client, source, found)
    if target.result.already_there:
        return target.result
    experiment_id = found["experiment_id"]
    total = 0
    linked: set[str] = set()
    # Ids first: a run may name a parent that comes later.
    for page in run_pages(source, experiment_id):
        target.assign([run["info"]["run_id"] for run in page])
        linked.update(row["model_id"] for run in page for row in run_model_rows(run))
        total += len(page)
    models = _Models(source, target, experiment_id, linked)
    # Models before runs, which link to them; their points after the runs that measured these.
    uris = models.create(progress)
    for page in run_pages(source, experiment_id, RUNS_TOGETHER):
        runs = [run for run in page if run["info"]["run_id"] not in target.arrived]
        if runs:
            _copy_runs(source, target, runs, progress)
            target.complete([run["info"]["run_id"] for run in runs])
        progress("runs", target.result.runs + len(target.arrived), total)
    models.fill(uris, progress)
    return target.finish()


def _begin(client: Client, source: Client, found: dict[str, Any]) -> ImportTarget:
    origin, created = origin_of(source, found), found.get("creation_time", 0)
    info = ExperimentInfo(
        found["experiment_id"], found["name"], created, found.get("last_update_time", created),
        pairs(found.get("tags")),
    )  # fmt: skip
    try:
        return ImportTarget(client, origin, info.name, info)
    except AlreadyExists:
        return ImportTarget(client, origin, renamed(info.name, source, MAX_NAME_LENGTH), info)


def _copy_runs(source: Client, target: ImportTarget, runs: Sequence[dict[str, Any]], progress: Progress) -> None:
    uris = target.put_runs([run_row(run) | {"artifact_uri": None} for run in runs])
    datasets = {(row["name"], row["digest"]): row for run in runs for row in dataset_rows(run)}
    target.put_datasets(list(datasets.values()))
    target.result.datasets += len(datasets)
    target.put_inputs([row for run in runs for row in input_rows(run)])
    target.put_run_models([row for run in runs for row in run_model_rows(run)])
    histories = [
        (run["info"]["run_id"], metric["key"]) for run in runs for metric in run.get("data", {}).get("metrics", ())
    ]
    with bounded_pool(READERS) as pool:
        for table in _gathered(pool(lambda entry: _history(source, *entry), histories)):
            target.result.points += target.put_points(table)
            progress("points", target.result.points, None)

    def download(run_id: str, path: str, into: BinaryIO) -> None:
        source.download("/get-artifact", into, run_id=run_id, path=path)

    _copy_files(target, uris, lambda run_id: run_files(source, run_id), download, progress)


class _Models:
    """The logged models of an experiment: those that are active, and deleted ones that runs link to."""

    def __init__(self, source: Client, target: ImportTarget, experiment_id: str, linked: set[str]) -> None:
        self._source, self._target = source, target
        self._experiment_id = experiment_id
        self._linked = linked
        self._deleted: list[dict[str, Any]] = []

    def create(self, progress: Progress) -> dict[str, str]:
        """Creates the models that have not arrived, and returns their artifact URIs by the source's ids."""
        uris: dict[str, str] = {}
        for page in self._active_pages():
            uris |= self._put(page, deleted=False)
            self._linked.difference_update(model["info"]["model_id"] for model in page)
            progress("logged models", len(uris), None)
        self._deleted = [model for model in map(self._find_deleted, sorted(self._linked)) if model is not None]
        return uris | self._put(self._deleted, deleted=True)

    def fill(self, uris: dict[str, str], progress: Progress) -> None:
        """Sends points and files of the models in ``uris``."""
        for page in (*self._active_pages(), self._deleted):
            models = [model for model in page if model["info"]["model_id"] in uris]
            self._target.put_model_metrics([row for model in models for row in model_metric_rows(model)])
            places = {model["info"]["model_id"]: uris[model["info"]["model_id"]] for model in models}
            _copy_files(self._target, places, self._files, self._download, progress)
            self._target.complete_models(list(places))

    def _active_pages(self) -> Iterator[list[dict[str, Any]]]:
        if not _has_logged_models(self._source):
            return
        path, body = f"{API}/logged-models/search", {"experiment_ids": [self._experiment_id]}
        yield from pages(lambda page: self._source.post(path, body | {"max_results": MODELS_TOGETHER} | page), "models")

    def _find_deleted(self, model_id: str) -> dict[str, Any] | None:
        try:
            model = self._source.get(f"{API}/logged-models/{model_id}", allow_deleted="true")["model"]
        except NotFound:  # whoever links to it says that it is missing
            return None
        return dict(model) if model["info"]["experiment_id"] == self._experiment_id else None

    def _put(self, models: Sequence[dict[str, Any]], *, deleted: bool) -> dict[str, str]:
        rows = [model_row(model, deleted=deleted) | {"artifact_uri": None} for model in models]
        self._target.assign_models([row["model_id"] for row in rows])
        return self._target.put_models([row for row in rows if row["model_id"] not in self._target.arrived_models])

    def _files(self, model_id: str) -> list[str]:
        try:
            return model_files(self._source, model_id)
        except NotFound:
            self._target.result.left_out.append(f"files of the deleted logged model {model_id}: MLflow hides them")
            return []

    def _download(self, model_id: str, path: str, into: BinaryIO) -> None:
        where = f"/ajax-api/2.0/mlflow/logged-models/{model_id}/artifacts/files"
        self._source.download(where, into, artifact_file_path=path)


def _has_logged_models(source: Client) -> bool:
    """MLflow has them since version 3."""
    major = source.text("/version").partition(".")[0]
    return not major.isdecimal() or int(major) >= 3


def _copy_files(
    target: ImportTarget,
    uris: dict[str, str],
    files: Callable[[str], list[str]],
    download: Callable[[str, str, BinaryIO], None],
    progress: Progress,
) -> None:
    """Copies the files of runs or models, whose new artifact URIs are ``uris``, one file of each at a time."""
    with bounded_pool(READERS) as pool, tempfile.TemporaryDirectory(prefix="mlplat-import-") as folder:

        def copy(owner: str) -> int:
            paths, file = files(owner), Path(folder) / uuid.uuid4().hex  # the owner's id is the server's word
            for path in paths:
                with file.open("wb") as into:
                    download(owner, path, into)
                target.put_artifact(uris[owner], path, lambda: file.open("rb"))
            file.unlink(missing_ok=True)
            return len(paths)

        for count in pool(copy, list(uris)):
            target.result.artifacts += count
            progress("artifacts", target.result.artifacts, None)


def _history(source: Client, run_id: str, key: str) -> pa.Table:
    query = {"run_id": run_id, "metric_key": key, "max_results": HISTORY_PAGE}
    try:
        rows = list(every(lambda page: source.get(f"{API}/metrics/get-history", **query, **page), "metrics"))
    except NotFound:  # deleted for good meanwhile
        rows = []
    columns = {
        "run_id": [run_id] * len(rows),
        "key": [key] * len(rows),
        "step": [int(row.get("step", 0)) for row in rows],
        "timestamp": [int(row.get("timestamp", 0)) for row in rows],
        "value": [float(row["value"]) for row in rows],  # NaN comes as text
    }
    return pa.table(columns, POINTS_SCHEMA)


def _gathered(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Small tables joined to larger ones."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(each.num_rows for each in waiting) >= POINTS_TOGETHER:
            yield pa.concat_tables(waiting)
            waiting = []
    if sum(each.num_rows for each in waiting):
        yield pa.concat_tables(waiting)
