"""Schedules: which fire times are due, which were missed, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from mlplat.pipelines.automation.cron import Cron, parse_cron

MAX_CATCH_UP = 1_000


class CatchUp(StrEnum):
    """What becomes of fire times that were missed, because the platform was away for instance.

    SKIP: nothing. LATEST: a run for the newest, unless one is due in time anyway. ALL: a run for each.
    """

    SKIP = "skip"
    LATEST = "latest"
    ALL = "all"


@dataclass(frozen=True)
class Timing:
    """When a schedule fires.

    Args:
        misfire_grace_s: a fire time counts as missed when it was longer ago than this; before that it is merely late.
        catch_up_limit: runs that one look may start; of more fire times the newest count.
        starts_at: no fire time before this.
        ends_at: no fire time after this.
    """

    cron: str
    time_zone: str = "UTC"
    catch_up: CatchUp = CatchUp.LATEST
    catch_up_limit: int = 100
    misfire_grace_s: float = 60.0
    starts_at: datetime | None = None
    ends_at: datetime | None = None

    def parse(self) -> Cron:
        """The fire times, whether or not within the bounds.

        Raises:
            InvalidInput: which field of the expression is wrong, or that the time zone is unknown.
        """
        return parse_cron(self.cron, self.time_zone)

    def next_after(self, moment: datetime) -> datetime | None:
        """The first fire time later than ``moment`` and within the bounds; None when all are over."""
        if self.starts_at is not None and self.starts_at > moment:
            moment = self.starts_at - timedelta(microseconds=1)
        found = self.parse().next_after(moment)
        return None if found is None or (self.ends_at is not None and found > self.ends_at) else found

    def preview(self, moment: datetime, count: int) -> list[datetime]:
        """The next ``count`` fire times after ``moment``; fewer when the schedule ends."""
        found: list[datetime] = []
        while len(found) < count and (following := self.next_after(moment)) is not None:
            found.append(following)
            moment = following
        return found


@dataclass(frozen=True)
class Schedule:
    """A pipeline with parameters that runs by itself. ``next_at`` is None while it is paused, and when it is over."""

    name: str
    pipeline: str
    digest: str
    params: dict[str, Any]
    timing: Timing
    paused: bool
    next_at: datetime | None
    last_at: datetime | None
    last_run_id: str | None
    created_by: str
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class Due:
    """What a look at a schedule leads to.

    Args:
        fire: fire times that get a run, oldest first.
        missed: the first and the last fire time that gets none, if there are any.
        next_at: the fire time to wait for; None when there is none.
    """

    fire: list[datetime]
    missed: tuple[datetime, datetime] | None
    next_at: datetime | None


def due(timing: Timing, next_at: datetime, now: datetime) -> Due:
    """What is due of a schedule that waits for ``next_at``. Pure: equal arguments give equal answers."""
    if next_at > now:
        return Due([], None, next_at)
    cron = timing.parse()
    until = now if timing.ends_at is None else min(now, timing.ends_at)
    following = timing.next_after(now)
    if timing.catch_up is CatchUp.ALL:
        fire = cron.last_until(next_at, until, timing.catch_up_limit)
    else:
        in_time = max(next_at, now - timedelta(seconds=timing.misfire_grace_s))
        fire = cron.last_until(in_time, until, timing.catch_up_limit) if in_time <= until else []
        if not fire and timing.catch_up is CatchUp.LATEST:
            fire = cron.last_until(next_at, until, 1)
    return Due(fire, _missed(cron, next_at, until, fire), following)


def _missed(cron: Cron, first: datetime, until: datetime, fire: list[datetime]) -> tuple[datetime, datetime] | None:
    """The first and the last fire time from ``first`` on that comes before those in ``fire``."""
    end = fire[0] - timedelta(microseconds=1) if fire else until
    if end < first:
        return None
    last = cron.last_until(first, end, 1)
    return (first, last[0]) if last else None
