"""``mlplat import-mlflow``: experiments of an MLflow server, read over its REST.

Datasets, logged models and registered models stay behind. Run ids are kept where they are free. An
import that broke off goes on with the runs that have not arrived; a complete one changes nothing any more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from mlplat.errors import AlreadyExists, NotFound
from mlplat.sdk.archive_files import Progress, no_progress
from mlplat.sdk.client import API, Client
from mlplat.sdk.exporting import artifact_paths, pairs, run_pages, run_row
from mlplat.sdk.importing import Imported, ImportTarget, bounded_pool
from mlplat.tracking.archive import POINTS_SCHEMA, ExperimentInfo
from mlplat.tracking.model import MAX_NAME_LENGTH

EXPERIMENT_PAGE = 1_000
#: What MLflow's own client asks for at a time.
HISTORY_PAGE = 25_000
#: Runs that are complete, and so are skipped by a later try, together.
RUNS_TOGETHER = 100
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


def _experiments(source: Client, names: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    if names is not None:
        for name in names:
            yield source.get(f"{API}/experiments/get-by-name", experiment_name=name)["experiment"]
        return
    token: str | None = None
    while True:
        body = {"max_results": EXPERIMENT_PAGE, "view_type": "ACTIVE_ONLY"}
        answer = source.post(f"{API}/experiments/search", body | ({"page_token": token} if token else {}))
        yield from answer.get("experiments", ())
        token = answer.get("next_page_token")
        if not token:
            return


def _import_one(client: Client, source: Client, found: dict[str, Any], progress: Progress) -> Imported:
    target = _begin(client, source, found)
    if target.result.already_there:
        return target.result
    experiment_id = found["experiment_id"]
    total = 0
    # Ids first: a run may name a parent that comes later.
    for page in run_pages(source, experiment_id):
        target.assign([run["info"]["run_id"] for run in page])
        total += len(page)
    for page in run_pages(source, experiment_id, RUNS_TOGETHER):
        runs = [run for run in page if run["info"]["run_id"] not in target.arrived]
        if runs:
            _copy_runs(source, target, runs, progress)
            target.complete([run["info"]["run_id"] for run in runs])
        progress("runs", target.result.runs + len(target.arrived), total)
    return target.finish()


def _begin(client: Client, source: Client, found: dict[str, Any]) -> ImportTarget:
    origin = f"mlflow:{_without_password(source.url)}:{found['experiment_id']}:{found.get('creation_time', 0)}"
    created = found.get("creation_time", 0)
    info = ExperimentInfo(
        found["experiment_id"], found["name"], created, found.get("last_update_time", created),
        pairs(found.get("tags")),
    )  # fmt: skip
    try:
        return ImportTarget(client, origin, info.name, info)
    except AlreadyExists:
        suffix = f" (from {urlsplit(source.url).hostname})"
        return ImportTarget(client, origin, info.name[: MAX_NAME_LENGTH - len(suffix)] + suffix, info)


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _copy_runs(source: Client, target: ImportTarget, runs: Sequence[dict[str, Any]], progress: Progress) -> None:
    rows = []
    for run in runs:
        references = (*run.get("inputs", {}).values(), *run.get("outputs", {}).values())
        target.result.references_left_out += sum(len(each) for each in references)
        data = run.get("data", {})
        row = run_row(run) | {"params": pairs(data.get("params")), "tags": pairs(data.get("tags"))}
        rows.append(row | {"artifact_uri": None})
    uris = target.put_runs(rows)
    with bounded_pool(READERS) as pool, tempfile.TemporaryDirectory(prefix="mlplat-import-") as folder:
        histories = [
            (run["info"]["run_id"], metric["key"]) for run in runs for metric in run.get("data", {}).get("metrics", ())
        ]
        for table in _gathered(pool(lambda entry: _history(source, *entry), histories)):
            target.result.points += target.put_points(table)
            progress("points", target.result.points, None)

        def copy_artifacts(run_id: str) -> int:
            paths, file = artifact_paths(source, run_id), Path(folder) / run_id
            for path in paths:
                with file.open("wb") as into:
                    source.download("/get-artifact", into, run_id=run_id, path=path)
                target.put_artifact(uris[run_id], path, lambda: file.open("rb"))
            file.unlink(missing_ok=True)
            return len(paths)

        for count in pool(copy_artifacts, list(uris)):
            target.result.artifacts += count
            progress("artifacts", target.result.artifacts, None)


def _history(source: Client, run_id: str, key: str) -> pa.Table:
    rows: list[dict[str, Any]] = []
    query = {"run_id": run_id, "metric_key": key, "max_results": HISTORY_PAGE}
    while True:
        try:
            answer = source.get(f"{API}/metrics/get-history", **query)
        except NotFound:  # deleted for good meanwhile
            break
        rows += answer.get("metrics", ())
        token = answer.get("next_page_token")
        if not token:
            break
        query["page_token"] = token
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
