"""The graph of a pipeline as an SVG picture: layers from top to bottom, few crossings, sub-pipelines as boxes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

from mlplat.errors import InvalidInput
from mlplat.pipelines.graph import COLOURS, Graph, GraphEdge, GraphNode

#: More cannot be read, and take long.
MAX_DRAWN = 500
# Pixels.
_CHARACTER, _LINE, _PADDING = 7.4, 17.0, 12.0
_GAP_X, _GAP_Y, _MARGIN = 28.0, 46.0, 16.0
_TITLE = 26.0
_BEND_WIDTH = 10.0
_SWEEPS = 8
_PLAIN = ("#ffffff", "#64748b")

Point = tuple[float, float]


@dataclass
class _Box:
    """What takes room in a layer: a step, or the bend of an edge that passes by."""

    node: GraphNode | None
    width: float
    height: float
    inner: _Picture | None = None
    x: float = 0.0
    y: float = 0.0

    @property
    def centre(self) -> float:
        return self.x + self.width / 2


@dataclass(frozen=True)
class _Picture:
    width: float
    height: float
    boxes: list[_Box]
    lines: list[tuple[list[Point], bool]]


def to_svg(graph: Graph) -> str:
    """The picture, as the text of an SVG file.

    Raises:
        InvalidInput: more than ``MAX_DRAWN`` steps.
    """
    steps = _count(graph)
    if steps > MAX_DRAWN:
        raise InvalidInput(f"{graph.name} has {steps} steps; a picture of more than {MAX_DRAWN} cannot be read")
    picture = _arrange(graph)
    width, height = picture.width + 2 * _MARGIN, picture.height + 2 * _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}" font-family="ui-sans-serif, system-ui, sans-serif" font-size="13">',
            f"<title>{escape(graph.name)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#64748b"/></marker></defs>',
            f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
            *_draw(picture, _MARGIN, _MARGIN),
            "</svg>",
        ]
    )


def _count(graph: Graph) -> int:
    return sum(1 + (_count(node.inner) if node.inner is not None else 0) for node in graph.nodes)


def _arrange(graph: Graph) -> _Picture:
    layer_of = _layers(graph)
    boxes = {node.name: _box(node) for node in graph.nodes}
    layers: list[list[_Box]] = [[] for _ in range(max(layer_of.values()) + 1)]
    for node in graph.nodes:
        layers[layer_of[node.name]].append(boxes[node.name])
    chains = [_chain(edge, boxes, layer_of, layers) for edge in graph.edges]
    above: dict[int, list[_Box]] = {}
    below: dict[int, list[_Box]] = {}
    for chain in chains:
        for upper, lower in pairwise(chain):
            above.setdefault(id(lower), []).append(upper)
            below.setdefault(id(upper), []).append(lower)
    _order(layers, above, below)
    _place(layers, above, below)
    every = [box for layer in layers for box in layer]
    left = min(box.x for box in every)
    for box in every:
        box.x -= left
    lines = [(list(_points(chain)), edge.is_loose) for chain, edge in zip(chains, graph.edges, strict=True)]
    width, height = max(box.x + box.width for box in every), max(box.y + box.height for box in every)
    return _Picture(width, height, [box for box in every if box.node is not None], lines)


def _layers(graph: Graph) -> dict[str, int]:
    """Each step one layer below the last that it waits for."""
    before: dict[str, list[str]] = {}
    for edge in graph.edges:
        before.setdefault(edge.after, []).append(edge.before)
    found: dict[str, int] = {}
    for node in graph.nodes:  # in an order in which they may run
        found[node.name] = 1 + max((found[name] for name in before.get(node.name, ())), default=-1)
    return found


def _box(node: GraphNode) -> _Box:
    written = node.lines if node.inner is None else [_title(node)]
    width = max(len(line) for line in written) * _CHARACTER + 2 * _PADDING
    if node.inner is None:
        return _Box(node, width, len(written) * _LINE + _PADDING)
    inner = _arrange(node.inner)
    return _Box(node, max(width, inner.width + 2 * _PADDING), inner.height + _TITLE + _PADDING, inner)


def _chain(
    edge: GraphEdge, boxes: Mapping[str, _Box], layer_of: Mapping[str, int], layers: Sequence[list[_Box]]
) -> list[_Box]:
    """The boxes that the edge runs through: a bend in every layer that it passes."""
    bends = []
    for layer in range(layer_of[edge.before] + 1, layer_of[edge.after]):
        bend = _Box(None, _BEND_WIDTH, 0.0)
        layers[layer].append(bend)
        bends.append(bend)
    return [boxes[edge.before], *bends, boxes[edge.after]]


def _order(layers: list[list[_Box]], above: Mapping[int, list[_Box]], below: Mapping[int, list[_Box]]) -> None:
    """Sorts each layer by where its neighbours stand, down and up again, which undoes most crossings."""
    place = {id(box): float(index) for layer in layers for index, box in enumerate(layer)}
    for sweep in range(_SWEEPS):
        beside, ordered = (above, layers) if sweep % 2 == 0 else (below, layers[::-1])
        for layer in ordered:
            weights: dict[int, float] = {}
            for box in layer:
                mean = _mean([place[id(other)] for other in beside.get(id(box), ())])
                weights[id(box)] = place[id(box)] if mean is None else mean
            layer.sort(key=lambda box, weights=weights: weights[id(box)])  # type: ignore[misc]  # mypy infers no default
            place.update((id(box), float(index)) for index, box in enumerate(layer))


def _place(layers: list[list[_Box]], above: Mapping[int, list[_Box]], below: Mapping[int, list[_Box]]) -> None:
    """Rows from top to bottom; in each, boxes as near to the middle of their neighbours as their order allows."""
    y = 0.0
    for layer in layers:
        x = 0.0
        for box in layer:
            box.x, box.y = x, y
            x += box.width + _GAP_X
        y += max(box.height for box in layer) + _GAP_Y
        for box in layer:
            if box.node is None:
                box.height = y - _GAP_Y - box.y
    for sweep in range(_SWEEPS):
        beside, ordered = (above, layers) if sweep % 2 == 0 else (below, layers[::-1])
        for layer in ordered:
            _shift(layer, [_mean([other.centre for other in beside.get(id(box), ())]) for box in layer])


def _shift(layer: Sequence[_Box], wanted: Sequence[float | None]) -> None:
    """Moves boxes towards the centres that they want. The mean of two arrangements without overlaps has none."""
    targets = [box.x if centre is None else centre - box.width / 2 for box, centre in zip(layer, wanted, strict=True)]
    rightwards, edge = [], float("-inf")
    for box, target in zip(layer, targets, strict=True):
        rightwards.append(max(target, edge))
        edge = rightwards[-1] + box.width + _GAP_X
    leftwards, edge = [], float("inf")
    for box, target in zip(reversed(layer), reversed(targets), strict=True):
        leftwards.append(min(target, edge - box.width))
        edge = leftwards[-1] - _GAP_X
    for box, right, left in zip(layer, rightwards, reversed(leftwards), strict=True):
        box.x = (right + left) / 2


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _points(chain: Sequence[_Box]) -> Iterator[Point]:
    first, *bends, last = chain
    yield first.centre, first.y + first.height
    for bend in bends:
        yield bend.centre, bend.y
        yield bend.centre, bend.y + bend.height
    yield last.centre, last.y


def _draw(picture: _Picture, dx: float, dy: float) -> Iterator[str]:
    for points, is_loose in picture.lines:
        yield _line([(x + dx, y + dy) for x, y in points], is_loose)
    for box in picture.boxes:
        yield from _draw_box(box, box.x + dx, box.y + dy)


def _line(points: Sequence[Point], is_loose: bool) -> str:
    (x, y), *rest = points
    path = [f"M{x:.1f} {y:.1f}"]
    for nx, ny in rest:
        middle = (y + ny) / 2
        path.append(f"C{x:.1f} {middle:.1f} {nx:.1f} {middle:.1f} {nx:.1f} {ny:.1f}")
        x, y = nx, ny
    dashes = ' stroke-dasharray="4 4"' if is_loose else ""
    return f'<path d="{" ".join(path)}" fill="none" stroke="#64748b"{dashes} marker-end="url(#tip)"/>'


def _draw_box(box: _Box, x: float, y: float) -> Iterator[str]:
    node = box.node
    assert node is not None, "bends are not drawn"
    fill, line = _PLAIN if node.state is None else COLOURS[node.state]
    dashes = ' stroke-dasharray="6 3"' if node.kind == "approval" else ""
    yield (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="7" fill="{fill}" '
        f'stroke="{line}"{dashes}><title>{escape(f"{node.name}: {node.state or node.kind}")}</title></rect>'
    )
    if box.inner is not None:
        yield f'<text x="{x + _PADDING:.1f}" y="{y + 18:.1f}" fill="#1f2937">{escape(_title(node))}</text>'
        yield from _draw(box.inner, x + (box.width - box.inner.width) / 2, y + _TITLE)
        return
    for index, text in enumerate(node.lines):
        colour = "#1f2937" if index == 0 else "#64748b"
        yield (
            f'<text x="{x + box.width / 2:.1f}" y="{y + _PADDING / 2 + (index + 0.75) * _LINE:.1f}" '
            f'text-anchor="middle" fill="{colour}">{escape(text)}</text>'
        )


def _title(node: GraphNode) -> str:
    """What is written on top of a sub-pipeline, in one line."""
    return " · ".join(node.lines)
