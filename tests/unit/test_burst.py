"""Bursts of submissions, on a clock that tests move."""

from __future__ import annotations

import asyncio
from bisect import bisect_right

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.pipelines import burst
from mlplat.pipelines.burst import BURST, MAX_WAIT_S, WINDOW_S, Burst


class Clock:
    """Stands in for ``time`` and ``asyncio`` in the module: whoever sleeps moves it.

    Args:
        arrivals: when submissions come.
    """

    def __init__(self, *arrivals: float) -> None:
        self.now = 0.0
        self.sleeps = 0
        self.burst = Burst()
        self.arrivals = sorted(arrivals)
        self._due = list(self.arrivals)

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.sleeps += 1
        self.move(self.now + seconds)

    def move(self, to: float) -> None:
        """Time passes; what comes meanwhile is noted when it comes."""
        while self._due and self._due[0] <= to:
            self.now = self._due.pop(0)
            self.burst.note()
        self.now = to

    def waited(self, since: float) -> float:
        """How long somebody waits who comes at that time."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(burst, "time", self)
            patch.setattr(burst, "asyncio", self)
            self.move(since)
            asyncio.run(self.burst.over())
        return self.now - since

    def is_busy(self, at: float) -> bool:
        """Whether a burst's submissions have come within the window before that time."""
        return bisect_right(self.arrivals, at) - bisect_right(self.arrivals, at - WINDOW_S) >= BURST


def test_without_a_burst_nobody_waits() -> None:
    assert Clock().waited(1) == 0
    assert Clock(*[1.0] * (BURST - 1)).waited(1) == 0
    assert Clock(*[1.0] * BURST).waited(1 + WINDOW_S) == 0


def test_submissions_that_come_one_after_another_are_no_burst() -> None:
    steady = [number * 1.1 * WINDOW_S / BURST for number in range(200)]
    assert Clock(*steady).waited(0.5) == 0


def test_a_burst_is_waited_for_until_it_is_over() -> None:
    waited = Clock(*[1.0] * BURST).waited(1)
    assert WINDOW_S <= waited <= 2 * WINDOW_S


def test_a_burst_that_begins_late_is_waited_for_too() -> None:
    assert Clock(*[0.0] * 3, *[1.0] * BURST).waited(1) > 0


def test_nobody_waits_for_ever() -> None:
    flood = [number * WINDOW_S / BURST / 3 for number in range(1_000)]
    waited = Clock(*flood).waited(0.1)
    assert MAX_WAIT_S <= waited <= MAX_WAIT_S + WINDOW_S


gaps = st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.001, 0.004, 0.006, 0.03, 0.2]), max_size=60)


@settings(deadline=None, max_examples=100)
@given(gaps, st.floats(0, 1))
def test_whoever_goes_on_waited_for_a_burst_and_for_nothing_else(between: list[float], since: float) -> None:
    times, now = [], 0.0
    for gap in between:
        now += gap
        times.append(now)
    clock = Clock(*times)
    waited = clock.waited(since)
    assert waited <= MAX_WAIT_S + WINDOW_S
    assert (waited > 0) == clock.is_busy(since)
    assert not clock.is_busy(clock.now) or waited >= MAX_WAIT_S
    assert clock.sleeps <= 1 + 2 * MAX_WAIT_S / WINDOW_S
