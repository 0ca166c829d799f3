"""The record of the metric log."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplat.metrics.record import pack, unpack


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=20))
def test_batches_come_out_as_they_went_in(batches: list[bytes]) -> None:
    assert unpack(pack(batches)) == batches


def test_equal_batches_take_little_room() -> None:
    assert len(pack([b"a run of the mill batch" * 100] * 50)) < 2_000


def test_a_bare_arrow_stream_is_a_record_of_one_batch() -> None:
    stream = b"\xff\xff\xff\xff and so on"
    assert unpack(stream) == [stream]


@pytest.mark.parametrize("record", [b"", b"{}", b"MLR2" + bytes(20)])
def test_anything_else_is_no_record(record: bytes) -> None:
    with pytest.raises(ValueError, match="not a record"):
        unpack(record)
