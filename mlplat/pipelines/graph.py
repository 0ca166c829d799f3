"""The graph of a pipeline for people: as Mermaid and as lines of text. ``drawing`` makes a picture of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from itertools import count

from mlplat.pipelines.dag import dependencies
from mlplat.pipelines.spec import PipelineSpec, Step

#: Fill and line of each state.
COLOURS = {
    "PENDING": ("#f6f7f9", "#9aa3ae"),
    "QUEUED": ("#eef1f5", "#6b7683"),
    "RUNNING": ("#dbeafe", "#2563eb"),
    "SUCCEEDED": ("#dcfce7", "#16a34a"),
    "FAILED": ("#fee2e2", "#dc2626"),
    "CANCELLED": ("#fef3c7", "#d97706"),
    "SKIPPED": ("#f3f4f6", "#c3c9d1"),
}
_SHAPES = {"approval": ('{{"', '"}}'), "command": ('[/"', '"/]'), "notebook": ('[\\"', '"\\]'), "uses": ('["', '"]')}


@dataclass(frozen=True)
class StepState:
    """How a step of a run is doing. ``items`` are (succeeded, all) of a fan-out; ``inner`` is of a sub-pipeline."""

    state: str
    items: tuple[int, int] | None = None
    inner: Mapping[str, StepState] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphNode:
    """A step. ``notes`` are a few words below its name."""

    name: str
    kind: str
    notes: tuple[str, ...]
    state: str | None
    is_finally: bool
    inner: Graph | None

    @property
    def lines(self) -> tuple[str, ...]:
        """What is written on it."""
        return (self.name, *self.notes)


@dataclass(frozen=True)
class GraphEdge:
    """``after`` waits for ``before``; loosely, when it only waits for its end, as finally steps do."""

    before: str
    after: str
    is_loose: bool = False


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they may run."""

    name: str
    nodes: tuple[GraphNode, ...]
    edges: tuple[GraphEdge, ...]


def graph_of(spec: PipelineSpec, states: Mapping[str, StepState] | None = None) -> Graph:
    """The graph of a definition, with the states of a run of it if there is one."""
    known = states or {}
    written = {name: index for index, name in enumerate(spec.all_steps)}
    needs = {name: sorted(before, key=written.__getitem__) for name, before in dependencies(spec).items()}
    order = [
        *TopologicalSorter({name: needs[name] for name in spec.steps}).static_order(),
        *TopologicalSorter({name: needs[name] for name in spec.finally_}).static_order(),
    ]
    nodes = tuple(_node(name, spec.all_steps[name], name in spec.finally_, known.get(name)) for name in order)
    edges = [GraphEdge(need, name) for name in order for need in needs[name]]
    waited_for = {edge.before for edge in edges}
    last = [name for name in order if name in spec.steps and name not in waited_for]
    first = [name for name in order if name in spec.finally_ and not needs[name]]
    edges += [GraphEdge(before, after, is_loose=True) for before in last for after in first]
    return Graph(spec.name, nodes, tuple(edges))


def _node(name: str, step: Step, is_finally: bool, known: StepState | None) -> GraphNode:
    notes = [] if step.kind in {"uses", "pipeline", name} else [step.kind]
    if step.foreach is not None:
        done = known.items if known is not None else None
        notes.append("for each" if done is None else f"{done[0]} of {done[1]}")
    if step.when is not None:
        notes.append("conditional")
    inner = None
    if step.pipeline is not None:
        inner = graph_of(step.pipeline, known.inner if known is not None else None)
    return GraphNode(name, step.kind, tuple(notes), known.state if known is not None else None, is_finally, inner)


def to_text(graph: Graph) -> str:
    """One line per step, those of sub-pipelines indented, each with what it waits for."""
    return "\n".join(_text_lines(graph, ""))


def _text_lines(graph: Graph, indent: str) -> Iterator[str]:
    width = max((len(node.name) for node in graph.nodes), default=0)
    for node in graph.nodes:
        before = [edge.before for edge in graph.edges if edge.after == node.name and not edge.is_loose]
        notes = [node.kind if node.kind == "pipeline" else "", *node.notes, "finally" if node.is_finally else ""]
        parts = [
            f"{indent}{node.name:<{width}}",
            f"{node.state:<9}" if node.state is not None else "",
            f"← {', '.join(before)}" if before else "",
            f"({', '.join(filter(None, notes))})" if any(notes) else "",
        ]
        yield "  ".join(filter(None, parts)).rstrip()
        if node.inner is not None:
            yield from _text_lines(node.inner, f"{indent}  ")


def to_mermaid(graph: Graph) -> str:
    """A Mermaid flowchart, with the colours of states if there are any."""
    numbers = count(1)
    states: dict[str, list[str]] = {}
    lines = ["flowchart TD", *_mermaid_lines(graph, "  ", numbers, states)]
    for state, ids in states.items():
        fill, line = COLOURS[state]
        lines.append(f"  classDef {state} fill:{fill},stroke:{line},color:#1f2937")
        lines.append(f"  class {','.join(ids)} {state}")
    return "\n".join(lines)


def _mermaid_lines(graph: Graph, indent: str, numbers: Iterator[int], states: dict[str, list[str]]) -> Iterator[str]:
    # Numbers: a step may have the name of a word of Mermaid's, such as "end".
    ids = {node.name: f"n{next(numbers)}" for node in graph.nodes}
    for node in graph.nodes:
        own, label = ids[node.name], "<br/>".join(node.lines)
        if node.state is not None:
            states.setdefault(node.state, []).append(own)
        if node.inner is None:
            left, right = _SHAPES[node.kind]
            yield f"{indent}{own}{left}{label}{right}"
            continue
        yield f'{indent}subgraph {own} ["{label}"]'
        yield from _mermaid_lines(node.inner, f"{indent}  ", numbers, states)
        yield f"{indent}end"
    for edge in graph.edges:
        yield f"{indent}{ids[edge.before]} {'-.->' if edge.is_loose else '-->'} {ids[edge.after]}"
