"""Events of the registry as those outside see them, and how far somebody has seen them. Pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mlplat.db.snapshots import Snapshot
from mlplat.errors import InvalidInput
from mlplat.pipelines.automation.triggers import REGISTRY_EVENTS

#: The names of kinds of events that one can ask for.
KINDS = frozenset(REGISTRY_EVENTS.values())
#: What MLflow 3.17 calls some of them, as ``entity.action``. Taking a tag away is an event of its own there.
MLFLOW_NAMES = {
    "model_created": "registered_model.created",
    "version_created": "model_version.created",
    "version_tag_set": "model_version_tag.set",
    "alias_set": "model_version_alias.created",
    "alias_deleted": "model_version_alias.deleted",
}
TAG_DELETED = "model_version_tag.deleted"
#: Characters of a cursor: a server has some hundred transactions open at most.
MAX_CURSOR = 8_000
MAX_PARTS = 100
_FORM = "1"


@dataclass(frozen=True)
class RegistryEvent:
    """A change of the registry.

    Args:
        lane: what stays the same when its model is renamed; None where that is not known.
        transaction: the one that made it.
        body: what is told of it.
    """

    event_id: int
    transaction: int
    lane: int | None
    body: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """Its public name, such as ``alias_set``."""
        return str(self.body["kind"])

    @property
    def mlflow_name(self) -> str | None:
        """What MLflow calls it; None: nothing."""
        if self.kind == "version_tag_set" and self.body.get("value") is None:
            return TAG_DELETED
        return MLFLOW_NAMES.get(self.kind)

    @property
    def models(self) -> tuple[str, ...]:
        """The names by which it can be asked for: a model that is renamed has two."""
        return tuple(str(self.body[key]) for key in ("model", "new_name") if key in self.body)


def describe(
    event_id: int, command: str, model: str, at: str, by: str, reason: str, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """What is told of an event: the fields of the command and of its answer, and what all events have."""
    known = {"id": event_id, "kind": REGISTRY_EVENTS.get(command, command), "model": model}
    rest = {key: value for key, value in fields.items() if key != "name"}
    return {**known, **rest, **known, "by": by, "reason": reason, "at": at}


@dataclass(frozen=True)
class EventFilter:
    """Which events somebody wants: of some kinds (none named: of all; MLflow's names count too), and of models by name
    or pattern."""

    kinds: frozenset[str] = frozenset()
    model: str = "*"

    def accepts(self, event: RegistryEvent) -> bool:
        """Whether the event is wanted."""
        if self.kinds and self.kinds.isdisjoint((event.kind, event.mlflow_name or event.kind)):
            return False
        return any(name == self.model or fnmatchcase(name, self.model) for name in event.models)


def parse_kinds(names: Sequence[str]) -> frozenset[str]:
    """Kinds by their names; ``*``, or none at all, are all of them.

    Raises:
        InvalidInput: there is no such kind.
    """
    unknown = sorted(set(names) - KINDS - {"*"})
    if unknown:
        raise InvalidInput(f"no such kind of event: {', '.join(unknown)[:200]}; there are {', '.join(sorted(KINDS))}")
    return frozenset() if "*" in names else frozenset(names)


@dataclass(frozen=True)
class Cursor:
    """What a reader has seen: transactions, and of others only the events up to a number.

    Args:
        parts: a transaction that is not among ``seen``, and the last of its events that was read.
    """

    seen: Snapshot
    parts: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        """As clients keep it, who need not understand it."""
        parts = ",".join(f"{transaction}.{event_id}" for transaction, event_id in self.parts)
        return base64.urlsafe_b64encode(f"{_FORM}|{self.seen}|{parts}".encode()).rstrip(b"=").decode()

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """What a client has kept.

        Raises:
            InvalidInput: it is no cursor.
        """
        try:
            form, seen, parts = _unpacked(text).split("|")
            pairs = [part.split(".") for part in parts.split(",") if part]
            cursor = cls(Snapshot.parse(seen), tuple((int(first), int(last)) for first, last in pairs))
        except (ValueError, binascii.Error) as error:
            raise InvalidInput(_NO_CURSOR.format(text[:60])) from error
        if form != _FORM or not _is_sound(cursor):
            raise InvalidInput(_NO_CURSOR.format(text[:60]))
        return cursor


def steps(after: Cursor, now: Snapshot, events: Sequence[RegistryEvent]) -> list[Cursor]:
    """Where a reader is after each event of a page, which has whole transactions in the order of their numbers.

    Args:
        now: the snapshot that the page was read at.
    """
    found = []
    for index, event in enumerate(events):
        number = event.transaction
        is_last = index + 1 == len(events) or events[index + 1].transaction != number
        seen = after.seen | now.up_to(number if is_last else number - 1)
        parts = {transaction: last for transaction, last in after.parts if not seen.sees(transaction)}
        if not is_last:
            parts[number] = event.event_id
        found.append(Cursor(seen, tuple(parts.items())))
    return found


_NO_CURSOR = "expected a cursor, the id of an event as this platform sent it, not {!r}"


def _unpacked(text: str) -> str:
    if not text.isascii() or len(text) > MAX_CURSOR:
        raise ValueError(text)
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode("ascii")


def _is_sound(cursor: Cursor) -> bool:
    numbers = [*cursor.seen.open, *(number for part in cursor.parts for number in part)]
    return (
        0 < cursor.seen.end < 2**63
        and all(0 < number < 2**63 for number in numbers)
        and all(number < cursor.seen.end for number in cursor.seen.open)
        and len(cursor.parts) <= MAX_PARTS
    )
