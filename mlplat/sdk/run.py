"""Runs: ``with mlplat.start_run(...) as run: run.log({"loss": 0.1}, step=1)``."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsIndex

from mlplat.errors import InvalidInput, PlatformError, Unavailable
from mlplat.metrics.model import Point
from mlplat.sdk import datasets, media
from mlplat.sdk.capture.options import Capture, RunLink
from mlplat.sdk.capture.recorder import Recorder
from mlplat.sdk.client import API, Client, client_for
from mlplat.sdk.files import RunFiles
from mlplat.sdk.outbox import Outbox
from mlplat.sdk.process import Mode, outbox_for, status_after, this_process
from mlplat.sdk.reading import read_ray, read_table
from mlplat.sdk.records import Call
from mlplat.sdk.values import metric_values, param_texts, step_number, tag_texts
from mlplat.sdk.writer import Points

if TYPE_CHECKING:
    import pandas as pd  # it takes half a second, which most runs need not spend
    from ray.data import Dataset

MAX_PAIRS = 100
FLUSH_TIMEOUT_S = 120.0
#: ``finish`` gives a platform that is away so long to come back, then leaves the rest on disk.
PATIENCE_S = 1.0
#: A platform that goes away while it is sent a file is tried so long, before the file goes to disk.
FILE_PATIENCE_S = 3.0
END_STATES = ("FINISHED", "FAILED", "KILLED")


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

    Nothing here fails because of the platform, and nothing waits for it apart from files, ``flush`` and ``finish``:
    what is logged is sent in the background, in its order, and kept on disk while the platform is away. Files are
    uploaded at once; while the platform is away a copy is kept on disk too. What has no room there is told as a
    ``RunWarning``.

    A run ends with the process that started it. A copy of it in another process (forked or unpickled) or from
    ``resume_run`` writes to the same run, and ends it only by ``finish`` with a status.
    """

    def __init__(
        self,
        outbox: Outbox,
        run_id: str,
        name: str | None = None,
        *,
        owner: bool,
        info: Mapping[str, str] | None = None,
        started_ms: int | None = None,
        capture: Capture | None = None,
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
        self.in_block = False
        self._started_ms = started_ms
        self._capture = capture
        self._recorder: Recorder | None = None
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
            InvalidInput: not a file, or a path that is not allowed.
        """
        file = Path(path)
        if not file.is_file():
            raise InvalidInput(f"not a file: {file}")
        self._put("/".join(filter(None, (artifact_path, file.name))), file)

    def log_artifacts(self, folder: str | Path, artifact_path: str = "") -> None:
        """Uploads a folder's files with their relative paths.

        Raises:
            InvalidInput: not a folder, or a path that is not allowed.
        """
        root = Path(folder)
        if not root.is_dir():
            raise InvalidInput(f"not a folder: {root}")
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            self._put("/".join(filter(None, (artifact_path, file.relative_to(root).as_posix()))), file)

    def log_text(self, text: str, path: str) -> None:
        """Writes a text file into the run's artifacts, such as ``notes/summary.md``."""
        self._put(path, text.encode())

    def log_dict(self, value: Mapping[str, Any] | list[Any], path: str) -> None:
        """Writes a dict or list as JSON, or as YAML when the path ends in ``.yaml`` or ``.yml``.

        Raises:
            InvalidInput: it holds something that the format cannot.
        """
        self._put(path, media.document_bytes(value, path))

    def log_figure(self, figure: Any, path: str) -> None:
        """Writes a matplotlib figure (``.png``, ``.svg``, ``.pdf`` …) or a plotly one (``.html``, ``.json``, or an
        image, for which plotly needs kaleido).

        Raises:
            InvalidInput: no such figure, or a format that it cannot be written in.
        """
        self._put(path, media.figure_bytes(figure, path))

    def log_image(self, image: Any, path: str) -> None:
        """Writes a PIL image, or an array as PNG: ``(height, width)`` or ``(height, width, 1 | 3 | 4)``, of uint8, of
        floats from 0 to 1, or of bools.

        Raises:
            InvalidInput: no such image, or a format that it cannot be written in.
        """
        self._put(path, media.image_bytes(image, path))

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
        if self._put(path, media.parquet_bytes(media.as_table(data))):
            self._tables |= {name: path}
            self.set_tag(media.LOGGED_ARTIFACTS_TAG, media.logged_tables(self._tables))
        return path

    def log_dataset(
        self,
        data: Any,
        name: str | None = None,
        context: str = "training",
        source: str | None = None,
        feature_views: Sequence[str] = (),
    ) -> str:
        """Says that the run uses a dataset, and returns the dataset's digest. The data itself stays where it is.

        Args:
            data: a DataFrame, an Arrow table, an array, a dict of arrays, a Ray Dataset, or the path or URL of a file
                or folder.
            name: the dataset's name; by default the file's, else ``dataset``.
            context: what for: ``training``, ``evaluation`` …
            source: where it comes from, as a URL or path; by default the file, else this code.
            feature_views: the names of the views of a feature store that it was read through.

        Raises:
            InvalidInput: no such data, or a name or context that is too long.
            NotFound: no such file.
        """
        dataset = datasets.describe(data, name, source)
        request = datasets.log_inputs_request(self.run_id, dataset, context, feature_views)
        self._call("dataset", "runs/log-inputs", request)
        return dataset.digest

    def read_dataset(
        self,
        location: str | Path,
        name: str | None = None,
        context: str = "training",
        columns: Sequence[str] | None = None,
        feature_views: Sequence[str] = (),
    ) -> pd.DataFrame:
        """Reads a table, and says that the run uses it; see ``log_dataset``.

        Args:
            location: the path or URL of a file or folder: Parquet, CSV, JSON lines, Feather or ORC, by its suffix.
            columns: those to read; by default all.

        Raises:
            InvalidInput: no table, a column that is not there, or a name or context that is too long.
            NotFound: no such file.
        """
        table = read_table(str(location), columns)
        self.log_dataset(str(location), name, context, feature_views=feature_views)
        frame: pd.DataFrame = table.to_pandas()
        return frame

    def read_ray_dataset(
        self,
        location: str | Path,
        name: str | None = None,
        context: str = "training",
        columns: Sequence[str] | None = None,
        feature_views: Sequence[str] = (),
    ) -> Dataset:
        """As ``read_dataset``, as a Ray Dataset: Parquet, CSV or JSON lines, which the cluster reads when it is used.

        Raises:
            InvalidInput: no such table, or a name or context that is too long.
            NotFound: no such file.
        """
        found = read_ray(str(location), columns)
        self.log_dataset(str(location), name, context, feature_views=feature_views)
        return found

    def record(self, recorder: Recorder, fixed_tags: frozenset[str] = frozenset()) -> None:
        """Lets a recorder follow the run until it is finished; of several in one process, only the first does.

        Args:
            recorder: not started yet.
            fixed_tags: the keys of tags that it leaves as they are.
        """
        if not this_process().begin_recording(self.run_id):
            return
        self._recorder = recorder
        files = RunFiles(self._outbox, self.run_id, self._known_uri, retry_for_s=0.0)
        recorder.start(RunLink(self.run_id, files, self._start_time, self.add_points, self.set_tags, fixed_tags))

    def add_points(self, points: list[Point]) -> None:
        """Takes finished metric points. Does not wait, and leaves ``log``'s step alone."""
        for point in points:
            self._outbox.log(Points(self.run_id, point.timestamp, point.step, {point.key: point.value}))

    def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Returns when the platform has everything logged so far; offline, when the disk has it.

        Raises:
            InvalidInput: the platform refused something.
            Unavailable: the platform did not take everything within ``timeout_s``, or the disk is full. Nothing is lost
                as long as this process lives.
        """
        delivered, folder = self._outbox.flush(timeout_s, timeout_s), self._outbox.folder
        if not delivered:
            where = f"in memory, for there is no room in {folder}" if self._outbox.in_memory else f"in {folder}"
            raise Unavailable(f"run {self.run_id}: not everything has arrived; the rest is {where}")
        refused = self._outbox.notes(self.run_id).refused
        if refused:
            raise InvalidInput(f"run {self.run_id}: not accepted: {'; '.join(refused)}")

    def finish(self, status: str | None = None) -> Finished:
        """Ends the run, and waits until the platform has everything; while it is away, a second only.

        Finishing again changes nothing. Problems are told as a ``RunWarning`` too.

        Args:
            status: FINISHED (default), FAILED or KILLED. A process that joined the run ends it only with a status.

        Raises:
            InvalidInput: no such status.
        """
        if self._finished is not None:
            return self._finished
        if self._recorder is not None:
            self._recorder.finish()
            this_process().end_recording(self.run_id)
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
                raise Unavailable(f"run {self.run_id} is offline: names and places are the platform's to give")
            self._outbox.flush(PATIENCE_S, PATIENCE_S)  # the run may be about to start over there
            info: Mapping[str, str] = self._client.get(f"{API}/runs/get", run_id=self.run_id)["run"]["info"]
            self._info = info
        return self._info

    @property
    def _known_uri(self) -> str | None:
        return None if self._info is None else self._info["artifact_uri"]

    def _start_time(self) -> int:
        """Ms since 1970; now when nobody knows better. May ask the platform, once."""
        if self._started_ms is None:
            self._started_ms = _now_ms()
            if not self._outbox.offline:
                with suppress(PlatformError):
                    found = client_for(self._outbox.url, 0.0).get(f"{API}/runs/get", run_id=self.run_id)
                    self._started_ms = int(found["run"]["info"]["start_time"])
        return self._started_ms

    def _put(self, path: str, source: bytes | Path) -> bool:
        files = RunFiles(self._outbox, self.run_id, self._known_uri, FILE_PATIENCE_S)
        kept = files.put(path, source)
        if not kept:
            warnings.warn(
                f"run {self.run_id}: {path} is lost: {self._outbox.url} is away, and {self._outbox.folder} has no room "
                "for it (MLPLAT_SPOOL_BYTES)",
                RunWarning,
                stacklevel=3,
            )
        return kept

    def _call(self, what: str, path: str, body: dict[str, Any]) -> None:
        self._outbox.put(Call(self.run_id, what, f"{API}/{path}", {"run_id": self.run_id} | body))

    def _warn(self, finished: Finished) -> None:
        problems = []
        if finished.refused:
            problems.append(f"not accepted: {'; '.join(finished.refused)}")
        if finished.dropped_points:
            problems.append(f"{finished.dropped_points} metric points were dropped: there was no room for them")
        if waiting := self._outbox.in_memory:
            problems.append(
                f"{self._outbox.folder} is full: {waiting} records wait in memory, and are lost unless there is room "
                "before this process ends"
            )
        if not finished.delivered and not self._outbox.offline:
            problems.append(
                f"{self._outbox.url} is away: the rest waits in {self._outbox.folder} for the next run or `mlplat sync`"
            )
        if problems:
            warnings.warn(f"run {self.run_id}: {'. '.join(problems)}", RunWarning, stacklevel=3)

    def __enter__(self) -> Run:
        self.in_block = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.in_block = False
        status = status_after(error)
        if error is not None and status != "FINISHED" and self._recorder is not None:
            self._recorder.failed(error)
        self.finish(status if self._is_owner else None)

    def __reduce__(self) -> tuple[Any, ...]:
        mode = "offline" if self._outbox.offline else "online"
        link = (self._outbox.url, mode, self.run_id, self._name, self._info, self._started_ms, self._capture)
        return _rejoin, link


def _rejoin(
    url: str,
    mode: Mode,
    run_id: str,
    name: str | None,
    info: Mapping[str, str] | None,
    started_ms: int | None,
    capture: Capture | None,
) -> Run:
    run = Run(outbox_for(url, mode), run_id, name, owner=False, info=info, started_ms=started_ms, capture=capture)
    run.record(Recorder(capture, owner=False))
    return run


def _pairs(values: Mapping[str, str]) -> Iterator[list[dict[str, str]]]:
    items = [{"key": key, "value": value} for key, value in values.items()]
    for start in range(0, len(items), MAX_PAIRS):
        yield items[start : start + MAX_PAIRS]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
