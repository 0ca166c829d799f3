"""A TCP proxy that can be slow, cut what is open, lose the answers of a server, or leave connections half open."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster.ports import free_port

CHUNK_BYTES = 64 * 1024
#: Closing with this sends RST instead of FIN.
_LINGER_0 = struct.pack("ii", 1, 0)


class FaultProxy:
    """Forwards ``port`` to another port of this machine, or to a Unix socket, until ``close``."""

    def __init__(self, target: int | Path) -> None:
        self.port = free_port()
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._delay_s = 0.0
        self._lose_answers = False
        self._swallow = False
        self._healed = threading.Event()
        #: How often each fault struck.
        self.delayed = self.cut = self.answers_lost = self.swallowed = 0
        threading.Thread(target=self._accept, daemon=True, name="fault-proxy").start()

    def slow_down(self, delay_s: float) -> None:
        """From now on every chunk, in either direction, takes so much longer."""
        self._healed.clear()
        self._delay_s = delay_s

    def lose_answers(self) -> None:
        """From now on requests arrive, and their connections break before the answer does."""
        self._lose_answers = True

    def swallow(self) -> None:
        """From now on nothing arrives and nobody hangs up: a connection that has lost something stays silent for ever,
        also after ``heal``."""
        self._swallow = True

    def heal(self) -> None:
        """Forwards faithfully again."""
        self._delay_s = 0.0
        self._lose_answers = self._swallow = False
        self._healed.set()

    def cut_all(self) -> int:
        """Resets every open connection; returns how many."""
        with self._lock:
            cut, self._open = self._open, set()
            self.cut += len(cut)
        for connection in cut:
            _reset(connection)
        return len(cut)

    def close(self) -> None:
        """Stops listening and resets what is open."""
        self._listener.close()
        self.heal()
        self.cut_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _address = self._listener.accept()
            except OSError:
                return
            try:
                server = self._connect()
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            with self._lock:
                self._open |= {client, server}
            for source, target, inspect in ((client, server, None), (server, client, self._answer)):
                threading.Thread(target=self._pump, args=(source, target, inspect), daemon=True).start()

    def _connect(self) -> socket.socket:
        if isinstance(self._target, int):
            return socket.create_connection(("127.0.0.1", self._target), timeout=5)
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(str(self._target))
        except OSError:
            server.close()
            raise
        return server

    def _answer(self, server: socket.socket, client: socket.socket) -> bool:
        if not self._lose_answers:
            return True
        self.answers_lost += 1
        _reset(server)
        _reset(client)
        return False

    def _pump(
        self,
        source: socket.socket,
        target: socket.socket,
        may_pass: Callable[[socket.socket, socket.socket], bool] | None,
    ) -> None:
        silent = False
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if self._swallow or silent:
                    silent = True
                    self.swallowed += 1
                    continue
                if self._delay_s:
                    self.delayed += 1
                    self._healed.wait(self._delay_s)
                if may_pass is not None and not may_pass(source, target):
                    break
                target.sendall(data)
        for connection in (source, target):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        with self._lock:
            self._open -= {source, target}


def _reset(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
