"""Blobs that the database refers to: all are found, wherever the digest is and however long the table."""

from __future__ import annotations

import hashlib

from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.artifacts.references import PAGES, referred_digests, referring_columns
from mlplat.db.tables import pipeline

PAGE_BYTES = 8_192


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


async def test_every_digest_of_a_long_table_is_found(engine: AsyncEngine) -> None:
    rows = [
        {
            "digest": _digest(f"spec {number}"),
            "name": "p",
            "spec": {
                "uses": f"function:{_digest(f'code {number}')}:train",
                "notebook": [f"blob:{_digest(f'notebook {number}')}"],
                "text": "0123456789" * 140,
                "longer": _digest("no digest") + "0",
            },
        }
        for number in range(2_000)
    ]
    async with engine.begin() as connection:
        await connection.execute(insert(pipeline), rows)
        size = (await connection.execute(select(func.pg_relation_size("pipeline")))).scalar_one()
    assert size > PAGES * PAGE_BYTES, "several statements"
    found = {digest async for digest in referred_digests(engine)}
    expected = {_digest(f"{what} {number}") for what in ("spec", "code", "notebook") for number in range(2_000)}
    assert expected <= found
    assert _digest("no digest") not in found


def test_the_columns_with_digests_are_searched() -> None:
    searched = {f"{table.name}.{column.name}" for table, column in referring_columns()}
    assert searched >= {
        "pipeline.spec", "pipeline.digest", "step_run.output", "step_cache.output", "pipeline_run.output",
        "pipeline_run.params", "pipeline_run.source", "schedule.params", "trigger.params", "firing.params",
        "model_version.manifest", "registry_event.answer", "lineage_run.record",
    }  # fmt: skip
