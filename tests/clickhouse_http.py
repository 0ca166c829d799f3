"""ClickHouse's HTTP interface over one chDB engine, in a process of its own: ``python -m tests.clickhouse_http``.

Package registries have no current ClickHouse server, so this process stands in for one: the engine is
the real one and so is clickhouse-connect's HTTP client, only the sockets in between are ours. Nothing
in the product depends on it. It shows statements, inserts, bound parameters, settings, errors, logins
and TLS over HTTP. It does not show replication, Distributed tables, asynchronous inserts or the
server's own access control, and answers are never compressed, which the protocol allows.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import queue
import re
import ssl
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import chdb.state
import pyarrow as pa

ENGINE_OPTIONS = "max_server_memory_usage=1500000000&mark_cache_size=67108864&background_pool_size=1"
#: Statements that run at a time, and connections that are open at a time; more of either wait.
HANDLES = 4
MAX_CONNECTIONS = 64
MAX_BODY_BYTES = 512 * 1024 * 1024
#: Parameters of the protocol; every other one is a setting.
RESERVED = frozenset(
    {
        "query", "database", "default_format", "session_id", "session_check", "session_timeout", "query_id", "user",
        "password", "quota_key", "role", "wait_end_of_query", "client_protocol_version", "buffer_size", "compress",
        "decompress", "enable_http_compression", "send_progress_in_http_headers", "http_headers_progress_interval_ms",
    }
)  # fmt: skip
#: The server's HTTP status by exception code; 500 for the rest.
STATUS = {36: 400, 62: 400, 47: 404, 60: 404, 81: 404, 159: 408, 516: 403}
AUTHENTICATION_FAILED = 516
_INSERT = re.compile(rb"\s*(INSERT\s+INTO\s+[^\n]*?)\s+FORMAT\s+(\w+)\s*?(?:\n|$)", re.IGNORECASE)
_CODE = re.compile(r"Code: (\d+)")
#: Content encodings that clients use for inserts.
ENCODINGS = frozenset({"gzip", "lz4", "zstd"})


@dataclass(frozen=True)
class Answer:
    """Rows of a statement in the format it asked for."""

    body: bytes
    format: str
    rows_read: int = 0


class Engine:
    """The one engine of this process: a few handles, each of which runs one statement at a time."""

    def __init__(self, folder: Path) -> None:
        self._uploads = folder / "uploads"
        self._uploads.mkdir(parents=True, exist_ok=True)
        for leftover in self._uploads.iterdir():
            leftover.unlink()
        self._handles: queue.Queue[Any] = queue.Queue()  # chDB's handles are untyped
        for _ in range(HANDLES):
            self._handles.put(chdb.state.connect(f"{folder / 'data'}?{ENGINE_OPTIONS}"))

    def execute(self, statement: bytes, fields: Mapping[str, str]) -> Answer:
        """Runs one statement; the payload of an INSERT follows its FORMAT clause.

        Raises:
            RuntimeError: the engine refused; the text has its code.
        """
        with self._handle(fields) as handle:
            insert = _INSERT.match(statement)
            if insert:
                return self._insert(handle, insert.group(1), insert.group(2), statement[insert.end() :])
            params = {name[len("param_") :]: value for name, value in fields.items() if name.startswith("param_")}
            asked = fields.get("default_format", "TabSeparated")
            result = handle.query(statement.decode(), asked, params=params)
            return Answer(result.bytes() or b"", asked, result.rows_read())

    def _insert(self, handle: Any, head: bytes, form: bytes, payload: bytes) -> Answer:
        with tempfile.NamedTemporaryFile(dir=self._uploads) as upload:
            upload.write(payload)
            upload.flush()
            result = handle.query(f"{head.decode()} FROM INFILE '{upload.name}' FORMAT {form.decode()}", "TabSeparated")
        return Answer(b"", "TabSeparated", result.rows_read())

    @contextmanager
    def _handle(self, fields: Mapping[str, str]) -> Iterator[Any]:
        """A handle with the request's database and settings, which later requests do not see."""
        settings = {name: value for name, value in fields.items() if not name.startswith("param_")}
        for name in RESERVED:
            settings.pop(name, None)
        handle = self._handles.get()
        try:
            handle.query(f"USE {_identifier(fields.get('database') or 'default')}", "TabSeparated")
            for name, value in settings.items():
                handle.query(f"SET {_identifier(name)} = {_literal(value)}", "TabSeparated")
            yield handle
        finally:
            for name in settings:
                try:
                    handle.query(f"SET {_identifier(name)} = DEFAULT", "TabSeparated")
                except RuntimeError:
                    continue  # the name was refused, so nothing was set
            self._handles.put(handle)


def _identifier(name: str) -> str:
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


def _literal(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    # Without these two, Nagle and delayed acknowledgements cost 40 ms a request.
    disable_nagle_algorithm = True
    wbufsize = 64 * 1024
    server: Server

    def do_GET(self) -> None:
        """A statement in the URL, or a sign of life."""
        if urlsplit(self.path).path == "/ping":
            self._send(200, b"Ok.\n", {})
        else:
            self._run()

    def do_POST(self) -> None:
        """A statement in the URL, the body, or both."""
        self._run()

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads a log of requests."""

    def _run(self) -> None:
        body = self._body()
        if not self._may_enter():
            self._refuse("Code: 516. DB::Exception: Authentication failed: password is incorrect. "
                         "(AUTHENTICATION_FAILED)")  # fmt: skip
            return
        fields = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        kind = self.headers.get("Content-Type", "")
        if kind.startswith("multipart/form-data"):
            fields |= _form(kind, body)
            body = b""
        query = fields.get("query", "").encode()
        try:
            answer = self.server.engine.execute(b"\n".join(part for part in (query, body) if part), fields)
        except RuntimeError as error:
            self._refuse(str(error))
            return
        summary = {"read_rows": str(answer.rows_read), "written_rows": str(answer.rows_read)}
        headers = {"X-ClickHouse-Summary": json.dumps(summary), "X-ClickHouse-Format": answer.format}
        self._send(200, answer.body, headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            raw = b"".join(self._chunks())
        else:
            length = int(self.headers.get("Content-Length") or 0)
            if length > MAX_BODY_BYTES:
                raise ConnectionError("the body is too large")
            raw = self.rfile.read(length)
        encoding = self.headers.get("Content-Encoding", "")
        if encoding not in ENCODINGS:
            return raw
        with pa.CompressedInputStream(pa.BufferReader(raw), encoding) as decoded:
            return bytes(decoded.read())

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _may_enter(self) -> bool:
        if self.server.login is None:
            return True
        expected = "Basic " + base64.b64encode(self.server.login.encode()).decode()
        return self.headers.get("Authorization") == expected

    def _refuse(self, message: str) -> None:
        found = _CODE.search(message)
        code = int(found.group(1)) if found else 1002
        body = message[found.start() if found else 0 :].encode()
        self._send(STATUS.get(code, 500), body, {"X-ClickHouse-Exception-Code": str(code)})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        common = {"X-ClickHouse-Query-Id": str(uuid.uuid4()), "X-ClickHouse-Timezone": "UTC"}
        for name, value in {**common, **headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


def _form(content_type: str, body: bytes) -> dict[str, str]:
    message = BytesParser().parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    fields = {}
    for part in message.walk():
        name = part.get_param("name", header="content-disposition")
        if isinstance(name, str):
            payload = part.get_payload(decode=True)
            assert isinstance(payload, bytes)
            fields[name] = payload.decode()
    return fields


class Server(ThreadingHTTPServer):
    """A thread per connection, and so many connections at most."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, port: int, engine: Engine, login: str | None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.engine = engine
        self.login = login
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Waits for a free place, then serves the connection in a thread."""
        self._free.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves the connection and frees its place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", type=Path, required=True, help="folder of the data")
    parser.add_argument("--login", help="user:password that clients must send")
    parser.add_argument("--certificate", type=Path, help="PEM with key and certificate: serves TLS")
    arguments = parser.parse_args()
    os.environ["TZ"] = "UTC"
    server = Server(arguments.port, Engine(arguments.path), arguments.login)
    if arguments.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(arguments.certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.serve_forever()


if __name__ == "__main__":
    main()
