"""The walk through the graph of what came from what, on graphs that are made up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplat.errors import InvalidInput
from mlplat.lineage.model import Direction, Edge, Kind, Node, parse_node, reaching, walk


def run(number: int) -> Node:
    return Node(Kind.RUN, str(number))


class World:
    """Edges, and how often somebody looked."""

    def __init__(self, edges: Iterable[tuple[Node, Node]]) -> None:
        self.edges = {Edge(*edge) for edge in edges}
        self.looks = 0

    async def neighbours(self, nodes: Sequence[Node], direction: Direction) -> set[Edge]:
        self.looks += 1
        near = "downstream" if direction is Direction.UPSTREAM else "upstream"
        return {edge for edge in self.edges if getattr(edge, near) in nodes}


@pytest.mark.parametrize(
    ("text", "kind", "parts"),
    [
        ("model-version:digits/3", Kind.MODEL_VERSION, ("digits", "3")),
        ("dataset:a@b@1f", Kind.DATASET, ("a@b", "1f")),
        ("step:r1/train", Kind.STEP, ("r1", "train")),
    ],
)
def test_nodes_are_read_as_they_are_written(text: str, kind: Kind, parts: tuple[str, str]) -> None:
    node = parse_node(text)
    assert (node.kind, node.parts, str(node)) == (kind, parts, text)


@pytest.mark.parametrize(
    "text",
    [
        "", "run", "run:", "model:a/1", "model-version:a", "model-version:a/x", "model-version:/1", "dataset:a",
        "step:a", "run:" + "x" * 2_000, "model-version:a/" + "9" * 30,
    ],
)  # fmt: skip
def test_what_is_no_node_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_node(text)


async def test_a_walk_finds_everything_with_its_distance_in_one_look_per_level() -> None:
    world = World([(run(1), run(2)), (run(2), run(4)), (run(1), run(3)), (run(3), run(4)), (run(9), run(8))])
    graph = await walk([run(4)], Direction.UPSTREAM, world.neighbours)
    assert graph.nodes == {run(4): 0, run(2): 1, run(3): 1, run(1): 2}
    assert len(graph.edges) == 4
    assert not graph.truncated
    assert world.looks == 3


async def test_a_walk_ends_in_a_cycle() -> None:
    world = World([(run(1), run(2)), (run(2), run(1))])
    graph = await walk([run(1)], Direction.DOWNSTREAM, world.neighbours)
    assert set(graph.nodes) == {run(1), run(2)}
    assert len(graph.edges) == 2


@pytest.mark.parametrize(("depth", "limit", "found"), [(2, 100, 3), (100, 4, 4), (9, 100, 10), (10, 10, 10)])
async def test_a_walk_that_may_not_go_on_says_so(depth: int, limit: int, found: int) -> None:
    world = World([(run(n), run(n + 1)) for n in range(9)])
    graph = await walk([run(0)], Direction.DOWNSTREAM, world.neighbours, depth=depth, limit=limit)
    assert len(graph.nodes) == found
    assert graph.truncated == (found < 10)
    assert all(edge.upstream in graph.nodes and edge.downstream in graph.nodes for edge in graph.edges)


@given(edges=st.sets(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=40))
async def test_what_reaches_a_version_is_what_the_walk_from_it_finds(edges: set[tuple[int, int]]) -> None:
    version = Node(Kind.MODEL_VERSION, "m/1")
    nodes = [run(number) for number in range(12)]
    named = [(run(a), version if b == 12 else run(b)) for a, b in edges if a != 12]
    world = World(named)
    above = await walk([version], Direction.UPSTREAM, world.neighbours)
    assert await reaching(nodes, Kind.MODEL_VERSION, world.neighbours) == set(nodes) & set(above.nodes)
