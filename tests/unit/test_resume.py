"""Which results of an earlier run still hold."""

from __future__ import annotations

from typing import Any

import pytest

from mlplat.errors import InvalidInput
from mlplat.pipelines.model import WHOLE_STEP, Node, RunSnapshot, State, StepRun
from mlplat.pipelines.resume import check_resume, reusable
from mlplat.pipelines.spec import PipelineSpec
from tests.unit.playing import new_run, spec_of, stored

PARAMETERS = {"n": {"type": "int", "default": 1}, "m": {"type": "int", "default": 1}}
STEPS: dict[str, Any] = {
    "load": {"with": {"n": "${{ params.n }}"}},
    "train": {"with": {"x": "${{ steps.load.output }}"}},
    "test": {"needs": ["train"], "when": "${{ params.m }}"},
    "other": {},
}


def earlier_run(spec: PipelineSpec, states: dict[Node, State], params: dict[str, Any] | None = None) -> RunSnapshot:
    run = new_run(spec, params or {"n": 1, "m": 1})
    run.run_id, run.state = "run0", State.FAILED
    rows = []
    for (step, item), state in states.items():
        count = sum(node[0] == step for node in states) - 1
        row = StepRun(step, item, state, items=count if count and item == WHOLE_STEP else None)
        row.output = stored(f"{step} {item}") if state is State.SUCCEEDED else None
        row.error = "failed" if state in {State.FAILED, State.CANCELLED} else None
        rows.append(row)
    return RunSnapshot(run, spec.to_json(), rows)


def whole(**states: State) -> dict[Node, State]:
    return {(name, WHOLE_STEP): state for name, state in states.items()}


ALL = whole(load=State.SUCCEEDED, train=State.SUCCEEDED, test=State.SUCCEEDED, other=State.SUCCEEDED)


def kept(
    states: dict[Node, State] | None = None,
    *,
    steps: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
    from_step: str | None = None,
    **fields: Any,
) -> set[str]:
    """Steps of which something is kept."""
    before = earlier_run(spec_of(STEPS, parameters=PARAMETERS), states or ALL)
    after = spec_of(STEPS | (steps or {}), parameters=PARAMETERS, **fields)
    return {name for name, _item in reusable(before, after, {"n": 1, "m": 1} | (params or {}), from_step)}


def test_everything_holds_when_nothing_changed() -> None:
    assert kept() == {"load", "train", "test", "other"}


def test_what_failed_and_what_needs_it_runs_again() -> None:
    states = whole(load=State.SUCCEEDED, train=State.FAILED, test=State.SKIPPED, other=State.SUCCEEDED)
    assert kept(states) == {"load", "test", "other"} - {"test"}


def test_a_step_and_what_depends_on_it_run_again_on_request() -> None:
    assert kept(from_step="train") == {"load", "other"}
    assert kept(from_step="other") == {"load", "train", "test"}


def test_another_value_of_a_parameter_matters_to_those_that_read_it() -> None:
    assert kept(params={"n": 2}) == {"other"}
    assert kept(params={"m": 2}) == {"load", "train", "other"}


@pytest.mark.parametrize(
    "change",
    [
        {"uses": "m:g"}, {"command": "ls"}, {"with": {"x": 1}}, {"when": "${{ `true` }}"}, {"foreach": [1]},
        {"env": {"variables": {"A": "b"}}}, {"env": {"packages": ["numpy"]}}, {"env": {"working_dir": "d" * 64}},
    ],
)  # fmt: skip
def test_another_definition_of_a_step_runs_it_again(change: dict[str, Any]) -> None:
    assert kept(steps={"other": change}) == {"load", "train", "test"}


@pytest.mark.parametrize(
    "change",
    [
        {"description": "x"}, {"attempts": 5}, {"timeout_s": 9}, {"resources": {"cpus": 2}}, {"durable": True},
        {"fresh_process": True}, {"needs": ["load"]}, {"cache": True}, {"checkpoint": {"keep": 9}},
    ],
)  # fmt: skip
def test_what_does_not_change_a_result_does_not_run_it_again(change: dict[str, Any]) -> None:
    assert kept(steps={"other": change}) == {"load", "train", "test", "other"}


def test_the_environment_of_the_whole_pipeline_is_that_of_its_steps() -> None:
    own = {"env": {"variables": {"B": "c"}}}
    assert kept(env={"working_dir": "d" * 64}) == set()
    assert kept(steps={"other": own}, env={"working_dir": "d" * 64}) == set()
    before = earlier_run(spec_of({"a": own, "b": {}}), whole(a=State.SUCCEEDED, b=State.SUCCEEDED))
    after = spec_of({"a": own, "b": {}}, env={"packages": ["numpy"]})
    assert {name for name, _item in reusable(before, after, {}, None)} == {"a"}  # which has one of its own
    same = spec_of({"a": own, "b": own | {}}, env={"packages": ["numpy"]})
    assert {name for name, _item in reusable(before, same, {}, None)} == {"a"}


def test_new_steps_run_and_removed_ones_are_forgotten() -> None:
    before = earlier_run(spec_of({"a": {}, "gone": {}}), whole(a=State.SUCCEEDED, gone=State.SUCCEEDED))
    rows = reusable(before, spec_of({"a": {}, "new": {"needs": ["a"]}}), {}, None)
    assert set(rows) == {("a", WHOLE_STEP)}


def test_what_a_condition_skipped_holds_and_what_a_failure_skipped_does_not() -> None:
    states = whole(load=State.SUCCEEDED, train=State.SUCCEEDED, test=State.SKIPPED, other=State.SUCCEEDED)
    assert kept(states) == {"load", "train", "test", "other"}
    before = earlier_run(spec_of(STEPS, parameters=PARAMETERS), states)
    next(row for row in before.step_runs if row.step == "test").error = "train did not succeed"
    assert "test" not in {name for name, _item in reusable(before, spec_of(STEPS, parameters=PARAMETERS),
                                                           {"n": 1, "m": 1}, None)}  # fmt: skip


def test_approvals_are_asked_for_again() -> None:
    spec = spec_of({"ask": {"approval": {}}, "go": {"needs": ["ask"]}})
    before = earlier_run(spec, whole(ask=State.SUCCEEDED, go=State.SUCCEEDED))
    assert reusable(before, spec, {}, None) == {}


def test_finally_steps_run_again() -> None:
    spec = spec_of({"a": {}}, {"clean": {}})
    before = earlier_run(spec, whole(a=State.SUCCEEDED, clean=State.SUCCEEDED))
    assert set(reusable(before, spec, {}, None)) == {("a", WHOLE_STEP)}


def test_of_a_fan_out_the_items_that_succeeded_are_kept() -> None:
    spec = spec_of({"f": {"foreach": [1, 2, 3]}, "after": {"needs": ["f"]}})
    states = {
        ("f", -1): State.FAILED, ("f", 0): State.SUCCEEDED, ("f", 1): State.FAILED, ("f", 2): State.SKIPPED,
        ("after", -1): State.SKIPPED,
    }  # fmt: skip
    rows = reusable(earlier_run(spec, states), spec, {}, None)
    assert {node: row.state for node, row in rows.items()} == {
        ("f", -1): State.RUNNING, ("f", 0): State.SUCCEEDED, ("f", 1): State.PENDING, ("f", 2): State.PENDING,
    }  # fmt: skip
    assert (rows["f", -1].items, rows["f", 0].output) == (3, stored("f 0"))
    assert reusable(earlier_run(spec, states), spec, {}, "f") == {}
    nothing: dict[Node, State] = {
        node: State.SKIPPED if state is State.SUCCEEDED else state for node, state in states.items()
    }
    assert reusable(earlier_run(spec, nothing), spec, {}, None) == {}


def test_only_a_run_of_the_same_pipeline_that_is_over_is_resumed() -> None:
    spec = spec_of({"a": {}})
    before = earlier_run(spec, {})
    check_resume(before, spec, None)
    check_resume(before, spec, "a")
    with pytest.raises(InvalidInput, match="'p' has no step 'b'; it has a"):
        check_resume(before, spec, "b")
    before.run.state = State.RUNNING
    with pytest.raises(InvalidInput, match="run run0 is RUNNING"):
        check_resume(before, spec, None)
    before.run.state, before.run.name = State.SUCCEEDED, "q"
    with pytest.raises(InvalidInput, match="run run0 is one of 'q', not of 'p'"):
        check_resume(before, spec, None)
