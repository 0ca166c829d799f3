"""The ends of the logs of one run's attempts, read once for everybody who watches the run."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from mlplat.artifacts.segments import Place
from mlplat.artifacts.store import ArtifactStore
from mlplat.artifacts.texts import TextPart, read_text, tail_start
from mlplat.errors import PlatformError
from mlplat.execution.capture import log_folder
from mlplat.pipelines.model import Attempt

#: Attempts of one run whose logs are read at once; those that begin later wait until others are over.
MAX_TAILS = 32
#: Bytes of one attempt's log that are kept for those who come later or are slow.
KEPT_BYTES = 32 * 1024
#: Bytes that one round reads of all logs of a run; what is printed faster is left out.
ROUND_BYTES = 128 * 1024
MIN_PART_BYTES = 4 * 1024
#: Failing reads of a log that is complete, after which nobody waits for it any more.
MAX_FAILURES = 20
_log = logging.getLogger(__name__)

Key = tuple[str, int, int]


@dataclass
class Tail:
    """The last text of one attempt. Parts are numbered from 0; ``parts`` has those from ``first`` on."""

    key: Key
    folder: str
    #: The attempt is over: everything that it printed is in the store.
    is_over: bool = False
    #: Everything has been read.
    is_done: bool = False
    first: int = 0
    parts: deque[tuple[TextPart, bool]] = field(default_factory=deque)
    _place: Place = field(default_factory=Place)
    _kept: int = 0
    _failures: int = 0

    @property
    def end(self) -> int:
        """The number that the next part gets."""
        return self.first + len(self.parts)

    async def read(self, artifacts: ArtifactStore, limit: int) -> bool:
        """Reads what is new, or the last ``limit`` bytes of it; True when there is something to tell."""
        was_over = self.is_over
        try:
            part, skipped = await asyncio.to_thread(self._read, artifacts, limit, was_over)
        except (OSError, PlatformError) as error:
            _log.debug("the log in %s waits: %s", self.folder, error)
            self._failures += 1
            self.is_done = was_over and self._failures >= MAX_FAILURES
            return self.is_done
        self._failures = 0
        self._place = part.next
        if part.text:
            self.parts.append((part, skipped))
            self._kept += part.size
            while self._kept > KEPT_BYTES and len(self.parts) > 1:
                self._kept -= self.parts.popleft()[0].size
                self.first += 1
        self.is_done = was_over and part.size < limit
        return bool(part.text) or self.is_done

    def _read(self, artifacts: ArtifactStore, limit: int, is_over: bool) -> tuple[TextPart, bool]:
        entries = artifacts.list(self.folder)
        start = tail_start(entries, self._place, limit - 1)  # a part that is shorter than the limit is complete
        part = read_text(artifacts, self.folder, start, limit, entries, is_over=is_over)
        return part, start != self._place


class Tails:
    """The tails of a run's attempts. Attempts that are over give their places up when others need these."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._one_round = asyncio.Lock()
        self._waiting: dict[Key, Attempt] = {}
        self.open: dict[Key, Tail] = {}

    @property
    def is_quiet(self) -> bool:
        """Whether everything there is has been read."""
        return all(tail.is_done for tail in self.open.values())

    def note(self, attempts: Iterable[Attempt]) -> None:
        """These attempts began, went on or ended."""
        for attempt in attempts:
            key = (attempt.step, attempt.item, attempt.attempt)
            if attempt.child_id is not None:
                continue
            if key in self.open:
                self.open[key].is_over |= attempt.state.is_final
            elif self._has_room():
                self._begin(key, attempt)
            elif attempt.state.is_final:
                self._waiting.pop(key, None)  # too many at once: its log can be read elsewhere
            else:
                self._waiting[key] = attempt

    async def read(self, artifacts: ArtifactStore) -> bool:
        """One round over all logs; True when there is something to tell. Rounds never overlap: two would read the same
        bytes twice."""
        async with self._one_round:
            return await self._read(artifacts)

    async def _read(self, artifacts: ArtifactStore) -> bool:
        unread = [tail for tail in self.open.values() if not tail.is_done]
        limit = max(MIN_PART_BYTES, ROUND_BYTES // max(1, len(unread)))
        news = await asyncio.gather(*(tail.read(artifacts, min(limit, KEPT_BYTES)) for tail in unread))
        while self._waiting and self._has_room():
            key = next(iter(self._waiting))
            self._begin(key, self._waiting.pop(key))
        return any(news)

    def _begin(self, key: Key, attempt: Attempt) -> None:
        self.open[key] = Tail(key, log_folder(self._run_id, *key), attempt.state.is_final)

    def _has_room(self) -> bool:
        """Makes room where an attempt is over, if it must."""
        if len(self.open) < MAX_TAILS:
            return True
        done = next((key for key, tail in self.open.items() if tail.is_done), None)
        if done is None:
            return False
        del self.open[done]
        return True
