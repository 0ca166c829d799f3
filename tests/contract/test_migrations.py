"""Migrations: they build the schema of the code, once, whoever runs them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from mlplat.db.engine import open_engine, open_sync_engine
from mlplat.db.migrate import head_revision, migrate
from mlplat.db.tables import metadata
from mlplat.errors import BringUpError
from mlplat.metrics.log import MetricLog
from mlplat.metrics.model import Point, decode, encode, points_table
from mlplat.metrics.record import unpack
from mlplat.registry.history_store import RegistryHistory
from mlplat.registry.model import CreateVersion
from mlplat.registry.semver import EVERY
from mlplat.registry.store import RegistryStore
from tests.databases import Databases
from tests.registry import registry_service


def _run(url: str, *statements: str) -> list[tuple[object, ...]]:
    """Executes statements outside of a transaction; rows of the last one."""
    engine = open_sync_engine(url, "tests")
    try:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for statement in statements:
                result = connection.execute(text(statement))
            return [tuple(row) for row in result] if result.returns_rows else []
    finally:
        engine.dispose()


@pytest.fixture
def empty_database_url(databases: Databases) -> Iterator[str]:
    """A database in which nothing was migrated yet."""
    with databases.empty() as url:
        yield url


def test_the_migrated_schema_is_the_schema_of_the_tables(empty_database_url: str) -> None:
    assert migrate(empty_database_url) == head_revision()
    engine = open_sync_engine(empty_database_url, "tests")
    try:
        with engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    finally:
        engine.dispose()


def test_columns_indexes_and_constraints_are_the_same_by_migration_as_by_metadata(
    empty_database_url: str, database_url: str
) -> None:
    engine = open_sync_engine(empty_database_url, "tests")
    metadata.create_all(engine)
    engine.dispose()
    for query in (
        "SELECT table_name, column_name, data_type, is_nullable, column_default, is_identity "
        "FROM information_schema.columns "
        "WHERE table_schema = 'public' AND table_name <> 'alembic_version' ORDER BY 1, 2",
        "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version' "
        "ORDER BY 1",
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text <> 'alembic_version' ORDER BY 1, 2",
    ):
        rows = _run(database_url, query)
        assert rows
        assert rows == _run(empty_database_url, query)


def test_migrating_again_changes_nothing(empty_database_url: str) -> None:
    assert migrate(empty_database_url) == head_revision()
    _run(empty_database_url, "INSERT INTO lease VALUES ('kept', 'h', 7, now())")
    tables = (
        "SELECT relname, oid, relfilenode FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
    )
    before = sorted(_run(empty_database_url, tables), key=str)
    assert migrate(empty_database_url) == head_revision()
    assert sorted(_run(empty_database_url, tables), key=str) == before
    assert _run(empty_database_url, "SELECT epoch FROM lease") == [(7,)]


async def test_points_in_the_log_of_the_first_schema_outlive_the_migration(empty_database_url: str) -> None:
    migrate(empty_database_url, "0001")
    old = points_table("r", [Point("m", 0.5, 7, 1), Point("m", 0.6, 8, 2)])
    body = encode(old.add_column(0, "experiment_id", [[1, 1]]), "zstd")
    _run(empty_database_url, f"INSERT INTO metric_log VALUES ('shard', 5, 2, '\\x{body.hex()}')")
    migrate(empty_database_url)
    engine = open_engine(empty_database_url, "tests", pool_size=1)
    try:
        log = MetricLog(engine, "shard")
        await log.prepare()
        assert await log.positions() == (5, 0)
        [group] = await log.read_after(0, 10)
    finally:
        await engine.dispose()
    assert [decode(batch).to_pylist() for batch in unpack(group.body)] == [old.to_pylist()]


async def test_what_the_registry_had_before_its_history_is_remembered(empty_database_url: str) -> None:
    migrate(empty_database_url, "0009")
    times = "created_at, updated_at"
    event = "INSERT INTO registry_event (request_id, kind, name, command, answer, epoch) VALUES"
    _run(
        empty_database_url,
        *(f"INSERT INTO registered_model (name, {times}) VALUES ('{n}', now(), now())" for n in ("kept", "new")),
        "INSERT INTO model_version (name, version, source, artifact_uri, created_at, updated_at) "
        "SELECT n, v, 's', 's', now(), now() FROM unnest(ARRAY['kept', 'new']) AS n, generate_series(1, 2) AS v",
        "INSERT INTO model_alias VALUES ('kept', 'a', 2), ('new', 'a', 1)",
        f"{event} ('1', 'CreateModel', 'kept', '{{}}', '{{}}', 1)",
        f"{event} ('2', 'CreateVersion', 'kept', '{{}}', '{{\"version\": 1}}', 1)",
        f"{event} ('3', 'CreateModel', 'old', '{{}}', '{{}}', 1)",
        f"{event} ('4', 'CreateVersion', 'old', '{{}}', '{{\"version\": 1}}', 1)",
        f"{event} ('5', 'RenameModel', 'old', '{{\"name\": \"old\", \"new_name\": \"new\"}}', '{{}}', 1)",
        f"{event} ('6', 'SetAlias', 'kept', '{{\"alias\": \"a\"}}', '{{}}', 1)",
        f"{event} ('7', 'CreateVersion', 'kept', '{{}}', '{{\"version\": 2}}', 1)",
        f"{event} ('8', 'DeleteModel', 'gone', '{{}}', '{{}}', 1)",
    )
    migrate(empty_database_url)
    engine = open_engine(empty_database_url, "tests", pool_size=1)
    try:
        history = RegistryHistory(engine)
        for name, alias in (("kept", 2), ("new", 1)):
            found = await history.at(name, None)
            assert (found.aliases, found.stages) == ({"a": alias}, {1: "None", 2: "None"})
        told = [(item.change.key, item.request_id) for item in await history.changes("kept", None, None, 10)]
        assert sorted(told) == [("1", "2"), ("2", "7"), ("a", "6"), ("name", "1")]
        told = [(item.change.key, item.request_id) for item in await history.changes("new", None, None, 10)]
        assert sorted(told) == [("1", "5"), ("2", "5"), ("a", "5"), ("name", "5")]
    finally:
        await engine.dispose()


async def test_versions_of_older_schemas_get_semantic_versions_in_their_order(empty_database_url: str) -> None:
    migrate(empty_database_url, "0010")
    _run(
        empty_database_url,
        "INSERT INTO registered_model (name, last_version, created_at, updated_at) "
        "SELECT n, 12, now(), now() FROM unnest(ARRAY['m', 'none']) AS n",
        "INSERT INTO model_version (name, version, source, artifact_uri, created_at, updated_at) "
        "SELECT 'm', v, 's', 's', now(), now() FROM unnest(ARRAY[10, 2, 11]) AS v",
    )
    migrate(empty_database_url)
    engine = open_engine(empty_database_url, "tests", pool_size=2)
    service = registry_service(engine)
    try:
        await service.start()
        for name, semantic in (("m", "1.0.3"), ("none", "1.0.0")):
            [answer] = await service.execute(name, [CreateVersion(name, "s", "s")])
            assert answer == {"version": 13, "semantic_version": semantic}
        found = await RegistryStore(engine).list_versions("m", EVERY, 10)
        assert [(version.version, str(version.semantic), version.bump) for version in found] == [
            (13, "1.0.3", "patch"), (11, "1.0.2", "patch"), (10, "1.0.1", "patch"), (2, "1.0.0", ""),
        ]  # fmt: skip
    finally:
        await service.stop()
        await engine.dispose()


def test_concurrent_migrations_of_one_empty_database_all_succeed(empty_database_url: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(migrate, [empty_database_url] * 3))
    assert answers == [head_revision()] * 3
    assert _run(empty_database_url, "SELECT version_num FROM alembic_version") == [(head_revision(),)]


def test_a_migration_leaves_no_lock_behind(empty_database_url: str) -> None:
    migrate(empty_database_url)
    assert _run(empty_database_url, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]


def test_a_database_of_a_newer_version_is_refused_and_left_alone(database_url: str) -> None:
    _run(database_url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(BringUpError) as refused:
        migrate(database_url)
    assert "'9999'" in refused.value.message
    assert repr(head_revision()) in refused.value.message
    assert _run(database_url, "SELECT version_num FROM alembic_version") == [("9999",)]
    engine = open_sync_engine(database_url, "tests")
    try:
        assert set(metadata.tables) <= set(inspect(engine).get_table_names())
    finally:
        engine.dispose()
    with pytest.raises(BringUpError):  # the lock was given back: this does not hang
        migrate(database_url)
