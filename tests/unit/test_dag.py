"""Who waits for whom, and which references are refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.pipelines import dag
from mlplat.pipelines.dag import Problem, dependencies
from mlplat.pipelines.spec import MAX_DEPTH, PipelineSpec

Steps = dict[str, dict[str, Any]]


def step(needs: list[str] | None = None, foreach: Any = None, **arguments: Any) -> dict[str, Any]:
    return {"uses": "m:f", "needs": needs or [], "with": arguments, "foreach": foreach}


def spec_of(steps: Steps, *parameters: str, **fields: Any) -> PipelineSpec:
    known = {name: {"type": "int"} for name in parameters}
    return PipelineSpec.model_validate({"name": "p", "parameters": known, "steps": steps} | fields)


def check_graph(steps: Steps, *parameters: str, **fields: Any) -> list[Problem]:
    return dag.check_graph(spec_of(steps, *parameters, **fields))


def test_a_sound_graph_has_no_problems() -> None:
    steps = {"a": step(), "b": step(["a"]), "c": step(x="${{ steps.b.output }} ${{ params.n }}")}
    assert check_graph(steps, "n") == []


def test_dependencies_come_from_needs_arguments_and_foreach() -> None:
    steps = {
        "a": step(),
        "b": step(),
        "c": step(),
        "d": step(["a"], foreach="${{ steps.b.output }}", x={"deep": ["${{ steps.c.output.rows[0] }}"]}),
    }
    assert dependencies(spec_of(steps)) == {"a": set(), "b": set(), "c": set(), "d": {"a", "b", "c"}}


def test_an_unknown_need_is_a_problem_at_its_index_with_a_hint() -> None:
    steps = {"train": step(), "test": step(["train", "trian"])}
    assert check_graph(steps) == [Problem(("steps", "test", "needs", 1), "unknown step 'trian'; did you mean 'train'?")]


def test_without_a_close_name_the_known_ones_are_listed() -> None:
    steps = {"alpha": step(), "beta": step(["zzz"])}
    assert check_graph(steps)[0].message == "unknown step 'zzz'; there is alpha, beta"


def test_an_unknown_parameter_is_a_problem_at_the_expression() -> None:
    steps = {"a": step(x={"y": ["fixed", "${{ params.sed }}"]})}
    assert check_graph(steps, "seed") == [
        Problem(("steps", "a", "with", "x", "y", 1), "unknown parameter 'sed'; did you mean 'seed'?")
    ]


def test_without_parameters_the_hint_says_so() -> None:
    assert check_graph({"a": step(x="${{ params.seed }}")})[0].message == "unknown parameter 'seed'; there is none"


def test_an_unknown_step_in_an_expression_is_a_problem() -> None:
    steps = {"load": step(), "b": step(x="${{ steps.laod.output }}")}
    assert check_graph(steps) == [Problem(("steps", "b", "with", "x"), "unknown step 'laod'; did you mean 'load'?")]


def test_a_malformed_expression_is_a_problem() -> None:
    (problem,) = check_graph({"a": step(x="${{ params. }}")})
    assert problem.path == ("steps", "a", "with", "x")
    assert problem.message.startswith("not an expression: 'params.'")


def test_item_exists_only_in_the_arguments_of_a_fan_out() -> None:
    assert check_graph({"a": step(foreach=[1], x="${{ item.n }}")}) == []
    reason = "item exists only in the arguments of a step with foreach"
    assert check_graph({"a": step(x="${{ item }}")}) == [Problem(("steps", "a", "with", "x"), reason)]
    assert check_graph({"a": step(foreach="${{ item }}")}) == [Problem(("steps", "a", "foreach"), reason)]
    assert check_graph({"a": step(foreach=["${{ item }}"])}) == [Problem(("steps", "a", "foreach", 0), reason)]


def test_a_foreach_text_without_an_expression_is_a_problem() -> None:
    assert check_graph({"a": step(foreach="steps.b.output")}) == [
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
def test_steps_that_wait_for_one_another_are_a_problem(steps: Steps, cycle: str) -> None:
    (problem,) = check_graph(steps)
    assert problem.path == ("steps", "a")
    assert problem.message == f"the steps wait for one another: {cycle}"


def test_a_cycle_is_told_in_the_order_of_waiting() -> None:
    steps = {"a": step(["b"]), "b": step(["c"]), "c": step(["a"]), "d": step(["a"])}
    (problem,) = check_graph(steps)
    names = problem.message.partition(": ")[2].split(" → ")
    assert names[0] == names[-1] == problem.path[1]
    assert all(later in dependencies(spec_of(steps))[earlier] for earlier, later in pairwise(names))


def test_every_problem_is_reported() -> None:
    steps = {"a": step(["x1"], y="${{ params.x2 }} ${{ steps.x3.output }}"), "b": step(["x4"])}
    messages = [problem.message for problem in check_graph(steps)]
    assert [name for name in ("x1", "x2", "x3", "x4") if any(repr(name) in message for message in messages)] == [
        "x1", "x2", "x3", "x4",
    ]  # fmt: skip


def test_a_chain_of_ten_thousand_steps_is_sound() -> None:
    steps = {"s0": step()} | {f"s{number}": step([f"s{number - 1}"]) for number in range(1, 10_000)}
    assert check_graph(steps) == []


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.integers(0, 7), st.sets(st.integers(0, 7), max_size=3), min_size=1))
def test_a_graph_is_refused_exactly_when_it_has_a_cycle(edges: dict[int, set[int]]) -> None:
    known = {node: {need for need in needs if need in edges} for node, needs in edges.items()}
    left = dict(known)
    while free := [node for node, needs in left.items() if not needs & left.keys()]:
        for node in free:
            del left[node]
    steps = {f"s{node}": step([f"s{need}" for need in sorted(needs)]) for node, needs in known.items()}
    assert bool(check_graph(steps)) == bool(left)


# -- conditions, commands, finally steps, sub-pipelines ---------------------------------------------


def test_conditions_and_commands_are_needs_too() -> None:
    steps = {
        "a": step(),
        "b": step() | {"when": "${{ steps.a.state == 'SKIPPED' }}"},
        "c": {"command": ["run", "--x=${{ steps.b.output }}"]},
        "d": {"command": "run ${{ steps.c.output }}", "with": {"Y": "${{ steps.a.output }}"}},
    }
    assert dependencies(spec_of(steps)) == {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"c", "a"}}


@pytest.mark.parametrize(
    "when", ["true", "", "params.n", "${{ params.n }} ${{ params.n }}", "${{ params.n }} > 1", "not ${{ params.n }}"]
)
def test_a_condition_is_one_expression_and_nothing_else(when: str) -> None:
    # Anything else is a text when it is evaluated, which is always true.
    assert check_graph({"a": step() | {"when": when}}, "n") == [
        Problem(("steps", "a", "when"), "expected one expression: ${{ … }}")
    ]


@pytest.mark.parametrize("foreach", ["", "a,b", "x ${{ params.n }}", "${{ params.n }}${{ params.n }}"])
def test_a_fan_out_goes_over_one_expression_or_a_list(foreach: str) -> None:
    assert check_graph({"a": step(foreach=foreach)}, "n") == [
        Problem(("steps", "a", "foreach"), "expected a list, or an expression that gives one")
    ]


def test_an_expression_may_have_room_around_it() -> None:
    assert check_graph({"a": step(foreach=" ${{ params.n }}\n") | {"when": "\n${{ params.n }} "}}, "n") == []


def test_finally_steps_read_everything_and_need_one_another() -> None:
    finally_ = {
        "clean": step(x="${{ steps.a.output }} ${{ run.state }}"),
        "tell": step(["clean"], y="${{ steps.clean.output }}"),
    }
    assert check_graph({"a": step()}, **{"finally": finally_}) == []
    assert dependencies(spec_of({"a": step()}, **{"finally": finally_})) == {
        "a": set(), "clean": set(), "tell": {"clean"},
    }  # fmt: skip


def test_steps_do_not_wait_for_finally_steps_and_do_not_know_the_end() -> None:
    steps = {"a": step(["z"]), "b": step(x="${{ steps.z.output }}"), "c": step(x="${{ run.state }} ${{ run.id }}")}
    problems = check_graph(steps, **{"finally": {"z": step(["a"])}})
    assert [(".".join(map(str, problem.path)), problem.message.partition(";")[0]) for problem in problems] == [
        ("steps.a.needs.0", "unknown step 'z'"),
        ("steps.b.with.x", "unknown step 'z'"),
        ("steps.c.with.x", "run.state is known only to finally steps"),
        ("finally.z.needs.0", "unknown step 'a'"),
    ]


def test_finally_steps_that_wait_for_one_another_are_a_problem() -> None:
    (problem,) = check_graph({"a": step()}, **{"finally": {"y": step(["z"]), "z": step(["y"])}})
    assert problem.path[0] == "finally"


def test_what_is_wrong_inside_a_sub_pipeline_is_told_with_its_path() -> None:
    inner = {"name": "inner", "parameters": {"x": {"type": "int"}, "y": {"type": "int", "default": 1}}}
    bad = inner | {"steps": {"s": step(["nobody"])}}
    assert [problem.path for problem in check_graph({"sub": {"pipeline": bad, "with": {"x": 1}}})] == [
        ("steps", "sub", "pipeline", "steps", "s", "needs", 0)
    ]
    good = inner | {"steps": {"s": step(v="${{ params.x }}")}}
    problems = check_graph({"sub": {"pipeline": good, "with": {"z": 1}}})
    assert [(problem.path[2:], problem.message) for problem in problems] == [
        (("with", "z"), "unknown parameter 'z'; there is x, y"),
        (("with",), "the sub-pipeline's parameter 'x' is required, and has no value"),
    ]


def test_an_inner_pipeline_does_not_see_the_outer_one() -> None:
    inner = {"name": "inner", "steps": {"s": step(v="${{ params.n }} ${{ steps.a.output }}")}}
    problems = check_graph({"a": step(), "sub": {"pipeline": inner}}, "n")
    assert [problem.message.partition(";")[0] for problem in problems] == ["unknown parameter 'n'", "unknown step 'a'"]


def test_sub_pipelines_are_nested_only_so_deep() -> None:
    def nested(depth: int) -> dict[str, Any]:
        inner = {"pipeline": nested(depth - 1)} if depth else step()
        return {"name": "p", "steps": {"s": inner}}

    assert dag.check_graph(PipelineSpec.model_validate(nested(MAX_DEPTH))) == []
    (problem,) = dag.check_graph(PipelineSpec.model_validate(nested(MAX_DEPTH + 1)))
    assert problem.message == f"sub-pipelines are nested more than {MAX_DEPTH} deep"


def test_outputs_and_the_concurrency_key_are_checked() -> None:
    concurrency = {"key": "${{ params.n }}-${{ steps.a.output }}"}
    problems = check_graph({"a": step()}, "n", outputs={"x": ["${{ steps.b.output }}"]}, concurrency=concurrency)
    assert [problem.path for problem in problems] == [("outputs", "x", 0), ("concurrency", "key")]
