"""An HTTP proxy before an S3 server that fails the requests it is told to, each in one of the ways in which S3 fails.

Requests and answers pass as they are, ``Host`` included: clients sign the proxy's address, and the server checks the
signature against the ``Host`` that it is sent. No body is kept: what passes may be of any size.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal, NoReturn
from urllib.parse import unquote

import h11

from cluster.ports import free_port
from tests.faults.http_peer import CONTINUE, Peer, reset

CONNECT_TIMEOUT_S = 5
#: Slow bodies go in so many pieces per second.
PIECES_PER_S = 10
COMPLETE_UPLOAD = r"^POST .*[?&]uploadId="
#: S3's code and message by status.
ERRORS = {
    500: ("InternalError", "We encountered an internal error. Please try again."),
    503: ("SlowDown", "Please reduce your request rate."),
}
_BODY = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{}</Code><Message>{}</Message></Error>'


@dataclass
class Fault:
    """Trouble for the requests in which ``which`` is found: ``"PUT /bucket/a key?partNumber=2&uploadId=…"``.

    ``left`` requests may still be struck (None: all). With ``done`` the server does what it was asked before.
    """

    which: re.Pattern[str]
    left: int | None
    done: bool = False
    #: The status and the error of an answer that is not the server's.
    answer: tuple[int, tuple[str, str]] | None = None
    silent: bool = False
    breaks: Literal["request", "answer"] | None = None
    delay_s: float = 0.0
    bytes_per_s: int | None = None
    #: How many requests were struck; counted just before it shows.
    fired: int = 0
    over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fire(self) -> None:
        """Counts a request."""
        with self._lock:
            self.fired += 1

    def snap(self) -> NoReturn:
        """Breaks the connection."""
        self.fire()
        raise ConnectionResetError("a fault")


class S3Faults:
    """Forwards HTTP from ``port`` to another port of this machine until ``close``.

    A fault strikes the next ``times`` requests that match (None: all of them). A request suffers from the eldest fault
    that matches and has not struck so often yet, and from no other.
    """

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True, name="s3-faults").start()

    @property
    def url(self) -> str:
        """What S3 clients take as ``endpoint_url``."""
        return f"http://127.0.0.1:{self.port}"

    def answer(self, which: str, status: int, *, times: int | None = 1, done: bool = False) -> Fault:
        """Answers 500 or 503 in S3's words."""
        return self._add(Fault(re.compile(which), times, done, answer=(status, ERRORS[status])))

    def fail_completion(self, which: str = COMPLETE_UPLOAD, *, times: int | None = 1, done: bool = False) -> Fault:
        """Answers 200 with an error in the body, as S3 may when it has to put the parts of an upload together."""
        return self._add(Fault(re.compile(which), times, done, answer=(200, ERRORS[500])))

    def break_request(self, which: str, *, times: int | None = 1) -> Fault:
        """Resets the connections when half of the request's body has passed."""
        return self._add(Fault(re.compile(which), times, breaks="request"))

    def break_answer(self, which: str, *, times: int | None = 1) -> Fault:
        """Resets the connections when half of the answer's body has passed, or before an answer that has none.

        The server has done what it was asked by then.
        """
        return self._add(Fault(re.compile(which), times, breaks="answer"))

    def swallow(self, which: str, *, times: int | None = 1, done: bool = False) -> Fault:
        """Keeps the client waiting for an answer until ``heal``, which resets its connection."""
        return self._add(Fault(re.compile(which), times, done, silent=True))

    def delay(self, which: str, delay_s: float, *, times: int | None = None) -> Fault:
        """Holds requests back for so long, or until ``heal``."""
        return self._add(Fault(re.compile(which), times, delay_s=delay_s))

    def slow_down(self, which: str, bytes_per_s: int = 10 * 1024, *, times: int | None = None) -> Fault:
        """Lets the bodies of requests and of their answers trickle, until ``heal``."""
        return self._add(Fault(re.compile(which), times, bytes_per_s=bytes_per_s))

    def heal(self) -> None:
        """Ends all faults, those under way too."""
        with self._lock:
            for fault in self._faults:
                fault.over.set()
            self._faults.clear()

    def close(self) -> None:
        """Stops listening and resets what is open."""
        _wake(self._listener)
        self._listener.close()
        self.heal()
        with self._lock:
            for connection in self._open:
                _wake(connection)

    def _add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def _strike(self, request: h11.Request) -> Fault | None:
        """The fault that this request suffers from."""
        text = f"{request.method.decode()} {unquote(request.target.decode('latin-1'))}"
        with self._lock:
            for fault in self._faults:
                if fault.left != 0 and fault.which.search(text):
                    fault.left = None if fault.left is None else fault.left - 1
                    return fault
        return None

    def _accept(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, h11.ProtocolError), self._held(connection):
            client = Peer(connection, h11.SERVER)
            while isinstance(request := client.receive(), h11.Request):
                self._exchange(client, request, self._strike(request))
                if client.http.our_state is not h11.DONE or client.http.their_state is not h11.DONE:
                    return
                client.http.start_next_cycle()

    @contextmanager
    def _held(self, connection: socket.socket) -> Iterator[None]:
        """Closes a client's connection in the end: in good order, or as it came to it."""
        with self._lock:
            self._open.add(connection)
        try:
            yield
        except BaseException:
            reset(connection)
            raise
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _exchange(self, client: Peer, request: h11.Request, fault: Fault | None) -> None:
        """One request and its answer."""
        if fault is not None and not fault.done and (fault.answer or fault.silent):
            self._instead(client, request, fault)
            return
        if fault is not None and (fault.delay_s or fault.bytes_per_s):
            fault.fire()
            fault.over.wait(fault.delay_s)
        with socket.create_connection(("127.0.0.1", self._target), CONNECT_TIMEOUT_S) as connection:
            server = Peer(connection, h11.CLIENT)
            try:
                self._forward(client, server, request, fault)
            except BaseException:
                reset(connection)
                raise

    def _forward(self, client: Peer, server: Peer, request: h11.Request, fault: Fault | None) -> None:
        server.send(request)
        if client.http.they_are_waiting_for_100_continue:
            if (refusal := server.early_answer()) is not None:
                # The body stays with the client, and the connection ends with that.
                client.send(_closing(refusal))
                _pass(server.receive(), server, client, None)
                return
            client.send(CONTINUE)
        _pass(client.receive(), client, server, fault, broken=_half(request, fault, "request"))
        answer = server.answer()
        if fault is not None and fault.done:
            server.drain()
            self._instead(client, request, fault)
            return
        first = server.receive()
        broken = _half(answer, fault, "answer")
        if fault is not None and broken is not None and isinstance(first, h11.EndOfMessage):
            fault.snap()
        client.send(answer)
        _pass(first, server, client, fault, broken=broken)

    def _instead(self, client: Peer, request: h11.Request, fault: Fault) -> None:
        """What the client gets in place of the server's answer."""
        if fault.silent or fault.answer is None:
            fault.fire()
            fault.over.wait()
            raise ConnectionResetError("a fault is over")
        if client.http.their_state is h11.SEND_BODY:
            if client.http.they_are_waiting_for_100_continue:
                client.send(CONTINUE)
            client.drain()
        status, error = fault.answer
        body = _BODY.format(*error).encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        fault.fire()
        client.send(h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode()))
        if request.method != b"HEAD":
            client.send(h11.Data(data=body))
        client.send(h11.EndOfMessage())


def _half(message: h11.Request | h11.Response, fault: Fault | None, side: Literal["request", "answer"]) -> int | None:
    """After how many bytes of a message's body the connection breaks; None when it does not."""
    if fault is None or fault.breaks != side:
        return None
    return int(dict(message.headers).get(b"content-length", b"0")) // 2


def _pass(first: h11.Event, source: Peer, target: Peer, fault: Fault | None, broken: int | None = None) -> None:
    """Forwards the rest of a message, of which ``first`` is there; ``fault`` breaks it off after ``broken`` bytes."""
    event = first
    while isinstance(event, h11.Data):
        data = bytes(event.data)
        for piece in _pieces(data[:broken], fault):
            target.send(h11.Data(data=piece))
        if broken is not None:
            broken -= len(data)
            if broken < 0:
                break
        event = source.receive()
    if fault is not None and broken is not None:
        fault.snap()
    target.send(event)


def _pieces(data: bytes, fault: Fault | None) -> Iterator[bytes]:
    if fault is None or fault.bytes_per_s is None:
        yield data
        return
    size = max(1, fault.bytes_per_s // PIECES_PER_S)
    for start in range(0, len(data), size):
        fault.over.wait(1 / PIECES_PER_S)
        yield data[start : start + size]


def _closing(answer: h11.Response) -> h11.Response:
    headers = [*answer.headers, (b"connection", b"close")]
    return h11.Response(status_code=answer.status_code, headers=headers, reason=answer.reason)


def _wake(connection: socket.socket) -> None:
    """Ends a connection under the thread that waits for it, which closes it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
