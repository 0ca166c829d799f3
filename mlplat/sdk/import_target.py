"""The experiment that an import fills, over HTTP: what all imports send through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa

from mlplat.artifacts.model import proxied_path
from mlplat.errors import InvalidInput
from mlplat.metrics.model import ARROW, SCHEMA, encode
from mlplat.parallel import in_order
from mlplat.sdk.client import Client
from mlplat.sdk.listing import slices
from mlplat.sdk.transfer import upload_from
from mlplat.tracking.archive import ExperimentInfo
from mlplat.tracking.model import PARENT_RUN_TAG

IDS_PER_CALL = 10_000
ENTITIES_PER_CALL = 500
ROWS_PER_CALL = 5_000
#: Characters of text in one call, unless a single entity has more.
MAX_CHARACTERS = 4_000_000


@dataclass
class Imported:
    """What became of a source. ``renamed``: the new ids of runs whose own were taken, ``renamed_models`` of models."""

    experiment_id: str
    experiment: str
    already_there: bool = False
    runs: int = 0
    points: int = 0
    datasets: int = 0
    models: int = 0
    artifacts: int = 0
    renamed: dict[str, str] = field(default_factory=dict)
    renamed_models: dict[str, str] = field(default_factory=dict)
    #: What could not be taken along, each with its name and why.
    left_out: list[str] = field(default_factory=list)


class ImportTarget:
    """An experiment on the platform that is being filled, hidden until ``finish``."""

    def __init__(self, client: Client, origin: str, name: str, info: ExperimentInfo) -> None:
        """Begins the import of ``origin``, or goes on with it.

        Raises:
            AlreadyExists: another experiment has the name.
        """
        self._client = client
        answer = client.post(
            "/api/v1/imports",
            {
                "origin": origin,
                "name": name,
                "experiment_id": info.experiment_id,
                "created_at": info.created_at,
                "updated_at": info.updated_at,
                "tags": info.tags,
            },
        )
        self._path = f"/api/v1/imports/{answer['experiment_id']}"
        self._ids: dict[str, str] = {}
        self._model_ids: dict[str, str] = {}
        #: Ids of the source's runs, and of its models, that are complete.
        self.arrived: set[str] = set()
        self.arrived_models: set[str] = set()
        self.result = Imported(answer["experiment_id"], answer["name"], answer["complete"])

    def assign(self, run_ids: Sequence[str]) -> None:
        """Gets the ids that the source's runs have here; notes in ``arrived`` which are complete."""
        self._assign("run_ids", "runs", run_ids, self._ids, self.result.renamed, self.arrived)

    def assign_models(self, model_ids: Sequence[str]) -> None:
        """The same for logged models, in ``arrived_models``."""
        ids, renamed = self._model_ids, self.result.renamed_models
        self._assign("model_ids", "models", model_ids, ids, renamed, self.arrived_models)

    def _assign(
        self,
        wanted: str,
        answered: str,
        source_ids: Sequence[str],
        ids: dict[str, str],
        renamed: dict[str, str],
        arrived: set[str],
    ) -> None:
        for batch in slices(source_ids, IDS_PER_CALL):
            for entry in self._client.post(f"{self._path}/ids", {wanted: batch})[answered]:
                old, new = entry["source_id"], entry["new_id"]
                ids[old] = new
                if old != new:
                    renamed[old] = new
                if entry["complete"]:
                    arrived.add(old)

    def new_id(self, run_id: str) -> str:
        """A run's id here.

        Raises:
            InvalidInput: the source has no such run.
        """
        try:
            return self._ids[run_id]
        except KeyError:
            raise InvalidInput(f"something belongs to a run that is not there: {run_id[:100]!r}") from None

    def new_model_id(self, model_id: str) -> str:
        """A logged model's id here.

        Raises:
            InvalidInput: the source has no such model.
        """
        try:
            return self._model_ids[model_id]
        except KeyError:
            raise InvalidInput(f"something belongs to a logged model that is not there: {model_id[:100]!r}") from None

    def put_runs(self, runs: Sequence[dict[str, Any]]) -> dict[str, str]:
        """Sends rows of ``runs.parquet`` with ``params`` and ``tags``; returns artifact URIs by the source's ids."""
        uris: list[str] = []
        for batch in _batches([self._run(run) for run in runs], ENTITIES_PER_CALL):
            uris += self._client.post(f"{self._path}/runs", {"runs": batch})["artifact_uris"]
        self.result.runs += len(runs)
        return {run["run_id"]: uri for run, uri in zip(runs, uris, strict=True)}

    def _run(self, run: dict[str, Any]) -> dict[str, Any]:
        tags = dict(run["tags"])
        # A parent that was not imported stays named as it was.
        if PARENT_RUN_TAG in tags:
            tags[PARENT_RUN_TAG] = self._ids.get(tags[PARENT_RUN_TAG], tags[PARENT_RUN_TAG])
        return run | {"run_id": self.new_id(run["run_id"]), "tags": tags}

    def put_models(self, models: Sequence[dict[str, Any]]) -> dict[str, str]:
        """The same for rows of ``models.parquet``."""
        uris: list[str] = []
        for batch in _batches([self._model(model) for model in models], ENTITIES_PER_CALL):
            uris += self._client.post(f"{self._path}/models", {"models": batch})["artifact_uris"]
        self.result.models += len(models)
        return {model["model_id"]: uri for model, uri in zip(models, uris, strict=True)}

    def _model(self, model: dict[str, Any]) -> dict[str, Any]:
        source = model["source_run_id"]
        return model | {
            "model_id": self.new_model_id(model["model_id"]),
            "source_run_id": self._ids.get(source, source),
        }

    def put_points(self, points: pa.Table) -> int:
        """Sends points, a table of ``POINTS_SCHEMA`` under the source's run ids; returns their number."""
        runs = points.column("run_id").combine_chunks().dictionary_encode()
        names = pa.array([self.new_id(run_id) for run_id in runs.dictionary.to_pylist()], pa.string())
        columns = {"run_id": pa.DictionaryArray.from_arrays(runs.indices, names)}
        columns["key"] = points.column("key").combine_chunks().dictionary_encode()
        columns |= {name: points.column(name) for name in ("step", "timestamp", "value")}
        batch = encode(pa.table(columns).cast(SCHEMA))
        return int(self._client.post_bytes("/api/v1/metrics", batch, ARROW)["points"])

    def put_model_metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        """Sends rows of ``model_metrics.parquet``; those of runs that the platform does not have are left out."""
        for batch in slices(rows, ROWS_PER_CALL):
            metrics = [
                row
                | {
                    "model_id": self.new_model_id(row["model_id"]),
                    "run_id": self._ids.get(row["run_id"], row["run_id"]),
                    "value": str(row["value"]),  # JSON has no NaN
                }
                for row in batch
            ]
            missing = self._client.post(f"{self._path}/model-metrics", {"metrics": metrics})["missing"]
            counts = Counter(row["run_id"] for row in metrics)
            self.result.left_out += [
                f"{counts[run_id]} metric points of logged models: run {run_id}, which they name, is not here"
                for run_id in missing
            ]

    def put_datasets(self, rows: Sequence[dict[str, Any]]) -> None:
        """Sends rows of ``datasets.parquet``."""
        for batch in _batches(rows, ENTITIES_PER_CALL):
            self._client.post(f"{self._path}/datasets", {"datasets": batch})

    def put_inputs(self, rows: Sequence[dict[str, Any]]) -> None:
        """Sends rows of ``inputs.parquet``, whose datasets are there."""
        for batch in slices(rows, ROWS_PER_CALL):
            inputs = [row | {"run_id": self.new_id(row["run_id"])} for row in batch]
            self._client.post(f"{self._path}/links", {"inputs": inputs})

    def put_run_models(self, rows: Sequence[dict[str, Any]]) -> None:
        """Sends rows of ``run_models.parquet``; links to models that the platform does not have are left out."""
        for batch in slices(rows, ROWS_PER_CALL):
            links = [
                row
                | {
                    "run_id": self.new_id(row["run_id"]),
                    "model_id": self._model_ids.get(row["model_id"], row["model_id"]),
                }
                for row in batch
            ]
            missing = set(self._client.post(f"{self._path}/links", {"models": links})["missing"])
            self.result.left_out += [
                f"{link['direction']} of run {link['run_id']}: logged model {link['model_id']} is not here"
                for link in links
                if link["model_id"] in missing
            ]

    def put_artifact(self, artifact_uri: str, path: str, open_body: Callable[[], BinaryIO]) -> None:
        """Uploads one file of a run or model."""
        upload_from(self._client, f"{proxied_path(artifact_uri)}/{path}", open_body)

    def complete(self, run_ids: Sequence[str]) -> None:
        """Notes that nothing of these runs is missing."""
        for batch in slices([self.new_id(run_id) for run_id in run_ids], IDS_PER_CALL):
            self._client.post(f"{self._path}/complete", {"run_ids": batch})

    def complete_models(self, model_ids: Sequence[str]) -> None:
        """The same for logged models."""
        for batch in slices([self.new_model_id(model_id) for model_id in model_ids], IDS_PER_CALL):
            self._client.post(f"{self._path}/complete", {"model_ids": batch})

    def finish(self) -> Imported:
        """Shows the experiment."""
        self._client.post(f"{self._path}/finish", {})
        return self.result


@contextmanager
def bounded_pool(size: int) -> Iterator[Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]]:
    """A ``map`` over threads that takes items only as fast as they are worked off. Results come in order."""
    with ThreadPoolExecutor(size, "import") as pool:

        def run(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
            return in_order(pool, size + 1, (partial(work, item) for item in items))

        try:
            yield run
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _batches(rows: Sequence[dict[str, Any]], limit: int) -> Iterator[list[dict[str, Any]]]:
    """Rows in batches that are small enough for one call."""
    batch: list[dict[str, Any]] = []
    characters = 0
    for row in rows:
        size = sum(_characters(value) for value in row.values())
        if batch and (characters + size > MAX_CHARACTERS or len(batch) == limit):
            yield batch
            batch, characters = [], 0
        batch.append(row)
        characters += size
    if batch:
        yield batch


def _characters(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(key) + len(text) for key, text in value.items())
    return 0
