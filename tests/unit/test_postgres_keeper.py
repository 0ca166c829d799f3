"""When the embedded Postgres may write."""

from __future__ import annotations

from cluster.postgres import WRITES
from cluster.postgres_keeper import ENOUGH_FREE_BYTES, MIN_FREE_BYTES, may_write


def test_writes_end_with_little_room_and_begin_again_with_enough() -> None:
    assert may_write(MIN_FREE_BYTES, allowed=True)
    assert not may_write(MIN_FREE_BYTES - 1, allowed=True)
    assert not may_write(ENOUGH_FREE_BYTES - 1, allowed=False)
    assert may_write(ENOUGH_FREE_BYTES, allowed=False)


def test_the_change_needs_no_room_on_disk() -> None:
    assert len({len(text) for text in WRITES.values()}) == 1
