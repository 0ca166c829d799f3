"""Cron expressions with a time zone.

Clock changes are handled as Debian's cron does. A time that the clocks jump over happens right after the jump, and
one that they show twice happens the first time only. Expressions whose minutes or hours start with ``*`` follow the
real time instead: they do nothing for the hour that is missing, and go on through the one that comes twice.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from cronsim import CronSim, CronSimError

from mlplat.errors import InvalidInput

MAX_LENGTH = 200
_FIELDS = {
    "minute": "0-59",
    "hour": "0-23",
    "day-of-month": "1-31 or L, in a month that is long enough",
    "month": "1-12 or JAN-DEC",
    "day-of-week": "0-7 or SUN-SAT; 5L is the last Friday, MON#1 the first Monday",
}
_SHORTHANDS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
#: Where looking for the first time begins: any moment will do.
_SOME_TIME = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Cron:
    """Fire times: a five-field expression, or a shorthand such as ``@daily``, read in a time zone.

    Build it with ``parse_cron``.
    """

    expression: str
    zone: ZoneInfo

    def after(self, moment: datetime) -> Iterator[datetime]:
        """All fire times later than ``moment``, in order, in UTC. Ends when there is none for 50 years."""
        latest = moment.astimezone(UTC)
        for found in CronSim(_SHORTHANDS.get(self.expression.lower(), self.expression), moment.astimezone(self.zone)):
            # Around a change of the clocks the library may give a time again, or an earlier one.
            if found.astimezone(UTC) > latest:
                latest = found.astimezone(UTC)
                yield latest

    def next_after(self, moment: datetime) -> datetime | None:
        """The first fire time later than ``moment``; None if there is none for 50 years."""
        return next(self.after(moment), None)

    def last_until(self, first: datetime, last: datetime, limit: int) -> list[datetime]:
        """The newest fire times of ``first <= time <= last``, at most ``limit``, oldest first."""
        reach = timedelta(hours=1)
        while True:
            start = max(first, last - reach)
            found: list[datetime] = []
            for moment in self.after(start - timedelta(microseconds=1)):
                if moment > last:
                    break
                found.append(moment)
            if len(found) >= limit or start == first:
                return found[-limit:]
            reach *= 2


@lru_cache(maxsize=1_000)
def parse_cron(expression: str, time_zone: str) -> Cron:
    """A cron expression in a time zone of the IANA database.

    Raises:
        InvalidInput: which field is wrong, or what the time zone may have been meant to be.
    """
    cron = Cron(expression.strip(), _zone(time_zone))
    _check(expression)
    if cron.next_after(_SOME_TIME) is None:
        raise InvalidInput(f"cron {expression!r}: there is no such day within 50 years")
    return cron


def _check(expression: str) -> None:
    if len(expression) > MAX_LENGTH:
        raise InvalidInput(f"cron: longer than {MAX_LENGTH} characters")
    text = expression.strip()
    if text.startswith("@"):
        if text.lower() not in _SHORTHANDS:
            raise InvalidInput(f"cron {expression!r}: unknown; there are {', '.join(_SHORTHANDS)}")
        return
    parts = text.split()
    if len(parts) != len(_FIELDS):
        raise InvalidInput(
            f"cron {expression!r}: has {len(parts)} fields, expected {len(_FIELDS)}: {' '.join(_FIELDS)}"
        )
    try:
        CronSim(text, _SOME_TIME)
    except CronSimError as error:
        name = str(error).removeprefix("Bad ")
        value = parts[list(_FIELDS).index(name)]
        raise InvalidInput(f"cron {expression!r}: {name} {value!r} is not valid ({_FIELDS[name]})") from error


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidInput(f"time zone {name[:100]!r} is not known; did you mean {_hint(name)}?") from error


def _hint(name: str) -> str:
    wanted = name[:100].lower().replace(" ", "_")
    known = {zone.lower(): zone for zone in available_timezones()}
    if wanted in known:
        return known[wanted]
    near = [zone for zone in sorted(known) if zone.endswith(f"/{wanted}")]
    near += difflib.get_close_matches(wanted, list(known), n=3)
    return " or ".join(known[zone] for zone in dict.fromkeys(near[:3])) or "a name such as Europe/Berlin, or UTC"
