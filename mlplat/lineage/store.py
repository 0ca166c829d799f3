"""Reads of the lineage."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import select

from mlplat.db.tables import pipeline, pipeline_run
from mlplat.errors import NotFound
from mlplat.lineage.edges import Edges, find_datasets, version_node
from mlplat.lineage.model import MAX_DEPTH, MAX_NODES, Direction, Graph, Kind, Node, walk
from mlplat.lineage.records import DataUse, RunRecord, RunRecords
from mlplat.registry.model import ModelVersion
from mlplat.registry.store import RegistryStore

#: Runs that are told in full; a version of a large sweep comes from many.
MAX_RUNS = 200


class PipelineFacts(msgspec.Struct, frozen=True):
    """A pipeline run that had a part in a model."""

    run_id: str
    name: str
    digest: str
    params: dict[str, Any]
    state: str
    submitted_by: str
    source: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class Provenance(msgspec.Struct, frozen=True):
    """What a model version comes from.

    Args:
        run: the run that it was made by, None if it names none, or one that nobody knows.
        runs: that run and all others upstream, the nearest first, at most ``MAX_RUNS``.
        data: the datasets of all of them, each once, with the feature views of every use.
        parents: the model versions upstream.
        pipelines: the pipeline runs upstream.
        graph: all nodes with their distance, and the edges.
    """

    version: ModelVersion
    run: RunRecord | None
    runs: list[RunRecord]
    data: list[DataUse]
    parents: list[str]
    pipelines: list[PipelineFacts]
    graph: Graph


class LineageStore:
    """All methods are safe to call concurrently."""

    def __init__(self, records: RunRecords) -> None:
        self._engine = records.engine
        self._records = records
        self._registry = RegistryStore(records.engine)

    async def graph(
        self, start: Sequence[Node], direction: Direction, depth: int = MAX_DEPTH, limit: int = MAX_NODES
    ) -> Graph:
        """What can be reached from nodes; see ``model.walk``.

        Raises:
            NotFound: a model version that is not there.
        """
        for node in start:
            if node.kind is Kind.MODEL_VERSION:
                name, version = node.parts
                await self._registry.get_version(name, int(version))
        async with self._engine.connect() as connection:
            return await walk(start, direction, Edges(connection), depth=depth, limit=limit)

    async def provenance(self, name: str, version: int) -> Provenance:
        """What a model version comes from.

        Raises:
            NotFound: there is no such version.
            Unavailable: the metric store is away.
        """
        found = await self._registry.get_version(name, version)
        graph = await self.graph([version_node(name, version)], Direction.UPSTREAM)
        run_ids = [node.id for node in graph.of_kind(Kind.RUN)][:MAX_RUNS]
        records = await self._records.load(run_ids)
        runs = list(records.values())
        own = [node.id for node, distance in graph.nodes.items() if node.kind is Kind.RUN and distance == 1]
        data: dict[tuple[str, str], DataUse] = {}
        for run in reversed(runs):
            for use in run.data:
                known = data.get((use.name, use.digest), use)
                views = sorted({*known.feature_views, *use.feature_views})
                data[use.name, use.digest] = msgspec.structs.replace(use, feature_views=views)
        return Provenance(
            found,
            next((records[run_id] for run_id in own if run_id in records), None),
            runs,
            sorted(data.values(), key=lambda use: (use.name, use.digest)),
            [node.id for node in graph.of_kind(Kind.MODEL_VERSION) if graph.nodes[node]],
            await self._pipelines(graph),
            graph,
        )

    async def versions_of_dataset(self, digest: str, name: str | None = None) -> Graph:
        """What came of the datasets with a digest, and of a name if one is given.

        Raises:
            NotFound: no run has read such a dataset.
        """
        async with self._engine.connect() as connection:
            nodes = await find_datasets(connection, digest, name)
        if not nodes:
            named = "" if name is None else f" and the name {name}"
            raise NotFound(f"no run has read a dataset with the digest {digest}{named}")
        return await self.graph(nodes, Direction.DOWNSTREAM)

    async def _pipelines(self, graph: Graph) -> list[PipelineFacts]:
        run_ids = {node.parts[0] for node in graph.of_kind(Kind.STEP)}
        query = select(pipeline_run, pipeline.c.digest).join(pipeline).where(pipeline_run.c.run_id.in_(run_ids))
        async with self._engine.connect() as connection:
            rows = await connection.execute(query.order_by(pipeline_run.c.created_at))
            return [
                PipelineFacts(
                    row.run_id, row.name, row.digest, row.params, row.state, row.submitted_by, row.source,
                    row.created_at, row.started_at, row.finished_at,
                )
                for row in rows
            ]  # fmt: skip
