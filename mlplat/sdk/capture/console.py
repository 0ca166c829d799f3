"""What a process prints, as live logs of its runs.

``sys.stdout`` and ``sys.stderr`` are seen by wrapping their ``write``: that catches Python's output, the
output of ``logging`` and of notebooks, and changes nothing for anybody else. What children and C code
print needs the file descriptors (``console_fd``).

Every run that is open in the process gets all that is printed from its start to its finish: a nested
run has its own part, the run around it the whole. (Output has no owner when several threads have a run
each, so each of these runs has all of it.)

New lines go out every two seconds, as segments (``mlplat.artifacts.segments``) in a folder per process; while the
platform is away they go to disk, as all files do. A process that is killed loses what it printed since. Forked
children are not recorded, except by ``console_fd``.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache

from mlplat.artifacts.console import FOLDER
from mlplat.artifacts.segments import MAX_LOG_BYTES, Shipper
from mlplat.sdk.capture.lines import Lines
from mlplat.sdk.capture.node import host_name
from mlplat.sdk.capture.tee import DescriptorTee, StreamTee
from mlplat.sdk.files import RunFiles

INTERVAL_S = 2.0
#: A line that is still being drawn, such as a progress bar, is shown that often.
UNFINISHED_EVERY_S = 10.0
#: Bytes of one run that may wait: what is printed faster than they can be sent is left out.
MAX_WAITING_BYTES = 4 * 1024 * 1024
_STREAMS = ("stdout", "stderr")


class Waiting:
    """One run's output that has not been sent: bounded, thread-safe."""

    def __init__(self, limit: int = MAX_WAITING_BYTES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._data = bytearray()
        self._left_out = 0

    def add(self, text: str) -> None:
        """Takes text, or counts it when there is no room."""
        body = text.encode(errors="replace")
        with self._lock:
            if len(self._data) + len(body) > self._limit:
                self._left_out += len(body)
                return
            if self._left_out:
                self._data += _left_out_notice(self._left_out)
                self._left_out = 0
            self._data += body

    def peek(self, limit: int) -> bytes:
        """The next bytes to send."""
        with self._lock:
            if not self._data and self._left_out:
                self._data += _left_out_notice(self._left_out)
                self._left_out = 0
            return bytes(self._data[:limit])

    def drop(self, count: int) -> None:
        """They are sent."""
        with self._lock:
            del self._data[:count]


class Console:
    """The process' output, shared by its open runs. The streams are wrapped while there is one."""

    def __init__(self) -> None:
        # A signal handler may print while its thread is in here.
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._runs: list[Waiting] = []
        self._lines = {name: Lines() for name in _STREAMS}
        self._tees: list[StreamTee] = []
        self._descriptors: list[DescriptorTee] = []
        self._shown_at = 0.0
        self._last = ("", "\n")

    def open(self, waiting: Waiting, *, descriptors: bool = False) -> None:
        """Gives a run all that is printed from now on."""
        self.collect(everything=True)
        with self._lock:
            if descriptors and not self._descriptors:
                self._unwrap()  # those that reach the descriptors would be seen twice
                self._descriptors = [DescriptorTee(number, self._sink(name)) for number, name in enumerate(_STREAMS, 1)]
            for name in _STREAMS:
                self._wrap(name)
            self._runs.append(waiting)

    def close(self, waiting: Waiting) -> None:
        """Ends that."""
        for tee in self._descriptors:  # not under the lock, which their threads need
            tee.drain()
        self.collect(everything=True)
        with self._lock:
            self._runs.remove(waiting)
            if self._runs:
                return
            self._unwrap()
            descriptors, self._descriptors = self._descriptors, []
        for tee in descriptors:
            tee.close()

    def collect(self, *, everything: bool = False) -> None:
        """Completes lines for which it is time, or all."""
        with self._lock:
            now = time.monotonic()
            everything = everything or now - self._shown_at >= UNFINISHED_EVERY_S
            self._shown_at = now if everything else self._shown_at
            for name, lines in self._lines.items():
                lines.rest(everything=everything)
                self._emit(name, lines.take())

    def _wrap(self, name: str) -> None:
        stream = getattr(sys, name)
        if stream is None or any(tee.is_on(stream) for tee in self._tees) or self._reaches_a_pipe(stream):
            return
        try:
            self._tees.append(StreamTee(stream, self._sink(name)))
        except (AttributeError, TypeError):
            return  # a stream of its own kind, without attributes: it stays as it is

    def _unwrap(self) -> None:
        for tee in self._tees:
            tee.close()
        self._tees = []

    def _reaches_a_pipe(self, stream: object) -> bool:
        try:
            return bool(self._descriptors) and stream.fileno() in {1, 2}  # type: ignore[attr-defined]
        except (AttributeError, OSError, ValueError):
            return False

    def _sink(self, name: str) -> Callable[[str], None]:
        return lambda text: self.write(name, text)

    def write(self, name: str, text: str) -> None:
        """Takes what was written to a stream."""
        # A forked child has a copy of the lock, perhaps held; the threads that send are the parent's.
        if os.getpid() != self._pid or threading.current_thread().name == "mlplat-logs":
            return
        with self._lock:
            lines = self._lines[name]
            lines.feed(text)
            self._emit(name, lines.take())

    def _emit(self, name: str, text: str) -> None:
        if not text:
            return
        before, end = self._last
        self._last = (name, text[-1])
        if before != name and end != "\n":
            text = f"\n{text}"
        for waiting in self._runs:
            waiting.add(text)


def console() -> Console:
    """This process' console; a forked child has one of its own."""
    return _console_of(os.getpid())


@lru_cache(maxsize=1)
def _console_of(_pid: int) -> Console:
    return Console()


class _Collected:
    """A run's waiting output as a source of segments: asking for it completes the lines that are due."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self.drop = waiting.drop

    def peek(self, limit: int) -> bytes:
        console().collect()
        return self._waiting.peek(limit)


class RunConsole:
    """One run's console: ``start`` … ``add`` … ``close``."""

    def __init__(self, files: RunFiles, *, descriptors: bool = False, interval_s: float = INTERVAL_S) -> None:
        self._files = files
        self._descriptors = descriptors
        self._folder = f"{FOLDER}/{recording_name()}"
        self._waiting = Waiting()
        self._shipper = Shipper(
            _Collected(self._waiting),
            self._write,
            interval_s,
            full_notice=f"\n[mlplat: the console has its {MAX_LOG_BYTES >> 20} MiB; the rest is left out]\n".encode(),
        )

    def start(self) -> None:
        """Records what is printed from now on."""
        console().open(self._waiting, descriptors=self._descriptors)
        self._shipper.start()

    def add(self, text: str) -> None:
        """Adds text that is not printed."""
        console().collect(everything=True)
        self._waiting.add(text)

    def close(self, timeout_s: float) -> bool:
        """Ends the recording and sends the rest; False when that takes longer than ``timeout_s``."""
        console().close(self._waiting)
        return self._shipper.close(timeout_s)

    def _write(self, name: str, body: bytes) -> None:
        if not self._files.put(f"{self._folder}/{name}", body):
            raise OSError("no room on disk")  # it waits in memory, as far as that goes


def recording_name() -> str:
    """``<host>-<pid>-<start>``, of this instant. A run that goes on in a process of the same name gets another one."""
    return f"{host_name()}-{os.getpid()}-{time.time_ns() // 1_000_000:x}"


def _left_out_notice(count: int) -> bytes:
    return f"\n[mlplat: {count} bytes left out: printed faster than they could be sent]\n".encode()
