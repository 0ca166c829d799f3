"""The judge of the fault suite: it must see what is lost, doubled, invented or torn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from tests.faults.ledger import Found, Verdict, Window, judge
from tests.faults.writer import Entry

WINDOWS = [Window("first", "fired", 0.0, 10.0), Window("second", "fired", 10.0, 30.0)]


def _entry(step: int, done: float | None, failures: Sequence[str] = ()) -> Entry:
    return Entry(0, "batch", "r", "k", step, 3, f"p{step}", done or 1.0, done, list(failures))


def _judge(entries: list[Entry], steps: list[int], params: tuple[str, ...] = ("p0", "p3", "p6")) -> list[Verdict]:
    return judge(Found({("r", "k"): Counter(steps)}, {"r": {name: name for name in params}}), entries, WINDOWS)


ACKNOWLEDGED = [_entry(0, 2.0), _entry(3, 5.0), _entry(6, 22.0, failures=["503 Retry-After"])]


def test_all_is_well() -> None:
    first, second = _judge(ACKNOWLEDGED, list(range(9)))
    assert (first.requests, first.points, first.lost, first.twice, first.gap_s) == (2, 6, 0, 0, 5.0)
    assert (second.requests, second.points, second.lost, second.twice, second.gap_s) == (1, 3, 0, 0, 12.0)
    assert second.failures == {"503 Retry-After": 1}
    assert str(second) == (
        "second → fired → 3 points acknowledged in 1 requests, lost 0, twice 0, longest gap 12.0 s of 20.0 s, "
        "failed tries: 1 × 503 Retry-After"
    )


def test_what_is_lost_counts_in_the_window_of_its_acknowledgement() -> None:
    lost = _judge(ACKNOWLEDGED, [0, 1, 2, 3, 4, 5], ("p0", "p3"))
    assert [verdict.lost for verdict in lost] == [0, 3]


def test_what_is_there_twice_is_seen() -> None:
    assert [verdict.twice for verdict in _judge(ACKNOWLEDGED, [*range(9), 1, 1, 2])] == [2, 0]


def test_half_a_batch_is_torn_even_when_nobody_was_told() -> None:
    with pytest.raises(AssertionError, match="torn: 2 of 3 points"):
        _judge([_entry(0, None)], [0, 1])


def test_an_unknown_outcome_may_be_all_or_nothing() -> None:
    for steps, params in (([], ()), ([0, 1, 2], ("p0",))):
        assert [verdict.lost for verdict in _judge([_entry(0, None)], steps, params)] == [0, 0]


@pytest.mark.parametrize(("steps", "params"), [([0, 1, 2], ()), ([], ("p0",))])
@pytest.mark.parametrize("done", [1.0, None])
def test_points_and_their_param_without_one_another_are_torn(
    steps: list[int], params: tuple[str, ...], done: float | None
) -> None:
    with pytest.raises(AssertionError, match=r"torn: \d points and param"):
        _judge([_entry(0, done)], steps, params)


def test_points_that_nobody_sent_are_seen() -> None:
    with pytest.raises(AssertionError, match=r"steps \[9\] were never sent"):
        _judge(ACKNOWLEDGED, list(range(10)))
