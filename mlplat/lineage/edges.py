"""The edges of the lineage, as the tables have them: what runs read and made, and what was made of that."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, CompoundSelect, Select, func, select, true, tuple_, union_all
from sqlalchemy.dialects.postgresql import array
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import (
    DATASET_RUN,
    IS_OF_RUN,
    dataset,
    lineage_edge,
    logged_model,
    model_version,
    run_input,
    run_model,
    run_tag,
)
from mlplat.lineage.model import Direction, Edge, Kind, Node, parse_node
from mlplat.lineage.pipelines import Pipelines
from mlplat.tracking.inputs import FEATURE_VIEW_TAG, INPUT, OUTPUT
from mlplat.tracking.model import PARENT_RUN_TAG

_Ids = Sequence[str]
_MODELS = "models:/"


class Edges:
    """The edges that lead from nodes, read on one connection; see ``model.Neighbours``."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._pipelines = Pipelines(connection)
        self._readers: dict[tuple[Kind, Direction], Callable[[_Ids], Awaitable[Iterable[Edge]]]] = {
            (Kind.RUN, Direction.UPSTREAM): self._into_runs,
            (Kind.RUN, Direction.DOWNSTREAM): self._out_of_runs,
            (Kind.LOGGED_MODEL, Direction.UPSTREAM): self._into_logged_models,
            (Kind.LOGGED_MODEL, Direction.DOWNSTREAM): self._out_of_logged_models,
            (Kind.MODEL_VERSION, Direction.UPSTREAM): self._into_versions,
            (Kind.MODEL_VERSION, Direction.DOWNSTREAM): self._out_of_versions,
            (Kind.DATASET, Direction.UPSTREAM): self._into_datasets,
            (Kind.DATASET, Direction.DOWNSTREAM): self._out_of_datasets,
            (Kind.FEATURE_VIEW, Direction.DOWNSTREAM): self._out_of_feature_views,
            (Kind.STEP, Direction.UPSTREAM): self._pipelines.into_steps,
            (Kind.STEP, Direction.DOWNSTREAM): self._pipelines.out_of_steps,
        }

    async def __call__(self, nodes: Sequence[Node], direction: Direction) -> set[Edge]:
        """The edges that lead from the nodes in the direction."""
        ids: dict[Kind, list[str]] = {}
        for node in nodes:
            ids.setdefault(node.kind, []).append(node.id)
        found = set(await self._kept(nodes, direction))
        for kind, of_kind in ids.items():
            reader = self._readers.get((kind, direction))
            if reader is not None:
                found.update(await reader(of_kind))
        return found

    async def _kept(self, nodes: Sequence[Node], direction: Direction) -> Iterator[Edge]:
        """Those of purged runs."""
        column = lineage_edge.c.downstream if direction is Direction.UPSTREAM else lineage_edge.c.upstream
        query = select(lineage_edge.c.upstream, lineage_edge.c.downstream)
        rows = await self._rows(query.where(column.in_([str(node) for node in nodes])))
        return (Edge(parse_node(upstream), parse_node(downstream)) for upstream, downstream in rows)

    async def _into_runs(self, ids: _Ids) -> list[Edge]:
        datasets = select(dataset.c.name, dataset.c.digest, run_input.c.run_id).join(run_input)
        views = _feature_views().where(run_input.c.run_id.in_(ids))
        models = select(run_model.c.model_id, run_model.c.run_id).where(run_model.c.direction == INPUT)
        parents = select(run_tag.c.value, run_tag.c.run_id).where(run_tag.c.key == PARENT_RUN_TAG)
        return [
            *(
                Edge(dataset_node(name, digest), _run(run_id))
                for name, digest, run_id in await self._rows(datasets.where(run_input.c.run_id.in_(ids)))
            ),
            *(Edge(_feature_view(tag), _run(run_id)) for tag, run_id in await self._rows(views)),
            *(
                Edge(_logged_model(model_id), _run(run_id))
                for model_id, run_id in await self._rows(models.where(run_model.c.run_id.in_(ids)))
            ),
            *(
                Edge(_run(parent), _run(run_id))
                for parent, run_id in await self._rows(parents.where(run_tag.c.run_id.in_(ids)))
            ),
            *await self._pipelines.into_runs(ids),
        ]

    async def _out_of_runs(self, ids: _Ids) -> list[Edge]:
        children = select(run_tag.c.value, run_tag.c.run_id).where(run_tag.c.key == PARENT_RUN_TAG)
        return [
            *(
                Edge(_run(run_id), _logged_model(model_id))
                for run_id, model_id in await self._made(lambda column: column.in_(ids), by_model=False)
            ),
            *(
                Edge(_run(run_id), version_node(name, version))
                for name, version, run_id in await self._rows(_versions_of_runs(ids))
            ),
            *await self._read_of_artifacts(DATASET_RUN.in_(ids)),
            *(
                Edge(_run(parent), _run(run_id))
                for parent, run_id in await self._rows(children.where(run_tag.c.value.in_(ids)))
            ),
            *await self._pipelines.out_of_runs(ids),
        ]

    async def _into_logged_models(self, ids: _Ids) -> list[Edge]:
        made = await self._made(lambda column: column.in_(ids), by_model=True)
        return [Edge(_run(run_id), _logged_model(model_id)) for run_id, model_id in made]

    async def _out_of_logged_models(self, ids: _Ids) -> list[Edge]:
        used = select(run_model.c.model_id, run_model.c.run_id).where(run_model.c.direction == INPUT)
        return [
            *(
                Edge(_logged_model(model_id), _run(run_id))
                for model_id, run_id in await self._rows(used.where(run_model.c.model_id.in_(ids)))
            ),
            *(
                Edge(_logged_model(source.removeprefix(_MODELS)), version_node(name, version))
                for name, version, source in await self._rows(_versions_of(ids))
            ),
        ]

    async def _into_versions(self, ids: _Ids) -> list[Edge]:
        columns = (
            model_version.c.name,
            model_version.c.version,
            model_version.c.source,
            model_version.c.run_id,
            model_version.c.facts["run_id"].astext,
        )
        keys = [(name, int(version)) for name, _slash, version in (found.rpartition("/") for found in ids)]
        query = select(*columns).where(tuple_(model_version.c.name, model_version.c.version).in_(keys))
        found = []
        for name, version, source, run_id, source_run_id in await self._rows(query):
            node = version_node(name, version)
            if run_id or source_run_id:
                found.append(Edge(_run(run_id or source_run_id), node))
            origin = _origin(source)
            if origin is not None:
                found.append(Edge(origin, node))
        return found

    async def _out_of_versions(self, ids: _Ids) -> list[Edge]:
        return [
            Edge(Node(Kind.MODEL_VERSION, source.removeprefix(_MODELS)), version_node(name, version))
            for name, version, source in await self._rows(_versions_of(ids))
        ]

    async def _into_datasets(self, ids: _Ids) -> list[Edge]:
        keys = [Node(Kind.DATASET, found).parts for found in ids]
        return await self._read_of_artifacts(tuple_(dataset.c.name, dataset.c.digest).in_(keys))

    async def _read_of_artifacts(self, which: ColumnElement[bool]) -> list[Edge]:
        """Datasets that are files of runs, and these runs."""
        query = select(DATASET_RUN, dataset.c.name, dataset.c.digest).where(IS_OF_RUN, which)
        return [Edge(_run(run_id), dataset_node(name, digest)) for run_id, name, digest in await self._rows(query)]

    async def _out_of_datasets(self, ids: _Ids) -> list[Edge]:
        keys = [Node(Kind.DATASET, found).parts for found in ids]
        query = select(dataset.c.name, dataset.c.digest, run_input.c.run_id).join(run_input)
        rows = await self._rows(query.where(tuple_(dataset.c.name, dataset.c.digest).in_(keys)))
        return [Edge(dataset_node(name, digest), _run(run_id)) for name, digest, run_id in rows]

    async def _out_of_feature_views(self, ids: _Ids) -> list[Edge]:
        tags = [FEATURE_VIEW_TAG + found for found in ids]
        query = _feature_views().where(run_input.c.tags.has_any(array(tags)))
        return [Edge(_feature_view(tag), _run(run_id)) for tag, run_id in await self._rows(query) if tag in tags]

    async def _made(self, among: Callable[[Any], Any], *, by_model: bool) -> list[tuple[str, str]]:
        """Runs and the logged models that they made."""
        sourced = select(logged_model.c.source_run_id, logged_model.c.model_id)
        linked = select(run_model.c.run_id, run_model.c.model_id).where(run_model.c.direction == OUTPUT)
        first = logged_model.c.model_id if by_model else logged_model.c.source_run_id
        second = run_model.c.model_id if by_model else run_model.c.run_id
        sourced = sourced.where(among(first), logged_model.c.source_run_id.is_not(None))
        return [*await self._rows(sourced), *await self._rows(linked.where(among(second)))]

    async def _rows(self, query: Select[Any] | CompoundSelect[Any]) -> list[Any]:
        return list((await self._connection.execute(query)).all())


async def find_datasets(connection: AsyncConnection, digest: str, name: str | None) -> list[Node]:
    """The datasets with a digest, and of a name if one is given; also those that only purged runs have read."""
    query = select(dataset.c.name).where(dataset.c.digest == digest).distinct()
    kept = select(lineage_edge.c.upstream).distinct()
    if name is None:
        named = lineage_edge.c.upstream.startswith(f"{Kind.DATASET}:")
        kept = kept.where(named, lineage_edge.c.upstream.endswith(f"@{digest}", autoescape=True))
    else:
        query = query.where(dataset.c.name == name)
        kept = kept.where(lineage_edge.c.upstream == str(dataset_node(name, digest)))
    nodes = {dataset_node(found, digest) for found in (await connection.execute(query)).scalars()}
    nodes |= {parse_node(found) for found in (await connection.execute(kept)).scalars()}
    return sorted(nodes)


def dataset_node(name: str, digest: str) -> Node:
    """A dataset's node."""
    return Node(Kind.DATASET, f"{name}@{digest}")


def version_node(name: str, version: int) -> Node:
    """A model version's node."""
    return Node(Kind.MODEL_VERSION, f"{name}/{version}")


def _run(run_id: str) -> Node:
    return Node(Kind.RUN, run_id)


def _feature_view(tag: str) -> Node:
    return Node(Kind.FEATURE_VIEW, tag.removeprefix(FEATURE_VIEW_TAG))


def _feature_views() -> Select[Any]:
    """The tags that name feature views, and the runs that read data through them."""
    tags = func.jsonb_object_keys(run_input.c.tags).table_valued("tag").render_derived()
    named = tags.c.tag.startswith(FEATURE_VIEW_TAG) & (tags.c.tag != FEATURE_VIEW_TAG)
    return select(tags.c.tag, run_input.c.run_id).join_from(run_input, tags, true()).where(named)


def _logged_model(model_id: str) -> Node:
    return Node(Kind.LOGGED_MODEL, model_id)


def _origin(source: str) -> Node | None:
    """What ``models:/…`` names: a logged model or a version by its number; None for what may have moved since."""
    name = source.removeprefix(_MODELS)
    if name == source:
        return None
    if name.startswith("m-") and "/" not in name:
        return _logged_model(name)
    model, _slash, version = name.rpartition("/")
    return Node(Kind.MODEL_VERSION, name) if model and version.isdecimal() and "/" not in model else None


def _versions_of(origins: _Ids) -> Select[Any]:
    query = select(model_version.c.name, model_version.c.version, model_version.c.source)
    return query.where(
        model_version.c.source.like(f"{_MODELS}%"), model_version.c.source.in_([_MODELS + found for found in origins])
    )


def _versions_of_runs(ids: _Ids) -> CompoundSelect[Any]:
    told = model_version.c.facts["run_id"].astext
    named = model_version.c.name, model_version.c.version
    return union_all(
        select(*named, model_version.c.run_id).where(model_version.c.run_id.in_(ids)),
        select(*named, told).where(model_version.c.run_id.is_(None), told.in_(ids)),
    )
