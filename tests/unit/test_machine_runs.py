"""What the state machine does with a whole run: decisions, endings, results and new owners, by example."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from mlplat.pipelines.model import (
    AttemptState,
    ChildRequest,
    Signal,
    SignalKind,
    State,
    StepRun,
)
from tests.unit.playing import NOW, RUN, Play, Seen, begun, labels, spec_of, stored

S, F, L, C = AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.LOST, AttemptState.CANCELLED


# -- approvals -------------------------------------------------------------------------------------


def test_an_approval_waits_and_lets_the_run_go_on() -> None:
    play = begun({"ask": {"approval": {}}, "go": {"with": {"x": "${{ steps.ask.output }}"}}})
    assert (play.row("ask").state, play.row("ask").attempt, play.ledger.attempts) == (State.QUEUED, 0, {})
    assert play.tick(100_000).start == []
    assert labels(play.tell(SignalKind.APPROVE, "ask", comment="fine")) == ["go"]
    assert play.requests["go", -1, 1].arguments == {"x": {"approved": True, "by": "ann", "comment": "fine"}}


def test_a_rejection_fails_the_step() -> None:
    play = begun({"ask": {"approval": {}}, "go": {"needs": ["ask"]}})
    play.tell(SignalKind.REJECT, "ask", comment="not now")
    assert (play.row("ask").state, play.row("ask").error) == (State.FAILED, "rejected by ann: not now")
    assert (play.row("go").state, play.run.state) == (State.SKIPPED, State.FAILED)


def test_a_decision_that_comes_too_early_or_too_late_or_twice_is_ignored() -> None:
    play = begun({"a": {}, "ask": {"approval": {}, "needs": ["a"]}})
    play.tell(SignalKind.REJECT, "ask")  # nobody asks yet
    play.tell(SignalKind.APPROVE, "a")  # no approval
    play.tell(SignalKind.APPROVE, "nobody")
    play.ends("a")
    assert play.row("ask").state is State.QUEUED
    signal = play.ledger.signals[0]
    play.machine.signal(signal, play.now)  # heard already
    assert play.tick().start == []
    play.tell(SignalKind.APPROVE, "ask")
    assert play.run.state is State.SUCCEEDED
    play.machine.signal(signal, play.now)
    assert play.machine.take_changes() is None


def test_a_new_owner_goes_on_waiting_and_hears_what_was_said() -> None:
    play = begun({"ask": {"approval": {}}, "go": {"needs": ["ask"]}})
    play.take_over()
    assert play.row("ask").state is State.QUEUED
    assert labels(play.tell(SignalKind.APPROVE, "ask")) == ["go"]
    play.take_over(survivors=True)
    assert play.row("ask").state is State.SUCCEEDED


# -- finally ---------------------------------------------------------------------------------------

CLEAN = {"clean": {"with": {"how": "${{ run.state }}"}}, "tell": {"needs": ["clean"]}}


@pytest.mark.parametrize(("state", "how"), [(S, "SUCCEEDED"), (F, "FAILED")])
def test_finally_steps_run_once_the_others_are_over_and_know_how(state: AttemptState, how: str) -> None:
    play = begun({"a": {}, "b": {"needs": ["a"]}, "c": {}}, CLEAN)
    assert labels(play.ends("c")) == []
    seen = play.ends("a", state)
    if state is S:
        seen = play.ends("b")
    assert labels(seen) == ["clean"]
    assert play.requests["clean", -1, 1].arguments == {"how": how}
    assert play.run.state is State.RUNNING
    assert labels(play.ends("clean")) == ["tell"]
    play.ends("tell")
    assert play.run.state is State(how)


def test_a_finally_step_that_fails_fails_a_run_that_had_succeeded() -> None:
    play = begun({"a": {}}, CLEAN)
    play.ends("a")
    play.ends("clean", F)
    assert play.row("tell").state is State.SKIPPED
    assert (play.run.state, play.run.error) == (State.FAILED, "finally step 'clean' failed: FAILED clean")


def test_a_finally_step_that_fails_does_not_hide_the_first_failure() -> None:
    play = begun({"a": {}}, CLEAN)
    play.ends("a", F)
    play.ends("clean", F)
    assert play.run.error == "step 'a' failed: FAILED a"


def test_finally_steps_run_after_a_cancellation_and_cannot_be_cancelled() -> None:
    play = begun(
        {"a": {}}, {"clean": {"with": {"how": "${{ run.state }}", "a": "${{ steps.a.state }}"}, "attempts": 2}}
    )
    assert play.tell(SignalKind.CANCEL).stop == [("a", -1)]
    assert labels(play.ends("a", C)) == ["clean"]
    assert play.requests["clean", -1, 1].arguments == {"how": "CANCELLED", "a": "CANCELLED"}
    assert play.tell(SignalKind.CANCEL, by="bob") == Seen([], [], None)
    assert labels(play.ends("clean", F)) == ["clean#2"]
    play.ends("clean")
    assert (play.run.state, play.run.error) == (State.CANCELLED, "cancelled by ann")


def test_finally_steps_run_after_a_timeout() -> None:
    play = Play(spec_of({"a": {}}, CLEAN, timeout_s=60))
    assert play.begin().wake_at == NOW + timedelta(seconds=60)
    assert play.tick(59).stop == []
    assert play.tick(1) == Seen([], [("a", -1)], None)
    play.ends("a", C)
    assert play.requests["clean", -1, 1].arguments == {"how": "FAILED"}
    play.tick(1_000)  # the timeout is none of theirs
    play.ends("clean")
    play.ends("tell")
    assert (play.run.state, play.run.error) == (State.FAILED, "timed out after 60 s")


def test_finally_steps_run_when_nothing_else_did() -> None:
    play = begun({"a": {"when": "${{ `false` }}"}}, {"clean": {}})
    assert play.ledger.state("clean") is State.QUEUED


def test_a_fan_out_may_be_a_finally_step() -> None:
    play = begun({"a": {}}, {"clean": {"foreach": "${{ steps.a.output }}", "max_parallel": 1}})
    assert labels(play.ends("a", output=stored([1, 2]))) == ["clean[0]"]
    assert labels(play.ends("clean", item=0)) == ["clean[1]"]
    play.ends("clean", item=1)
    assert play.run.state is State.SUCCEEDED


# -- stopping --------------------------------------------------------------------------------------


def test_a_run_is_cancelled_in_the_middle() -> None:
    play = begun({
        "done": {}, "active": {}, "ask": {"approval": {}}, "waits": {"retry": {"max_attempts": 2, "initial_s": 60}},
        "f": {"foreach": [0, 1, 2], "max_parallel": 1}, "later": {"needs": ["active"]},
    })  # fmt: skip
    play.ends("done")
    play.ends("waits", F)
    seen = play.tell(SignalKind.CANCEL, comment="enough")
    assert (sorted(seen.stop), seen.start, seen.wake_at) == ([("active", -1), ("f", 0)], [], None)
    states = {name: str(play.ledger.state(name)) for name in play.spec.steps}
    assert states == {
        "done": "SUCCEEDED", "active": "QUEUED", "ask": "CANCELLED", "waits": "CANCELLED", "f": "RUNNING",
        "later": "CANCELLED",
    }  # fmt: skip
    assert play.states("f") == [State.QUEUED, State.CANCELLED, State.CANCELLED]
    assert (play.run.state, play.run.stopping) == (State.RUNNING, State.CANCELLED)
    assert labels(play.tick(100)) == []
    play.ends("active", F)  # it was stopped, whatever it says
    play.ends("f", L, 0)
    assert [play.ledger.state(name) for name in ("active", "f")] == [State.CANCELLED, State.CANCELLED]
    assert play.ledger.of(("active", -1))[0].state is C
    assert (play.run.state, play.run.error) == (State.CANCELLED, "cancelled by ann: enough")


def test_what_succeeds_while_it_is_stopped_has_succeeded() -> None:
    play = begun({"a": {}, "b": {"needs": ["a"]}})
    play.tell(SignalKind.CANCEL)
    play.ends("a")
    assert (play.row("a").state, play.row("b").state) == (State.SUCCEEDED, State.CANCELLED)
    assert play.run.state is State.CANCELLED


def test_a_run_that_has_not_begun_is_cancelled() -> None:
    play = Play(spec_of({"a": {}, "b": {"needs": ["a"]}}))
    play.machine.begin(NOW)
    assert play.tell(SignalKind.CANCEL) == Seen([], [], None)
    assert (play.run.state, play.ledger.attempts) == (State.CANCELLED, {})


def test_an_attempt_that_ended_at_the_time_of_the_cancellation_is_not_stopped() -> None:
    for end_first in (True, False):
        play = begun({"a": {}, "b": {"needs": ["a"]}})
        if end_first:
            play.end("a")
        play.machine.signal(Signal(1, RUN, SignalKind.CANCEL, "", "ann", "", NOW), NOW)
        if not end_first:
            play.end("a")
        assert play.tick() == Seen([], [], None)
        assert (play.row("a").state, play.row("b").state) == (State.SUCCEEDED, State.CANCELLED)


def test_the_first_reason_to_stop_is_the_one() -> None:
    play = begun({"a": {}}, timeout_s=60)
    play.tell(SignalKind.CANCEL)
    assert play.tick(100).stop == []
    play.ends("a", C)
    assert play.run.state is State.CANCELLED


def test_a_run_that_is_over_in_time_does_not_time_out() -> None:
    play = begun({"a": {}}, timeout_s=60)
    play.now += timedelta(seconds=61)
    play.ends("a")
    assert play.run.state is State.SUCCEEDED


# -- outputs, reuse, caches, sub-pipelines ---------------------------------------------------------


def test_a_run_gives_its_outputs() -> None:
    blob = {"kind": "blob", "digest": "d", "type": "Model"}
    play = begun({"a": {}, "b": {}}, outputs={"sum": "${{ steps.a.output.x }}", "all": ["${{ steps.b.output }}", 1]})
    play.ends("a", output=stored({"x": 3}))
    play.ends("b", output=blob)
    assert play.run.output == {
        "kind": "map", "outputs": {"sum": stored(3), "all": {"kind": "list", "outputs": [blob, stored(1)]}},
    }  # fmt: skip


def test_outputs_that_cannot_be_made_fail_the_run() -> None:
    play = begun({"a": {}}, outputs={"n": "${{ length(steps.a.output) }}"})
    play.ends("a")
    assert play.run.state is State.FAILED
    assert (play.run.error or "").startswith("outputs: expression 'length(steps.a.output)' failed")


def test_a_cache_hit_ends_the_attempt_with_the_output_of_another_run() -> None:
    play = begun({"a": {"cache": True}, "b": {"with": {"x": "${{ steps.a.output }}"}}})
    play.machine.cache_hit(("a", -1), stored(5), "run0", play.now)
    assert labels(play.tick()) == ["b"]
    assert (play.row("a").state, play.row("a").reused_from) == (State.SUCCEEDED, "run0")
    assert [entry.state for entry in play.ledger.of(("a", -1))] == [S]
    play.machine.cache_hit(("a", -1), stored(6), "run9", play.now)
    assert play.machine.take_changes() is None


def test_results_of_an_earlier_run_are_taken_over() -> None:
    play = Play(spec_of({"a": {}, "f": {"foreach": [1, 2, 3], "needs": ["a"]}, "z": {"needs": ["f"]}}))
    rows = [
        StepRun("a", -1, State.SUCCEEDED, attempt=3, failures=2, output=stored(1), error=None, started_at=NOW),
        StepRun("f", -1, State.RUNNING, 3), StepRun("f", 0, State.SUCCEEDED, output=stored(1)),
        StepRun("f", 1, State.PENDING), StepRun("f", 2, State.SUCCEEDED, output=stored(1), reused_from="older"),
    ]  # fmt: skip
    play.machine.reuse({row.node: row for row in rows}, "run0")
    assert labels(play.begin()) == ["f[1]"]
    assert [play.row("f", item).reused_from for item in (0, 2)] == ["run0", "older"]
    assert (play.row("a").attempt, play.row("a").reused_from) == (0, "run0")
    assert labels(play.ends("f", item=1)) == ["z"]


def test_a_run_may_take_everything_over() -> None:
    play = Play(spec_of({"a": {}}))
    play.machine.reuse({("a", -1): StepRun("a", -1, State.SUCCEEDED, output=stored(1))}, "run0")
    assert labels(play.begin()) == []
    assert play.run.state is State.SUCCEEDED


INNER = {"name": "inner", "parameters": {"x": {"type": "int", "max": 5}}, "steps": {"s": {"uses": "m:f"}}}


def test_a_sub_pipeline_is_a_run_that_goes_on_from_that_of_the_attempt_before() -> None:
    play = Play(spec_of({"sub": {"pipeline": INNER, "with": {"x": 3}, "attempts": 3}}))
    play.begin()
    first = play.requests["sub", -1, 1]
    assert isinstance(first, ChildRequest)
    assert (first.params, first.resumed_from, first.spec.name) == ({"x": 3}, None, "inner")
    assert play.ledger.of(("sub", -1))[0].child_id == first.child_id
    play.ends("sub", F)
    second = play.requests["sub", -1, 2]
    assert (second.resumed_from, second.child_id != first.child_id) == (first.child_id, True)
    play.take_over(survivors=True)
    [(row, _entry)] = play.machine.open_attempts()
    assert play.machine.request_of(row) == second


@pytest.mark.parametrize("value", [9, [1], None])
def test_a_sub_pipeline_with_parameters_that_do_not_fit_fails_the_step(value: Any) -> None:
    play = begun({"a": {}, "sub": {"pipeline": INNER, "with": {"x": "${{ steps.a.output }}"}, "attempts": 3}})
    play.ends("a", output=stored(value))
    assert (play.row("sub").state, play.ledger.of(("sub", -1))) == (State.FAILED, [])


# -- take-overs ------------------------------------------------------------------------------------


def test_a_new_owner_replaces_what_was_lost_and_keeps_what_was_reached() -> None:
    play = begun({"a": {}, "b": {}, "c": {"needs": ["a"]}})
    play.ends("a")
    assert sorted(labels(play.take_over())) == ["b#2", "c#2"]
    assert [entry.state for entry in play.ledger.of(("b", -1))] == [L, AttemptState.QUEUED]


def test_a_new_owner_waits_for_the_same_retry() -> None:
    play = begun({"a": {"retry": {"max_attempts": 2, "initial_s": 60, "jitter": 0}}})
    play.ends("a", F)
    play.now += timedelta(seconds=30)
    assert play.take_over() == Seen([], [], NOW + timedelta(seconds=60))
    assert labels(play.tick(30)) == ["a#2"]


def test_a_new_owner_stops_again_what_is_to_be_stopped() -> None:
    play = begun({"a": {}, "f": {"foreach": [0, 1], "max_parallel": 1}})
    assert sorted(play.tell(SignalKind.CANCEL).stop) == [("a", -1), ("f", 0)]
    # Nobody knows whether the earlier owner has got so far as to stop them.
    assert sorted(play.take_over(survivors=True).stop) == [("a", -1), ("f", 0)]
    assert play.tick().stop == []
    play.ends("a", C)
    play.ends("f", C, 0)
    assert play.run.state is State.CANCELLED


def test_what_did_not_survive_need_not_be_stopped() -> None:
    play = begun({"a": {}})
    play.tell(SignalKind.CANCEL)
    assert play.take_over().stop == []
    assert play.run.state is State.CANCELLED


def test_a_new_owner_keeps_the_timeout() -> None:
    play = begun({"a": {}}, timeout_s=60)
    play.now += timedelta(seconds=61)
    assert play.take_over(survivors=True).stop == [("a", -1)]
    play = begun({"a": {}}, timeout_s=60)
    play.now += timedelta(seconds=10)
    assert play.take_over(survivors=True).wake_at == NOW + timedelta(seconds=60)


def test_finally_steps_survive_a_new_owner() -> None:
    play = begun({"a": {}}, CLEAN)
    play.tell(SignalKind.CANCEL)
    play.ends("a", C)
    assert labels(play.take_over()) == ["clean#2"]
    assert play.requests["clean", -1, 2].arguments == {"how": "CANCELLED"}


def test_the_error_of_a_fan_out_is_the_same_for_every_owner() -> None:
    errors = set()
    for crash in (False, True):
        play = begun({"f": {"foreach": [0, 1, 2]}})
        play.ends("f", F, 2)
        play.ends("f", F, 0)
        if crash:
            play.take_over(survivors=True)
        play.ends("f", item=1)
        errors.add(play.row("f").error)
    assert len(errors) == 1


def test_each_change_has_a_number_and_no_change_has_none() -> None:
    play = begun({"a": {}, "b": {"needs": ["a"]}})
    assert (play.run.seq, play.row("a").seq) == (1, 1)
    play.tick()
    assert play.run.seq == 1
    play.ends("a")
    assert (play.run.seq, play.row("a").seq, play.row("b").seq) == (2, 2, 2)
    play.take_over(survivors=True)
    play.ends("b")
    assert (play.run.seq, play.row("a").seq, play.row("b").seq) == (3, 2, 3)
