"""The tables of Postgres, in a backup: written from one snapshot, read into an empty database in one transaction.

COPY's text, and not pg_dump's archives: these could not be restored by a server of an older version than the dump's,
nor in one transaction together with what a restored database needs (see ``load_rows``), and would lock the partitions
of the metric log, which the shard has to truncate meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, LiteralString

import pyarrow as pa
from psycopg.sql import SQL, Composed, Identifier, Literal
from sqlalchemy import Table

from mlplat.backup.connection import Connection
from mlplat.backup.model import Backup, DumpedSequence, DumpedTable, DumpFile, table_file
from mlplat.backup.tree import CHUNK_BYTES, Tree
from mlplat.db.migrate import head_revision
from mlplat.db.removals import REMOVALS
from mlplat.db.tables import metadata
from mlplat.errors import InvalidInput, Overloaded
from mlplat.tally import Tally, no_tally

#: What is left out: points that are on their way into the metric store are there when it is read (see ``points``).
LEFT_OUT = ("metric_log",)
#: Epochs that writers of the old installation may have had since the backup, if any of them is still there.
EPOCHS = 1_000_000
#: Transactions that are used up by one statement.
BURN = 200_000
_NEXT_TRANSACTION: Final = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"


@dataclass(frozen=True)
class Rows:
    """What was written of one snapshot; ``runs`` are ids and experiments of all runs in it."""

    taken_at: datetime
    transactions: int
    tables: list[DumpedTable]
    sequences: list[DumpedSequence]
    files: dict[str, DumpFile]
    runs: list[tuple[str, int]]


def lock_removals(connection: Connection) -> None:
    """Keeps purges and other backups out for as long as the connection lasts.

    Raises:
        Overloaded: one is under way.
    """
    if not _value(connection, "SELECT pg_try_advisory_lock(%s)", REMOVALS):
        raise Overloaded("a purge or another backup is under way; retry when it is done")


def dump_rows(connection: Connection, tree: Tree, folder: str, tally: Tally = no_tally) -> Rows:
    """Writes all tables into files below ``folder``, whose name is appended to with a slash.

    Raises:
        InvalidInput: the database has another schema than this version's.
    """
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        _require_schema(connection)
        taken_at: datetime = _value(connection, "SELECT transaction_timestamp()")
        transactions: int = _value(connection, _NEXT_TRANSACTION)
        runs = connection.execute("SELECT run_id, experiment_id FROM run ORDER BY run_id").fetchall()
        tables: list[DumpedTable] = []
        files: dict[str, DumpFile] = {}
        for table in metadata.sorted_tables:
            if table.name not in LEFT_OUT:
                dumped, file = _dump_table(connection, tree, folder, table)
                tables.append(dumped)
                files[dumped.file] = file
                tally("rows", sum(each.rows for each in tables), None)
        # Numbers that were given out since the snapshot are skipped; none is given out twice.
        sequences = [found for table in metadata.sorted_tables for found in _sequences(connection, table)]
    return Rows(taken_at, transactions, tables, sequences, files, [(row[0], row[1]) for row in runs])


def require_connected(connection: Connection) -> None:
    """Checks that the lock of ``lock_removals`` was held all the time.

    Raises:
        psycopg.OperationalError: the connection broke, and the lock with it.
    """
    connection.execute("SELECT 1")


def has_rows(connection: Connection) -> str | None:
    """A table of the database in which there are rows, None when all are empty."""
    names = connection.execute(
        "SELECT c.relname FROM pg_class c WHERE c.relnamespace = to_regnamespace(quote_ident(current_schema())) "
        "AND c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relname <> 'alembic_version' ORDER BY c.relname"
    ).fetchall()
    for (name,) in names:
        if connection.execute(SQL("SELECT 1 FROM {} LIMIT 1").format(Identifier(name))).fetchone():
            return str(name)
    return None


def load_rows(connection: Connection, tree: Tree, backup: Backup, mark: str, tally: Tally = no_tally) -> None:
    """Fills an empty database of the backup's schema, all or nothing, and makes it one that can go on.

    Leases are free: nobody of their holders is here. Epochs are higher than any that a writer of the old
    installation can have, so that such a writer, if it still reaches this server, changes nothing.

    Args:
        mark: stays with the database, see ``marked``.

    Raises:
        InvalidInput: the database is not empty, has another schema, or a file has less or more rows than the backup
            says.
    """
    with connection.transaction():
        schema = _schema(connection)
        if schema != backup.schema:
            raise InvalidInput(f"the database has schema {schema}, the backup {backup.schema}; it must have no tables")
        found = has_rows(connection)
        if found is not None:
            raise InvalidInput(f"the database is not empty: there are rows in {found}")
        done = 0
        for table in backup.tables:
            rows = _load_table(connection, tree, f"{backup.name}/{table.file}", table)
            if rows != table.rows:
                raise InvalidInput(f"{backup.name}/{table.file} has {rows} rows, the backup says {table.rows}")
            done += rows
            tally("rows", done, backup.rows)
        for sequence in backup.sequences:
            _value(
                connection, "SELECT setval(pg_get_serial_sequence(%s, %s), %s, %s)",
                sequence.table, sequence.column, sequence.last, sequence.called,
            )  # fmt: skip
        connection.execute("UPDATE lease SET until = clock_timestamp(), epoch = epoch + %s", [EPOCHS])
        connection.execute("UPDATE pipeline_run SET epoch = epoch + %s WHERE finished_at IS NULL", [EPOCHS])
        connection.execute(SQL("COMMENT ON TABLE alembic_version IS {}").format(Literal(mark)))
    connection.execute("ANALYZE")


def marked(connection: Connection) -> str | None:
    """The mark of the restore that filled this database."""
    found = _value(connection, "SELECT obj_description(to_regclass('alembic_version'), 'pg_class')")
    return None if found is None else str(found)


def pass_transactions(connection: Connection, transactions: int, tally: Tally = no_tally) -> None:
    """Uses up the server's transaction numbers below ``transactions``, which rows of another server have.

    Events are read by these numbers: those of rows must lie in the past. Half a million pass in a second.
    """
    begun = now = _value(connection, _NEXT_TRANSACTION)
    while now < transactions:
        count = min(BURN, transactions - now)
        connection.execute(
            SQL("DO $$ BEGIN FOR i IN 1..{} LOOP PERFORM pg_current_xact_id(); ROLLBACK; END LOOP; END $$").format(
                Literal(count)
            )
        )
        now = _value(connection, _NEXT_TRANSACTION)
        tally("transaction numbers passed", now - begun, transactions - begun)


def _schema(connection: Connection) -> str | None:
    """Its revision, None of a database without tables of ours."""
    if _value(connection, "SELECT to_regclass('alembic_version')::text") is None:
        return None
    found = _value(connection, "SELECT min(version_num) FROM alembic_version")
    return None if found is None else str(found)


def _require_schema(connection: Connection) -> None:
    found = _schema(connection)
    if found != head_revision():
        raise InvalidInput(
            f"the database has schema {found}, this version of mlplat backs up schema {head_revision()}; "
            "bring it up with this version first"
        )


def _dump_table(connection: Connection, tree: Tree, folder: str, table: Table) -> tuple[DumpedTable, DumpFile]:
    # SQLAlchemy's names are strings of a type of their own.
    name, columns = str(table.name), [str(column.name) for column in table.columns if column.computed is None]
    statement = SQL("COPY (SELECT {} FROM {}) TO STDOUT").format(_names(columns), Identifier(name))
    with tree.writing(f"{folder}{table_file(name)}") as sink:
        with pa.output_stream(sink, compression="zstd") as out, connection.cursor() as cursor:
            pending = bytearray()
            with cursor.copy(statement) as copy:
                for block in copy:
                    pending += block
                    if len(pending) >= CHUNK_BYTES:
                        out.write(bytes(pending))
                        pending.clear()
            out.write(bytes(pending))
            rows = cursor.rowcount
        file = DumpFile(sink.sha256, sink.bytes)
    return DumpedTable(name, columns, rows), file


def _load_table(connection: Connection, tree: Tree, key: str, table: DumpedTable) -> int:
    statement = SQL("COPY {} ({}) FROM STDIN").format(Identifier(table.name), _names(table.columns))
    with tree.open(key) as source, pa.input_stream(source, compression="zstd") as body, connection.cursor() as cursor:
        with cursor.copy(statement) as copy:
            while block := body.read(CHUNK_BYTES):
                copy.write(block)
        return cursor.rowcount


def _sequences(connection: Connection, table: Table) -> list[DumpedSequence]:
    found = []
    for column in table.columns:
        name = _value(connection, "SELECT pg_get_serial_sequence(%s, %s)", table.name, column.name)
        if name is not None:
            row = connection.execute(
                SQL("SELECT last_value, is_called FROM {}").format(Identifier(*str(name).split(".")))
            ).fetchone()
            assert row is not None
            found.append(DumpedSequence(str(table.name), str(column.name), row[0], row[1]))
    return found


def _names(columns: Sequence[str]) -> Composed:
    return SQL(", ").join(Identifier(column) for column in columns)


def _value(connection: Connection, statement: LiteralString, *values: object) -> Any:
    row = connection.execute(statement, values).fetchone()
    assert row is not None
    return row[0]
