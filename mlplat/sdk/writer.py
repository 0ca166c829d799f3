"""From what was logged to frames: the work that the user's thread is spared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from mlplat.errors import InvalidInput
from mlplat.keys import check_key
from mlplat.metrics.model import Point, encode, points_table
from mlplat.sdk.spool import Frame, Kind

FRAME_POINTS = 2_000


class Points(NamedTuple):
    """One call of ``run.log``: metric values at a step."""

    run_id: str
    timestamp: int
    step: int
    values: dict[str, float]


class Record(NamedTuple):
    """Anything else, encoded."""

    run_id: str
    frame: Frame


class Written(NamedTuple):
    """A frame of one run; ``points`` is 0 for other records."""

    run_id: str
    frame: Frame
    points: int


class FrameMaker:
    """Turns entries into frames. ``on_bad_key`` hears of every metric key that the platform would refuse."""

    def __init__(self, on_bad_key: Callable[[str, str], None]) -> None:
        self._on_bad_key = on_bad_key
        self._keys: dict[str, bool] = {}

    def frames(self, entries: Iterable[Points | Record]) -> Iterator[Written]:
        """The entries in their order; points of one run that no other record separates come together."""
        waiting: dict[str, list[Point]] = {}
        for entry in entries:
            if isinstance(entry, Record):
                yield from _drain(waiting)
                yield Written(entry.run_id, entry.frame, 0)
                continue
            points = waiting.setdefault(entry.run_id, [])
            points += [
                Point(key, value, entry.timestamp, entry.step)
                for key, value in entry.values.items()
                if self._keys.get(key) or self._is_sound(entry.run_id, key)
            ]
            if len(points) >= FRAME_POINTS:
                yield from _drain(waiting)
        yield from _drain(waiting)

    def _is_sound(self, run_id: str, key: str) -> bool:
        if key not in self._keys:
            self._keys[key] = True
            try:
                check_key("metric", key)
            except InvalidInput as error:
                self._keys[key] = False
                self._on_bad_key(run_id, error.message)
        return self._keys[key]


def _drain(waiting: dict[str, list[Point]]) -> Iterator[Written]:
    for run_id, points in waiting.items():
        for start in range(0, len(points), FRAME_POINTS):
            part = points[start : start + FRAME_POINTS]
            yield Written(run_id, Frame(Kind.POINTS, encode(points_table(run_id, part))), len(part))
    waiting.clear()
