"""Schedules: what is due, what was missed, and what the policies make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.errors import InvalidInput
from mlplat.pipelines.automation.decisions import fire_times
from mlplat.pipelines.automation.firings import FiringState
from mlplat.pipelines.automation.schedules import CatchUp, Schedule, Timing, due
from mlplat.pipelines.automation.templates import check_template
from mlplat.pipelines.loader import build_spec

NINE = datetime(2026, 1, 5, 9, tzinfo=UTC)
HOURLY = Timing("0 * * * *", misfire_grace_s=60)
SPEC = build_spec(
    {
        "name": "report",
        "parameters": {
            "day": {"type": "str", "default": "none"},
            "at": {"type": "int", "default": 0, "min": 0},
            "size": {"type": "int", "default": 3, "max": 10},
        },
        "steps": {"a": {"uses": "os:getcwd"}},
    }
)


def at(hour: int, minute: int = 0, second: int = 0) -> datetime:
    return datetime(2026, 1, 5, hour, minute, second, tzinfo=UTC)


def hours(moments: Sequence[datetime]) -> list[int]:
    return [moment.hour for moment in moments]


def test_nothing_is_due_before_its_time() -> None:
    for now in (at(8), at(8, 59, 59)):
        found = due(HOURLY, NINE, now)
        assert (found.fire, found.missed, found.next_at) == ([], None, NINE)


@pytest.mark.parametrize("catch_up", list(CatchUp))
@pytest.mark.parametrize("late_s", [0, 1, 60])
def test_what_is_in_time_fires_once_whatever_the_policy(catch_up: CatchUp, late_s: int) -> None:
    found = due(replace(HOURLY, catch_up=catch_up), NINE, NINE + timedelta(seconds=late_s))
    assert (found.fire, found.missed, found.next_at) == ([NINE], None, at(10))


@pytest.mark.parametrize(
    ("catch_up", "fire", "missed"),
    [(CatchUp.SKIP, [], (9, 13)), (CatchUp.LATEST, [13], (9, 12)), (CatchUp.ALL, [9, 10, 11, 12, 13], None)],
)
def test_after_some_hours_away(catch_up: CatchUp, fire: list[int], missed: tuple[int, int] | None) -> None:
    found = due(replace(HOURLY, catch_up=catch_up), NINE, at(13, 30))
    assert hours(found.fire) == fire
    assert (None if found.missed is None else tuple(hours(found.missed))) == missed
    assert found.next_at == at(14)


def test_one_in_time_stands_for_those_that_were_missed() -> None:
    found = due(replace(HOURLY, catch_up=CatchUp.LATEST), NINE, at(12, 0, 30))
    assert (hours(found.fire), hours(found.missed or ())) == ([12], [9, 11])


def test_several_that_are_merely_late_all_fire() -> None:
    timing = replace(HOURLY, catch_up=CatchUp.SKIP, misfire_grace_s=2 * 3_600)
    found = due(timing, NINE, at(12, 0, 30))
    assert (hours(found.fire), hours(found.missed or ())) == ([11, 12], [9, 10])


def test_of_more_than_the_limit_the_newest_fire() -> None:
    found = due(replace(HOURLY, catch_up=CatchUp.ALL, catch_up_limit=2), NINE, at(13, 30))
    assert (hours(found.fire), hours(found.missed or ())) == ([12, 13], [9, 11])


def test_the_end_is_the_last_fire_time() -> None:
    timing = replace(HOURLY, ends_at=at(10))
    assert due(timing, NINE, NINE).next_at == at(10)
    assert due(timing, at(10), at(10)).next_at is None
    late = due(replace(timing, catch_up=CatchUp.ALL), NINE, at(15))
    assert (hours(late.fire), late.next_at) == ([9, 10], None)
    assert due(replace(timing, catch_up=CatchUp.SKIP), NINE, at(15)).fire == []


def test_nothing_fires_before_the_start() -> None:
    timing = replace(HOURLY, starts_at=at(11))
    assert timing.next_after(at(3)) == at(11)
    assert timing.next_after(at(11)) == at(12)
    assert hours(timing.preview(at(3), 3)) == [11, 12, 13]
    assert replace(timing, ends_at=at(10)).preview(at(3), 3) == []


def test_a_year_away_of_a_schedule_of_minutes_is_quick_and_bounded() -> None:
    timing = Timing("* * * * *", catch_up=CatchUp.ALL, catch_up_limit=10)
    found = due(timing, NINE, NINE + timedelta(days=365))
    assert len(found.fire) == 10
    assert found.missed == (NINE, found.fire[0] - timedelta(minutes=1))


TIMINGS = st.builds(
    Timing,
    st.sampled_from(("0 * * * *", "*/20 * * * *", "30 2 * * *", "0 0 29 2 *", "15 1-3 * * SUN", "0 12 L * *")),
    st.sampled_from(("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe")),
    st.sampled_from(CatchUp),
    st.integers(1, 50),
    st.sampled_from((1.0, 60.0, 7_200.0)),
)
STARTS = st.datetimes(datetime(2024, 1, 1), datetime(2028, 1, 1), timezones=st.just(UTC))
STEPS = st.lists(
    st.one_of(st.timedeltas(timedelta(seconds=1), timedelta(hours=3)), st.timedeltas(timedelta(), timedelta(days=40))),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(deadline=None)  # forty days of minutes take a while on a busy machine
@given(TIMINGS, STARTS, STEPS)
def test_however_often_one_looks_each_fire_time_is_decided_once(
    timing: Timing, start: datetime, steps: list[timedelta]
) -> None:
    """Every fire time up to the last look fired once, or lies in one missed range; none comes early."""
    next_at, now = timing.next_after(start), start
    fired: list[datetime] = []
    missed: list[tuple[datetime, datetime]] = []
    for step in steps:
        now += step
        assert next_at is not None
        found = due(timing, next_at, now)
        assert all(moment <= now for moment in found.fire)
        fired += found.fire
        missed += [] if found.missed is None else [found.missed]
        next_at = found.next_at
    assert fired == sorted(set(fired))
    assert next_at == timing.next_after(now)
    cron = timing.parse()
    for moment in cron.after(start):
        if moment > now:
            break
        covering = sum(first <= moment <= last for first, last in missed)
        assert (moment in fired) + covering == 1, moment


@settings(deadline=None)
@given(TIMINGS, STARTS, st.timedeltas(timedelta(), timedelta(days=400)))
def test_the_policies_keep_their_promises(timing: Timing, start: datetime, away: timedelta) -> None:
    next_at = timing.next_after(start)
    assert next_at is not None
    now = next_at + away
    found = due(timing, next_at, now)
    newest = timing.parse().last_until(next_at, now, 1)
    in_time = [moment for moment in found.fire if now - moment <= timedelta(seconds=timing.misfire_grace_s)]
    assert len(found.fire) <= timing.catch_up_limit
    if timing.catch_up is CatchUp.SKIP:
        assert found.fire == in_time
    else:
        assert found.fire[-1:] == newest
    if timing.catch_up is CatchUp.LATEST:
        assert found.fire == in_time or len(found.fire) == 1


def schedule(params: dict[str, object], **timing: object) -> Schedule:
    return Schedule(
        "nightly", "report", SPEC.digest, dict(params), Timing("0 0 * * *", "Europe/Berlin", **timing),  # type: ignore[arg-type] # whatever a test needs
        False, datetime(2026, 1, 5, 23, tzinfo=UTC), None, None, "ann", NINE, NINE,
    )  # fmt: skip


def test_a_firing_has_the_rendered_parameters() -> None:
    params = {"day": "of ${{ trigger.date }}", "at": "${{ trigger.timestamp }}", "size": 7}
    now = datetime(2026, 1, 5, 23, 0, 1, tzinfo=UTC)
    [firing], next_at = fire_times(schedule(params), now, lambda _digest: SPEC)
    assert firing.key == "schedule:nightly:2026-01-05T23:00:00Z"
    assert firing.params == {"day": "of 2026-01-06", "at": 1_767_654_000, "size": 7}  # the date in Berlin
    assert (firing.submitted_by, firing.state) == ("ann", FiringState.PENDING)
    assert next_at == datetime(2026, 1, 6, 23, tzinfo=UTC)


def test_what_was_missed_is_one_firing_that_says_so() -> None:
    now = datetime(2026, 1, 9, 12, tzinfo=UTC)
    missed, latest = fire_times(schedule({}), now, lambda _digest: SPEC)[0]
    assert (missed.state, latest.state) == (FiringState.SKIPPED, FiringState.PENDING)
    assert "from 2026-01-05T23:00:00Z to 2026-01-07T23:00:00Z" in missed.reason
    assert latest.event_id == "2026-01-08T23:00:00Z"


def test_parameters_that_do_not_fit_when_the_time_comes_fail_that_firing_only() -> None:
    now = datetime(2026, 1, 5, 23, 0, 1, tzinfo=UTC)
    [firing], next_at = fire_times(schedule({"size": "${{ trigger.timestamp }}"}), now, lambda _digest: SPEC)
    assert firing.state is FiringState.FAILED
    assert "parameters.size: must be at most 10" in firing.reason
    assert next_at is not None


def test_a_definition_that_cannot_be_read_any_more_ends_the_schedule() -> None:
    def spec_of(_digest: str) -> object:
        raise InvalidInput("steps.a.uses: unknown field")

    now = datetime(2026, 1, 5, 23, 0, 1, tzinfo=UTC)
    [firing], next_at = fire_times(schedule({}), now, spec_of)  # type: ignore[arg-type] # never returns
    assert (firing.state, firing.reason, next_at) == (FiringState.FAILED, "steps.a.uses: unknown field", None)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"sise": 1}, "parameters.sise: unknown"),
        ({"sise": "${{ trigger.date }}"}, "parameters.sise: unknown"),
        ({"size": 11}, "parameters.size: must be at most 10"),
        ({"size": "big"}, "parameters.size: expected int"),
        ({"day": "${{ trigger.dat }}"}, "params.day: 'trigger.dat' refers to trigger.dat: here expressions read"),
        ({"day": "${{ params.day }}"}, "refers to params.day"),
        ({"day": "${{ @ }}"}, "refers to nothing"),
        ({"day": "${{ trigger }}"}, "refers to trigger"),
        ({"day": "${{ trigger.date + }}"}, "not an expression"),
        ({"day": "x" * 70_000}, "params: larger than 65536 bytes"),
    ],
)  # fmt: skip
def test_a_template_is_checked_as_far_as_it_can_be(params: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_template(SPEC, params)
    assert message in caught.value.message


def test_all_problems_of_a_template_are_told_at_once() -> None:
    with pytest.raises(InvalidInput) as caught:
        check_template(SPEC, {"size": 11, "day": "${{ nothing.here }}", "at": -1})
    assert len(caught.value.message.splitlines()) == 3
