"""Getting records out of the user's process without holding it up.

Three stages, each bounded: a buffer that the user's threads add to; a writer thread that moves it to
the backlog on disk a few times a second; a sender thread that hands the backlog to the platform. What
was logged is therefore safe from the end of the process a moment later, and the platform may be away
for as long as the disk has room.
"""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mlplat.errors import PlatformError
from mlplat.sdk.backlog import Backlog
from mlplat.sdk.buffer import Buffer
from mlplat.sdk.client import Client
from mlplat.sdk.delivery import REFUSALS, Delivery, Refusal
from mlplat.sdk.leftovers import resend_leftovers, sender_to
from mlplat.sdk.notes import Notes, RunNotes
from mlplat.sdk.pulse import Pulse
from mlplat.sdk.records import CreateRun, PutFile, SpooledRecord, origin_here, to_frame
from mlplat.sdk.sender import Sender
from mlplat.sdk.writer import FrameMaker, Points, Record

#: Points in memory; what does not fit is dropped and counted.
MAX_BUFFERED = 1_000_000
#: The writer does not linger when this many points wait.
HURRY_POINTS = 50_000
#: How long points gather, so that the threads here seldom take the interpreter from the user's.
LINGER_S = 0.25
#: While the platform is away, what was written survives the loss of the machine after so many seconds.
SYNC_EVERY_S = 1.0
#: One attempt to send: a platform that hangs is a platform that is away.
SEND_TIMEOUT_S = 10.0
START_TIMEOUT_S = 3.0
EXIT_TIMEOUT_S, EXIT_PATIENCE_S = 10.0, 1.0
CLOSE_TIMEOUT_S = 2.0
RESEND_PAUSE_S = 0.02
POLL_S = 0.1
_log = logging.getLogger(__name__)


class Started(NamedTuple):
    """A run's info, or None for one that starts later; and why, when it is news that the platform is away."""

    info: dict[str, str] | None
    away: PlatformError | None


class Outbox:
    """Records of this process for one platform. Thread-safe; survives a fork, after which the child starts empty."""

    def __init__(self, url: str, folder: Path, max_bytes: int, *, offline: bool) -> None:
        self.url = url
        self.folder = folder
        self.offline = offline
        self._max_bytes = max_bytes
        self.pulse = Pulse(url)
        self._open()

    def _open(self) -> None:
        self._notes = Notes()
        self._buffer: Buffer[Points | Record] = Buffer(MAX_BUFFERED, HURRY_POINTS)
        self._maker = FrameMaker(lambda run_id, reason: self._notes.refuse(Refusal(run_id, reason)))
        origin = origin_here(self.url)
        self._backlog = Backlog(self.folder, origin, self._max_bytes)
        self._aside = Backlog(self.folder, origin, self._max_bytes)
        working = threading.Lock()
        delivery = Delivery(Client(self.url, retry_for_s=0, timeout_s=SEND_TIMEOUT_S), working=working)
        self._sender = Sender(self._backlog, self._aside, delivery, self._moved_on, self._notes.refuse)
        self._starting = threading.Lock()
        #: Held while a thread here is inside of Arrow, whose locks a fork must not copy in a locked state.
        self.working = working
        self._threads: list[threading.Thread] = []
        self._moved = threading.Condition()
        self._written = 0
        self._closed = False

    def forked(self) -> None:
        """In the child: what was added so far is the parent's to send."""
        self._backlog.abandon()
        self._aside.abandon()
        self.pulse = self.pulse.copy()
        self._open()

    @property
    def is_away(self) -> bool:
        """Whether the platform did not answer the last time."""
        return self._sender.away_since is not None

    def log(self, points: Points) -> None:
        """Takes points; never waits."""
        if not self._buffer.add(points, len(points.values)):
            self._notes.drop(points.run_id, len(points.values))
        if not self._threads:
            self._start()

    def put(self, record: SpooledRecord) -> None:
        """Takes a record; never waits."""
        frame = to_frame(record)
        if not self._buffer.add(Record(record.run_id, frame), 1):
            self._notes.refuse(Refusal(record.run_id, "too much waits in memory: a record was dropped"))
            self._backlog.forget(frame)
        if not self._threads:
            self._start()

    @property
    def in_memory(self) -> int:
        """Records that found no room on disk yet, and would be lost with this process."""
        return self._backlog.in_memory

    @property
    def takes_files(self) -> bool:
        """Whether a file may go to the platform at once: that answers, and no earlier file waits for its turn."""
        if self.offline or (self.is_away and self._backlog.settled < self._backlog.appended):
            return False
        attachments = self._backlog.attachments
        return attachments is None or attachments.count == 0

    def put_file(self, run_id: str, path: str, source: BinaryIO, size: int) -> bool:
        """Copies a file of ``size`` bytes to disk, to be uploaded as ``path``; False when it found no room."""
        attached = self._backlog.attach(f"{run_id}/{path}", source, size)
        if attached is None:
            self._notes.refuse(Refusal(run_id, f"{path}: found no room in {self.folder}"))
        elif attached.is_new:
            self.put(PutFile(run_id, path, attached.name))
        return attached is not None

    def note_away(self) -> None:
        """The platform did not answer."""
        self._sender.note_away()

    def create_now(self, record: CreateRun) -> Started:
        """Starts a run at once if the platform answers within a few seconds, else later.

        Raises:
            PlatformError: the platform refused.
        """
        away = None
        if not self.offline and not self.is_away:
            try:
                client = Client(self.url, retry_for_s=START_TIMEOUT_S, timeout_s=START_TIMEOUT_S)
                return Started(Delivery(client).create(record), None)
            except REFUSALS:
                raise
            except PlatformError as error:
                self._sender.note_away()
                away = error
        self.put(record)
        return Started(None, away)

    def flush(self, timeout_s: float, patience_s: float) -> bool:
        """Waits until the platform has everything added before this call; offline, until the disk has it.

        Gives up after ``timeout_s``, or when the platform is away for ``patience_s`` of them; False then.
        """
        began = time.monotonic()
        added = self._buffer.added
        self._buffer.hurry()
        self._sender.retry()
        with self._moved:
            while self._written < added and self._threads and time.monotonic() - began < timeout_s:
                self._moved.wait(POLL_S)
            target = self._backlog.appended
            while not self.offline and self._backlog.settled < target:
                now, away = time.monotonic(), self._sender.away_since
                if now - began > timeout_s or (away is not None and now - max(away, began) > patience_s):
                    break
                self._moved.wait(POLL_S)
        if self.offline or self._backlog.settled < target:
            self._backlog.sync()
        if self.offline:
            return self._written >= added and self._backlog.in_memory == 0
        return self._written >= added and self._backlog.settled >= target

    def notes(self, run_id: str) -> RunNotes:
        """What of a run was refused or dropped."""
        return self._notes.of(run_id)

    def close(self) -> None:
        """Writes what is in memory to disk and lets go of it; call ``flush`` before."""
        self._closed = True
        self.pulse.stop()
        self._buffer.hurry()
        self._sender.close()
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)
        self._backlog.close()
        self._aside.close()

    def _start(self) -> None:
        with self._starting:
            if self._threads:
                return
            self._threads = [_thread(self._write_forever)]
            if not self.offline:
                self._threads.append(_thread(self._sender.run))
                _thread(self._resend_leftovers)
        self.pulse.start()
        if multiprocessing.parent_process() is not None:  # such a process ends without atexit
            Finalize(None, self._exit_child, exitpriority=10)

    def _exit_child(self) -> None:
        self.flush(EXIT_TIMEOUT_S, EXIT_PATIENCE_S)
        self.close()

    def _moved_on(self) -> None:
        with self._moved:
            self._moved.notify_all()

    def _write_forever(self) -> None:
        synced_at = 0.0
        while True:
            closing = self._closed
            entries = self._buffer.take()
            if entries:
                self._write(entries)
            if (self.offline or self.is_away) and time.monotonic() - synced_at > SYNC_EVERY_S:
                self._backlog.sync()
                synced_at = time.monotonic()
            if entries and not closing:
                self._buffer.linger(LINGER_S)
            elif closing:
                return
            else:
                self._buffer.wait()

    def _write(self, entries: list[Points | Record]) -> None:
        try:
            frames = self._maker.frames(entries)
            while True:
                with self.working:
                    written = next(frames, None)
                if written is None:
                    break
                if self._backlog.append(written.frame):
                    self._sender.wake()
                elif written.points:
                    self._notes.drop(written.run_id, written.points)
                else:
                    self._notes.refuse(Refusal(written.run_id, f"{self.folder} is full: a record was dropped"))
                    self._backlog.forget(written.frame)
                time.sleep(0)  # lets the user's thread in
        except Exception:  # a defect here must neither end the writer nor leave flush() waiting
            _log.exception("mlplat could not keep %d records", len(entries))
            for entry in entries:
                self._notes.drop(entry.run_id, len(entry.values) if isinstance(entry, Points) else 0)
        with self._moved:
            self._written += len(entries)
            self._moved.notify_all()

    def _resend_leftovers(self) -> None:
        """What earlier processes left, once the platform has answered."""
        self._sender.reached.wait()
        try:
            for left in resend_leftovers(
                self.folder, sender_to, only_url=self.url, max_bytes=self._max_bytes, pause_s=RESEND_PAUSE_S
            ):
                _log.info("mlplat sent what %s had left: %s", left.path.name, left.summary)
        except (PlatformError, OSError) as error:  # the next process, or `mlplat sync`, tries again
            _log.info("mlplat could not send everything that earlier processes left: %s", error)


def _thread(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, name="mlplat-outbox", daemon=True)
    thread.start()
    return thread
