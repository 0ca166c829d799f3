"""What travels from the user's process to the platform, in the order in which it happened.

Points travel as they are (Arrow), files beside their frames; everything else is a JSON call that may arrive twice.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import msgspec

from mlplat.sdk.spool import Frame, Kind


class Origin(msgspec.Struct, frozen=True):
    """Which platform a spool file is for, and who wrote it."""

    url: str
    host: str
    pid: int
    created_ms: int


class CreateRun(msgspec.Struct, frozen=True):
    """A run that starts; its id follows from the idempotency key. The experiment is created on first use."""

    run_id: str
    experiment: str
    idempotency_key: str
    body: dict[str, Any]


class Call(msgspec.Struct, frozen=True):
    """A POST about a run. ``what`` names it for people."""

    run_id: str
    what: str
    path: str
    body: dict[str, Any]
    idempotency_key: str | None = None


class PutFile(msgspec.Struct, frozen=True):
    """A file for a run's artifacts at ``path``; ``name`` is its copy's among the spool file's attachments."""

    run_id: str
    path: str
    name: str


SpooledRecord = CreateRun | Call | PutFile
_KINDS: dict[Kind, type[SpooledRecord]] = {Kind.CREATE: CreateRun, Kind.CALL: Call, Kind.FILE: PutFile}


def origin_here(url: str) -> bytes:
    """The origin of this process' records."""
    return msgspec.json.encode(Origin(url, socket.gethostname(), os.getpid(), time.time_ns() // 1_000_000))


def read_origin(body: bytes) -> Origin | None:
    """The origin in a spool file; None when it has none."""
    try:
        return msgspec.json.decode(body, type=Origin)
    except msgspec.DecodeError:
        return None


def to_frame(record: SpooledRecord) -> Frame:
    """The record as bytes."""
    kind = next(kind for kind, of in _KINDS.items() if isinstance(record, of))
    return Frame(kind, msgspec.json.encode(record))


def from_frame(frame: Frame) -> SpooledRecord:
    """The record in a frame that has no points.

    Raises:
        msgspec.DecodeError: not one.
    """
    return msgspec.json.decode(frame.body, type=_KINDS[frame.kind])


def attachment_of(frame: Frame) -> str | None:
    """The name of the copy that a frame is about, if it is about one."""
    try:
        return msgspec.json.decode(frame.body, type=PutFile).name if frame.kind is Kind.FILE else None
    except msgspec.DecodeError:
        return None
