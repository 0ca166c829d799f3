"""What this process owes the platform, whichever way it ends."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Literal, NoReturn, Protocol

from mlplat.errors import InvalidInput
from mlplat.sdk.client import client_for, default_url
from mlplat.sdk.outbox import EXIT_PATIENCE_S, EXIT_TIMEOUT_S, Outbox
from mlplat.settings import Settings

TERMINATE_TIMEOUT_S = 3.0
FORK_TIMEOUT_S = 1.0

Mode = Literal["online", "offline"]


class OpenRun(Protocol):
    """A run that ends with this process."""

    @property
    def run_id(self) -> str:
        """Its id."""
        ...

    def end(self, status: str) -> None:
        """Puts its end into the outbox, without waiting."""
        ...


class Process:
    """The outboxes and the unfinished runs of this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outboxes: dict[tuple[str, Path, bool], Outbox] = {}
        self._runs: dict[str, OpenRun] = {}
        self._mask: set[int | signal.Signals] = set()
        self._terminated: SimpleQueue[None] = SimpleQueue()
        self._before: object = None
        self._recording: set[str] = set()
        self._watches_exit = False
        self._exit_code: object = None
        self._held: list[threading.Lock] = []
        atexit.register(self.close)
        os.register_at_fork(before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._forked)

    def outbox(self, url: str, folder: Path, max_bytes: int, *, offline: bool) -> Outbox:
        """The one way out of this process to a platform."""
        with self._lock:
            found = self._outboxes.get((url, folder, offline))
            if found is None:
                found = self._outboxes[url, folder, offline] = Outbox(url, folder, max_bytes, offline=offline)
        return found

    def enter(self, run: OpenRun) -> None:
        """From now on the run ends when this process does: FINISHED, FAILED after an exception or ``sys.exit`` with
        another code than 0, KILLED by SIGTERM or Ctrl-C."""
        with self._lock:
            self._runs[run.run_id] = run
        self._listen()
        self._watch_exit()

    def leave(self, run: OpenRun) -> None:
        """The run has ended."""
        with self._lock:
            self._runs.pop(run.run_id, None)

    def begin_recording(self, run_id: str) -> bool:
        """Whether nobody here records the run yet; somebody does then."""
        with self._lock:
            is_first = run_id not in self._recording
            self._recording.add(run_id)
        return is_first

    def end_recording(self, run_id: str) -> None:
        """Another recorder may go on."""
        with self._lock:
            self._recording.discard(run_id)

    def close(self) -> None:
        """Ends the runs and closes the outboxes, as the end of the process does."""
        self._end_all(self._status_at_exit(), EXIT_TIMEOUT_S, EXIT_PATIENCE_S)
        with self._lock:
            outboxes, self._outboxes = list(self._outboxes.values()), {}
        for outbox in outboxes:
            outbox.close()

    def _end_all(self, status: str, timeout_s: float, patience_s: float) -> None:
        with self._lock:
            runs, outboxes = list(self._runs.values()), list(self._outboxes.values())
        for run in runs:
            run.end(status)
        for outbox in outboxes:
            outbox.flush(timeout_s, patience_s)

    def _before_fork(self) -> None:
        # Python forgets a signal that reaches the child before its handlers are in order; a blocked one waits.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self._held = [box.working for box in self._outboxes.values() if box.working.acquire(timeout=FORK_TIMEOUT_S)]

    def _after_fork(self) -> None:
        for working in self._held:
            working.release()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _forked(self) -> None:
        """The child writes to the parent's runs, but does not end them."""
        self._lock = threading.Lock()
        self._runs, self._recording = {}, set()
        client_for.cache_clear()
        for outbox in self._outboxes.values():
            outbox.forked()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]  # what getsignal gave
            self._before = None
            self._terminated = SimpleQueue()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    # -- the exit's code -----------------------------------------------------------------------

    def _watch_exit(self) -> None:
        """Python forgets ``sys.exit``'s code before it tells anybody that the process ends."""
        self._exit_code = None
        if self._watches_exit:
            return
        self._watches_exit = True
        original: Callable[..., NoReturn] = sys.exit

        @wraps(original)
        def exit_(code: object = None, /) -> NoReturn:
            if threading.current_thread() is threading.main_thread():
                self._exit_code = code
            original(code)

        sys.exit = exit_

    def _status_at_exit(self) -> str:
        """In an interactive program, earlier exceptions and exits mean nothing."""
        if hasattr(sys, "ps1"):
            return "FINISHED"
        return status_after(getattr(sys, "last_value", None) or SystemExit(self._exit_code))

    # -- SIGTERM -------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Takes SIGTERM, unless it is ignored; only the main thread can."""
        if self._before is not None or threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGTERM)
        if before is None or before is signal.SIG_IGN:
            return
        self._before = before
        threading.Thread(target=self._wait_for_sigterm, name="mlplat-sigterm", daemon=True).start()
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, _frame: FrameType | None) -> None:
        # Whatever lock the interrupted code holds, this needs none of them: a thread does the work.
        signal.signal(number, self._before)  # type: ignore[arg-type]  # what getsignal gave
        self._terminated.put(None)

    def _wait_for_sigterm(self) -> None:
        self._terminated.get()
        self._end_all("KILLED", TERMINATE_TIMEOUT_S, TERMINATE_TIMEOUT_S)
        os.kill(os.getpid(), signal.SIGTERM)


def status_after(error: BaseException | None) -> str:
    """How a run ends whose code was left by ``error``: an exit with code 0 is none."""
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


@cache
def this_process() -> Process:
    """Made at the first use."""
    return Process()


def outbox_for(url: str | None, mode: Mode | None) -> Outbox:
    """The way to a platform, by default that of the settings.

    Raises:
        InvalidInput: no such mode.
    """
    settings = Settings()
    chosen = mode or settings.mode
    if chosen not in ("online", "offline"):
        raise InvalidInput(f"mode is online or offline, not {chosen!r}")
    return this_process().outbox(
        (url or default_url()).rstrip("/"), settings.spool_folder, settings.spool_bytes, offline=chosen == "offline"
    )
