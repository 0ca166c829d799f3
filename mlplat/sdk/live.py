"""A run's events, folded into its present state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

Kind = Literal["snapshot", "change", "log", "end"]
_KINDS: tuple[Kind, ...] = ("snapshot", "change", "log", "end")


@dataclass(frozen=True)
class RunEvent:
    """Something that happened to a run.

    Args:
        kind: ``snapshot`` (the whole run), ``change`` (rows that changed), ``log`` (new text), ``end``.
        data: as ``/api/v1/pipeline-runs/{run_id}/events`` sends it.
        number: of the transition after which this is the run's state; None where that says nothing new.
    """

    kind: Kind
    data: dict[str, Any]
    number: int | None = None


class EventParser:
    """Takes Server-Sent Events apart as they arrive."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[RunEvent | None]:
        """The events that are complete now; None for every sign of life between them."""
        *blocks, self._rest = (self._rest + chunk).split(b"\n\n")
        return [_event(block) for block in blocks]


def _event(block: bytes) -> RunEvent | None:
    fields: dict[bytes, bytes] = {}
    for line in block.split(b"\n"):
        name, _colon, value = line.partition(b":")
        fields[name] = value.removeprefix(b" ")
    for kind in _KINDS:
        if fields.get(b"event") == kind.encode():
            number = fields.get(b"id")
            return RunEvent(kind, json.loads(fields[b"data"]), None if number is None else int(number))
    return None  # a comment, or something that a newer platform tells


class LiveRun:
    """The state of a run after the events so far.

    ``status`` is what ``GET /api/v1/pipeline-runs/{run_id}`` would answer, ``dag`` the graph in the order of the
    definition.
    """

    def __init__(self) -> None:
        self.status: dict[str, Any] = {}
        self.dag: list[dict[str, Any]] = []
        self._attempts: dict[tuple[str, int, int], dict[str, Any]] = {}

    def apply(self, event: RunEvent) -> None:
        """Takes an event; logs change nothing."""
        if event.kind == "snapshot":
            self.status, self.dag = dict(event.data["run"]), event.data["dag"]
            self._attempts = {_key(row): row for row in self.status["attempts"]}
        elif event.kind == "change":
            self._change(event.data)

    def _change(self, data: dict[str, Any]) -> None:
        steps = self.status["steps"]
        for row in sorted(data["steps"], key=lambda row: row["item"] is not None):
            step = steps[row["step"]]
            fields = {name: value for name, value in row.items() if name not in {"step", "item", "items"}}
            if row["item"] is not None:
                step["items"][row["item"]] = fields | {"items": None}
                continue
            step.update(fields)
            if row["items"] is not None and step["items"] is None:
                step["items"] = [None] * row["items"]
        for name in {row["step"] for row in data["steps"]}:
            step = steps[name]
            if step["items"] is not None:
                succeeded = step["state"] == "SUCCEEDED"
                step["output"] = [item["output"] for item in step["items"]] if succeeded else None
        for row in data["attempts"]:
            self._attempts[_key(row)] = row
        if data["attempts"]:
            self.status["attempts"] = sorted(self._attempts.values(), key=_order)
        if data["signals"] is not None:
            self.status["signals"] = data["signals"]
        self.status.update(data["run"], seq=data["seq"])


def _key(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["step"], -1 if row["item"] is None else row["item"], row["attempt"]


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return datetime.fromisoformat(row["queued_at"]), *_key(row)


class LogPositions:
    """How far each attempt's log has been told, to leave out what comes again after a reconnect."""

    def __init__(self) -> None:
        self._next: dict[tuple[str, int, int], tuple[int, int]] = {}

    def new_part(self, data: dict[str, Any]) -> dict[str, Any] | None:
        """The ``log`` event's data without what was told already; None when nothing is left."""
        key = _key(data)
        start, end = _place(data["start"]), _place(data["next"])
        known = self._next.get(key, start)
        if end <= known:
            return None
        self._next[key] = end
        if known <= start:
            return data
        body = data["text"].encode()
        if start[0] != known[0] or start[0] != end[0] or len(body) != end[1] - start[1]:
            return data  # the bytes cannot be counted from the text: better twice than not at all
        return data | {"text": body[known[1] - start[1] :].decode(errors="replace")}


def _place(position: dict[str, Any]) -> tuple[int, int]:
    return position["segment"], position["offset"]
