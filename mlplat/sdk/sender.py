"""The thread that hands the backlog to the platform, and waits while there is none."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mlplat.errors import Overloaded, Unavailable
from mlplat.sdk.backlog import Backlog
from mlplat.sdk.delivery import MAX_BATCH_BYTES, Delivered, Delivery, Refusal, run_id_of

RETRY_FIRST_S, RETRY_MAX_S = 0.2, 5.0
#: A record at which the platform itself fails (HTTP 500) is set aside after so many attempts.
MAX_DEFECTS = 10
_log = logging.getLogger(__name__)


class Sender:
    """Empties ``backlog`` in order. What is refused and might be taken later goes to ``aside``.

    Args:
        on_progress: called whenever something is settled or the platform goes away.
        on_refusal: called for everything that the platform did not take.
    """

    def __init__(
        self,
        backlog: Backlog,
        aside: Backlog,
        delivery: Delivery,
        on_progress: Callable[[], None],
        on_refusal: Callable[[Refusal], None],
    ) -> None:
        self._backlog = backlog
        self._aside = aside
        self._delivery = delivery
        self._on_progress = on_progress
        self._on_refusal = on_refusal
        self._work = threading.Event()
        self._retry = threading.Event()
        self._closed = False
        self._attempts = self._defects = 0
        #: Set when the platform takes something for the first time.
        self.reached = threading.Event()
        #: Since when (monotonic clock, seconds) the platform takes nothing; None while it does.
        self.away_since: float | None = None

    def wake(self) -> None:
        """Says that the backlog has something."""
        self._work.set()

    def retry(self) -> None:
        """Tries again at once when the platform is away: somebody waits."""
        self._retry.set()

    def close(self) -> None:
        """Lets ``run`` return once the backlog is empty or the platform is away."""
        self._closed = True
        self._work.set()
        self._retry.set()

    def run(self) -> None:
        """Sends until closed."""
        while True:
            self._work.clear()
            if self._send_next():
                continue
            if self._closed:
                return
            if self.away_since is None:
                self._work.wait()
            else:
                self._pause()

    def note_away(self) -> None:
        """The platform did not answer."""
        if self.away_since is None:
            self.away_since = time.monotonic()

    def _send_next(self) -> bool:
        """Whether something was settled."""
        frames, marks = self._backlog.peek(MAX_BATCH_BYTES)
        if not frames:
            return False
        try:
            delivered = self._delivery.deliver(frames, self._attachments)
        except Exception as error:  # whatever it is, it must not end the sender
            is_away = isinstance(error, Unavailable | Overloaded)
            self._attempts += 1
            self._defects += not is_away
            if is_away or self._defects < MAX_DEFECTS:
                _log.debug("not sent: %s", error)
                self.note_away()
                self._on_progress()
                return False
            reason = f"the platform failed {self._defects} times: {error}"
            delivered = Delivered(1, 0, [Refusal(run_id_of(frames[0]), reason, may_pass=True)])
        for refusal in delivered.refusals:
            self._on_refusal(refusal)
        if any(refusal.may_pass for refusal in delivered.refusals):
            self._aside.take_over(frames[0], self._attachments)
        self._backlog.settle(marks[: delivered.frames])
        self._backlog.forget(frames[0])
        self._attempts = self._defects = 0
        self.away_since = None
        self.reached.set()
        self._on_progress()
        return True

    @property
    def _attachments(self) -> Path | None:
        attachments = self._backlog.attachments
        return None if attachments is None else attachments.folder

    def _pause(self) -> None:
        longest = min(RETRY_MAX_S, RETRY_FIRST_S * 2 ** min(self._attempts, 10))
        self._retry.wait(longest * random.uniform(0.5, 1))  # noqa: S311 - spreads retries
        self._retry.clear()
