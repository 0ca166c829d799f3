"""``mlplat import``: an archive becomes an experiment, over HTTP; and what all imports send through."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from mlplat.errors import InvalidInput
from mlplat.metrics.model import ARROW, SCHEMA, encode
from mlplat.sdk.archive_files import Archive, Progress, no_progress, open_archive
from mlplat.sdk.client import Client
from mlplat.sdk.files import ARTIFACTS
from mlplat.tracking.archive import PAIRS_SCHEMA, PARAMS, POINTS_SCHEMA, RUNS, RUNS_SCHEMA, TAGS, ExperimentInfo
from mlplat.tracking.model import PARENT_RUN_TAG

IDS_PER_CALL = 10_000
RUNS_PER_CALL = 500
POINTS_PER_CALL = 100_000
#: Characters in params and tags in one call, unless a single run has more.
MAX_CHARACTERS = 4_000_000
TRANSFERS = 4


@dataclass
class Imported:
    """What became of a source. ``renamed``: the new ids of runs whose own were taken."""

    experiment_id: str
    experiment: str
    already_there: bool = False
    runs: int = 0
    points: int = 0
    artifacts: int = 0
    renamed: dict[str, str] = field(default_factory=dict)
    #: Datasets and logged models that runs of an MLflow server name; these do not come along.
    references_left_out: int = 0


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
        self.arrived: set[str] = set()
        self.result = Imported(answer["experiment_id"], answer["name"], answer["complete"])

    def assign(self, source_ids: Sequence[str]) -> None:
        """Gets the ids that the source's runs have here; notes in ``arrived`` which are complete."""
        for batch in _slices(source_ids, IDS_PER_CALL):
            for entry in self._client.post(f"{self._path}/ids", {"run_ids": batch}):
                self._ids[entry["source_id"]] = entry["run_id"]
                if entry["complete"]:
                    self.arrived.add(entry["source_id"])
        self.result.renamed = {old: new for old, new in self._ids.items() if old != new}

    def new_id(self, source_id: str) -> str:
        """A run's id here.

        Raises:
            InvalidInput: the source has no such run.
        """
        try:
            return self._ids[source_id]
        except KeyError:
            raise InvalidInput(f"something belongs to a run that is not there: {source_id[:100]!r}") from None

    def put_runs(self, runs: Sequence[dict[str, Any]]) -> dict[str, str]:
        """Sends rows of ``runs.parquet`` with ``params`` and ``tags``; returns artifact URIs by the source's ids."""
        uris: list[str] = []
        for batch in _batches([self._row(run) for run in runs]):
            uris += self._client.post(f"{self._path}/runs", {"runs": batch})["artifact_uris"]
        self.result.runs += len(runs)
        return {run["run_id"]: uri for run, uri in zip(runs, uris, strict=True)}

    def _row(self, run: dict[str, Any]) -> dict[str, Any]:
        tags = dict(run["tags"])
        # A parent that was not imported stays named as it was.
        if PARENT_RUN_TAG in tags:
            tags[PARENT_RUN_TAG] = self._ids.get(tags[PARENT_RUN_TAG], tags[PARENT_RUN_TAG])
        return run | {"run_id": self.new_id(run["run_id"]), "tags": tags}

    def put_points(self, points: pa.Table) -> int:
        """Sends points, a table of ``POINTS_SCHEMA`` under the source's run ids; returns their number."""
        runs = points.column("run_id").combine_chunks().dictionary_encode()
        names = pa.array([self.new_id(run_id) for run_id in runs.dictionary.to_pylist()], pa.string())
        columns = {"run_id": pa.DictionaryArray.from_arrays(runs.indices, names)}
        columns["key"] = points.column("key").combine_chunks().dictionary_encode()
        columns |= {name: points.column(name) for name in ("step", "timestamp", "value")}
        batch = encode(pa.table(columns).cast(SCHEMA))
        return int(self._client.post_bytes("/api/v1/metrics", batch, ARROW)["points"])

    def put_artifact(self, artifact_uri: str, path: str, open_body: Callable[[], BinaryIO]) -> None:
        """Uploads one file of a run."""
        root = artifact_uri.partition(":")[2].strip("/")
        self._client.upload_from(f"{ARTIFACTS}/{root}/{path}", open_body)

    def complete(self, source_ids: Sequence[str]) -> None:
        """Notes that nothing of these runs is missing."""
        for batch in _slices([self.new_id(source_id) for source_id in source_ids], IDS_PER_CALL):
            self._client.post(f"{self._path}/complete", {"run_ids": batch})

    def finish(self) -> Imported:
        """Shows the experiment."""
        self._client.post(f"{self._path}/finish", {})
        return self.result


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
    run_ids = [run_id for batch in archive.batches(RUNS, RUNS_SCHEMA, 10_000) for run_id in batch["run_id"].to_pylist()]
    if len(run_ids) != archive.manifest.runs or len(set(run_ids)) != len(run_ids):
        raise InvalidInput(f"{RUNS} has {len(set(run_ids))} runs, the manifest says {archive.manifest.runs}")
    target.assign(run_ids)
    uris = _send_runs(target, archive, progress)
    _send_points(target, archive, progress)
    _send_artifacts(target, archive, uris, progress)
    target.complete(run_ids)
    return target.finish()


class _Grouped:
    """Rows of params or tags, handed out run by run in the order of the runs."""

    def __init__(self, archive: Archive, name: str) -> None:
        self._name = name
        self._rows = (
            row
            for batch in archive.batches(name, PAIRS_SCHEMA, 10_000)
            for row in zip(*batch.to_pydict().values(), strict=True)
        )
        self._next = next(self._rows, None)

    def of(self, run_id: str) -> dict[str, str]:
        found: dict[str, str] = {}
        while self._next is not None and self._next[0] == run_id:
            _run_id, key, value = self._next
            found[key] = value
            self._next = next(self._rows, None)
        return found

    def check_end(self) -> None:
        if self._next is not None:
            raise InvalidInput(f"{self._name} is not in the order of {RUNS}, at run {self._next[0][:100]!r}")


def _send_runs(target: ImportTarget, archive: Archive, progress: Progress) -> dict[str, str]:
    params, tags = _Grouped(archive, PARAMS), _Grouped(archive, TAGS)
    uris: dict[str, str] = {}
    for batch in archive.batches(RUNS, RUNS_SCHEMA, RUNS_PER_CALL):
        rows = batch.to_pylist()
        for row in rows:
            row["params"], row["tags"] = params.of(row["run_id"]), tags.of(row["run_id"])
            if row["artifact_uri"].startswith("mlflow-artifacts:"):
                row["artifact_uri"] = None  # its artifacts come along
        uris |= target.put_runs(rows)
        progress("runs", len(uris), archive.manifest.runs)
    params.check_end()
    tags.check_end()
    return uris


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


def _send_artifacts(target: ImportTarget, archive: Archive, uris: Mapping[str, str], progress: Progress) -> None:
    artifacts = archive.manifest.artifacts

    def send(entry: tuple[str, str, str]) -> None:
        name, run_id, path = entry
        if run_id not in uris:
            raise InvalidInput(f"an artifact belongs to a run that is not there: {name[:200]!r}")
        target.put_artifact(uris[run_id], path, lambda: archive.open(name))

    with bounded_pool(TRANSFERS) as run:
        for _done in run(send, artifacts):
            target.result.artifacts += 1
            progress("artifacts", target.result.artifacts, len(artifacts))


@contextmanager
def bounded_pool(size: int) -> Iterator[Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]]:
    """A ``map`` over threads that takes items only as fast as they are worked off. Results come in order."""
    with ThreadPoolExecutor(size, "import") as pool:

        def run(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
            waiting: list[Future[Any]] = []
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > size:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()

        try:
            yield run
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _slices(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _batches(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Runs in batches that are small enough for one call."""
    batch: list[dict[str, Any]] = []
    characters = 0
    for row in rows:
        size = sum(len(key) + len(value) for pairs in (row["params"], row["tags"]) for key, value in pairs.items())
        if batch and (characters + size > MAX_CHARACTERS or len(batch) == RUNS_PER_CALL):
            yield batch
            batch, characters = [], 0
        batch.append(row)
        characters += size
    if batch:
        yield batch
