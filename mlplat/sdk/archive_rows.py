"""What MLflow's REST says of runs and logged models, as rows of an archive's tables."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from mlplat.sdk.client import API, Client
from mlplat.sdk.listing import every, pages, pairs
from mlplat.tracking.inputs import INPUT, OUTPUT
from mlplat.tracking.logged_model import WIRE_STATUS

RUN_PAGE = 1_000
_STATUS = {name: status.value for status, name in WIRE_STATUS.items()}


def run_pages(client: Client, experiment_id: str, page: int = RUN_PAGE) -> Iterator[list[dict[str, Any]]]:
    """All runs of an experiment as MLflow writes them, deleted ones included, each once."""
    seen: set[str] = set()
    body = {"experiment_ids": [experiment_id], "run_view_type": "ALL", "max_results": page}
    for found in pages(lambda wanted: client.post(f"{API}/runs/search", body | wanted), "runs"):
        # A run that starts meanwhile can push others to the next page, where they come again.
        runs = [run for run in found if run["info"]["run_id"] not in seen]
        seen.update(run["info"]["run_id"] for run in runs)
        if runs:
            yield runs


def run_row(run: dict[str, Any]) -> dict[str, Any]:
    """A row of the runs, with params and tags."""
    info, data = run["info"], run.get("data", {})
    return {
        "run_id": info["run_id"],
        "name": info.get("run_name", ""),
        "status": info["status"],
        "user_id": info.get("user_id", ""),
        "started_at": info.get("start_time", 0),
        "ended_at": info.get("end_time"),
        "deleted": info["lifecycle_stage"] == "deleted",
        "artifact_uri": info["artifact_uri"],
        "params": pairs(data.get("params")),
        "tags": pairs(data.get("tags")),
    }


def dataset_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The datasets that a run read."""
    return [_dataset_row(one["dataset"]) for one in run.get("inputs", {}).get("dataset_inputs", ())]


def _dataset_row(dataset: dict[str, Any]) -> dict[str, Any]:
    texts = {name: dataset.get(name, "") for name in ("name", "digest", "source_type", "source")}
    return texts | {name: dataset.get(name) for name in ("schema", "profile")}


def input_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The uses of datasets by a run."""
    return [
        {
            "run_id": run["info"]["run_id"],
            "name": one["dataset"].get("name", ""),
            "digest": one["dataset"].get("digest", ""),
            "tags": pairs(one.get("tags")),
        }
        for one in run.get("inputs", {}).get("dataset_inputs", ())
    ]


def run_model_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The logged models that a run read and made."""
    directions = (
        (INPUT, run.get("inputs", {}).get("model_inputs", ())),
        (OUTPUT, run.get("outputs", {}).get("model_outputs", ())),
    )
    return [
        {
            "run_id": run["info"]["run_id"],
            "direction": direction,
            "model_id": link["model_id"],
            "step": int(link.get("step", 0)),
        }
        for direction, links in directions
        for link in links
    ]


def model_row(model: dict[str, Any], *, deleted: bool) -> dict[str, Any]:
    """A row of the logged models, with params and tags. MLflow does not say whether a model is deleted."""
    info = model["info"]
    return {
        "model_id": info["model_id"],
        "name": info["name"],
        "status": _STATUS.get(info.get("status", ""), "PENDING"),
        "model_type": info.get("model_type"),
        "source_run_id": info.get("source_run_id") or None,
        "created_at": info["creation_timestamp_ms"],
        "updated_at": info["last_updated_timestamp_ms"],
        "deleted": deleted,
        "artifact_uri": info["artifact_uri"],
        "params": pairs(model.get("data", {}).get("params")),
        "tags": pairs(info.get("tags")),
    }


def model_metric_rows(model: dict[str, Any]) -> list[dict[str, Any]]:
    """The metric points of a logged model."""
    return [
        {
            "model_id": model["info"]["model_id"],
            "run_id": point.get("run_id", ""),
            "key": point["key"],
            "step": int(point.get("step", 0)),
            "timestamp": int(point.get("timestamp", 0)),
            "value": point["value"],
            "dataset_name": point.get("dataset_name"),
            "dataset_digest": point.get("dataset_digest"),
        }
        for point in model.get("data", {}).get("metrics", ())
    ]


def run_files(client: Client, run_id: str) -> list[str]:
    """All files below a run's artifacts."""
    return _files_below(client, f"{API}/artifacts/list", "path", {"run_id": run_id})


def model_files(client: Client, model_id: str) -> list[str]:
    """All files below a logged model's artifacts; of deleted models only this platform answers them."""
    path = f"{API}/logged-models/{model_id}/artifacts/directories"
    return _files_below(client, path, "artifact_directory_path", {"allow_deleted": "true"})


def _files_below(client: Client, path: str, folder_key: str, query: dict[str, str]) -> list[str]:
    files: list[str] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        here = partial(client.get, path, **query, **({folder_key: folder} if folder else {}))
        for entry in every(lambda page, here=here: here(**page), "files"):  # type: ignore[misc]
            (folders if entry.get("is_dir") else files).append(entry["path"])
    return sorted(files)
