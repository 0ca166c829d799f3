"""Edges through pipelines: a step comes from the steps that it waits for and the runs that it tracked.

A tracked run comes from the steps that its own step waits for; its step comes from it. Steps of a sub-pipeline that
wait for none of their own kind come from what the step waits for whose sub-pipeline it is, and that step comes from
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import attempt, pipeline, pipeline_run, run_tag, step_run
from mlplat.lineage.model import Edge, Kind, Node
from mlplat.pipelines.dag import dependencies
from mlplat.pipelines.model import WHOLE_STEP
from mlplat.pipelines.spec import MAX_DEPTH, PipelineSpec

PIPELINE_RUN_TAG = "mlplat.pipelineRun"
STEP_TAG = "mlplat.step"
_TAGS = (PIPELINE_RUN_TAG, STEP_TAG)
_SUB_PIPELINE = "step:"


@dataclass(frozen=True)
class _Shape:
    """A pipeline run: what each step waits for, and the step that it is the sub-pipeline of."""

    needs: Mapping[str, frozenset[str]]
    parent: tuple[str, str] | None


class Pipelines:
    """Reads on one connection; the shape of a pipeline run never changes, and is read once."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._shapes: dict[str, _Shape] = {}

    async def into_runs(self, ids: Sequence[str]) -> list[Edge]:
        """The steps that tracked runs come from."""
        places = await self._places(ids)
        needs = await self._needs(places.values())
        return [
            Edge(before, Node(Kind.RUN, run_id)) for run_id, place in places.items() for before in needs.get(place, ())
        ]

    async def out_of_runs(self, ids: Sequence[str]) -> list[Edge]:
        """The steps that tracked runs are part of."""
        return [Edge(Node(Kind.RUN, run_id), _step(*place)) for run_id, place in (await self._places(ids)).items()]

    async def into_steps(self, ids: Sequence[str]) -> list[Edge]:
        """What steps come from: the steps that they wait for, the runs that they tracked, their sub-pipelines, and
        the step whose output they took instead of running."""
        places = [Node(Kind.STEP, found).parts for found in ids]
        needs = await self._needs(places)
        found = [Edge(before, _step(*place)) for place in places for before in needs.get(place, ())]
        wanted = set(places)
        tracked = await self._tracked([run_id for run_id, _name in places])
        found += [Edge(Node(Kind.RUN, run_id), _step(*place)) for run_id, place in tracked if place in wanted]
        found += [
            Edge(_step(child, inner), _step(*place))
            for place, child in await self._children(places)
            for inner in self._shapes[child].needs
        ]
        reused = select(step_run.c.run_id, step_run.c.step, step_run.c.reused_from).where(
            step_run.c.run_id.in_([run_id for run_id, _name in places]),
            step_run.c.item == WHOLE_STEP,
            step_run.c.reused_from.is_not(None),
        )
        for run_id, name, origin in await self._connection.execute(reused):
            if (run_id, name) in wanted and origin != run_id:
                found.append(Edge(_step(origin, name), _step(run_id, name)))
        return found

    async def out_of_steps(self, ids: Sequence[str]) -> list[Edge]:
        """What came of steps."""
        places = [Node(Kind.STEP, found).parts for found in ids]
        shapes = await self._load({run_id for run_id, _name in places})
        waiting = [
            (run_id, other)
            for run_id, name in places
            if run_id in shapes
            for other, needs in shapes[run_id].needs.items()
            if name in needs
        ]
        entries = await self._entries(waiting)
        needs = await self._needs([*waiting, *entries])
        wanted = set(ids)
        found = [
            Edge(before, _step(*place)) for place, befores in needs.items() for before in befores if before.id in wanted
        ]
        for run_id, place in await self._tracked([run_id for run_id, _name in needs]):
            found += [Edge(before, Node(Kind.RUN, run_id)) for before in needs.get(place, ()) if before.id in wanted]
        for run_id, name in places:
            parent = shapes[run_id].parent if run_id in shapes else None
            if parent is not None:
                found.append(Edge(_step(run_id, name), _step(*parent)))
        origins = {run_id for run_id, _name in places}
        reused = select(step_run.c.run_id, step_run.c.step, step_run.c.reused_from)
        reused = reused.where(step_run.c.reused_from.in_(origins), step_run.c.item == WHOLE_STEP)
        for run_id, name, origin in await self._connection.execute(reused):
            if f"{origin}/{name}" in wanted and origin != run_id:
                found.append(Edge(_step(origin, name), _step(run_id, name)))
        return found

    async def _places(self, run_ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        """The pipeline run and the step that runs were tracked by."""
        query = select(run_tag.c.run_id, run_tag.c.key, run_tag.c.value)
        query = query.where(run_tag.c.run_id.in_(run_ids), run_tag.c.key.in_(_TAGS))
        tags: dict[str, dict[str, str]] = {}
        for run_id, key, value in await self._connection.execute(query):
            tags.setdefault(run_id, {})[key] = value
        return {
            run_id: (found[PIPELINE_RUN_TAG], found[STEP_TAG])
            for run_id, found in tags.items()
            if len(found) == len(_TAGS)
        }

    async def _tracked(self, pipeline_runs: Iterable[str]) -> list[tuple[str, tuple[str, str]]]:
        """The tracked runs of pipeline runs, each with where it was tracked."""
        query = select(run_tag.c.run_id).where(
            run_tag.c.key == PIPELINE_RUN_TAG, run_tag.c.value.in_(set(pipeline_runs))
        )
        run_ids = list((await self._connection.execute(query)).scalars())
        return list((await self._places(run_ids)).items())

    async def _needs(self, places: Iterable[tuple[str, str]]) -> dict[tuple[str, str], set[Node]]:
        """The steps that steps come from."""
        found: dict[tuple[str, str], set[Node]] = {}
        left = {place: place for place in places}
        for _level in range(MAX_DEPTH + 1):
            shapes = await self._load({run_id for run_id, _name in left.values()})
            outer: dict[tuple[str, str], tuple[str, str]] = {}
            for place, (run_id, name) in left.items():
                shape = shapes.get(run_id)
                own = () if shape is None else shape.needs.get(name, ())
                if own:
                    found[place] = {_step(run_id, before) for before in own}
                elif shape is not None and shape.parent is not None:
                    outer[place] = shape.parent
            left = outer
            if not left:
                break
        return found

    async def _entries(self, places: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """The steps with which the sub-pipelines of steps begin, to any depth."""
        found: list[tuple[str, str]] = []
        for _level in range(MAX_DEPTH + 1):
            children = {child for _place, child in await self._children(places)}
            places = [
                (child, name)
                for child in sorted(children)
                for name, needs in self._shapes[child].needs.items()
                if not needs
            ]
            if not places:
                break
            found += places
        return found

    async def _children(self, places: Sequence[tuple[str, str]]) -> list[tuple[tuple[str, str], str]]:
        """The runs of the sub-pipelines of steps."""
        wanted = set(places)
        query = select(attempt.c.run_id, attempt.c.step, attempt.c.child_id).where(
            attempt.c.run_id.in_({run_id for run_id, _name in places}), attempt.c.child_id.is_not(None)
        )
        rows = [row for row in await self._connection.execute(query) if (row.run_id, row.step) in wanted]
        shapes = await self._load({row.child_id for row in rows})
        return [((row.run_id, row.step), row.child_id) for row in rows if row.child_id in shapes]

    async def _load(self, run_ids: Iterable[str]) -> dict[str, _Shape]:
        """The shapes of those of the runs that there are."""
        wanted = set(run_ids)
        query = select(pipeline_run.c.run_id, pipeline_run.c.source, pipeline.c.spec).join(pipeline)
        unknown = wanted - self._shapes.keys()
        if unknown:
            for row in await self._connection.execute(query.where(pipeline_run.c.run_id.in_(unknown))):
                needs = dependencies(PipelineSpec.model_validate(row.spec))
                shape = _Shape({name: frozenset(found) for name, found in needs.items()}, _parent(row.source))
                self._shapes[row.run_id] = shape
        return {run_id: self._shapes[run_id] for run_id in wanted & self._shapes.keys()}


def _step(run_id: str, name: str) -> Node:
    return Node(Kind.STEP, f"{run_id}/{name}")


def _parent(source: str) -> tuple[str, str] | None:
    """The step that a run is the sub-pipeline of: its source is ``step:run/step/item/attempt``."""
    if not source.startswith(_SUB_PIPELINE):
        return None
    run_id, name, *_rest = source.removeprefix(_SUB_PIPELINE).split("/")
    return run_id, name
