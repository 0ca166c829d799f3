"""The cache between the metric log and the metric store."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.metrics.buffer import Cached, FlushBuffer


def group(seq: int, points: int = 1, weight: int = 10) -> Cached[str]:
    return Cached(seq, points, weight, f"body {seq}")


def filled(*seqs: int, flushed: int = 0, max_weight: int = 100) -> FlushBuffer[str]:
    buffer: FlushBuffer[str] = FlushBuffer(flushed, flushed, max_weight)
    for seq in seqs:
        buffer.add(group(seq))
    return buffer


def seqs(batch: list[Cached[str]]) -> list[int]:
    return [cached.seq for cached in batch]


def test_a_new_buffer_is_empty() -> None:
    buffer = filled(flushed=7)
    assert (buffer.lag, buffer.weight, buffer.points, buffer.next_batch(10)) == (0, 0, 0, [])


def test_groups_come_out_in_order() -> None:
    buffer = filled(8, 9, 10, flushed=7)
    assert (buffer.lag, buffer.weight, buffer.points) == (3, 30, 3)
    assert seqs(buffer.next_batch(100)) == [8, 9, 10]


def test_looking_at_a_batch_takes_nothing_away() -> None:
    buffer = filled(1, 2)
    assert buffer.next_batch(100) == buffer.next_batch(100)
    assert buffer.lag == 2


def test_a_batch_has_at_most_the_points_asked_for_but_at_least_one_group() -> None:
    buffer: FlushBuffer[str] = FlushBuffer(0, 0, 1_000)
    for seq, points in ((1, 5), (2, 5), (3, 1)):
        buffer.add(group(seq, points))
    assert seqs(buffer.next_batch(3)) == [1]
    assert seqs(buffer.next_batch(9)) == [1]
    assert seqs(buffer.next_batch(10)) == [1, 2]
    assert seqs(buffer.next_batch(11)) == [1, 2, 3]


def test_what_is_flushed_is_forgotten() -> None:
    buffer = filled(1, 2, 3)
    buffer.mark_flushed(2)
    assert (buffer.lag, buffer.weight, buffer.points) == (1, 10, 1)
    assert seqs(buffer.next_batch(100)) == [3]


def test_a_group_that_does_not_fit_is_left_to_the_log() -> None:
    buffer = filled(1, 2, 3, max_weight=20)
    assert (buffer.lag, buffer.weight) == (3, 20)
    assert seqs(buffer.next_batch(100)) == [1, 2]
    buffer.mark_flushed(2)
    assert buffer.next_batch(100) == []
    assert buffer.lag == 1


def test_after_a_gap_nothing_is_cached_until_the_log_was_read_up() -> None:
    buffer = filled(1, 2, 3, max_weight=20)
    buffer.mark_flushed(2)
    buffer.add(group(4))
    assert (buffer.lag, buffer.weight, buffer.next_batch(100)) == (2, 0, [])
    buffer.mark_flushed(4)
    buffer.add(group(5))
    assert seqs(buffer.next_batch(100)) == [5]


def test_a_group_larger_than_the_buffer_is_left_to_the_log() -> None:
    buffer: FlushBuffer[str] = FlushBuffer(0, 0, 5)
    buffer.add(group(1))
    assert (buffer.lag, buffer.weight, buffer.next_batch(1)) == (1, 0, [])


def test_numbers_may_not_jump_or_repeat() -> None:
    buffer = filled(1)
    for seq in (1, 3):
        with pytest.raises(AssertionError):
            buffer.add(group(seq))


def test_the_mark_never_moves_back() -> None:
    buffer = filled(1, 2)
    buffer.mark_flushed(2)
    with pytest.raises(AssertionError):
        buffer.mark_flushed(1)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 50),
    st.lists(st.tuples(st.sampled_from(["add", "flush"]), st.integers(1, 9), st.integers(1, 30)), max_size=60),
)
def test_every_group_is_flushed_once_and_in_order(max_weight: int, actions: list[tuple[str, int, int]]) -> None:
    buffer: FlushBuffer[str] = FlushBuffer(0, 0, max_weight)
    log: dict[int, Cached[str]] = {}
    stored: list[int] = []
    for action, points, weight in actions:
        if action == "add":
            log[buffer.last_seq + 1] = group(buffer.last_seq + 1, points, weight)
            buffer.add(log[buffer.last_seq + 1])
        elif buffer.lag:
            batch = buffer.next_batch(points)
            assert all(log[cached.seq] == cached for cached in batch)
            assert len(batch) <= 1 or sum(cached.points for cached in batch) <= points
            taken = seqs(batch) or [buffer.flushed_seq + 1]
            stored += taken
            buffer.mark_flushed(taken[-1])
        assert 0 <= buffer.weight <= max_weight
        assert buffer.lag == len(log) - len(stored)
        assert (buffer.weight == 0) == (buffer.points == 0)
        if buffer.lag == 0:
            assert buffer.weight == 0
    assert stored == list(range(1, len(stored) + 1))
