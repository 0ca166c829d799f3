"""Shared, expensive things: one Postgres and one platform per session."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from cluster.postgres import EmbeddedPostgres
from mlplat.db.engine import open_engine
from mlplat.settings import embedded_postgres_url
from tests.ceph_packages import ensure_ceph
from tests.clickhouse import ClickHouse, RemoteStore
from tests.databases import Databases
from tests.faults.proxy import FaultProxy
from tests.faults.s3_faults import S3Faults
from tests.platform import Platform
from tests.platforms import Platforms
from tests.s3 import S3Server

#: Tests of these folders wait for whole platforms, the first of them for its start too.
PLATFORM_TESTS = {"e2e", "faults"}
PLATFORM_TIMEOUT_S = 900
#: Fixtures for which ``platform`` has to stop, in the order in which their tests run.
OTHER_PLATFORMS = ("remote_platform", "cramped", "doomed", "lab", "s3_platform")

if "mlplat" not in fsspec.available_protocols():  # an installation that is older than the entry point
    fsspec.register_implementation("mlplat", "mlplat.sdk.filesystem.ArtifactFileSystem")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Takes one platform after another, and gives their tests time on a machine with much else to do."""
    for item in items:
        # The first of those with an S3 server may have to install it.
        patient = item.path.parent.name in PLATFORM_TESTS or "s3_server" in getattr(item, "fixturenames", ())
        if patient and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(PLATFORM_TIMEOUT_S))
    items.sort(key=_platform_rank)


def _platform_rank(item: pytest.Item) -> int:
    names = getattr(item, "fixturenames", ())
    return max((rank for rank, name in enumerate(OTHER_PLATFORMS, 1) if name in names), default=0)


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder for a platform's state."""
    folder = Path(tempfile.mkdtemp(prefix="mlt-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def state_dir() -> Iterator[Path]:
    """A state folder with a short path (Unix sockets), reachable for the database's user."""
    with short_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def postgres(state_dir: Path) -> Iterator[EmbeddedPostgres]:
    """The session's Postgres server."""
    server = EmbeddedPostgres(state_dir)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def platforms() -> Iterator[Platforms]:
    """What starts and stops the platforms."""
    platforms = Platforms()
    yield platforms
    platforms.stop()


@pytest.fixture(scope="session")
def main_platform(state_dir: Path) -> Platform:
    """See ``platform``; it need not run."""
    # Ray puts a driver's folder first on its workers' path: files like these must not get in the way.
    trap = state_dir / "trap"
    trap.mkdir()
    for name in ("actors.py", "cluster.py", "mlplat.py"):
        (trap / name).write_text("raise ImportError('a file of the user shadows the platform')\n")
    return Platform(state_dir)


@pytest.fixture
def platform(main_platform: Platform, platforms: Platforms) -> Platform:
    """The session's platform: one Ray cluster, its actors and the Gateway."""
    platforms.run(main_platform, cwd=main_platform.state_dir / "trap")
    return main_platform


@pytest.fixture(scope="session")
def remote_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteStore]:
    """The metric store of ``remote_platform``."""
    server = ClickHouse(tmp_path_factory.mktemp("clickhouse"), login="mlplat:secret")
    server.start()
    proxy = FaultProxy(server.port)
    yield RemoteStore(server, proxy)
    proxy.close()
    server.kill()


@pytest.fixture(scope="session")
def other_platform(remote_store: RemoteStore, platforms: Platforms) -> Iterator[Platform]:
    """See ``remote_platform``; it need not run."""
    with short_folder() as folder:
        yield Platform(folder, extra={"MLPLAT_CLICKHOUSE_URL": remote_store.url})
        platforms.stop()


@pytest.fixture
def remote_platform(other_platform: Platform, platforms: Platforms) -> Platform:
    """A second platform, whose metric store is a ClickHouse server; started by the tests that need it."""
    platforms.run(other_platform)
    return other_platform


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """The session's S3 server; tests that need it are skipped where it cannot be had.

    Whoever breaks it starts it again: ``start`` starts what does not run.
    """
    if why := ensure_ceph():
        pytest.skip(why)
    with short_folder() as folder:
        server = S3Server(folder / "s3")
        try:
            server.start()
            yield server
        finally:
            server.kill()


@pytest.fixture
def s3_faults(s3_server: S3Server) -> Iterator[S3Faults]:
    """A proxy before that server, which fails what the test tells it to."""
    proxy = S3Faults(s3_server.port)
    yield proxy
    proxy.close()


_FORGOTTEN: list[object] = []


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """``s3://…``, an empty bucket of this test's own; by its environment this process finds that server and no other.

    A test that goes through ``s3_faults`` sets ``AWS_ENDPOINT_URL`` before it opens the URL.
    """
    s3_server.start()
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    filesystem = fsspec.get_filesystem_class("s3")
    filesystem.clear_instance_cache()
    yield f"s3://{s3_server.new_bucket()}"
    # Not collected: s3fs would close them in whatever event loop runs then.
    _FORGOTTEN.extend(filesystem._cache.values())
    filesystem.clear_instance_cache()


@pytest.fixture(scope="session")
def databases(postgres: EmbeddedPostgres, state_dir: Path) -> Iterator[Databases]:
    """Databases of the session's server."""
    databases = Databases(embedded_postgres_url(state_dir))
    yield databases
    databases.close()


@pytest.fixture
def database_url(databases: Databases) -> Iterator[str]:
    """An empty, migrated database of this test's own."""
    url = databases.take()
    yield url
    databases.give_back(url)


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """An async engine on the test's own database."""
    engine = open_engine(database_url, "tests", pool_size=8)
    yield engine
    await engine.dispose()
