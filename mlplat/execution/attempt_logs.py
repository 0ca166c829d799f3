"""Reading the logs of a run's attempts, those that run and those that are over, from a cursor on.

Attempts that are over come first, in the order in which they ended: what is read once stays read, and whatever ends
later comes later. Of those that run, as many at once as a cursor has places for.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlplat.artifacts.segments import Place
from mlplat.artifacts.store import ArtifactStore
from mlplat.artifacts.texts import read_text
from mlplat.errors import InvalidInput
from mlplat.execution.capture import log_folder
from mlplat.pipelines.model import Attempt
from mlplat.pipelines.store import EndedKey, PipelineStore

#: Running attempts that one cursor follows at once.
MAX_BEGUN = 32
#: Attempts that one page looks at.
PAGE_ATTEMPTS = 200
#: A cursor must fit into a URL.
MAX_CURSOR = 16 * 1024


@dataclass(frozen=True)
class LogCursor:
    """What has been read: whole attempts up to one, by their ends, and parts of others, by label."""

    after: EndedKey | None = None
    places: dict[str, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class LogPart:
    """Some of an attempt's log, up to ``next``."""

    attempt: Attempt
    text: str
    next: Place


@dataclass(frozen=True)
class LogPage:
    """What follows a cursor. ``more``: there is more already. ``is_running``: more may come."""

    parts: list[LogPart]
    cursor: LogCursor
    more: bool
    is_running: bool


@dataclass(frozen=True)
class LogFilter:
    """Whose logs: all, or those with the given values."""

    step: str | None = None
    item: int | None = None
    attempt: int | None = None


class LogReader:
    """Reads logs of one run."""

    def __init__(self, store: PipelineStore, artifacts: ArtifactStore, run_id: str, wanted: LogFilter) -> None:
        self._store = store
        self._artifacts = artifacts
        self._run_id = run_id
        self._wanted = wanted

    async def read(self, cursor: LogCursor, limit: int) -> LogPage:
        """What follows the cursor, at most ``limit`` bytes.

        Raises:
            NotFound: no such run.
        """
        wanted = self._wanted
        run, ended, begun = await self._store.find_attempts(
            self._run_id, PAGE_ATTEMPTS, step=wanted.step, item=wanted.item, number=wanted.attempt, after=cursor.after
        )
        page = await asyncio.to_thread(self._read, cursor, ended, begun, limit)
        return LogPage(page.parts, page.cursor, page.more, not run.state.is_final)

    def _read(self, cursor: LogCursor, ended: Sequence[Attempt], begun: Sequence[Attempt], limit: int) -> LogPage:
        parts, after, places = list[LogPart](), cursor.after, dict(cursor.places)
        more = len(ended) == PAGE_ATTEMPTS
        for attempt in [*ended, *([] if more else begun)]:
            if limit <= 0:
                more = True
                break
            is_over, label = attempt.state.is_final, _label(attempt)
            if not is_over and label not in places and len(places) >= MAX_BEGUN:
                continue
            folder = log_folder(self._run_id, attempt.step, attempt.item, attempt.attempt)
            part = read_text(self._artifacts, folder, places.get(label, Place()), limit, is_over=is_over)
            if part.text or (is_over and label not in places):  # of an attempt that printed nothing its end is told
                parts.append(LogPart(attempt, part.text, part.next))
            if is_over and part.size < limit:
                after = (attempt.seq, attempt.step, attempt.item, attempt.attempt)
                places.pop(label, None)
            elif part.size:
                places[label] = part.next
            limit -= part.size
        return LogPage(parts, LogCursor(after, places), more or limit <= 0, is_running=True)


def encode_cursor(cursor: LogCursor) -> str:
    """The cursor as text for URLs."""
    places = {label: [place.segment, place.offset] for label, place in cursor.places.items()}
    return base64.urlsafe_b64encode(json.dumps([cursor.after, places]).encode()).decode().rstrip("=")


def decode_cursor(text: str) -> LogCursor:
    """The cursor in a text; an empty one is the beginning.

    Raises:
        InvalidInput: not a cursor of ours.
    """
    if not text:
        return LogCursor()
    try:
        if len(text) > MAX_CURSOR:
            raise ValueError
        after, places = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        found = {str(label): _place(*place) for label, place in places.items()}
        if after is None:
            return LogCursor(None, found)
        seq, step, item, attempt = after
        return LogCursor((_number(seq, 2**63), str(step), _number(item, 2**31), _number(attempt, 2**15)), found)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"not a cursor of these logs: {text[:100]!r}") from error


def cursor_in(wanted: LogFilter, place: Place) -> LogCursor:
    """Where ``place`` is in the log of the one attempt that is wanted.

    Raises:
        InvalidInput: several attempts are wanted.
    """
    if wanted.step is None or wanted.attempt is None:
        raise InvalidInput("a place `segment:offset` is one in the log of one attempt: name its step and its number")
    return LogCursor(None, {f"{wanted.step}/{-1 if wanted.item is None else wanted.item}/{wanted.attempt}": place})


def _label(attempt: Attempt) -> str:
    return f"{attempt.step}/{attempt.item}/{attempt.attempt}"


def _place(segment: object, offset: object) -> Place:
    return Place(_number(segment, 10**9), _number(offset, 2**40))


def _number(value: object, limit: int) -> int:
    if not isinstance(value, int) or not -1 <= value < limit:
        raise ValueError
    return value
