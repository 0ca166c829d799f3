"""Runs: ``with mlplat.start_run(...) as run: run.log({"loss": 0.1}, step=1)``."""

from __future__ import annotations

import getpass
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mlplat.artifacts.model import safe_path
from mlplat.errors import AlreadyExists, InvalidInput, NotFound
from mlplat.metrics.model import Point
from mlplat.sdk import datasets, media
from mlplat.sdk.capture.options import Capture, RunLink
from mlplat.sdk.capture.recorder import Recorder
from mlplat.sdk.client import Client, client_for, default_url
from mlplat.sdk.context import current_step
from mlplat.sdk.files import RunFiles, artifact_root
from mlplat.sdk.metrics import PointBuffer, best_sender
from mlplat.tracking.model import ATTEMPT_TAG, PARENT_RUN_TAG

API = "/api/2.0/mlflow"
DEFAULT_EXPERIMENT = "Default"
MAX_PARAMS = 100


class Run:
    """A run that is being written. Metric points are sent in the background; ``finish`` waits for them."""

    def __init__(self, client: Client, run_id: str, experiment_id: int, name: str, artifact_uri: str) -> None:
        self._client = client
        self.run_id = run_id
        self.experiment_id = experiment_id
        self.name = name
        self.artifact_uri = artifact_uri
        self._points = PointBuffer(run_id, best_sender(client))
        self._next_step = 0
        self._finished = False
        self._capture: Recorder | None = None
        self._tables: dict[str, str] = {}

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs metric values at ``step`` (default: one more than the last call). Does not wait.

        Raises:
            InvalidInput: a value is not a number.
        """
        step = self._next_step if step is None else step
        self._next_step = step + 1
        now = time.time_ns() // 1_000_000
        try:
            points = [Point(key, float(value), now, step) for key, value in metrics.items()]
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"metric values must be numbers: {dict(metrics)!r}") from error
        self._points.add(points)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs parameters; each may be set once.

        Raises:
            InvalidInput: one has another value already.
        """
        for chunk in _chunked([{"key": key, "value": str(value)} for key, value in params.items()], MAX_PARAMS):
            self._client.post(f"{API}/runs/log-batch", {"run_id": self.run_id, "params": chunk})

    def log_param(self, key: str, value: Any) -> None:
        """Logs one parameter."""
        self.log_params({key: value})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Sets tags, replacing earlier values."""
        for chunk in _chunked([{"key": key, "value": str(value)} for key, value in tags.items()], MAX_PARAMS):
            self._client.post(f"{API}/runs/log-batch", {"run_id": self.run_id, "tags": chunk})

    def set_tag(self, key: str, value: Any) -> None:
        """Sets one tag."""
        self.set_tags({key: value})

    def log_artifact(self, path: str | Path, artifact_path: str = "") -> None:
        """Uploads a file into the run's artifacts, below the folder ``artifact_path``.

        Raises:
            InvalidInput: not a file.
        """
        file = Path(path)
        if not file.is_file():
            raise InvalidInput(f"not a file: {file}")
        self._client.upload("/".join(filter(None, (self._artifact_root, artifact_path, file.name))), file)

    def log_artifacts(self, folder: str | Path, artifact_path: str = "") -> None:
        """Uploads a folder's files with their relative paths.

        Raises:
            InvalidInput: not a folder.
        """
        root = Path(folder)
        if not root.is_dir():
            raise InvalidInput(f"not a folder: {root}")
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            relative = file.relative_to(root).as_posix()
            self._client.upload("/".join(filter(None, (self._artifact_root, artifact_path, relative))), file)

    def log_text(self, text: str, path: str) -> None:
        """Writes a text file into the run's artifacts, such as ``notes/summary.md``."""
        self._files.put(safe_path(path), text.encode())

    def log_dict(self, value: Mapping[str, Any] | list[Any], path: str) -> None:
        """Writes a dict or list as JSON, or as YAML when the path ends in ``.yaml`` or ``.yml``.

        Raises:
            InvalidInput: it holds something that the format cannot.
        """
        self._files.put(safe_path(path), media.document_bytes(value, path))

    def log_figure(self, figure: Any, path: str) -> None:
        """Writes a matplotlib figure (``.png``, ``.svg``, ``.pdf`` …) or a plotly one (``.html``, ``.json``, or an
        image, for which plotly needs kaleido).

        Raises:
            InvalidInput: no such figure, or a format that it cannot be written in.
        """
        self._files.put(safe_path(path), media.figure_bytes(figure, path))

    def log_image(self, image: Any, path: str) -> None:
        """Writes a PIL image, or an array as PNG: ``(height, width)`` or ``(height, width, 1 | 3 | 4)``, of uint8, of
        floats from 0 to 1, or of bools.

        Raises:
            InvalidInput: no such image, or a format that it cannot be written in.
        """
        self._files.put(safe_path(path), media.image_bytes(image, path))

    def log_table(self, name: str, data: Any, step: int | None = None) -> str:
        """Writes a table as Parquet and returns its path, ``tables/<name>/<step>.parquet`` or, without a step,
        ``tables/<name>/table.parquet``, which the next one replaces.

        Args:
            name: the table's name.
            data: a DataFrame (pandas, polars), an Arrow table, a list of dicts, or a dict of columns.
            step: the step that it belongs to.

        Raises:
            InvalidInput: not a table, or a column with values of several types.
        """
        path = media.table_path(name, step)
        self._files.put(path, media.parquet_bytes(media.as_table(data)))
        self._tables |= {name: path}
        self.set_tag(media.LOGGED_ARTIFACTS_TAG, media.logged_tables(self._tables))
        return path

    def log_dataset(
        self, data: Any, name: str | None = None, context: str = "training", source: str | None = None
    ) -> str:
        """Says that the run uses a dataset, and returns the dataset's digest. The data itself stays where it is.

        Args:
            data: a DataFrame, an Arrow table, an array, a dict of arrays, a Ray Dataset, or the path or URL of a file
                or folder.
            name: the dataset's name; by default the file's, else ``dataset``.
            context: what for: ``training``, ``evaluation`` …
            source: where it comes from, as a URL or path; by default the file, else this code.

        Raises:
            InvalidInput: no such data, or a name or context that is too long.
            NotFound: no such file.
        """
        dataset = datasets.describe(data, name, source)
        self._client.post(f"{API}/runs/log-inputs", datasets.log_inputs_request(self.run_id, dataset, context))
        return dataset.digest

    def record(self, recorder: Recorder, link: RunLink) -> None:
        """Lets a recorder follow the run until it is finished."""
        self._capture = recorder
        recorder.start(link)

    def add_points(self, points: list[Point]) -> None:
        """Takes finished metric points. Does not wait, and leaves ``log``'s step alone."""
        self._points.add(points)

    def flush(self) -> None:
        """Returns when every metric point logged so far is durable."""
        self._points.flush()

    def finish(self, status: str = "FINISHED") -> None:
        """Waits for the metric points and ends the run; ``status`` is FINISHED, FAILED or KILLED."""
        if self._finished:
            return
        if self._capture is not None:
            self._capture.finish()
        self._points.close()
        self._finished = True
        self._client.post(
            f"{API}/runs/update",
            {"run_id": self.run_id, "status": status, "end_time": time.time_ns() // 1_000_000},
        )

    @property
    def _artifact_root(self) -> str:
        return artifact_root(self.artifact_uri)

    @property
    def _files(self) -> RunFiles:
        return RunFiles(lambda: self._client, self.artifact_uri)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self._capture is not None:
            self._capture.failed(error)
        self.finish("FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")


def start_run(
    experiment: str = DEFAULT_EXPERIMENT,
    name: str | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    parent: Run | str | None = None,
    url: str | None = None,
    capture: Capture | None = None,
) -> Run:
    """Starts a run in an experiment, which is created on first use.

    Args:
        experiment: the experiment's name.
        name: the run's name; a random one by default.
        params: logged at once.
        tags: set at once.
        parent: the run (or its id) that this one belongs under.
        url: the platform; by default ``MLPLAT_URL``, or the one on this machine.
        capture: what the run records by itself; by default all that ``MLPLAT_CAPTURE_*`` leaves on.

    Raises:
        InvalidInput: the experiment is deleted, or a setting is not allowed.
    """
    recorder = Recorder(capture)
    client = client_for(url or default_url())
    experiment_id = ensure_experiment(client, experiment)
    all_tags = {key: str(value) for key, value in (tags or {}).items()}
    if parent is not None:
        all_tags[PARENT_RUN_TAG] = parent.run_id if isinstance(parent, Run) else parent
    step = current_step()
    if step is not None:
        all_tags.setdefault(ATTEMPT_TAG, step.label)
        all_tags |= {"mlplat.pipelineRun": step.run_id, "mlplat.step": step.step}
    fixed_tags = frozenset(all_tags)
    all_tags = recorder.first_tags() | all_tags
    started_ms = time.time_ns() // 1_000_000
    answer = client.post(
        f"{API}/runs/create",
        {
            "experiment_id": str(experiment_id),
            "run_name": name,
            "user_id": getpass.getuser(),
            "start_time": started_ms,
            "tags": [{"key": key, "value": value} for key, value in all_tags.items()],
        },
        idempotency_key=uuid.uuid4().hex,
    )
    info = answer["run"]["info"]
    run = Run(client, info["run_id"], experiment_id, info["run_name"], info["artifact_uri"])
    run.record(recorder, RunLink(run.run_id, client.url, run.artifact_uri, started_ms, run.add_points, fixed_tags))
    if params:
        run.log_params(params)
    return run


def ensure_experiment(client: Client, name: str) -> int:
    """The id of the experiment, created if there is none.

    Raises:
        InvalidInput: it exists, but is deleted.
    """
    try:
        found = client.get(f"{API}/experiments/get-by-name", experiment_name=name)["experiment"]
    except NotFound:
        try:
            return int(client.post(f"{API}/experiments/create", {"name": name})["experiment_id"])
        except AlreadyExists:  # somebody was faster
            found = client.get(f"{API}/experiments/get-by-name", experiment_name=name)["experiment"]
    if found["lifecycle_stage"] == "deleted":
        raise InvalidInput(f"experiment {name!r} is deleted; restore it or use another name")
    return int(found["experiment_id"])


def _chunked(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
