"""What the state machine does with steps, fan-outs and attempts, by example."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from mlplat.pipelines.machine import MAX_LOST
from mlplat.pipelines.model import (
    AttemptOutcome,
    AttemptRequest,
    AttemptState,
    Reservation,
    State,
)
from tests.unit.playing import NOW, RUN, Play, begun, labels, spec_of, stored

S, F, L, C = AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.LOST, AttemptState.CANCELLED


# -- needs -----------------------------------------------------------------------------------------


def test_steps_without_needs_start_together_in_the_order_of_the_definition() -> None:
    play = Play(spec_of({"b": {}, "a": {}}))
    assert labels(play.begin()) == ["b", "a"]
    assert (play.run.state, play.run.started_at) == (State.RUNNING, NOW)
    assert (play.row("a").state, play.row("a").queued_at, play.row("a").started_at) == (State.QUEUED, NOW, None)


def test_a_step_waits_until_all_its_needs_succeeded() -> None:
    play = begun({"c": {"needs": ["a", "b"]}, "a": {}, "b": {}})
    assert labels(play.ends("a")) == []
    assert labels(play.ends("b")) == ["c"]


def test_what_an_expression_reads_is_a_need() -> None:
    play = Play(spec_of({"b": {"with": {"x": "${{ steps.a.output.n }}"}}, "a": {}}))
    assert labels(play.begin()) == ["a"]
    assert labels(play.ends("a", output=stored({"n": 7}))) == ["b"]
    assert play.requests["b", -1, 1].arguments == {"x": 7}


def test_the_run_succeeds_when_every_step_did() -> None:
    play = begun({"a": {}, "b": {}})
    play.ends("a")
    assert play.run.state is State.RUNNING
    assert play.tick(5).start == []
    play.ends("b")
    assert (play.run.state, play.run.error, play.run.finished_at) == (State.SUCCEEDED, None, NOW + timedelta(seconds=5))


def test_a_failure_skips_what_needs_the_step_and_the_others_go_on() -> None:
    play = begun({"a": {}, "b": {"needs": ["a"]}, "c": {"needs": ["b"]}, "d": {}, "e": {"needs": ["d"]}})
    assert labels(play.ends("a", F, error="ValueError: no\n\nTraceback")) == []
    assert (play.row("b").state, play.row("b").error) == (State.SKIPPED, "a did not succeed")
    assert (play.row("c").state, play.row("c").error) == (State.SKIPPED, "b did not succeed")
    assert labels(play.ends("d")) == ["e"]
    assert play.run.state is State.RUNNING
    play.ends("e")
    assert (play.run.state, play.run.error) == (State.FAILED, "step 'a' failed: ValueError: no")


def test_a_step_with_several_needs_is_skipped_at_the_first_that_fails() -> None:
    play = begun({"a": {}, "b": {}, "c": {"needs": ["a", "b"]}})
    play.ends("b", F)
    assert (play.row("c").state, play.row("c").error) == (State.SKIPPED, "b did not succeed")
    play.ends("a", F)
    assert play.run.error == "step 'a' failed: FAILED a"  # the first of the definition


def test_a_failed_step_without_an_error_still_ends_the_run() -> None:
    play = begun({"a": {}})
    play.ends("a", F, error=None)
    assert play.run.error == "step 'a' failed: failed"


# -- conditions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [False, None, 0, "", [], {}])
def test_what_a_condition_skips_holds_nobody_up(value: Any) -> None:
    play = begun({"a": {}, "b": {"when": "${{ steps.a.output }}"}, "c": {"needs": ["b"]}})
    assert labels(play.ends("a", output=stored(value))) == ["c"]
    assert (play.row("b").state, play.row("b").error, play.row("b").attempt) == (State.SKIPPED, None, 0)
    play.ends("c")
    assert play.run.state is State.SUCCEEDED


@pytest.mark.parametrize("value", [True, 1, "no", [0], {"a": None}])
def test_a_condition_that_is_met_lets_the_step_start(value: Any) -> None:
    play = begun({"a": {}, "b": {"when": "${{ steps.a.output }}"}})
    assert labels(play.ends("a", output=stored(value))) == ["b"]


def test_a_condition_may_ask_how_a_step_ended() -> None:
    play = begun({
        "a": {"when": "${{ `false` }}"}, "b": {"when": "${{ steps.a.state == 'SKIPPED' }}"},
        "c": {"when": "${{ steps.a.state == 'SUCCEEDED' }}"},
    })  # fmt: skip
    assert [play.ledger.state(name) for name in "abc"] == [State.SKIPPED, State.QUEUED, State.SKIPPED]


def test_a_skip_by_failure_passes_on_and_a_skip_by_condition_does_not() -> None:
    play = begun({
        "bad": {}, "off": {"when": "${{ `false` }}"},
        "both": {"needs": ["bad", "off"]}, "after_both": {"needs": ["both"]}, "after_off": {"needs": ["off"]},
    })  # fmt: skip
    play.ends("bad", F)
    skipped = {name: play.ledger.state(name) is State.SKIPPED for name in play.spec.steps}
    assert skipped == {"bad": False, "off": True, "both": True, "after_both": True, "after_off": False}


def test_a_condition_is_asked_once_and_not_at_a_retry() -> None:
    play = begun({"a": {"when": "${{ `true` }}", "attempts": 2}})
    assert labels(play.ends("a", F)) == ["a#2"]


def test_a_condition_that_cannot_be_evaluated_fails_the_step() -> None:
    play = begun({"a": {}, "b": {"when": "${{ length(steps.a.output) > `1` }}"}})
    play.ends("a")
    assert play.row("b").state is State.FAILED
    assert "length(steps.a.output)" in (play.row("b").error or "")


# -- fan-outs --------------------------------------------------------------------------------------


def test_items_start_together_in_order_and_the_output_is_their_list() -> None:
    play = Play(
        spec_of(
            {"f": {"foreach": ["c", "a"], "with": {"x": "${{ item }}"}}, "g": {"with": {"x": "${{ steps.f.output }}"}}}
        )
    )
    assert labels(play.begin()) == ["f[0]", "f[1]"]
    assert [play.requests["f", item, 1].arguments for item in (0, 1)] == [{"x": "c"}, {"x": "a"}]
    assert (play.row("f").state, play.row("f").items) == (State.RUNNING, 2)
    play.ends("f", item=1, output=stored("second"))
    assert labels(play.ends("f", item=0, output=stored("first"))) == ["g"]
    assert play.requests["g", -1, 1].arguments == {"x": ["first", "second"]}


@pytest.mark.parametrize("width", [1, 2, 3, 9])
def test_no_more_items_run_at_once_than_may(width: int) -> None:
    play = Play(spec_of({"f": {"foreach": list(range(5)), "max_parallel": width}}))
    started = labels(play.begin())
    assert started == [f"f[{item}]" for item in range(min(width, 5))]
    for item in range(5):
        started += labels(play.ends("f", item=item))
    assert started == [f"f[{item}]" for item in range(5)]
    assert play.run.state is State.SUCCEEDED


def test_an_item_that_waits_for_a_retry_leaves_its_place_to_another() -> None:
    retry = {"max_attempts": 2, "initial_s": 10, "jitter": 0}
    play = begun({"f": {"foreach": [0, 1, 2], "max_parallel": 1, "retry": retry}})
    assert labels(play.ends("f", F, 0)) == ["f[1]"]
    assert labels(play.tick(10)) == []  # due, but there is no room
    assert labels(play.ends("f", item=1)) == ["f[0]#2"]  # before those that have not begun
    assert labels(play.ends("f", item=0)) == ["f[2]"]


def test_an_empty_fan_out_succeeds_at_once_with_an_empty_list() -> None:
    play = Play(spec_of({"f": {"foreach": []}, "g": {"with": {"x": "${{ steps.f.output }}"}}}))
    assert labels(play.begin()) == ["g"]
    assert (play.row("f").state, play.row("f").items) == (State.SUCCEEDED, 0)
    assert play.requests["g", -1, 1].arguments == {"x": []}


def test_after_an_item_has_failed_the_others_need_not_start() -> None:
    play = begun({"f": {"foreach": [0, 1, 2, 3], "max_parallel": 2}, "g": {"needs": ["f"]}})
    assert labels(play.ends("f", F, 1)) == []
    assert play.states("f") == [State.QUEUED, State.FAILED, State.SKIPPED, State.SKIPPED]
    assert play.row("f", 2).error == "f[1] failed"
    assert play.row("f").state is State.RUNNING
    play.ends("f", item=0)
    assert (play.row("f").state, play.row("f").error) == (State.FAILED, "item 1: FAILED f")
    assert play.row("g").state is State.SKIPPED


def test_an_item_that_fails_after_another_has_failed_is_not_tried_again() -> None:
    play = begun({"f": {"foreach": [0, 1], "attempts": 2}})
    assert labels(play.ends("f", F, 0)) == ["f[0]#2"]
    play.ends("f", F, 0)
    assert labels(play.ends("f", F, 1)) == []
    assert (play.row("f", 1).failures, play.row("f").state) == (1, State.FAILED)


def test_an_item_that_waits_for_its_retry_is_skipped_once_another_failed() -> None:
    play = begun({"f": {"foreach": [0, 1], "retry": {"max_attempts": 2, "initial_s": 60}}})
    play.ends("f", F, 0)
    play.ends("f", F, 1)
    play.tick(60)
    play.ends("f", F, 1)
    play.ends("f", F, 0)
    assert play.states("f") == [State.FAILED, State.FAILED]
    assert play.row("f", 0).failures == 2


@pytest.mark.parametrize("width", [None, 1, 2, 3])
@pytest.mark.parametrize(
    "items", [[[1], 5, [2]], [[1], 5, [2], [3]], [5, [1], [2]], [5, 6, [1]], [[1], 5, 6, [2], [3]]]
)
def test_an_item_whose_arguments_cannot_be_made_fails_without_an_attempt(items: list[Any], width: int | None) -> None:
    play = begun({"f": {"foreach": items, "with": {"x": "${{ length(item) }}"}, "max_parallel": width}})
    while active := [item for item in range(len(items)) if play.ledger.state("f", item) is State.QUEUED]:
        play.ends("f", item=active[-1])
    bad = items.index(5)
    assert (play.ledger.state("f"), play.ledger.of(("f", bad))) == (State.FAILED, [])
    assert (play.row("f").error or "").startswith(f"item {bad}: expression 'length(item)' failed")
    assert all(play.ledger.of(("f", item)) == [] for item in range(bad, len(items)))
    assert play.run.state is State.FAILED


@pytest.mark.parametrize(("value", "name"), [({"a": 1}, "dict"), ("abc", "str"), (None, "NoneType"), (True, "bool")])
def test_a_foreach_that_gives_no_list_fails_the_step(value: Any, name: str) -> None:
    play = begun({"a": {}, "f": {"foreach": "${{ steps.a.output }}"}, "g": {"needs": ["f"]}})
    play.ends("a", output=stored(value))
    assert (play.row("f").state, play.row("f").error) == (State.FAILED, f"foreach must give a list, not {name}")
    assert play.row("g").state is State.SKIPPED


def test_a_foreach_has_a_bound() -> None:
    play = begun({"a": {}, "f": {"foreach": "${{ steps.a.output }}"}})
    play.ends("a", output=stored([0] * 10_001))
    assert play.row("f").error == "foreach gave 10001 items, at most 10000 are allowed"


# -- attempts --------------------------------------------------------------------------------------


def test_a_failure_is_tried_again_after_its_wait() -> None:
    play = begun({"a": {"retry": {"max_attempts": 3, "initial_s": 4, "factor": 3, "jitter": 0, "cap_s": 10}}})
    seen = play.ends("a", F, error="first")
    assert (seen.start, seen.wake_at) == ([], NOW + timedelta(seconds=4))
    row = play.row("a")
    assert (row.state, row.failures, row.retry_at, row.error) == (State.PENDING, 1, seen.wake_at, "first")
    assert play.tick(3.9).start == []
    assert labels(play.tick(0.1)) == ["a#2"]
    assert play.ends("a", F).wake_at == play.now + timedelta(seconds=10)  # capped
    play.tick(10)
    play.ends("a")
    assert (play.row("a").state, play.row("a").failures, play.row("a").error) == (State.SUCCEEDED, 2, None)
    assert [entry.state for entry in play.ledger.of(("a", -1))] == [F, F, S]
    assert play.run.state is State.SUCCEEDED


def test_the_random_part_of_a_wait_is_the_same_for_every_owner() -> None:
    waits = []
    for _owner in range(2):
        play = begun({"a": {"retry": {"max_attempts": 2, "initial_s": 100, "jitter": 0.5, "cap_s": 100}}})
        wake_at = play.ends("a", F).wake_at
        assert wake_at is not None
        waits.append((wake_at - NOW).total_seconds())
    assert waits[0] == waits[1]
    assert 50 <= waits[0] < 100


@pytest.mark.parametrize(
    ("policy", "types", "again"),
    [
        ({"on": ["OSError"]}, ["builtins.ConnectionError", "builtins.OSError", "builtins.Exception"], True),
        ({"on": ["builtins.OSError"]}, ["builtins.ConnectionError", "builtins.OSError"], True),
        ({"on": ["OSError"]}, ["builtins.ValueError", "builtins.Exception"], False),
        ({"on": ["OSError"]}, [], False),
        ({}, [], True),
        ({"never_on": ["ValueError"]}, ["builtins.ValueError"], False),
        ({"never_on": ["ValueError"]}, ["builtins.KeyError"], True),
        ({"on": ["Exception"], "never_on": ["ValueError"]}, ["builtins.ValueError", "builtins.Exception"], False),
        ({"on": ["mine.OSError"]}, ["builtins.OSError"], False),
    ],
)
def test_only_some_exceptions_are_worth_another_attempt(policy: dict[str, Any], types: list[str], again: bool) -> None:
    play = begun({"a": {"retry": {"max_attempts": 2, "initial_s": 0} | policy}})
    assert labels(play.ends("a", F, error_types=tuple(types))) == (["a#2"] if again else [])
    assert play.run.state is (State.RUNNING if again else State.FAILED)


def test_a_lost_attempt_is_replaced_at_once_and_does_not_count() -> None:
    play = begun({"a": {"retry": {"max_attempts": 1, "initial_s": 60}}})
    assert labels(play.ends("a", L)) == ["a#2"]
    assert (play.row("a").failures, play.row("a").attempt) == (0, 2)


def test_losing_attempts_without_end_counts_in_the_end() -> None:
    play = begun({"a": {}})
    for number in range(2, MAX_LOST + 2):
        assert labels(play.ends("a", L)) == [f"a#{number}"]
    assert labels(play.ends("a", L)) == []
    assert (play.row("a").state, play.row("a").failures) == (State.FAILED, 1)


def test_what_ends_late_changes_nothing() -> None:
    play = begun({"a": {"attempts": 2}})
    play.ends("a", F)
    for outcome in (AttemptOutcome(S, stored(9)), AttemptOutcome(F, error="again"), AttemptOutcome(L)):
        assert not play.machine.attempt_ended(("a", -1), 1, outcome, play.now)
        assert not play.machine.attempt_ended(("a", -1), 3, outcome, play.now)
        assert not play.machine.attempt_ended(("nobody", -1), 1, outcome, play.now)
    play.machine.attempt_started(("a", -1), 1, play.now, "node")
    play.machine.attempt_progressed(("a", -1), 1, {"done": 1.0, "text": ""})
    assert play.machine.take_changes() is None
    play.ends("a")
    assert not play.end("a")
    assert play.run.state is State.SUCCEEDED


def test_a_start_and_progress_are_kept() -> None:
    play = begun({"a": {}})
    later = NOW + timedelta(seconds=7)
    for _repeat in range(2):
        play.machine.attempt_started(("a", -1), 1, later, "node-1")
    play.machine.attempt_progressed(("a", -1), 1, {"done": 0.5, "text": "half"})
    play.tick(9)
    [entry] = play.ledger.of(("a", -1))
    assert (entry.state, entry.started_at, entry.node) == (AttemptState.RUNNING, later, "node-1")
    assert entry.progress == {"done": 0.5, "text": "half"}
    assert (play.row("a").state, play.row("a").started_at) == (State.RUNNING, later)


def test_an_outcome_brings_what_nobody_had_told() -> None:
    play = begun({"a": {}})
    play.ends("a", F, started_at=NOW + timedelta(seconds=1), node="n")
    [entry] = play.ledger.of(("a", -1))
    assert (entry.started_at, entry.node, entry.queued_at) == (NOW + timedelta(seconds=1), "n", NOW)
    assert play.row("a").started_at == NOW + timedelta(seconds=1)


def test_an_attempt_that_somebody_else_stopped_fails_the_step() -> None:
    play = begun({"a": {"attempts": 3}, "b": {"needs": ["a"]}})
    assert labels(play.ends("a", C, error="stopped")) == []
    assert (play.row("a").state, play.ledger.of(("a", -1))[0].state) == (State.FAILED, C)
    assert (play.run.state, play.run.error) == (State.FAILED, "step 'a' failed: stopped")


def test_a_request_carries_everything_that_a_worker_needs() -> None:
    step = {
        "with": {"x": "${{ params.n }}"}, "attempts": 3, "timeout_s": 9, "durable": True, "fresh_process": True,
        "resources": {"cpus": 2.5, "gpus": 1, "memory_mb": 64, "accelerator": "A100", "custom": {"disk": 1.0}},
        "env": {"packages": ["a"], "variables": {"B": "b"}, "working_dir": "w"}, "checkpoint": {"keep": 7},
    }  # fmt: skip
    play = Play(spec_of({"a": step}), {"n": 4}, submitted_by="ann", resumed_from="run0")
    play.begin()
    assert play.requests["a", -1, 1] == AttemptRequest(
        "p", RUN, "a", -1, 1, "uses", "m:f", {"x": 4}, 3,
        Reservation(2.5, 1.0, 64, "A100", (("disk", 1.0),), (("B", "b"),), ("a",)), "w", 9.0, True, True, 7,
        ("pipelines/run1/checkpoints/a/-1", "pipelines/run0/checkpoints/a/-1"), "ann",
    )  # fmt: skip
    assert play.requests["a", -1, 1].label == "run1/a/-1/1"


def test_a_program_gets_values_as_texts_and_no_pickles() -> None:
    steps = {"a": {}, "b": {"command": ["run", "${{ steps.a.output }}", "--x=${{ params.n }}", "$(no shell)"]}}
    for value, text in ((3, "3"), ("a b", "a b"), ([1, "ü"], '[1, "\\u00fc"]'), (None, "null")):
        play = Play(spec_of(steps), {"n": True})
        play.begin()
        play.ends("a", output=stored(value))
        assert play.requests["b", -1, 1].target == ["run", text, "--x=true", "$(no shell)"]
    pickle = {"kind": "blob", "digest": "d", "type": "Model"}
    for output in (pickle, {"kind": "list", "outputs": [pickle]}):
        play = begun(steps)
        play.ends("a", output=output)
        assert (play.row("b").state, play.row("b").attempt) == (State.FAILED, 0)
