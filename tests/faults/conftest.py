"""One platform to break for all tests of pipelines under faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.postgres import EmbeddedPostgres
from tests.conftest import short_folder
from tests.faults.lab import Lab
from tests.faults.proxy import FaultProxy
from tests.platform import Platform
from tests.platforms import Platforms


@pytest.fixture(scope="session")
def session_lab(platforms: Platforms) -> Iterator[Lab]:
    """The session's platform with two executors, on a Postgres behind a proxy."""
    with short_folder() as folder, short_folder() as database:
        server = EmbeddedPostgres(database)
        server.start()
        proxy = FaultProxy(server.socket_dir / ".s.PGSQL.5432")
        url = f"postgresql+psycopg://postgres@127.0.0.1:{proxy.port}/mlplat"
        platform = Platform(folder, extra={"MLPLAT_POSTGRES_URL": url, "MLPLAT_EXECUTORS": "2"})
        try:
            platforms.run(platform)
            lab = Lab(platform, server, proxy, folder / "executions.jsonl")
            lab.watch()
            yield lab
        finally:
            proxy.heal()
            platforms.stop()
            proxy.close()
            server.stop()


@pytest.fixture
def lab(session_lab: Lab, platforms: Platforms) -> Lab:
    """That platform, running."""
    platforms.run(session_lab.platform)
    return session_lab
