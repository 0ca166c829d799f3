"""One row per run and metric: the last value, the smallest, the largest."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.metrics import summary
from mlplat.metrics.model import SCHEMA, Point, concat, points_table, with_experiments
from mlplat.metrics.summary import SUMMARY_SCHEMA, last_points, merge_last_points, summarise

Rows = dict[tuple[str, str], list[Point]]


def reference(rows: Rows) -> dict[tuple[str, str], tuple[int, int, float, bool, float, float]]:
    """The same, one point after the other."""
    found = {}
    for pair, points in rows.items():
        last = max(
            points, key=lambda p: (p.step, p.timestamp, 0.0 if math.isnan(p.value) else p.value, p.value != p.value)
        )
        numbers = [point.value for point in points if not math.isnan(point.value)]
        is_nan = math.isnan(last.value)
        found[pair] = (
            last.step, last.timestamp, 0.0 if is_nan else last.value, is_nan,
            min(numbers, default=math.inf), max(numbers, default=-math.inf),
        )  # fmt: skip
    return found


def summarised(rows: Rows) -> dict[tuple[str, str], tuple[int, int, float, bool, float, float]]:
    tables = [points_table(run, points) for (run, _key), points in rows.items()]
    runs = {run: number for number, (run, _key) in enumerate(rows)}
    table = summarise(with_experiments(concat(tables), runs))
    assert table.schema == SUMMARY_SCHEMA
    found = {}
    for row in table.to_pylist():
        assert row["experiment_id"] == runs[row["run_id"]]
        last = row["last"]
        found[row["run_id"], row["key"]] = (
            last["step"], last["timestamp"], last["number"], bool(last["is_nan"]), row["min_value"], row["max_value"],
        )  # fmt: skip
    assert len(found) == table.num_rows
    return found


# Few different numbers, so that there are ties.
numbers = st.sampled_from([0.0, 1.0, -1.0, math.nan, math.inf, -math.inf]) | st.floats(-9, 9)
points = st.builds(
    Point, st.just("?"), numbers, st.integers(0, 3), st.integers(-2, 2) | st.integers(-(2**63), 2**63 - 1)
)
pairs = st.tuples(st.sampled_from("rst"), st.sampled_from("abc"))


@pytest.mark.parametrize("dense", [4, 0], ids=["numbered by a table", "numbered by sorting"])
@settings(deadline=None, max_examples=80)
@given(st.dictionaries(pairs, st.lists(points, min_size=1, max_size=12), min_size=1))
def test_the_summary_is_that_of_each_run_and_metric(dense: int, drawn: Rows) -> None:
    rows = {(run, key): [point._replace(key=key) for point in found] for (run, key), found in drawn.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "_DENSE", dense)
        assert summarised(rows) == reference(rows)


def test_no_points_have_no_summary() -> None:
    assert summarise(with_experiments(SCHEMA.empty_table().combine_chunks(), {})).num_rows == 0


def test_points_of_runs_that_are_gone_are_left_out() -> None:
    table = concat([points_table("here", [Point("m", 1.0, 1, 1)]), points_table("gone", [Point("m", 2.0, 1, 1)])])
    assert with_experiments(table, {"here": 7})["run_id"].to_pylist() == ["here"]


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(pairs, st.lists(points, min_size=1, max_size=6), min_size=1),
    st.lists(st.dictionaries(pairs, st.lists(points, min_size=1, max_size=6), min_size=1), max_size=3),
)
def test_what_is_pending_counts_as_if_it_were_stored(stored: Rows, groups: list[Rows]) -> None:
    def table(rows: Rows) -> pa.Table:
        return concat([points_table(run, [p._replace(key=key) for p in found]) for (run, key), found in rows.items()])

    everything: Rows = {}
    for rows in (stored, *groups):
        for pair, found in rows.items():
            everything.setdefault(pair, []).extend(found)
    wanted = ["r", "t", "nobody"]
    known = table({pair: found for pair, found in stored.items() if pair[0] in wanted} or {("r", "a"): []})
    first = last_points(known).select(["run_id", "key", "value", "step", "timestamp"])
    merged = merge_last_points(first, [last_points(table(rows)) for rows in groups], wanted)
    assert merged.column_names == first.column_names
    answered = [(row["run_id"], row["key"], row["step"], row["timestamp"], row["value"]) for row in merged.to_pylist()]
    expected = sorted(
        (run, key, step, timestamp, math.nan if is_nan else number)
        for (run, key), (step, timestamp, number, is_nan, *_) in reference(everything).items()
        if run in wanted
    )
    assert repr(answered) == repr(expected)
