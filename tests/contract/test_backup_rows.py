"""Postgres in a backup: every table goes out of one database and into another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import text

from cluster.postgres import EmbeddedPostgres
from mlplat.backup.catalog import open_place
from mlplat.backup.connection import connected
from mlplat.backup.model import Backup
from mlplat.backup.rows import (
    EPOCHS,
    dump_rows,
    has_rows,
    load_rows,
    lock_removals,
    marked,
    pass_transactions,
)
from mlplat.backup.tree import Tree
from mlplat.db.engine import open_sync_engine
from mlplat.db.migrate import head_revision, migrate
from mlplat.errors import InvalidInput, Overloaded, Unavailable
from mlplat.settings import embedded_postgres_url
from tests.conftest import short_folder
from tests.contract.backups import backup_of
from tests.contract.every_table import TABLES, contents, fill
from tests.databases import Databases


@pytest.fixture
def place(tmp_path: Path) -> Tree:
    return open_place(f"file://{tmp_path}/backups")


@pytest.fixture
def empty_url(databases: Databases) -> Iterator[str]:
    with databases.empty() as url:
        yield url


def dump(url: str, place: Tree) -> Backup:
    with connected(url, "tests") as connection:
        made = backup_of(dump_rows(connection, place, "b/"))
    return msgspec.json.decode(msgspec.json.encode(made), type=Backup)


def load(url: str, place: Tree, backup: Backup, mark: str = "this restore") -> None:
    migrate(url, backup.schema)
    with connected(url, "tests") as connection:
        load_rows(connection, place, backup, mark)


def execute(url: str, statement: str) -> list[tuple[Any, ...]]:
    engine = open_sync_engine(url, "tests")
    try:
        with engine.begin() as connection:
            result = connection.execute(text(statement))
            return [tuple(row) for row in result] if result.returns_rows else []
    finally:
        engine.dispose()


def test_every_table_comes_back_as_it_was(database_url: str, empty_url: str, place: Tree) -> None:
    fill(database_url)
    before = contents(database_url)
    assert all(before.values())
    backup = dump(database_url, place)
    assert {table.name: table.rows for table in backup.tables} == {name: len(rows) for name, rows in before.items()}
    load(empty_url, place, backup)
    after = contents(empty_url)
    changed = {"lease", "pipeline_run"}  # see below
    assert {name: rows for name, rows in after.items() if name not in changed} == {
        name: rows for name, rows in before.items() if name not in changed
    }


def test_what_is_generated_is_generated_again(database_url: str, empty_url: str, place: Tree) -> None:
    fill(database_url)
    execute(database_url, "UPDATE run_param SET value = '12.5'")
    load(empty_url, place, dump(database_url, place))
    assert execute(empty_url, "SELECT DISTINCT number FROM run_param") == [(12.5,)]


def test_numbers_are_not_given_out_twice(database_url: str, empty_url: str, place: Tree) -> None:
    fill(database_url)
    # A number that no row has, because its transaction was rolled back or its row is gone.
    execute(database_url, "SELECT nextval(pg_get_serial_sequence('dataset', 'dataset_id')) FROM generate_series(1, 50)")
    backup = dump(database_url, place)
    load(empty_url, place, backup)
    sequences = "SELECT sequencename, last_value FROM pg_sequences ORDER BY 1"
    found = execute(empty_url, sequences)
    assert found == execute(database_url, sequences)
    assert len(found) == len(backup.sequences) >= 10
    assert execute(empty_url, "SELECT nextval(pg_get_serial_sequence('dataset', 'dataset_id'))") == [(55,)]


def test_a_dump_shows_one_moment(database_url: str, empty_url: str, place: Tree) -> None:
    fill(database_url)
    before = contents(database_url)

    def meanwhile(_what: str, _done: int, _total: int | None) -> None:
        execute(
            database_url, "DELETE FROM experiment_tag; DELETE FROM run_tag; UPDATE experiment SET name = name || 'x'"
        )

    with connected(database_url, "tests") as connection:
        backup = backup_of(dump_rows(connection, place, "b/", meanwhile))
    assert contents(database_url) != before
    load(empty_url, place, backup)
    after = contents(empty_url)
    assert {name: after[name] for name in ("experiment", "experiment_tag", "run_tag")} == {
        name: before[name] for name in ("experiment", "experiment_tag", "run_tag")
    }


def test_nobody_waits_for_a_lease_of_the_old_installation_nor_is_fenced_by_it(
    database_url: str, empty_url: str, place: Tree
) -> None:
    execute(database_url, "INSERT INTO lease VALUES ('shard', 'dead', 7, clock_timestamp() + interval '1 year')")
    fill_runs = (
        "INSERT INTO pipeline (digest, name, spec) VALUES ('d', 'p', '{}');"
        "INSERT INTO pipeline_run (run_id, digest, name, params, state, epoch, finished_at) VALUES "
        "('open', 'd', 'p', '{}', 'RUNNING', 3, NULL), ('over', 'd', 'p', '{}', 'SUCCEEDED', 3, now())"
    )
    execute(database_url, fill_runs)
    load(empty_url, place, dump(database_url, place))
    found = execute(empty_url, "SELECT epoch, until < clock_timestamp() FROM lease")
    assert found == [(7 + EPOCHS, True)]
    epochs = execute(empty_url, "SELECT run_id, epoch FROM pipeline_run ORDER BY 1")
    assert epochs == [("open", 3 + EPOCHS), ("over", 3)]


def test_only_an_empty_database_is_filled_and_only_as_a_whole(database_url: str, empty_url: str, place: Tree) -> None:
    fill(database_url)
    backup = dump(database_url, place)
    with connected(database_url, "tests") as connection:
        assert has_rows(connection) is not None
        with pytest.raises(InvalidInput, match="not empty"):
            load_rows(connection, place, backup, "mark")
    last = backup.tables[-1]
    with place.writing(f"b/{last.file}"):
        pass  # an empty file: found out when all other tables are filled
    migrate(empty_url, backup.schema)
    with connected(empty_url, "tests") as connection:
        with pytest.raises(InvalidInput, match=f"{re.escape(last.file)} has 0 rows, the backup says 4"):
            load_rows(connection, place, backup, "mark")
        assert has_rows(connection) is None
        assert marked(connection) is None


def test_a_filled_database_knows_who_filled_it(database_url: str, empty_url: str, place: Tree) -> None:
    backup = dump(database_url, place)
    with connected(empty_url, "tests") as connection:
        assert marked(connection) is None
    load(empty_url, place, backup, "it's me")
    with connected(empty_url, "tests") as connection:
        assert marked(connection) == "it's me"


def test_another_schema_is_refused(database_url: str, empty_url: str, place: Tree) -> None:
    backup = dump(database_url, place)
    with connected(empty_url, "tests") as connection:
        with pytest.raises(InvalidInput, match="the database has schema None, this version"):
            dump_rows(connection, place, "c/")
        with pytest.raises(InvalidInput, match=f"schema None, the backup {head_revision()}"):
            load_rows(connection, place, backup, "mark")
    execute(database_url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(InvalidInput, match="the database has schema 9999, this version"):
        dump(database_url, place)


def test_one_backup_at_a_time(database_url: str) -> None:
    with connected(database_url, "tests") as first:
        lock_removals(first)
        with connected(database_url, "tests") as second, pytest.raises(Overloaded, match="another backup"):
            lock_removals(second)
    with connected(database_url, "tests") as third:
        lock_removals(third)


def test_a_server_that_is_away_is_one_line() -> None:
    with (
        pytest.raises(Unavailable, match=r"^Postgres: [^\n]+$"),
        connected("postgresql+psycopg://me:secret@127.0.0.1:1/x", "tests"),
    ):
        pass


def test_numbers_of_transactions_are_passed(database_url: str) -> None:
    now = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
    with connected(database_url, "tests") as connection:
        before = execute(database_url, now)[0][0]
        shown: list[tuple[int, int | None]] = []
        pass_transactions(connection, before + 250_000, lambda _what, done, total: shown.append((done, total)))
        assert execute(database_url, now)[0][0] >= before + 250_000
        assert len(shown) == 2
        pass_transactions(connection, before, lambda *_: pytest.fail("nothing to do"))


def test_a_new_server_is_ahead_of_any_other(databases: Databases) -> None:
    others = (5 << 32) + 4_000_000_000
    with short_folder() as folder:
        server = EmbeddedPostgres(folder)
        server.create(others)
        server.start()
        try:
            url = embedded_postgres_url(folder)
            assert execute(url, "SELECT pg_current_xact_id()::text::bigint")[0][0] > others
            migrate(url)
            fill(url)
            execute(url, "DELETE FROM run_tag")
        finally:
            server.destroy()
        assert not server.is_running()
        assert not server.data.exists()


def test_all_tables_are_dumped_but_the_log(database_url: str, place: Tree) -> None:
    with connected(database_url, "tests") as connection:
        found = connection.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')"
        ).fetchall()
    names = {row[0] for row in found}
    assert names - {table.name for table in TABLES} == {"metric_log", "alembic_version"}
    assert [table.name for table in dump(database_url, place).tables] == [table.name for table in TABLES]
