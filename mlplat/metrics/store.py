"""The metric store: ClickHouse over HTTP or chDB in this process, one set of statements for both.

chDB allows one engine per process and one process per path, hangs after a fork, and has no async
client: exactly one actor opens it, every call runs in a thread, and each thread has its own client.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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
QUERY_TIMEOUT_S = 60


class MetricStore:
    """Blocking and thread-safe. ``close`` ends it for all threads."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._threads = threading.local()
        self._clients: list[Any] = []  # clickhouse-connect's clients are untyped
        self._lock = threading.Lock()

    @property
    def is_embedded(self) -> bool:
        """True when the engine lives in this process."""
        return self._url.startswith("chdb://")

    def create_tables(self) -> None:
        """Brings the tables to this version's schema; safe to repeat.

        Raises:
            Unavailable: the store cannot be reached or opened, or a newer version wrote it.
        """
        self._call("command", SCHEMA_TABLE)
        done = self.query(Statement("SELECT max(version) AS version FROM metric_schema"))["version"][0].as_py()
        if done > len(VERSIONS):
            raise Unavailable(f"the metric store has schema {done}, this version of mlplat knows {len(VERSIONS)}")
        for version in range(done + 1, len(VERSIONS) + 1):
            for statement in VERSIONS[version - 1]:
                self._call("command", statement)
            self._call("command", f"INSERT INTO metric_schema VALUES ({version})")  # noqa: S608 - a number of ours

    def insert(self, points: pa.Table) -> None:
        """Stores the points (``STORED_SCHEMA``, one chunk), at least once; exact repeats collapse when read.

        Raises:
            Unavailable: the store refused or is out of reach.
        """
        self._call("insert_arrow", "metric_points", points)
        self._call("insert_arrow", "metric_latest", summarise(points))

    def query(self, statement: Statement) -> pa.Table:
        """The statement's rows.

        Raises:
            Unavailable: the store refused or is out of reach.
        """
        table = self._call("query_arrow", statement.sql, parameters=statement.parameters)
        assert isinstance(table, pa.Table)
        return table

    def free_bytes(self) -> int | None:
        """Free space of the embedded engine's disk, None for a server."""
        return shutil.disk_usage(self._path().parent).free if self.is_embedded else None

    def close(self) -> None:
        """Closes every thread's client."""
        with self._lock:
            clients, self._clients = self._clients, []
        for client in clients:
            client.close()

    def _path(self) -> Path:
        return Path(urlsplit(self._url).path)

    def _call(self, method: str, *arguments: object, **options: object) -> object:
        try:
            return getattr(self._client(), method)(*arguments, **options)
        except (ClickHouseError, OSError) as error:
            self._threads.client = None
            raise Unavailable(f"the metric store refused: {_first_line(error)}") from error

    def _client(self) -> Any:
        client = getattr(self._threads, "client", None)
        if client is None:
            client = self._threads.client = self._open()
            with self._lock:
                self._clients.append(client)
        return client

    def _open(self) -> Any:
        if self.is_embedded:
            self._path().mkdir(parents=True, exist_ok=True)
            return clickhouse_connect.get_client(interface="chdb", path=str(self._path()), chdb_options=CHDB_OPTIONS)
        return clickhouse_connect.get_client(
            dsn=self._url.replace("clickhouses://", "https://").replace("clickhouse://", "http://"),
            connect_timeout=5,
            send_receive_timeout=QUERY_TIMEOUT_S,
        )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:500]
