"""Blobs that the database refers to: whatever looks like a SHA-256 in a column that could hold one.

That keeps a blob too many at times, and forgets none: columns count unless they are known to hold none.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from sqlalchemy import ARRAY, JSON, BigInteger, Column, String, Table, Text, cast, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.tables import metadata

_DIGEST = "(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])"
#: Tables of tracking and of the platform itself, whose texts are the user's or no digests of blobs.
_WITHOUT = {
    "experiment", "experiment_tag", "run", "run_param", "run_tag", "run_input", "run_model", "run_import", "dataset",
    "logged_model", "logged_model_metric", "logged_model_param", "logged_model_tag", "model_import", "metric_log",
    "metric_flush", "metric_outbox", "lease", "event_cursor", "webhook", "webhook_delivery", "attempt",
    "pipeline_signal", "model_alias", "model_version_tag", "registered_model_tag", "move_decision",
    "artifact_collection", "legal_hold", "storage_quota", "metric_archive",
}  # fmt: skip


#: Pages of a table that one statement searches, 2 MiB: statements have a time limit, and tables none.
PAGES = 256


def referring_columns() -> list[tuple[Table, Column[object]]]:
    """The columns that are searched."""
    return [
        (table, column)
        for table in metadata.sorted_tables
        if table.name not in _WITHOUT
        for column in table.columns
        if isinstance(column.type, String | JSON | ARRAY)
    ]


async def referred_digests(engine: AsyncEngine) -> AsyncIterator[str]:
    """All of them, some several times, as of one moment."""
    async with engine.connect() as plain:
        connection = await plain.execution_options(isolation_level="REPEATABLE READ", stream_results=True)
        for table, column in referring_columns():
            found = func.regexp_matches(cast(column, Text), _DIGEST, "g")
            for start in range(0, await _pages(connection, table), PAGES):
                within = text("ctid >= CAST(:start AS tid) AND ctid < CAST(:end AS tid)")
                bounds = {"start": f"({start},0)", "end": f"({start + PAGES},0)"}
                result = await connection.stream(select(found).select_from(table).where(within), bounds)
                async for row in result:
                    yield row[0][0]


async def _pages(connection: AsyncConnection, table: Table) -> int:
    size = func.pg_relation_size(func.to_regclass(table.name)) / cast(func.current_setting("block_size"), BigInteger)
    return int((await connection.execute(select(size), execution_options={"stream_results": False})).scalar_one())
