"""What triggers wait for, read from Postgres in the order of its commits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Row, TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.snapshots import Snapshot, seen_values, unseen
from mlplat.pipelines.automation.triggers import REGISTRY_EVENTS, Event, Kind
from mlplat.pipelines.spec import MAX_DEPTH
from mlplat.pipelines.stored import open_for_expressions

#: Events in one read, and as many more as their last transaction has.
PAGE = 200


async def read_events(connection: AsyncConnection, kind: Kind, seen: Snapshot) -> tuple[Snapshot, list[Event]]:
    """A page of the events that were committed since ``seen``, and the snapshot to read on from.

    There are no more for now when that snapshot was given with less than ``PAGE`` events.
    """
    statement, event_of = _READERS[kind]
    values = {**seen_values(seen), "page": PAGE}
    rows = (await connection.execute(statement, values)).all()
    now = Snapshot.parse(rows[0].snapshot)
    found = [row for row in rows if row.txid is not None]
    if len(found) >= PAGE:
        now = now.up_to(found[-1].txid)
    return now, [event_of(row) for row in found]


async def find_lineages(connection: AsyncConnection, run_ids: Sequence[str]) -> Mapping[str, list[str]]:
    """The triggers that led to pipeline runs, also by way of the runs that these are parts of. Others are left out."""
    if not run_ids:
        return {}
    rows = await connection.execute(_LINEAGES, {"run_ids": list(run_ids), "depth": MAX_DEPTH})
    return {row.start: row.lineage for row in rows}


def _registry_event(row: Row[Any]) -> Event:
    body = {"id": row.event_id, "kind": REGISTRY_EVENTS.get(row.kind, row.kind), **row.command, **row.answer}
    body["model"] = body.pop("name")
    return Event(str(row.event_id), row.created_at, body, row.txid, row.made_by)


def _run_ended(row: Row[Any]) -> Event:
    body = {
        "run_id": row.run_id, "pipeline": row.name, "state": row.state, "error": row.error, "params": row.params,
        "output": open_for_expressions(row.output), "submitted_by": row.submitted_by, "source": row.source,
        "created_at": row.created_at.isoformat(),
        "started_at": row.started_at.isoformat() if row.started_at is not None else None,
        "finished_at": row.finished_at.isoformat(),
    }  # fmt: skip
    return Event(row.run_id, row.finished_at, body, row.txid, row.run_id)


def _reader(columns: str, source: str, column: str, order: str) -> TextClause:
    """One row at least, for the snapshot: of a statement's own moment, which is that of its rows."""
    return text(f"""
        WITH found AS (
            SELECT {columns}, {column} AS txid FROM {source} AND {unseen(column)}
            ORDER BY {column} FETCH FIRST (:page) ROWS WITH TIES
        )
        SELECT pg_current_snapshot()::text AS snapshot, found.* FROM (VALUES (1)) AS one(n) LEFT JOIN found ON true
        ORDER BY found.txid, found.{order}
    """)  # noqa: S608 - of the constants below


_READERS = {
    # A version's run has a tag with the pipeline run that started it, if one did.
    Kind.REGISTRY: (
        _reader(
            # A signature can be large, and nobody decides by it.
            "event_id, kind, command - 'signature' AS command, answer, created_at, "
            "(SELECT t.value FROM model_version v JOIN run_tag t "
            "ON t.run_id = v.run_id AND t.key = 'mlplat.pipelineRun' WHERE v.name = registry_event.name AND "
            "v.version = coalesce(answer ->> 'version', command ->> 'version')::bigint) AS made_by",
            "registry_event WHERE true",
            "txid",
            "event_id",
        ),
        _registry_event,
    ),
    Kind.PIPELINE: (
        _reader(
            "run_id, name, state, error, params, output, submitted_by, source, created_at, started_at, finished_at",
            "pipeline_run WHERE source NOT LIKE 'step:%'",
            "ended_txid",
            "run_id",
        ),
        _run_ended,
    ),
}

_LINEAGES = text("""
    WITH RECURSIVE up(start, run_id, depth) AS (
        SELECT id, id, 0 FROM unnest(CAST(:run_ids AS text[])) AS id
        UNION ALL
        SELECT up.start, split_part(substr(r.source, 6), '/', 1), up.depth + 1
        FROM up JOIN pipeline_run AS r USING (run_id) WHERE r.source LIKE 'step:%' AND up.depth < :depth
    )
    SELECT up.start, f.lineage FROM up JOIN firing AS f USING (run_id) WHERE jsonb_array_length(f.lineage) > 0
""")
