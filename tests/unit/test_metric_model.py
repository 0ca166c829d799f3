"""The wire format of metric points."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.errors import InvalidInput
from mlplat.metrics.model import MAX_TIMESTAMP, SCHEMA, Point, decode, encode, points_table

POINTS = [Point("loss", 0.5, 1_700_000_000_000, 0), Point("acc", math.inf, 1_700_000_000_001, -3)]
GOOD: dict[str, list[Any]] = {
    "run_id": ["r", "r"],
    "key": ["a", "b"],
    "step": [0, 1],
    "timestamp": [5, 6],
    "value": [0.5, 1.5],
}


def body(columns: dict[str, Any]) -> bytes:
    return encode(pa.table(columns))


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidInput) as caught:
        decode(data)
    return caught.value.message


def test_points_become_rows() -> None:
    table = points_table("run", POINTS)
    assert table.schema == SCHEMA
    assert table.to_pylist()[1] == {
        "run_id": "run",
        "key": "acc",
        "step": -3,
        "timestamp": 1_700_000_000_001,
        "value": math.inf,
    }


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_a_batch_survives_the_wire(compression: str | None) -> None:
    table = points_table("run", POINTS)
    assert decode(encode(table, compression)).equals(table)


def test_an_empty_batch_is_a_batch() -> None:
    assert decode(encode(points_table("r", []))).num_rows == 0


def test_no_points_at_all_need_no_list() -> None:
    assert points_table("r", iter(())).schema == SCHEMA


def test_a_batch_in_several_chunks_is_one_table() -> None:
    one = points_table("r", POINTS)
    assert decode(encode(pa.concat_tables([one, one]))).num_rows == 4


def test_compatible_types_are_cast() -> None:
    columns = GOOD | {
        "step": pa.array([0, 1], pa.int32()),
        "value": pa.array([0.5, 1.5], pa.float32()),
        "key": pa.array(["a", "b"]).dictionary_encode(),
    }
    table = decode(body(columns))
    assert table.schema == SCHEMA
    assert table["key"].to_pylist() == ["a", "b"]
    assert table["value"].to_pylist() == [0.5, 1.5]


@pytest.mark.parametrize("data", [b"", b"x", b"{}", b"\xff" * 100, b"ARROW1\x00\x00"])
def test_what_is_no_arrow_stream_is_refused(data: bytes) -> None:
    assert refusal(data).startswith("the body is not an Arrow IPC stream")


def test_a_stream_that_was_cut_is_refused() -> None:
    whole = encode(points_table("r", POINTS * 100))
    for length in range(0, len(whole) - 16, max(1, len(whole) // 50)):
        refusal(whole[:length])


@pytest.mark.parametrize("missing", list(GOOD))
def test_a_missing_column_is_refused(missing: str) -> None:
    columns = {name: values for name, values in GOOD.items() if name != missing}
    assert refusal(body(columns)).startswith("metric batches have the columns")


def test_other_columns_and_another_order_are_refused() -> None:
    assert refusal(body(GOOD | {"more": [1, 2]})).startswith("metric batches have the columns")
    assert refusal(body(dict(reversed(GOOD.items())))).startswith("metric batches have the columns")


@pytest.mark.parametrize("name", list(GOOD))
def test_a_null_is_refused(name: str) -> None:
    assert refusal(body(GOOD | {name: [GOOD[name][0], None]})) == "metric batches may not contain nulls"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("value", ["a", "b"]),
        ("step", [0.5, 1.0]),
        ("step", ["x", "y"]),
        ("run_id", [[1], [2]]),
        ("step", pa.array([2**63, 0], pa.uint64())),
        ("key", [{"a": 1}, {"a": 2}]),
    ],
)
def test_a_column_of_the_wrong_type_is_refused(name: str, values: Any) -> None:
    assert refusal(body(GOOD | {name: values})).startswith("a column of the metric batch has the wrong type")


def test_text_that_is_not_utf8_is_refused() -> None:
    raw = pa.array([b"\xff\xfe", b"ok"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    assert refusal(body(GOOD | {"key": text})).startswith("the body is not an Arrow IPC stream")


points = st.builds(
    Point,
    st.from_regex(r"[\w\-. :]{0,9}\w", fullmatch=True),
    st.floats(),
    st.integers(0, MAX_TIMESTAMP),
    st.integers(-(2**63), 2**63 - 1),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(points, max_size=5))
def test_any_points_survive_the_wire(batch: list[Point]) -> None:
    table = decode(encode(points_table("r", batch), "zstd"))
    rows = [Point(row["key"], row["value"], row["timestamp"], row["step"]) for row in table.to_pylist()]
    assert repr(rows) == repr(batch)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_batch_or_refused(data: bytes) -> None:
    refusal(data)
