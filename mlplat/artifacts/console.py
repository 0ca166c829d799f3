"""Reading the console of a run: the segments of all processes that wrote to it, from a cursor on."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from mlplat.artifacts.segments import Place
from mlplat.artifacts.store import ArtifactStore
from mlplat.artifacts.texts import read_text
from mlplat.errors import InvalidInput

#: Below a run's artifacts: a folder per process, ``<host>-<pid>-<start>``.
FOLDER = "mlplat/console"
#: A cursor has a place for each, and must fit into a URL.
MAX_PROCESSES = 64
MAX_CURSOR = 12 * 1024


@dataclass(frozen=True)
class Cursor:
    """How far each process' output has been read, and whose was read last."""

    places: dict[str, Place] = field(default_factory=dict)
    last: str = ""


@dataclass(frozen=True)
class ConsolePart:
    """A part of the text. ``more``: there was more already than one part holds."""

    text: str
    cursor: Cursor
    more: bool


def read_console(
    artifacts: ArtifactStore,
    root: str,
    cursor: Cursor,
    limit: int,
    process: str = "",
    others: Mapping[str, str] = MappingProxyType({}),
) -> ConsolePart:
    """What follows the cursor, at most about ``limit`` bytes; blocks.

    Args:
        artifacts: the store.
        root: the run's folder in it.
        cursor: where to go on.
        limit: bytes of text. A heading is added where another process' output begins.
        process: only this one's output; by default that of the first ``MAX_PROCESSES`` by name.
        others: folders elsewhere that count as processes, by name.
    """
    folder = f"{root}/{FOLDER}"
    found = dict(others) | {entry.path: f"{folder}/{entry.path}" for entry in artifacts.list(folder) if entry.is_dir}
    processes = [name for name in found if process in {"", name}][:MAX_PROCESSES]
    # The one that was read last goes on first: fewer headings.
    processes.sort(key=lambda name: name != cursor.last)
    places, last, parts, left = dict(cursor.places), cursor.last, list[str](), limit
    for name in processes:
        part = read_text(artifacts, found[name], places.get(name, Place()), left)
        places[name] = part.next
        if part.text and name != last:
            between = "\n" if parts and not parts[-1].endswith("\n") else ""
            parts.append(f"{between}── {name}\n" if len(processes) > 1 else "")
            last = name
        if part.text:
            parts.append(part.text)
        left -= part.size
        if left <= 0:
            break
    return ConsolePart("".join(parts), Cursor(places, last), left <= 0)


def encode_cursor(cursor: Cursor) -> str:
    """The cursor as text for URLs."""
    places = {process: [place.segment, place.offset] for process, place in cursor.places.items()}
    return base64.urlsafe_b64encode(json.dumps([cursor.last, places]).encode()).decode().rstrip("=")


def decode_cursor(text: str) -> Cursor:
    """The cursor in a text; an empty one is the beginning.

    Raises:
        InvalidInput: not a cursor of ours.
    """
    if not text:
        return Cursor()
    try:
        if len(text) > MAX_CURSOR:
            raise ValueError
        last, places = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        return Cursor({str(name): _place(*place) for name, place in places.items()}, str(last))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"not a cursor of this console: {text[:100]!r}") from error


def _place(segment: object, offset: object) -> Place:
    if not (isinstance(segment, int) and isinstance(offset, int)) or segment < 0 or offset < 0:
        raise ValueError
    return Place(segment, offset)
