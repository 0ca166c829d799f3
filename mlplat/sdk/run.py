"""Runs: ``with mlplat.start_run(...) as run: run.log({"loss": 0.1}, step=1)``."""

from __future__ import annotations

import getpass
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mlplat.errors import AlreadyExists, InvalidInput, NotFound
from mlplat.metrics.model import Point
from mlplat.sdk.client import Client, client_for, default_url
from mlplat.sdk.context import current_step
from mlplat.sdk.metrics import PointBuffer, best_sender
from mlplat.tracking.model import ATTEMPT_TAG, PARENT_RUN_TAG

API = "/api/2.0/mlflow"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
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

    def flush(self) -> None:
        """Returns when every metric point logged so far is durable."""
        self._points.flush()

    def finish(self, status: str = "FINISHED") -> None:
        """Waits for the metric points and ends the run; ``status`` is FINISHED, FAILED or KILLED."""
        if self._finished:
            return
        self._points.close()
        self._finished = True
        self._client.post(
            f"{API}/runs/update",
            {"run_id": self.run_id, "status": status, "end_time": time.time_ns() // 1_000_000},
        )

    @property
    def _artifact_root(self) -> str:
        scheme, _colon, path = self.artifact_uri.partition(":/")
        if scheme != "mlflow-artifacts":
            raise InvalidInput(f"artifacts of this run live at {self.artifact_uri}, not behind the platform")
        return f"{ARTIFACTS}/{path.strip('/')}"

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish("FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")


def start_run(
    experiment: str = DEFAULT_EXPERIMENT,
    name: str | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    parent: Run | str | None = None,
    url: str | None = None,
) -> Run:
    """Starts a run in an experiment, which is created on first use.

    Args:
        experiment: the experiment's name.
        name: the run's name; a random one by default.
        params: logged at once.
        tags: set at once.
        parent: the run (or its id) that this one belongs under.
        url: the platform; by default ``MLPLAT_URL``, or the one on this machine.
    """
    client = client_for(url or default_url())
    experiment_id = ensure_experiment(client, experiment)
    all_tags = {key: str(value) for key, value in (tags or {}).items()}
    if parent is not None:
        all_tags[PARENT_RUN_TAG] = parent.run_id if isinstance(parent, Run) else parent
    step = current_step()
    if step is not None:
        all_tags.setdefault(ATTEMPT_TAG, step.label)
        all_tags |= {"mlplat.pipelineRun": step.run_id, "mlplat.step": step.step}
    answer = client.post(
        f"{API}/runs/create",
        {
            "experiment_id": str(experiment_id),
            "run_name": name,
            "user_id": getpass.getuser(),
            "start_time": time.time_ns() // 1_000_000,
            "tags": [{"key": key, "value": value} for key, value in all_tags.items()],
        },
        idempotency_key=uuid.uuid4().hex,
    )
    info = answer["run"]["info"]
    run = Run(client, info["run_id"], experiment_id, info["run_name"], info["artifact_uri"])
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
