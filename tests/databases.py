"""Databases of tests: copies of a migrated template, one of them made ahead while a test runs."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import open_engine, open_sync_engine
from mlplat.db.migrate import migrate

_TEMPLATE = "mlplat_template"
#: Tests end processes, never the machine.
_NOT_DURABLE = ("fsync = off", "synchronous_commit = off", "full_page_writes = off")


class Databases:
    """Copies of the template on one server.

    Args:
        admin_url: the server's database ``mlplat``.
    """

    def __init__(self, admin_url: str) -> None:
        self._admin_url = admin_url
        self._engine = open_sync_engine(admin_url, "tests").execution_options(isolation_level="AUTOCOMMIT")
        self._execute(*(f"ALTER SYSTEM SET {setting}" for setting in _NOT_DURABLE), "SELECT pg_reload_conf()")
        self._execute(f"CREATE DATABASE {_TEMPLATE}")
        migrate(self._url(_TEMPLATE))
        self._thread = ThreadPoolExecutor(1, "databases")
        self._next: Future[str] = self._thread.submit(self._create)

    def take(self) -> str:
        """The URL of an empty, migrated database."""
        made, self._next = self._next, self._thread.submit(self._create)
        return made.result(120)

    def give_back(self, url: str) -> None:
        """Drops it soon."""
        self._thread.submit(self._drop, url)

    def close(self) -> None:
        """Ends what is under way."""
        self._thread.shutdown()
        self._engine.dispose()

    @asynccontextmanager
    async def open(self, pool_size: int) -> AsyncIterator[AsyncEngine]:
        """An engine on an empty, migrated database."""
        url = self.take()
        engine = open_engine(url, "tests", pool_size=pool_size)
        try:
            yield engine
        finally:
            await engine.dispose()
            self.give_back(url)

    @contextmanager
    def empty(self) -> Iterator[str]:
        """The URL of a database without tables."""
        name = f"empty_{uuid.uuid4().hex[:12]}"
        self._execute(f"CREATE DATABASE {name}")
        try:
            yield self._url(name)
        finally:
            self.give_back(self._url(name))

    def _create(self) -> str:
        name = f"test_{uuid.uuid4().hex[:12]}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}")
        return self._url(name)

    def _drop(self, url: str) -> None:
        name = url.partition("?")[0].rpartition("/")[2]
        self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _url(self, name: str) -> str:
        return self._admin_url.replace("/mlplat?", f"/{name}?")

    def _execute(self, *statements: str) -> None:
        with self._engine.connect() as connection:
            # A test may have told the server to take no writes meanwhile.
            for statement in ("SET default_transaction_read_only = off", *statements):
                connection.execute(text(statement))
