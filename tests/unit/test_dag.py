"""Who waits for whom, and which references are refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.pipelines.dag import Problem, check_graph, dependencies
from mlplat.pipelines.spec import Step


def step(needs: list[str] | None = None, foreach: Any = None, **arguments: Any) -> Step:
    return Step.model_validate({"uses": "m:f", "needs": needs or [], "with": arguments, "foreach": foreach})


def test_a_sound_graph_has_no_problems() -> None:
    steps = {"a": step(), "b": step(["a"]), "c": step(x="${{ steps.b.output }} ${{ params.n }}")}
    assert check_graph(steps, {"n": None}) == []


def test_dependencies_come_from_needs_arguments_and_foreach() -> None:
    steps = {
        "a": step(),
        "b": step(),
        "c": step(),
        "d": step(["a"], foreach="${{ steps.b.output }}", x={"deep": ["${{ steps.c.output.rows[0] }}"]}),
    }
    assert dependencies(steps) == {"a": set(), "b": set(), "c": set(), "d": {"a", "b", "c"}}


def test_an_unknown_need_is_a_problem_at_its_index_with_a_hint() -> None:
    steps = {"train": step(), "test": step(["train", "trian"])}
    assert check_graph(steps, {}) == [
        Problem(("steps", "test", "needs", 1), "unknown step 'trian'; did you mean 'train'?")
    ]


def test_without_a_close_name_the_known_ones_are_listed() -> None:
    steps = {"alpha": step(), "beta": step(["zzz"])}
    assert check_graph(steps, {})[0].message == "unknown step 'zzz'; there is alpha, beta"


def test_an_unknown_parameter_is_a_problem_at_the_expression() -> None:
    steps = {"a": step(x={"y": ["fixed", "${{ params.sed }}"]})}
    assert check_graph(steps, {"seed": None}) == [
        Problem(("steps", "a", "with", "x", "y", 1), "unknown parameter 'sed'; did you mean 'seed'?")
    ]


def test_without_parameters_the_hint_says_so() -> None:
    assert check_graph({"a": step(x="${{ params.seed }}")}, {})[0].message == "unknown parameter 'seed'; there is none"


def test_an_unknown_step_in_an_expression_is_a_problem() -> None:
    steps = {"load": step(), "b": step(x="${{ steps.laod.output }}")}
    assert check_graph(steps, {}) == [Problem(("steps", "b", "with", "x"), "unknown step 'laod'; did you mean 'load'?")]


def test_a_malformed_expression_is_a_problem() -> None:
    (problem,) = check_graph({"a": step(x="${{ params. }}")}, {})
    assert problem.path == ("steps", "a", "with", "x")
    assert problem.message.startswith("not an expression: 'params.'")


def test_item_exists_only_in_the_arguments_of_a_fan_out() -> None:
    assert check_graph({"a": step(foreach=[1], x="${{ item.n }}")}, {}) == []
    reason = "item exists only in the arguments of a step with foreach"
    assert check_graph({"a": step(x="${{ item }}")}, {}) == [Problem(("steps", "a", "with", "x"), reason)]
    assert check_graph({"a": step(foreach="${{ item }}")}, {}) == [Problem(("steps", "a", "foreach"), reason)]
    assert check_graph({"a": step(foreach=["${{ item }}"])}, {}) == [Problem(("steps", "a", "foreach", 0), reason)]


def test_a_foreach_text_without_an_expression_is_a_problem() -> None:
    assert check_graph({"a": step(foreach="steps.b.output")}, {}) == [
        Problem(("steps", "a", "foreach"), "expected a list, or an expression that gives one")
    ]


@pytest.mark.parametrize(
    ("steps", "cycle"),
    [
        ({"a": step(["a"])}, "a → a"),
        ({"a": step(x="${{ steps.a.output }}")}, "a → a"),
        ({"a": step(["b"]), "b": step(x="${{ steps.a.output }}")}, "a → b → a"),
    ],
)
def test_steps_that_wait_for_one_another_are_a_problem(steps: dict[str, Step], cycle: str) -> None:
    (problem,) = check_graph(steps, {})
    assert problem.path == ("steps", "a")
    assert problem.message == f"the steps wait for one another: {cycle}"


def test_a_cycle_is_told_in_the_order_of_waiting() -> None:
    steps = {"a": step(["b"]), "b": step(["c"]), "c": step(["a"]), "d": step(["a"])}
    (problem,) = check_graph(steps, {})
    names = problem.message.partition(": ")[2].split(" → ")
    assert names[0] == names[-1] == problem.path[1]
    assert all(later in dependencies(steps)[earlier] for earlier, later in pairwise(names))


def test_every_problem_is_reported() -> None:
    steps = {"a": step(["x1"], y="${{ params.x2 }} ${{ steps.x3.output }}"), "b": step(["x4"])}
    messages = [problem.message for problem in check_graph(steps, {})]
    assert [name for name in ("x1", "x2", "x3", "x4") if any(repr(name) in message for message in messages)] == [
        "x1", "x2", "x3", "x4",
    ]  # fmt: skip


def test_a_chain_of_ten_thousand_steps_is_sound() -> None:
    steps = {"s0": step()} | {f"s{number}": step([f"s{number - 1}"]) for number in range(1, 10_000)}
    assert check_graph(steps, {}) == []


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.integers(0, 7), st.sets(st.integers(0, 7), max_size=3), min_size=1))
def test_a_graph_is_refused_exactly_when_it_has_a_cycle(edges: dict[int, set[int]]) -> None:
    known = {node: {need for need in needs if need in edges} for node, needs in edges.items()}
    left = dict(known)
    while free := [node for node, needs in left.items() if not needs & left.keys()]:
        for node in free:
            del left[node]
    steps = {f"s{node}": step([f"s{need}" for need in sorted(needs)]) for node, needs in known.items()}
    assert bool(check_graph(steps, {})) == bool(left)
