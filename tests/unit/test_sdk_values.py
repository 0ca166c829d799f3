"""What users may log, and the buffer between them and the disk."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from mlplat.errors import InvalidInput
from mlplat.metrics.model import decode
from mlplat.sdk.buffer import Buffer
from mlplat.sdk.records import Call, to_frame
from mlplat.sdk.spool import Kind
from mlplat.sdk.values import metric_values, param_texts, step_number, tag_texts
from mlplat.sdk.writer import FRAME_POINTS, FrameMaker, Points, Record


def test_numbers_of_every_kind_are_taken() -> None:
    values = metric_values({"a": 1, "b": np.float32(0.5), "c": np.array(2), "d": True, "e": float("nan"), "f": 10**300})
    assert all(type(value) is float for value in values.values())
    assert [values[key] for key in "abcdf"] == [1.0, 0.5, 2.0, 1.0, 1e300]


@pytest.mark.parametrize("value", ["1", b"1", None, [1.0], {}, 1j, object(), 10**400, np.array([1.0, 2.0])])
def test_what_is_not_a_number_is_named(value: Any) -> None:
    with pytest.raises(InvalidInput, match="metric 'loss': the value must be a number"):
        metric_values({"ok": 1.0, "loss": value})


@pytest.mark.parametrize("key", [1, None, b"a", ("a",)])
def test_keys_are_text(key: Any) -> None:
    for check in (metric_values, tag_texts, lambda values: param_texts(values, {})):
        with pytest.raises(InvalidInput, match="keys are strings"):
            check({key: 1.0})


def test_steps_are_whole_numbers_of_64_bits() -> None:
    assert step_number(np.int32(3)) == 3
    for step in (1.0, "1", None, 2**63, -(2**63) - 1):
        with pytest.raises(InvalidInput):
            step_number(step)  # type: ignore[arg-type]


def test_params_do_not_change() -> None:
    known = param_texts({"a": 1, "b": "x" * 7_000}, {})
    assert known == {"a": "1", "b": "x" * 6_000}
    assert param_texts({"a": "1", "c": None}, known) == {"c": "None"}
    with pytest.raises(InvalidInput, match="'a' was logged as '1' and cannot become '2'"):
        param_texts({"a": 2}, known)


def test_a_buffer_keeps_order_and_bounds() -> None:
    buffer: Buffer[int] = Buffer(max_weight=10, hurry_weight=100)
    assert [buffer.add(entry, 4) for entry in range(3)] == [True, True, False]
    assert (buffer.take(), buffer.take(), buffer.added) == ([0, 1], [], 2)
    assert buffer.add(3, 10)


def test_a_waiting_taker_is_woken() -> None:
    buffer: Buffer[int] = Buffer(max_weight=100, hurry_weight=3)
    taken: list[int] = []

    def taker() -> None:
        while len(taken) < 50:
            buffer.wait()
            taken.extend(buffer.take())

    thread = threading.Thread(target=taker, daemon=True)
    thread.start()
    for entry in range(50):
        assert buffer.add(entry, 1)
    thread.join(30)
    assert taken == list(range(50))


def test_lingering_ends_when_enough_waits_or_when_told() -> None:
    buffer: Buffer[int] = Buffer(max_weight=100, hurry_weight=2)
    buffer.add(1, 1)
    buffer.add(2, 1)
    buffer.linger(60)
    buffer.hurry()
    buffer.linger(60)


def test_frames_keep_the_order_of_what_was_logged() -> None:
    refused: list[tuple[str, str]] = []
    maker = FrameMaker(lambda run_id, reason: refused.append((run_id, reason)))
    call = to_frame(Call("r1", "tags", "/x", {}))
    entries: list[Points | Record] = [
        Points("r1", 1, 0, {"a": 1.0, "b": 2.0, "no*good": 3.0}),
        Points("r2", 2, 0, {"a": 1.5}),
        Record("r1", call),
        Points("r1", 3, 1, {"a": 4.0, "no*good": 3.0}),
    ]
    written = list(maker.frames(entries))
    assert [(frame.run_id, frame.frame.kind, frame.points) for frame in written] == [
        ("r1", Kind.POINTS, 2), ("r2", Kind.POINTS, 1), ("r1", Kind.CALL, 0), ("r1", Kind.POINTS, 1),
    ]  # fmt: skip
    table = decode(written[0].frame.body)
    assert table.to_pylist() == [
        {"run_id": "r1", "key": "a", "step": 0, "timestamp": 1, "value": 1.0},
        {"run_id": "r1", "key": "b", "step": 0, "timestamp": 1, "value": 2.0},
    ]
    assert [run_id for run_id, _reason in refused] == ["r1"]  # each bad key once


def test_large_batches_come_in_frames() -> None:
    maker = FrameMaker(lambda *_: None)
    entries = [Points("r", 1, step, {"a": 1.0}) for step in range(FRAME_POINTS * 2 + 10)]
    assert [frame.points for frame in maker.frames(entries)] == [FRAME_POINTS, FRAME_POINTS, 10]
