"""The spool: frames, torn and damaged files, locks, bounds."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.errors import InvalidInput
from mlplat.sdk import spool
from mlplat.sdk.backlog import Backlog
from mlplat.sdk.records import PutFile, attachment_of, from_frame, to_frame
from mlplat.sdk.spool import Frame, Kind, SpoolFile, folder_bytes, pack, spooled_files, unpack

FRAMES = st.lists(st.builds(Frame, st.sampled_from(Kind), st.binary(max_size=200)), max_size=8)
CALL = Frame(Kind.CALL, b'{"a": 1}')
POINTS = Frame(Kind.POINTS, b"p" * 1000)


def frames_of(data: bytes) -> list[Frame]:
    return [frame for frame, _end in unpack(data)]


@given(FRAMES)
def test_frames_come_back_as_they_were(frames: list[Frame]) -> None:
    data = b"".join(map(pack, frames))
    assert frames_of(data) == frames
    assert [end for _frame, end in unpack(data)][-1:] == ([len(data)] if frames else [])


@given(FRAMES, st.data())
def test_a_torn_tail_costs_the_torn_frame_only(frames: list[Frame], data: st.DataObject) -> None:
    packed = [pack(frame) for frame in frames]
    whole = b"".join(packed)
    cut = data.draw(st.integers(0, len(whole)))
    kept = [frame for index, frame in enumerate(frames) if len(b"".join(packed[: index + 1])) <= cut]
    assert frames_of(whole[:cut]) == kept


@given(FRAMES.filter(len), st.data())
def test_a_changed_byte_never_makes_another_frame(frames: list[Frame], data: st.DataObject) -> None:
    whole = bytearray(b"".join(map(pack, frames)))
    position = data.draw(st.integers(0, len(whole) - 1))
    whole[position] ^= data.draw(st.integers(1, 255))
    found = frames_of(bytes(whole))
    assert len(found) < len(frames)
    assert found == frames[: len(found)]


@given(st.binary(max_size=300))
def test_any_bytes_can_be_read(data: bytes) -> None:
    assert all(end <= len(data) for _frame, end in unpack(data))


def test_a_body_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MAX_BODY", 10)
    with pytest.raises(InvalidInput, match="too large"):
        pack(Frame(Kind.CALL, b"x" * 11))
    assert frames_of(struct.pack("<IIB", 11, 0, 2) + b"x" * 11) == []


def test_a_file_keeps_its_frames_and_what_was_acknowledged(tmp_path: Path) -> None:
    file = SpoolFile.create(tmp_path, b"origin")
    file.append([CALL, POINTS])
    file.append([CALL])
    (first, offset), *rest = file.read(10_000)
    assert [first, *(frame for frame, _offset in rest)] == [CALL, POINTS, CALL]
    file.acknowledge(offset)
    file.close(delete=False)
    again = SpoolFile.adopt(file.path)
    assert again is not None
    assert again.origin == b"origin"
    assert [frame for frame, _offset in again.read(10_000)] == [POINTS, CALL]
    assert [frame for frame, _offset in again.read(1)] == [POINTS]
    again.close(delete=True)
    assert spooled_files(tmp_path) == []


def test_only_one_has_a_file(tmp_path: Path) -> None:
    file = SpoolFile.create(tmp_path, b"")
    assert SpoolFile.adopt(file.path) is None
    file.close(delete=False)
    taken = SpoolFile.adopt(file.path)
    assert taken is not None
    assert SpoolFile.adopt(file.path) is None
    taken.close(delete=True)
    assert SpoolFile.adopt(file.path) is None


@pytest.mark.parametrize("content", [b"", b"short", b"something else altogether"])
def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "1-1-x.spool"
    path.write_bytes(content)
    assert SpoolFile.adopt(path) is None
    assert path.read_bytes() == content


def test_a_torn_file_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    for tail, torn in ((b"\x01", True), (pack(CALL)[:-1], True), (pack(CALL)[:-1] + b"?", False)):
        file = SpoolFile.create(tmp_path, b"")
        file.append([CALL])
        with file.path.open("ab") as out:
            out.write(tail)
        file.close(delete=False)
        again = SpoolFile.adopt(file.path)
        assert again is not None
        ((frame, offset),) = again.read(10_000)
        assert frame == CALL
        again.acknowledge(offset)
        assert again.read(10_000) == []
        assert (again.pending_bytes, again.tail_is_torn()) == (len(tail), torn)
        again.close(delete=True)


def test_a_file_that_is_sent_gives_its_space_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "COMPACT_BYTES", 5_000)
    file = SpoolFile.create(tmp_path, b"origin")
    before = file.size
    for _round in range(3):
        file.append([POINTS] * 10)
        file.acknowledge(file.read(100_000)[-1][1])
        assert file.size == before == file.path.stat().st_size
    file.append([CALL])
    assert [frame for frame, _offset in file.read(100)] == [CALL]
    file.close(delete=True)


def test_the_names_sort_by_time(tmp_path: Path) -> None:
    files = [SpoolFile.create(tmp_path, b"") for _ in range(5)]
    assert [file.path for file in files] == spooled_files(tmp_path)
    assert folder_bytes(tmp_path) == sum(file.size for file in files)
    for file in files:
        file.close(delete=True)


def drain(backlog: Backlog) -> list[Frame]:
    found: list[Frame] = []
    while True:
        frames, marks = backlog.peek(3_000)
        if not frames:
            return found
        found.append(frames[0])
        backlog.settle(marks[:1])


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from(["points", "call", "settle"]), max_size=30))
def test_a_backlog_is_a_queue(tmp_path_factory: pytest.TempPathFactory, moves: list[str]) -> None:
    backlog = Backlog(tmp_path_factory.mktemp("spool"), b"", 2**30)
    expected: list[Frame] = []
    for move in moves:
        if move == "settle":
            frames, marks = backlog.peek(100_000)
            assert frames == expected
            backlog.settle(marks[:1])
            del expected[:1]
        else:
            expected.append(POINTS if move == "points" else CALL)
            assert backlog.append(expected[-1])
        assert backlog.appended - backlog.settled == len(expected)
    assert drain(backlog) == expected
    backlog.close()


def test_a_full_folder_refuses_points_and_takes_the_rest(tmp_path: Path) -> None:
    backlog = Backlog(tmp_path, b"", 1024 * 1024 + 5_000)
    taken = [backlog.append(POINTS) for _ in range(8)]
    assert taken == [True] * taken.count(True) + [False] * taken.count(False)
    assert taken.count(False) > 0
    assert backlog.append(CALL)
    assert drain(backlog) == [POINTS] * taken.count(True) + [CALL]
    backlog.close()
    assert spooled_files(tmp_path) == []


def test_without_a_disk_frames_wait_in_memory_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backlog = Backlog(tmp_path / "spool", b"", 2**30)
    backlog.append(CALL)
    with monkeypatch.context() as disk:
        disk.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert backlog.append(POINTS)
        assert backlog.append(CALL)
        assert backlog.in_memory == 2
    assert backlog.append(POINTS)  # the disk is back, and what waits in memory comes first
    assert backlog.in_memory == 0
    assert drain(backlog) == [CALL, POINTS, CALL, POINTS]
    assert backlog.append(CALL)
    backlog.close()
    assert len(spooled_files(tmp_path / "spool")) == 1


@pytest.mark.parametrize("sent", [1, 2, 3])
def test_what_was_sent_from_memory_is_settled_after_it_moved_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    backlog = Backlog(tmp_path / "spool", b"", 2**30)
    with monkeypatch.context() as disk:
        disk.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert all(backlog.append(frame) for frame in (CALL, POINTS, CALL))
        frames, marks = backlog.peek(100_000)  # a sender is at it while the disk comes back
    assert frames == [CALL, POINTS, CALL]
    backlog.sync()
    assert backlog.in_memory == 0
    backlog.settle(marks[:sent])
    assert drain(backlog) == frames[sent:]
    assert backlog.settled == backlog.appended == 3
    backlog.close()


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlplat.sdk.backlog.MAX_MEMORY_BYTES", 2_500)
    (tmp_path / "file").write_text("")
    backlog = Backlog(tmp_path / "file", b"", 2**30)
    assert [backlog.append(POINTS) for _ in range(4)] == [True, True, False, False]
    assert backlog.appended == 2


def attach(backlog: Backlog, key: str, body: bytes) -> Frame | None:
    """Attaches a file as the outbox does; the frame that names it, if it needs one."""
    attached = backlog.attach(key, io.BytesIO(body), len(body))
    return to_frame(PutFile("r", key, attached.name)) if attached is not None and attached.is_new else None


def read_copy(backlog: Backlog, frame: Frame) -> bytes:
    name = attachment_of(frame)
    assert name is not None
    assert backlog.attachments is not None
    return (backlog.attachments.folder / name).read_bytes()


def test_files_wait_beside_their_frames_and_go_with_them(tmp_path: Path) -> None:
    backlog = Backlog(tmp_path, b"", 2**30)
    frames = [attach(backlog, key, body) for key, body in (("a", b"1"), ("b", b"2"), ("a", b"longer"))]
    assert frames[2] is None  # the first copy of "a" was not yet on its way
    for frame in frames[:2]:
        assert frame is not None
        assert backlog.append(frame)
    (first, *_rest), marks = backlog.peek(1000)
    assert from_frame(first) == PutFile("r", "a", attachment_of(first) or "")
    assert read_copy(backlog, first) == b"longer"
    assert attach(backlog, "a", b"3") is not None  # it is on its way now, and stays as it is
    assert read_copy(backlog, first) == b"longer"
    backlog.settle(marks[:1])
    backlog.forget(first)
    assert len(list(tmp_path.glob("*.files/*"))) == 2
    assert attach(backlog, "b", b"4") is None
    backlog.settle(backlog.peek(1000)[1])
    backlog.close()  # all is settled: what is left in the folder has no purpose
    assert list(tmp_path.iterdir()) == []


def test_files_count_and_find_no_more_room_than_there_is(tmp_path: Path) -> None:
    backlog = Backlog(tmp_path, b"", 1024 * 1024 + 5_000)
    assert attach(backlog, "a", bytes(3_000)) is not None
    assert attach(backlog, "b", bytes(3_000)) is None
    assert backlog.attach("b", io.BytesIO(bytes(3_000)), 3_000) is None
    assert backlog.append(CALL)
    assert folder_bytes(tmp_path) > 3_000
    backlog.close()


def test_a_frame_moves_with_its_file(tmp_path: Path) -> None:
    backlog, aside = Backlog(tmp_path, b"", 2**30), Backlog(tmp_path, b"", 2**30)
    frame = attach(backlog, "a", b"body")
    assert frame is not None
    assert backlog.attachments is not None
    assert aside.take_over(frame, backlog.attachments.folder)
    assert not aside.take_over(frame, backlog.attachments.folder)  # once is enough
    backlog.close()
    assert read_copy(aside, aside.peek(1000)[0][0]) == b"body"
    aside.close()
    assert len(list(tmp_path.glob("*.files/*"))) == 1


def test_a_disk_that_is_full_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backlog = Backlog(tmp_path, b"", 2**30)
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert backlog.attach("a", io.BytesIO(b"body"), 4) is None
    assert backlog.attachments is not None
    assert backlog.attachments.count == 0
    assert list(tmp_path.glob("*.files/*")) == []
    backlog.close()
