"""The graph of what came from what, and the walk through it. Pure."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from mlplat.errors import InvalidInput

MAX_NODES = 10_000
MAX_DEPTH = 1_000
MAX_NODE_LENGTH = 1_100


class Kind(StrEnum):
    """What a node is.

    DATASET: ``name@digest``. FEATURE_VIEW: its name. RUN: a run's id. LOGGED_MODEL: its id. MODEL_VERSION:
    ``name/version``. STEP: a step of a pipeline run, ``pipeline_run_id/step``.
    """

    DATASET = "dataset"
    FEATURE_VIEW = "feature-view"
    RUN = "run"
    LOGGED_MODEL = "logged-model"
    MODEL_VERSION = "model-version"
    STEP = "step"


class Direction(StrEnum):
    """UPSTREAM: what it comes from. DOWNSTREAM: what came of it."""

    UPSTREAM = "upstream"
    DOWNSTREAM = "downstream"


@dataclass(frozen=True, order=True)
class Node:
    """One thing; written ``kind:id``."""

    kind: Kind
    id: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.id}"

    @property
    def parts(self) -> tuple[str, str]:
        """The two halves of the id of a dataset, a model version or a step.

        Raises:
            InvalidInput: it has no second half.
        """
        separator = "@" if self.kind is Kind.DATASET else "/"
        first, found, second = self.id.rpartition(separator) if self.kind is not Kind.STEP else self.id.partition("/")
        if not found or not first or not second:
            raise InvalidInput(f"{self}: expected {_FORMS[self.kind]}")
        return first, second


_FORMS = {
    Kind.DATASET: "dataset:NAME@DIGEST",
    Kind.FEATURE_VIEW: "feature-view:NAME",
    Kind.RUN: "run:ID",
    Kind.LOGGED_MODEL: "logged-model:ID",
    Kind.MODEL_VERSION: "model-version:NAME/VERSION",
    Kind.STEP: "step:PIPELINE_RUN/STEP",
}
_TWO_PARTS = frozenset({Kind.DATASET, Kind.MODEL_VERSION, Kind.STEP})


def parse_node(text: str) -> Node:
    """The node that a text names.

    Raises:
        InvalidInput: it names none.
    """
    kind, _colon, found = text.partition(":")
    if kind not in set(Kind) or not found or len(text) > MAX_NODE_LENGTH:
        raise InvalidInput(f"not a node of the lineage: {text[:100]!r}. Write {', '.join(_FORMS.values())}.")
    node = Node(Kind(kind), found)
    if node.kind in _TWO_PARTS:
        second = node.parts[1]
        if node.kind is Kind.MODEL_VERSION and not (second.isascii() and second.isdecimal() and len(second) <= 18):
            raise InvalidInput(f"{node}: expected {_FORMS[node.kind]}")
    return node


@dataclass(frozen=True, order=True)
class Edge:
    """``downstream`` came from ``upstream``."""

    upstream: Node
    downstream: Node

    def end(self, direction: Direction) -> Node:
        """Where it leads in a direction."""
        return self.upstream if direction is Direction.UPSTREAM else self.downstream


@dataclass
class Graph:
    """Nodes with their distance from where the walk began, and the edges between them.

    ``truncated``: there is more than the walk was allowed to take.
    """

    nodes: dict[Node, int] = field(default_factory=dict)
    edges: set[Edge] = field(default_factory=set)
    truncated: bool = False

    def of_kind(self, kind: Kind) -> list[Node]:
        """The nodes of a kind, the nearest first."""
        found = [(distance, node) for node, distance in self.nodes.items() if node.kind is kind]
        return [node for _distance, node in sorted(found)]


#: The edges that lead from nodes in a direction.
Neighbours = Callable[[Sequence[Node], Direction], Awaitable[Iterable[Edge]]]


async def walk(
    start: Sequence[Node],
    direction: Direction,
    neighbours: Neighbours,
    *,
    depth: int = MAX_DEPTH,
    limit: int = MAX_NODES,
) -> Graph:
    """Everything that can be reached in a direction, breadth first: one look per level, however many nodes it has."""
    graph = Graph(dict.fromkeys(start, 0))
    level = list(graph.nodes)
    for distance in range(1, depth + 1):
        if not level:
            return graph
        following: list[Node] = []
        for edge in sorted(await neighbours(level, direction)):
            end = edge.end(direction)
            if end not in graph.nodes:
                if len(graph.nodes) >= limit:
                    graph.truncated = True
                    continue
                graph.nodes[end] = distance
                following.append(end)
            graph.edges.add(edge)
        level = following
    graph.truncated |= bool(level and await neighbours(level, direction))
    return graph


async def reaching(start: Sequence[Node], wanted: Kind, neighbours: Neighbours, limit: int = MAX_NODES) -> set[Node]:
    """Those of the nodes from which something of a kind came, by any way. All of them when the graph is too large."""
    graph = await walk(start, Direction.DOWNSTREAM, neighbours, limit=limit)
    if graph.truncated:
        return set(start)
    above: dict[Node, list[Node]] = {}
    for edge in graph.edges:
        above.setdefault(edge.downstream, []).append(edge.upstream)
    left = [node for node in graph.nodes if node.kind is wanted]
    seen = set(left)
    while left:
        for node in above.get(left.pop(), ()):
            if node not in seen:
                seen.add(node)
                left.append(node)
    return seen & set(start)
