"""Handing records to the platform, once each, and telling a refusal from an absence."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from mlplat.artifacts.console import FOLDER as CONSOLE
from mlplat.artifacts.model import proxied_path
from mlplat.errors import AlreadyExists, InvalidInput, NotFound, PermissionDenied, PlatformError
from mlplat.metrics.model import columns_table, concat, encode, names_of
from mlplat.sdk.client import API, Client
from mlplat.sdk.metrics import Send, best_sender
from mlplat.sdk.records import Call, CreateRun, PutFile, SpooledRecord, from_frame
from mlplat.sdk.spool import Frame, Kind
from mlplat.sdk.transfer import put_at_once, upload

#: Points of several frames travel together up to this size.
MAX_BATCH_BYTES = 2 * 1024 * 1024
#: Runs of which it is remembered where their artifacts are.
MAX_ROOTS = 1_000
#: Asking again at once gives the same answer.
REFUSALS = (InvalidInput, AlreadyExists, NotFound, PermissionDenied)


class Refusal(NamedTuple):
    """What the platform did not take. ``may_pass``: later it might, say when the run's start has arrived."""

    run_id: str
    reason: str
    may_pass: bool = False


class Delivered(NamedTuple):
    """How many frames from the start are dealt with, the points among them, and what was refused."""

    frames: int
    points: int
    refusals: list[Refusal]


class Delivery:
    """One platform. Thread-safe. Frames may arrive twice: every record is harmless twice.

    ``working`` is entered for everything but waiting for the platform.
    """

    def __init__(
        self, client: Client, send_points: Send | None = None, working: AbstractContextManager[object] | None = None
    ) -> None:
        self._client = client
        self._working = working or nullcontext()
        self._send_points = send_points or best_sender(client)
        self._roots: dict[str, str] = {}

    def deliver(self, frames: Sequence[Frame], attachments: Path | None = None) -> Delivered:
        """Hands over the first frame, with the frames of points that follow if it is one.

        Args:
            frames: what waits, oldest first.
            attachments: where the files are that frames name.

        Raises:
            PlatformError: the platform is away, overloaded or broken: the same call may succeed later.
        """
        first = frames[0]
        if first.kind is Kind.POINTS:
            return self._deliver_points(_points_at_start(frames))
        if first.kind is Kind.ORIGIN:
            return Delivered(1, 0, [])
        record = from_frame(first)
        try:
            if isinstance(record, CreateRun):
                self.create(record)
            elif isinstance(record, Call):
                self._client.post(record.path, record.body, idempotency_key=record.idempotency_key)
            elif attachments is None or not (copy := attachments / record.name).is_file():
                return Delivered(1, 0, [Refusal(record.run_id, f"{record.path}: the copy of the file is gone")])
            else:
                self._put_file(record, copy)
        except REFUSALS as error:
            return Delivered(1, 0, [_refusal(record.run_id, _what(record), error)])
        return Delivered(1, 0, [])

    def create(self, record: CreateRun) -> dict[str, str]:
        """Starts the run and returns its info, as MLflow's API has it.

        Raises:
            PlatformError: refused (``REFUSALS``), or the platform is away.
        """
        experiment_id = ensure_experiment(self._client, record.experiment)
        body = record.body | {"experiment_id": str(experiment_id)}
        answer = self._client.post(f"{API}/runs/create", body, idempotency_key=record.idempotency_key)
        info: dict[str, str] = answer["run"]["info"]
        return info

    def _put_file(self, record: PutFile, copy: Path) -> None:
        target = f"{self._root_of(record.run_id)}/{record.path}"
        if record.path.startswith(CONSOLE):
            put_at_once(self._client, target, copy.read_bytes())
        else:
            upload(self._client, target, copy)

    def _root_of(self, run_id: str) -> str:
        if run_id not in self._roots:
            info = self._client.get(f"{API}/runs/get", run_id=run_id)["run"]["info"]
            if len(self._roots) >= MAX_ROOTS:
                self._roots.clear()
            self._roots[run_id] = proxied_path(info["artifact_uri"])
        return self._roots[run_id]

    def _deliver_points(self, frames: Sequence[Frame]) -> Delivered:
        with self._working:
            tables = [_read(frame) for frame in frames]
            body = frames[0].body if len(frames) == 1 else encode(concat(tables))
        try:
            self._send_points(body)
            return Delivered(len(frames), sum(table.num_rows for table in tables), [])
        except REFUSALS as error:
            if len(frames) > 1:  # one at a time: what is wrong with one must not cost the others
                return self._deliver_points(frames[:1])
            return self._deliver_by_key(tables[0], error)

    def _deliver_by_key(self, table: pa.Table, refused: PlatformError) -> Delivered:
        """Sends the keys of a refused batch one by one, to keep what can be kept."""
        (run_id,) = names_of(table, "run_id")
        keys = names_of(table, "key")
        if len(keys) == 1 or not isinstance(refused, InvalidInput):
            what = f"{table.num_rows} points of {', '.join(keys[:5])}"
            return Delivered(1, 0, [_refusal(run_id, what, refused)])
        sent, refusals = 0, []
        for key in keys:
            part = table.filter(pc.equal(table["key"].cast(pa.string()), key))
            columns = [part[name].to_pylist() for name in ("step", "timestamp", "value")]
            try:
                self._send_points(encode(columns_table(run_id, [key] * part.num_rows, *columns)))
                sent += part.num_rows
            except REFUSALS as error:
                refusals.append(_refusal(run_id, f"{part.num_rows} points of {key}", error))
        return Delivered(1, sent, refusals)


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


def run_id_of(frame: Frame) -> str:
    """The run that a frame is about."""
    return names_of(_read(frame), "run_id")[0] if frame.kind is Kind.POINTS else from_frame(frame).run_id


def _read(frame: Frame) -> pa.Table:
    with pa.ipc.open_stream(frame.body) as reader:
        return reader.read_all()


def _points_at_start(frames: Sequence[Frame]) -> list[Frame]:
    taken: list[Frame] = []
    size = 0
    for frame in frames:
        size += len(frame.body)
        if frame.kind is not Kind.POINTS or (taken and size > MAX_BATCH_BYTES):
            break
        taken.append(frame)
    return taken


def _what(record: SpooledRecord) -> str:
    if isinstance(record, PutFile):
        return record.path
    return "start of the run" if isinstance(record, CreateRun) else record.what


def _refusal(run_id: str, what: str, error: PlatformError) -> Refusal:
    return Refusal(run_id, f"{what}: {error}", isinstance(error, NotFound | PermissionDenied))
