"""Runs: ``with mlplat.start_run(...) as run: run.log({"loss": 0.1}, step=1)``."""

from __future__ import annotations

import getpass
import os
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, SupportsIndex

from mlplat.artifacts.model import safe_path
from mlplat.errors import InvalidInput, Unavailable
from mlplat.metrics.model import Point
from mlplat.sdk import datasets, media
from mlplat.sdk.capture.options import Capture, RunLink
from mlplat.sdk.capture.recorder import Recorder
from mlplat.sdk.client import API, Client, client_for, default_url
from mlplat.sdk.context import current_step
from mlplat.sdk.files import RunFiles, artifact_root
from mlplat.sdk.outbox import Outbox
from mlplat.sdk.process import this_process
from mlplat.sdk.records import Call, CreateRun
from mlplat.sdk.values import metric_values, param_texts, step_number, tag_texts
from mlplat.sdk.writer import Points
from mlplat.settings import Settings
from mlplat.tracking.model import ATTEMPT_TAG, PARENT_RUN_TAG, RUN_NAME_TAG, random_run_name, run_id_for

DEFAULT_EXPERIMENT = "Default"
MAX_PAIRS = 100
FLUSH_TIMEOUT_S = 120.0
#: ``finish`` gives a platform that is away so long to come back, then leaves the rest on disk.
PATIENCE_S = 5.0
END_STATES = ("FINISHED", "FAILED", "KILLED")

Mode = Literal["online", "offline"]


class RunWarning(UserWarning):
    """Something of a run is not, or not yet, on the platform."""


@dataclass(frozen=True)
class Finished:
    """How the end of a run went.

    ``delivered``: the platform has everything; else the rest is on disk, for the next run or ``mlplat sync``.
    ``dropped_points`` found no room. ``refused`` is what the platform did not accept, and why.
    """

    delivered: bool
    dropped_points: int
    refused: tuple[str, ...]


class Run:
    """A run that is being written, by this process and perhaps by others.

    Nothing here waits for the platform or fails because of it, apart from artifacts, ``flush`` and ``finish``: what
    is logged is sent in the background, in its order, and kept on disk while the platform is away.

    A run ends with the process that started it. A copy of it in another process (forked or unpickled) or from
    ``resume_run`` writes to the same run, and ends it only by ``finish`` with a status.
    """

    def __init__(
        self, outbox: Outbox, run_id: str, name: str | None, *, owner: bool, info: Mapping[str, str] | None
    ) -> None:
        self._outbox = outbox
        self.run_id = run_id
        self._name = name
        self._info = info
        self._owner_pid = os.getpid() if owner else None
        self._next_step = 0
        self._params: dict[str, str] = {}
        self._params_lock = threading.Lock()
        self._finished: Finished | None = None
        self._capture: Recorder | None = None
        self._tables: dict[str, str] = {}
        if not outbox.offline:
            outbox.pulse.add(run_id)
        if owner:
            this_process().enter(self)

    def log(self, metrics: Mapping[str, Any], step: SupportsIndex | None = None) -> None:
        """Logs metric values at ``step`` (default: one more than the last call). Does not wait.

        Values that would need more than a million points of memory before they reach the disk are dropped and
        counted, see ``Finished``.

        Raises:
            InvalidInput: a value is not a number, a key not a string, or the step not a whole number.
        """
        at = self._next_step if step is None else step if type(step) is int else step_number(step)
        values = metric_values(metrics)
        self._next_step = at + 1
        self._outbox.log(Points(self.run_id, time.time_ns() // 1_000_000, at, values))

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Logs parameters; each may be set once. Does not wait.

        Raises:
            InvalidInput: a key is malformed, or this process has logged another value. What another process has
                logged differently shows in ``flush`` and ``finish``.
        """
        with self._params_lock:
            new = param_texts(values, self._params)
            self._params |= new
        for chunk in _pairs(new):
            self._call("params", "runs/log-batch", {"params": chunk})

    def log_param(self, key: str, value: Any) -> None:
        """Logs one parameter."""
        self.log_params({key: value})

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Sets tags, replacing earlier values. Does not wait.

        Raises:
            InvalidInput: a key is malformed.
        """
        for chunk in _pairs(tag_texts(values)):
            self._call("tags", "runs/log-batch", {"tags": chunk})

    def set_tag(self, key: str, value: Any) -> None:
        """Sets one tag."""
        self.set_tags({key: value})

    def log_artifact(self, path: str | Path, artifact_path: str = "") -> None:
        """Uploads a file into the run's artifacts, below the folder ``artifact_path``.

        Raises:
            InvalidInput: not a file.
            Unavailable: the platform is away.
        """
        file = Path(path)
        if not file.is_file():
            raise InvalidInput(f"not a file: {file}")
        self._upload(file, "/".join(filter(None, (artifact_path, file.name))))

    def log_artifacts(self, folder: str | Path, artifact_path: str = "") -> None:
        """Uploads a folder's files with their relative paths.

        Raises:
            InvalidInput: not a folder.
            Unavailable: the platform is away.
        """
        root = Path(folder)
        if not root.is_dir():
            raise InvalidInput(f"not a folder: {root}")
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            self._upload(file, "/".join(filter(None, (artifact_path, file.relative_to(root).as_posix()))))

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
        self._call("dataset", "runs/log-inputs", datasets.log_inputs_request(self.run_id, dataset, context))
        return dataset.digest

    def record(self, recorder: Recorder, link: RunLink) -> None:
        """Lets a recorder follow the run until it is finished."""
        self._capture = recorder
        recorder.start(link)

    def add_points(self, points: list[Point]) -> None:
        """Takes finished metric points. Does not wait, and leaves ``log``'s step alone."""
        for point in points:
            self._outbox.log(Points(self.run_id, point.timestamp, point.step, {point.key: point.value}))

    def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Returns when the platform has everything logged so far; offline, when the disk has it.

        Raises:
            InvalidInput: the platform refused something.
            Unavailable: the platform did not take everything within ``timeout_s``. Nothing is lost.
        """
        delivered = self._outbox.flush(timeout_s, timeout_s)
        refused = self._outbox.notes(self.run_id).refused
        if refused:
            raise InvalidInput(f"run {self.run_id}: not accepted: {'; '.join(refused)}")
        if not delivered:
            raise Unavailable(f"run {self.run_id}: not everything has arrived; the rest is in {self._outbox.folder}")

    def finish(self, status: str | None = None) -> Finished:
        """Ends the run, and waits until the platform has everything; while it is away, a few seconds only.

        Finishing again changes nothing. Problems are told as a ``RunWarning`` too.

        Args:
            status: FINISHED (default), FAILED or KILLED. A process that joined the run ends it only with a status.

        Raises:
            InvalidInput: no such status.
        """
        if self._finished is not None:
            return self._finished
        if self._capture is not None:
            self._capture.finish()
        if status is not None or self._is_owner:
            self.end(status or "FINISHED")
        delivered = self._outbox.flush(FLUSH_TIMEOUT_S, PATIENCE_S)
        self._outbox.pulse.remove(self.run_id)
        notes = self._outbox.notes(self.run_id)
        self._finished = Finished(delivered, notes.dropped_points, notes.refused)
        self._warn(self._finished)
        return self._finished

    def end(self, status: str) -> None:
        """Says that the run has ended, without waiting for anything; ``finish`` is what you want.

        Raises:
            InvalidInput: no such status.
        """
        if status not in END_STATES:
            raise InvalidInput(f"a run ends as {', '.join(END_STATES)}, not {status!r}")
        this_process().leave(self)
        self._call("end of the run", "runs/update", {"status": status, "end_time": _now_ms()})

    @property
    def name(self) -> str:
        """The run's name.

        Raises:
            Unavailable: it is not known yet, because the platform is away.
        """
        return self._name or self._known_info["run_name"]

    @property
    def experiment_id(self) -> int:
        """The experiment's id.

        Raises:
            Unavailable: it is not known yet, because the platform is away.
        """
        return int(self._known_info["experiment_id"])

    @property
    def artifact_uri(self) -> str:
        """Where the run's artifacts are.

        Raises:
            Unavailable: it is not known yet, because the platform is away.
        """
        return self._known_info["artifact_uri"]

    @property
    def _is_owner(self) -> bool:
        return self._owner_pid == os.getpid()

    @property
    def _client(self) -> Client:
        return client_for(self._outbox.url)

    @property
    def _known_info(self) -> Mapping[str, str]:
        if self._info is None:
            if self._outbox.offline:
                raise Unavailable(f"run {self.run_id} is offline: artifacts and ids are the platform's to give")
            self._outbox.flush(PATIENCE_S, PATIENCE_S)  # the run may be about to start over there
            info: Mapping[str, str] = self._client.get(f"{API}/runs/get", run_id=self.run_id)["run"]["info"]
            self._info = info
        return self._info

    @property
    def _files(self) -> RunFiles:
        return RunFiles(lambda: self._client, self.artifact_uri)

    def _upload(self, file: Path, path: str) -> None:
        self._client.upload(f"{artifact_root(self.artifact_uri)}/{path}", file)

    def _call(self, what: str, path: str, body: dict[str, Any]) -> None:
        self._outbox.put(Call(self.run_id, what, f"{API}/{path}", {"run_id": self.run_id} | body))

    def _warn(self, finished: Finished) -> None:
        problems = []
        if finished.refused:
            problems.append(f"not accepted: {'; '.join(finished.refused)}")
        if finished.dropped_points:
            problems.append(f"{finished.dropped_points} metric points were dropped: they came too fast")
        if not finished.delivered and not self._outbox.offline:
            problems.append(
                f"{self._outbox.url} is away: the rest waits in {self._outbox.folder} for the next run or `mlplat sync`"
            )
        if problems:
            warnings.warn(f"run {self.run_id}: {'. '.join(problems)}", RunWarning, stacklevel=3)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self._capture is not None:
            self._capture.failed(error)
        if not self._is_owner:
            self.finish()
        else:
            self.finish("FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rejoin, (self._outbox.url, self._outbox.offline, self.run_id, self._name, self._info)


def start_run(
    experiment: str = DEFAULT_EXPERIMENT,
    name: str | None = None,
    *,
    run_id: str | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    parent: Run | str | None = None,
    url: str | None = None,
    mode: Mode | None = None,
    capture: Capture | None = None,
) -> Run:
    """Starts a run in an experiment, which is created on first use.

    When the platform does not answer within a few seconds, the run starts all the same: a warning says so, and
    what it logs is kept on disk until the platform is back.

    Args:
        experiment: the experiment's name.
        name: the run's name; a random one by default.
        run_id: writes to this run instead of a new one, see ``resume_run``.
        params: logged at once.
        tags: set at once.
        parent: the run (or its id) that this one belongs under.
        url: the platform; by default ``MLPLAT_URL``, or the one on this machine.
        mode: ``offline`` keeps everything on disk for ``mlplat sync``; by default ``MLPLAT_MODE``, or online.
        capture: what the run records by itself; by default all that ``MLPLAT_CAPTURE_*`` leaves on. A run that starts
            without the platform records no files.

    Raises:
        InvalidInput: the platform refused, for instance because the experiment is deleted; or a setting is not allowed.
    """
    if run_id is not None:
        run = resume_run(run_id, url=url, mode=mode)
        if tags:
            run.set_tags(tags)
    else:
        recorder = Recorder(capture)
        outbox = _outbox(url, mode)
        given = _given_tags(tags or {}, parent)
        record = _new_run(experiment, name, recorder.first_tags() | given)
        started = outbox.create_now(record)
        if started.away is not None:
            warnings.warn(
                f"{started.away} The run goes on; what it logs waits in {outbox.folder} until the platform is back.",
                RunWarning,
                stacklevel=2,
            )
        run = Run(outbox, record.run_id, record.body["run_name"], owner=True, info=started.info)
        if started.info is not None:
            started_ms = record.body["start_time"]
            link = RunLink(run.run_id, outbox.url, run.artifact_uri, started_ms, run.add_points, frozenset(given))
            run.record(recorder, link)
    if params:
        run.log_params(params)
    return run


def resume_run(run_id: str, *, owner: bool = False, url: str | None = None, mode: Mode | None = None) -> Run:
    """A handle on a run that exists, or that another process has started. The run is RUNNING again.

    Many processes may write to one run. Unless it is the ``owner``, a process does not end the run by its own end;
    ``finish`` with a status does.

    Args:
        run_id: the run.
        owner: the run ends with this process, as if it had started it.
        url: the platform; by default ``MLPLAT_URL``, or the one on this machine.
        mode: ``offline`` keeps everything on disk for ``mlplat sync``.
    """
    if not run_id or not isinstance(run_id, str):
        raise InvalidInput(f"a run id is a text, not {run_id!r}")
    run = Run(_outbox(url, mode), run_id, None, owner=owner, info=None)
    run._call("start of the run", "runs/update", {"status": "RUNNING", "resumed_at": _now_ms()})
    return run


def _given_tags(values: Mapping[str, Any], parent: Run | str | None) -> dict[str, str]:
    given = tag_texts(values)
    if parent is not None:
        given[PARENT_RUN_TAG] = parent.run_id if isinstance(parent, Run) else parent
    step = current_step()
    if step is not None:
        given.setdefault(ATTEMPT_TAG, step.label)
        given |= {"mlplat.pipelineRun": step.run_id, "mlplat.step": step.step}
    return given


def _new_run(experiment: str, name: str | None, all_tags: Mapping[str, str]) -> CreateRun:
    key = uuid.uuid4().hex
    body = {
        "run_name": name or all_tags.get(RUN_NAME_TAG) or random_run_name(),
        "user_id": _user(),
        "start_time": _now_ms(),
        "tags": [{"key": tag, "value": value} for tag, value in all_tags.items()],
        "heartbeat": True,
    }
    return CreateRun(run_id_for(key), experiment, key, body)


def _outbox(url: str | None, mode: Mode | None) -> Outbox:
    settings = Settings()
    chosen = mode or settings.mode
    if chosen not in ("online", "offline"):
        raise InvalidInput(f"mode is online or offline, not {chosen!r}")
    return this_process().outbox(
        (url or default_url()).rstrip("/"), settings.spool_folder, settings.spool_bytes, offline=chosen == "offline"
    )


def _rejoin(url: str, offline: bool, run_id: str, name: str | None, info: Mapping[str, str] | None) -> Run:
    return Run(_outbox(url, "offline" if offline else "online"), run_id, name, owner=False, info=info)


def _pairs(values: Mapping[str, str]) -> Iterator[list[dict[str, str]]]:
    items = [{"key": key, "value": value} for key, value in values.items()]
    for start in range(0, len(items), MAX_PAIRS):
        yield items[start : start + MAX_PAIRS]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
