"""One end of an HTTP connection, as events: a socket and what h11 makes of its bytes."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress

import h11

CHUNK_BYTES = 1024 * 1024
#: Who is silent for so long is given up.
SILENCE_S = 120.0
#: How long to wait for leave to go on with a body; S3's own clients go on without it then.
CONTINUE_S = 1.0
CONTINUE = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
#: Closing with this sends RST instead of FIN.
_LINGER_0 = struct.pack("ii", 1, 0)


class Peer:
    """The client of a proxy (whose role there is ``h11.SERVER``), or its server (``h11.CLIENT``)."""

    def __init__(self, connection: socket.socket, role: type[h11.SERVER] | type[h11.CLIENT]) -> None:
        connection.settimeout(SILENCE_S)
        self._socket = connection
        self.http = h11.Connection(role)

    def receive(self) -> h11.Event:
        """The next event.

        Raises:
            OSError: the connection broke, or was silent for too long.
            h11.RemoteProtocolError: it ended, or something else than HTTP came.
        """
        while True:
            event = self.http.next_event()
            if isinstance(event, h11.Event):
                return event
            self.http.receive_data(self._socket.recv(CHUNK_BYTES))

    def send(self, event: h11.Event) -> None:
        """Sends an event.

        Raises:
            OSError: the connection broke, or took nothing for too long.
        """
        self._socket.sendall(self.http.send(event) or b"")

    def answer(self) -> h11.Response:
        """The head of a server's answer; what says less than that is passed over."""
        while True:
            event = self.receive()
            if isinstance(event, h11.Response):
                return event

    def early_answer(self) -> h11.Response | None:
        """A server's answer to a request that waits with its body; None when it may go on."""
        self._socket.settimeout(CONTINUE_S)
        try:
            event = self.receive()
            return event if isinstance(event, h11.Response) else None
        except TimeoutError:
            return None
        finally:
            self._socket.settimeout(SILENCE_S)

    def drain(self) -> None:
        """Reads the rest of a message and forgets it."""
        while not isinstance(self.receive(), h11.EndOfMessage):
            pass


def reset(connection: socket.socket) -> None:
    """Breaks a connection, so that the other side sees an error rather than an end."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
        connection.shutdown(socket.SHUT_RD)
    connection.close()
