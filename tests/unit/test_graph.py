"""Graphs of pipelines: what they say, and that their pictures can be read."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.errors import InvalidInput
from mlplat.pipelines import drawing
from mlplat.pipelines.drawing import to_svg
from mlplat.pipelines.graph import COLOURS, Graph, StepState, graph_of, to_mermaid, to_text
from mlplat.pipelines.loader import build_spec
from mlplat.pipelines.model import State

INNER = {"name": "inner", "steps": {"deep": {"uses": "m:f"}, "end": {"uses": "m:f", "needs": ["deep"]}}}
SPEC = build_spec(
    {
        "name": "whole",
        "steps": {
            "join": {"uses": "m:f", "needs": ["load", "sub"]},
            "load": {"uses": "m:f"},
            "fan": {"command": "ls", "foreach": "${{ steps.load.output }}"},
            "ask": {"approval": {}, "when": "${{ steps.fan.output }}"},
            "sub": {"pipeline": INNER},
        },
        "finally": {"last": {"notebook": "a.ipynb"}, "later": {"uses": "m:f", "needs": ["last"]}},
    }
)


def test_text() -> None:
    assert to_text(graph_of(SPEC)).splitlines() == [
        "load",
        "sub    (pipeline)",
        "  deep",
        "  end   ← deep",
        "fan    ← load  (command, for each)",
        "join   ← load, sub",
        "ask    ← fan  (approval, conditional)",
        "last   (notebook, finally)",
        "later  ← last  (finally)",
    ]
    assert "fan    RUNNING    ← load" in to_text(graph_of(SPEC, {"fan": StepState("RUNNING")}))


def test_mermaid_with_states() -> None:
    states = {"load": StepState("SUCCEEDED"), "fan": StepState("RUNNING", (1, 3)), "ask": StepState("PENDING")}
    text = to_mermaid(graph_of(SPEC, {**states, "sub": StepState("FAILED", inner={"deep": StepState("FAILED")})}))
    ids = dict(re.findall(r'^ *(?:subgraph )?(n\d+) ?(?:\[|\[/|\{\{|\[\\)"([^"<]*)', text, re.MULTILINE))
    names = {name: number for number, name in ids.items()}
    assert f"  {names['load']} --> {names['fan']}" in text
    assert f"  {names['sub']} --> {names['join']}" in text
    assert f"  {names['ask']} -.-> {names['last']}" in text
    assert f"  {names['last']} --> {names['later']}" in text
    assert f'    {names["end"]}["end"]' in text
    assert f"  class {names['sub']},{names['deep']} FAILED" in text
    assert "1 of 3" in text
    assert text.count("subgraph") == text.splitlines().count("  end")


def test_every_state_has_a_colour() -> None:
    assert set(COLOURS) == {str(state) for state in State}


def test_a_picture_has_every_step_and_every_edge() -> None:
    graph = graph_of(SPEC, {"load": StepState("FAILED")})
    root = ElementTree.fromstring(to_svg(graph))
    space = {"s": "http://www.w3.org/2000/svg"}
    written = {element.text for element in root.iterfind(".//s:text", space)}
    assert written >= {"join", "load", "fan", "ask", "sub", "deep", "end", "last", "later", "for each"}
    edges = [path for path in root.iterfind(".//s:path", space) if path.get("fill") == "none"]
    assert len(edges) == len(graph.edges) + 1
    assert COLOURS["FAILED"][0] in {element.get("fill") for element in root.iterfind(".//s:rect", space)}


@st.composite
def pipelines(draw: st.DrawFn, depth: int = 2) -> dict[str, Any]:
    count = draw(st.integers(1, 9))
    steps: dict[str, Any] = {}
    for number in range(count):
        needs = draw(st.sets(st.integers(0, number - 1))) if number else set()
        is_inner = depth > 0 and draw(st.integers(0, 4)) == 0
        what = {"pipeline": draw(pipelines(depth - 1))} if is_inner else {"uses": "m:f"}
        steps[f"s{number}" * draw(st.integers(1, 6))] = {**what, "needs": [list(steps)[need] for need in needs]}
    return {"name": "p", "steps": steps}


@settings(max_examples=60, deadline=None)
@given(pipelines())
def test_boxes_never_overlap_and_edges_run_downwards(document: dict[str, Any]) -> None:
    check(drawing._arrange(graph_of(build_spec(document))))


def check(picture: drawing._Picture) -> None:
    boxes = picture.boxes
    for index, box in enumerate(boxes):
        assert box.x >= -0.01
        assert box.x + box.width <= picture.width + 0.01
        assert box.y + box.height <= picture.height + 0.01
        for other in boxes[index + 1 :]:
            apart = (
                box.x + box.width <= other.x + 0.01
                or other.x + other.width <= box.x + 0.01
                or box.y + box.height <= other.y + 0.01
                or other.y + other.height <= box.y + 0.01
            )
            assert apart, (box, other)
        if box.inner is not None:
            assert box.inner.width <= box.width
            assert box.inner.height < box.height
            check(box.inner)
    for points, _loose in picture.lines:
        heights = [y for _x, y in points]
        assert heights == sorted(heights)
        for x, y in points[1:-1]:  # it passes beside the boxes of the layers between
            assert not any(box.x < x < box.x + box.width and box.y < y < box.y + box.height for box in boxes)


def test_what_cannot_be_read_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "MAX_DRAWN", 8)
    with pytest.raises(InvalidInput, match="whole has 9 steps"):
        to_svg(graph_of(SPEC))


def test_crossings_are_undone() -> None:
    steps = {"a": [], "b": [], "c": [], "x": ["c"], "y": ["b"], "z": ["a"]}
    graph = graph_of(build_spec({"name": "p", "steps": {k: {"uses": "m:f", "needs": n} for k, n in steps.items()}}))
    assert crossings(graph) == 0


def crossings(graph: Graph) -> int:
    lines = [(points[0][0], points[-1][0]) for points, _loose in drawing._arrange(graph).lines]
    return sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for i, a in enumerate(lines) for b in lines[i + 1 :])
