"""The metric store: ClickHouse over HTTP or chDB in this process, one set of statements for both.

chDB allows one engine per process and one process per path, hangs after a fork, and has no async
client: exactly one actor opens it, every call runs in a thread, and each thread has its own client.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import clickhouse_connect
import pyarrow as pa
from clickhouse_connect.driver.exceptions import ClickHouseError

from mlplat.errors import Unavailable
from mlplat.metrics.queries import Statement
from mlplat.metrics.schema import SCHEMA_TABLE, VERSIONS
from mlplat.metrics.summary import summarise

#: chDB sizes itself for a server by default; these fit a laptop.
CHDB_OPTIONS = {
    "max_server_memory_usage": "1500000000",
    "max_memory_usage": "1000000000",
    "mark_cache_size": "67108864",
    "background_pool_size": "1",
    "background_schedule_pool_size": "1",
}
CONNECT_TIMEOUT_S = 5
#: The engine gives a statement up after this time, whoever still waits for it.
STATEMENT_TIMEOUT_S = 30
#: Longer than the engine's own limit, so that its answer arrives before the client gives up.
ANSWER_TIMEOUT_S = STATEMENT_TIMEOUT_S + 5
SETTINGS = {
    "max_execution_time": STATEMENT_TIMEOUT_S,
    # An insert leaves the log when it is answered, so the answer must mean that the rows are stored.
    "async_insert": 0,
}
UNKNOWN_DATABASE = 81
#: chDB shares its process with the shard. By default a query takes one thread per free GiB, which below that cap would
#: always be a single one. Two-level tables are for many threads that merge them.
CHDB_SETTINGS = {
    "max_threads_min_free_memory_per_thread": 0,
    "group_by_two_level_threshold": 0,
    "group_by_two_level_threshold_bytes": 0,
}


class MetricStore:
    """Blocking and thread-safe. ``close`` ends it for all threads.

    ``url`` is ``chdb:///path`` or ``clickhouse[s]://[user[:password]@]host[:port][/database][?option=value]``.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._threads = threading.local()
        self._clients: set[Any] = set()  # clickhouse-connect's clients are untyped
        self._lock = threading.Lock()

    @property
    def is_embedded(self) -> bool:
        """True when the engine lives in this process."""
        return self._url.startswith("chdb://")

    @property
    def where(self) -> str:
        """The folder, or host and port, without the login."""
        if self.is_embedded:
            return str(self._path())
        options = server_options(self._url)
        return f"{options['host']}:{options['port']}"

    def load_engine(self) -> None:
        """Loads the embedded engine's library; a server has none here.

        It has half a gigabyte, and holds up every thread of the process until it is read: a dozen seconds page by page
        after a boot, one when the system is told before. Call it before anything has to answer in time.
        """
        if not self.is_embedded:
            return
        spec = find_spec("chdb")
        for folder in (spec and spec.submodule_search_locations) or ():
            for library in Path(folder).glob("_chdb*.so"):
                with library.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        import_module("chdb")

    def create_tables(self) -> None:
        """Brings the tables to this version's schema, the server's database included; safe to repeat.

        Raises:
            Unavailable: the store cannot be reached or opened, or a newer version wrote it.
        """
        self._ensure_database()
        self._call("command", SCHEMA_TABLE)
        done = self.query(Statement("SELECT max(version) AS version FROM metric_schema"))["version"][0].as_py()
        if done > len(VERSIONS):
            raise Unavailable(f"the metric store has schema {done}, this version of mlplat knows {len(VERSIONS)}")
        for version in range(done + 1, len(VERSIONS) + 1):
            for statement in VERSIONS[version - 1]:
                self._call("command", statement)
            self._call("command", f"INSERT INTO metric_schema VALUES ({version})")  # noqa: S608 - a number of ours

    def check(self) -> None:
        """Returns when the store answers.

        Raises:
            Unavailable: it does not.
        """
        self._call("command", "SELECT 1")

    def insert(self, points: pa.Table) -> None:
        """Stores the points (``STORED_SCHEMA``, one chunk), at least once; exact repeats collapse when read.

        Raises:
            Unavailable: the store refused or is out of reach.
        """
        self.insert_points(points)
        self._insert("metric_latest", summarise(points))

    def insert_points(self, points: pa.Table) -> None:
        """As ``insert``, of points that are summed up already.

        Raises:
            Unavailable: the store refused or is out of reach.
        """
        self._insert("metric_points", points)

    def query(self, statement: Statement) -> pa.Table:
        """The statement's rows.

        Raises:
            Unavailable: the store refused or is out of reach.
        """
        # Not as a setting of the call: chDB would be told of it by statements of their own.
        limit = " SETTINGS max_threads = 1" if statement.on_one_thread and self.is_embedded else ""
        table = self._call("query_arrow", statement.sql + limit, parameters=statement.parameters)
        assert isinstance(table, pa.Table)
        return table

    def change(self, statements: Sequence[Statement]) -> None:
        """Applies statements that return no rows, one after another.

        Raises:
            Unavailable: the store refused or is out of reach; some may have been applied.
        """
        for statement in statements:
            self._call("command", statement.sql, parameters=statement.parameters)

    def free_bytes(self) -> int | None:
        """Free space of the embedded engine's disk, None for a server."""
        return shutil.disk_usage(self._path().parent).free if self.is_embedded else None

    def close(self) -> None:
        """Closes every thread's client."""
        with self._lock:
            clients, self._clients = self._clients, set()
        for client in clients:
            client.close()

    def _insert(self, table: str, rows: pa.Table) -> None:
        # Writers are waiting for the other cores meanwhile, and one thread is about as fast.
        settings = {"max_threads": 1, "max_insert_threads": 1} if self.is_embedded else None
        self._call("insert_arrow", table, rows, settings=settings)

    def _path(self) -> Path:
        return Path(self._url.removeprefix("chdb://"))

    def _call(self, method: str, *arguments: object, **options: object) -> object:
        try:
            return getattr(self._client(), method)(*arguments, **options)
        except (ClickHouseError, pa.ArrowException, OSError) as error:
            self._forget()
            raise Unavailable(self._complaint(error)) from error

    def _client(self) -> Any:
        client = getattr(self._threads, "client", None)
        if client is None:
            client = self._threads.client = self._open()
            with self._lock:
                self._clients.add(client)
        return client

    def _forget(self) -> None:
        """Closes this thread's client; the next call opens a new one."""
        client = getattr(self._threads, "client", None)
        if client is not None:
            self._threads.client = None
            with self._lock:
                self._clients.discard(client)
            client.close()

    def _open(self) -> Any:
        if self.is_embedded:
            self._path().mkdir(parents=True, exist_ok=True)
            return clickhouse_connect.get_client(
                interface="chdb", path=str(self._path()), chdb_options=CHDB_OPTIONS, settings=SETTINGS | CHDB_SETTINGS
            )
        return clickhouse_connect.get_client(**server_options(self._url), settings=dict(SETTINGS))

    def _ensure_database(self) -> None:
        """Creates the URL's database, but only when it is missing: not every login may ask for it."""
        try:
            self.check()
        except Unavailable as error:
            if getattr(error.__cause__, "code", None) != UNKNOWN_DATABASE:
                raise
            self._create_database()

    def _create_database(self) -> None:
        options = server_options(self._url)
        name = options.pop("database")
        try:
            client = clickhouse_connect.get_client(**options)
            client.command("CREATE DATABASE IF NOT EXISTS {name:Identifier}", parameters={"name": name})
            client.close()
        except (ClickHouseError, OSError) as error:
            raise Unavailable(self._complaint(error)) from error

    def _complaint(self, error: BaseException) -> str:
        if self.is_embedded or getattr(error, "code", None) is not None:
            return f"the metric store refused: {_first_line(error)}"
        return f"the metric store at {self.where} does not answer: {_first_line(_root_cause(error))}"


def server_options(url: str) -> dict[str, Any]:
    """What clickhouse-connect takes for a ``clickhouse[s]://`` URL.

    It would read a DSN itself, but then decide by the port alone whether to use TLS.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "clickhouses"
    return {
        **dict(parse_qsl(parts.query)),
        "interface": "https" if secure else "http",
        "host": parts.hostname,
        "port": parts.port or (8443 if secure else 8123),
        "username": unquote(parts.username or "") or None,
        "password": unquote(parts.password or ""),
        "database": unquote(parts.path.strip("/")) or None,
        "connect_timeout": CONNECT_TIMEOUT_S,
        "send_receive_timeout": ANSWER_TIMEOUT_S,
        # The server would tie the client's statements together, and lock out the next one after a timeout.
        "autogenerate_session_id": False,
    }


def _root_cause(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:500]
