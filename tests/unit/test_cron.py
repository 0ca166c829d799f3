"""Cron expressions with time zones: what is refused, changes of the clocks, and what holds of all of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.errors import InvalidInput
from mlplat.pipelines.automation.cron import parse_cron

ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata", "America/Sao_Paulo")
FIELDS = st.tuples(
    st.sampled_from(("0", "30", "*/15", "5-59/20", "0,59", "*")),
    st.sampled_from(("0", "2", "1-3", "*/6", "*", "23")),
    st.sampled_from(("*", "1", "29", "L", "31")),
    st.sampled_from(("*", "2", "3,10", "JAN")),
    st.sampled_from(("*", "0", "MON-FRI", "5L")),
).filter(lambda fields: (fields[2], fields[3]) != ("31", "2"))
EXPRESSIONS = FIELDS.map(" ".join)
MOMENTS = st.datetimes(datetime(2023, 1, 1), datetime(2029, 1, 1), timezones=st.just(UTC))


def times(expression: str, zone: str, start: datetime, count: int) -> list[str]:
    cron = parse_cron(expression, zone)
    return [moment.astimezone(cron.zone).isoformat() for moment in islice(cron.after(start), count)]


def refusal(expression: str, zone: str = "UTC") -> str:
    with pytest.raises(InvalidInput) as caught:
        parse_cron(expression, zone)
    return caught.value.message


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("61 * * * *", "minute '61' is not valid (0-59)"),
        ("0 24 * * *", "hour '24' is not valid (0-23)"),
        ("0 0 0 * *", "day-of-month '0' is not valid"),
        ("0 0 31 2 *", "day-of-month '31' is not valid (1-31 or L, in a month that is long enough)"),
        ("0 0 * foo *", "month 'foo' is not valid (1-12 or JAN-DEC)"),
        ("0 0 * * FRIDAY", "day-of-week 'FRIDAY' is not valid"),
        ("*/0 * * * *", "minute '*/0' is not valid"),
        ("5-1 * * * *", "minute '5-1' is not valid"),
        ("* * * *", "has 4 fields, expected 5: minute hour day-of-month month day-of-week"),
        ("0 * * * * *", "has 6 fields, expected 5"),
        ("", "has 0 fields"),
        ("@often", "unknown; there are @hourly, @daily"),
        ("* * */20 * 1L", "no such day within 50 years"),
        ("1," * 200 + "1 * * * *", "longer than 200 characters"),
    ],
)
def test_a_bad_expression_is_refused_with_the_field(expression: str, message: str) -> None:
    assert message in refusal(expression)


@pytest.mark.parametrize(
    ("zone", "hint"),
    [
        ("europe/berlin", "did you mean Europe/Berlin?"),
        ("Berlin", "Europe/Berlin"),
        ("new york", "America/New_York"),
        ("Europe/Berln", "Europe/Berlin"),
        ("", "a name such as Europe/Berlin"),
        ("../../etc/passwd", "is not known"),
        ("/etc/localtime", "is not known"),
        ("Europe", "is not known"),
        ("a\0b", "is not known"),
    ],
)
def test_an_unknown_time_zone_is_refused_with_a_hint(zone: str, hint: str) -> None:
    assert hint in refusal("0 0 * * *", zone)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_an_expression_or_refused(text: str) -> None:
    try:
        cron = parse_cron(text, "Europe/Berlin")
    except InvalidInput:
        return
    assert cron.next_after(datetime(2026, 1, 1, tzinfo=UTC)) is not None


def test_shorthands() -> None:
    start = datetime(2026, 1, 1, 12, 30, tzinfo=UTC)
    assert times("@hourly", "UTC", start, 1) == ["2026-01-01T13:00:00+00:00"]
    assert times("@Daily", "UTC", start, 1) == ["2026-01-02T00:00:00+00:00"]
    assert times(" @yearly ", "UTC", start, 1) == ["2027-01-01T00:00:00+00:00"]


def test_a_time_that_the_clocks_jump_over_happens_right_after_the_jump() -> None:
    start = datetime(2026, 3, 28, tzinfo=UTC)
    assert times("30 2 * * *", "Europe/Berlin", start, 3) == [
        "2026-03-28T02:30:00+01:00", "2026-03-29T03:00:00+02:00", "2026-03-30T02:30:00+02:00",
    ]  # fmt: skip


def test_a_time_that_the_clocks_show_twice_happens_once() -> None:
    expected = ["2026-10-25T02:30:00+02:00", "2026-10-26T02:30:00+01:00"]
    assert times("30 2 * * *", "Europe/Berlin", datetime(2026, 10, 24, 1, tzinfo=UTC), 2) == expected
    between = datetime(2026, 10, 25, 1, 15, tzinfo=UTC)  # 02:15, the second time
    assert times("30 2 * * *", "Europe/Berlin", between, 1) == expected[1:]


def test_what_runs_all_the_time_follows_the_real_time() -> None:
    jump = times("*/30 * * * *", "Europe/Berlin", datetime(2026, 3, 29, 0, 15, tzinfo=UTC), 3)
    assert jump == ["2026-03-29T01:30:00+01:00", "2026-03-29T03:00:00+02:00", "2026-03-29T03:30:00+02:00"]
    twice = times("*/30 2 * * *", "Europe/Berlin", datetime(2026, 10, 24, 23, tzinfo=UTC), 4)
    assert twice == [f"2026-10-25T02:{minute}:00+0{offset}:00" for offset in (2, 1) for minute in ("00", "30")]


def test_the_29th_of_february() -> None:
    assert times("0 0 29 2 *", "UTC", datetime(2025, 1, 1, tzinfo=UTC), 2) == [
        "2028-02-29T00:00:00+00:00", "2032-02-29T00:00:00+00:00",
    ]  # fmt: skip


@settings(deadline=None)
@given(EXPRESSIONS, st.sampled_from(ZONES), MOMENTS)
def test_fire_times_rise_and_are_the_same_from_wherever_one_looks(expression: str, zone: str, start: datetime) -> None:
    cron = parse_cron(expression, zone)
    found = list(islice(cron.after(start), 40))
    assert all(later > earlier for earlier, later in pairwise([start, *found]))
    assert all(moment.second == moment.microsecond == 0 for moment in found)
    for earlier, later in pairwise(found):
        assert cron.next_after(earlier) == later
        assert cron.next_after(later - timedelta(seconds=1)) == later


@settings(deadline=None)
@given(EXPRESSIONS, st.sampled_from(ZONES), MOMENTS)
def test_every_fire_time_shows_its_minute_unless_the_clocks_jumped(expression: str, zone: str, start: datetime) -> None:
    cron = parse_cron(expression, zone)
    minute, rest = expression.split(maxsplit=1)
    fixed = parse_cron(f"* {rest}", zone)
    for moment in islice(cron.after(start), 40):
        local = moment.astimezone(ZoneInfo(zone))
        just_jumped = (local - timedelta(days=1)).utcoffset() != local.utcoffset()
        if minute in {"0", "30"} and not just_jumped:
            assert local.minute == int(minute)
            assert fixed.next_after(moment - timedelta(seconds=1)) == moment


@settings(deadline=None)
@given(
    EXPRESSIONS, st.sampled_from(ZONES), MOMENTS, st.timedeltas(timedelta(), timedelta(days=400)), st.integers(1, 30)
)
def test_the_last_ones_are_the_last_of_all(
    expression: str, zone: str, first: datetime, span: timedelta, limit: int
) -> None:
    cron = parse_cron(expression, zone)
    last = min(first + span, first + timedelta(days=20) if expression.startswith("*") else first + span)
    every = []
    for moment in cron.after(first - timedelta(microseconds=1)):
        if moment > last:
            break
        every.append(moment)
    assert cron.last_until(first, last, limit) == every[-limit:]
