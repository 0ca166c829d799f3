"""Keeps what would be lost with purged runs and experiments, as far as model versions came from it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, literal, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import lineage_edge, logged_model, model_version
from mlplat.lineage.edges import Edges
from mlplat.lineage.model import Direction, Edge, Kind, Node, reaching
from mlplat.lineage.records import RunRecords, keep_records


class LineageKeeper:
    """See ``tracking.purger.LineagePort``."""

    def __init__(self, records: RunRecords) -> None:
        self._records = records

    async def keep_runs(self, run_ids: Sequence[str]) -> None:
        """Before the runs are removed: keeps the records and the edges of those that model versions came from.

        Raises:
            Unavailable: the metric store is away.
        """
        nodes = [Node(Kind.RUN, run_id) for run_id in run_ids]
        async with self._records.engine.connect() as connection:
            edges = Edges(connection)
            held = sorted(await reaching(nodes, Kind.MODEL_VERSION, edges))
            if not held:
                return
            around = await edges(held, Direction.UPSTREAM) | await edges(held, Direction.DOWNSTREAM)
        records = await self._records.live([node.id for node in held])
        async with self._records.engine.begin() as connection:
            await keep_records(connection, list(records.values()))
            await _keep_edges(connection, around)

    async def keep_models(self, connection: AsyncConnection, experiment_id: int) -> None:
        """Before the experiment is removed, in that transaction: keeps which runs its logged models came from, if
        versions were made of them."""
        made = select(
            func.concat(literal(f"{Kind.RUN}:"), logged_model.c.source_run_id),
            func.concat(literal(f"{Kind.LOGGED_MODEL}:"), logged_model.c.model_id),
        ).where(
            logged_model.c.experiment_id == experiment_id,
            logged_model.c.source_run_id.is_not(None),
            func.concat("models:/", logged_model.c.model_id).in_(
                select(model_version.c.source).where(model_version.c.source.like("models:/%"))
            ),
        )
        kept = upsert(lineage_edge).from_select(["upstream", "downstream"], made)
        await connection.execute(kept.on_conflict_do_nothing())


async def _keep_edges(connection: AsyncConnection, edges: set[Edge]) -> None:
    if edges:
        rows = [{"upstream": str(edge.upstream), "downstream": str(edge.downstream)} for edge in sorted(edges)]
        await connection.execute(upsert(lineage_edge).values(rows).on_conflict_do_nothing())
