"""Chunks on the wire."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.artifacts.chunking import MAX_CHUNK_BYTES, pack
from mlplat.artifacts.digests import sha256
from mlplat.artifacts.frames import Frame, decode_frames, encode_frame
from mlplat.errors import InvalidInput


def framed(body: bytes) -> Frame:
    """A chunk as a client sends it."""
    return Frame(sha256(body), len(body), pack(body) or body)


def encoded(*frames: Frame) -> bytes:
    return b"".join(part for frame in frames for part in encode_frame(frame))


def head(size: int, count: int) -> bytes:
    return struct.pack(">32sII", b"d" * 32, size, count)


frames = st.one_of(st.binary(min_size=1, max_size=200), st.integers(1, 3_000).map(lambda size: b"ab" * size))


@settings(deadline=None)
@given(st.lists(frames, max_size=8), st.lists(st.integers(0, 3_000), max_size=40))
def test_frames_come_back_however_the_body_is_cut(bodies: list[bytes], cuts: list[int]) -> None:
    sent = [framed(body) for body in bodies]
    body = encoded(*sent)
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    pieces = [body[start:end] for start, end in pairwise(edges)]
    assert list(decode_frames(pieces)) == sent


def test_single_bytes_and_empty_pieces_are_pieces() -> None:
    sent = [framed(b"one"), framed(b"two" * 1_000)]
    body = encoded(*sent)
    pieces = [piece for index in range(len(body)) for piece in (b"", body[index : index + 1], b"")]
    assert list(decode_frames(pieces)) == sent


def test_nothing_is_no_frame() -> None:
    assert list(decode_frames([])) == []
    assert list(decode_frames([b"", b""])) == []


def test_the_largest_chunk_passes() -> None:
    [found] = decode_frames([encoded(Frame("0" * 64, MAX_CHUNK_BYTES, bytes(MAX_CHUNK_BYTES)))])
    assert len(found.stored) == MAX_CHUNK_BYTES


def test_a_frame_is_given_before_the_next_has_come() -> None:
    first, second = framed(b"one"), framed(b"two")

    def pieces() -> Iterator[bytes]:
        yield encoded(first)
        yield encoded(second)[:-1]

    found = decode_frames(pieces())
    assert next(found) == first
    with pytest.raises(InvalidInput, match="not complete"):
        next(found)


def test_what_is_cut_short_is_refused_wherever() -> None:
    body = encoded(framed(b"one"), framed(b"two" * 1_000))
    whole = {0, len(encoded(framed(b"one")))}
    for end in range(len(body)):
        if end not in whole:
            with pytest.raises(InvalidInput, match="not complete"):
                list(decode_frames([body[:end]]))


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (0, 0),
        (1, 0),
        (0, 1),
        (3, 4),
        (MAX_CHUNK_BYTES + 1, 3),
        (MAX_CHUNK_BYTES + 1, MAX_CHUNK_BYTES + 1),
        (2**32 - 1, 2**32 - 1),
    ],
)
def test_sizes_that_no_chunk_has_are_refused_before_any_byte_is_awaited(size: int, count: int) -> None:
    def pieces() -> Iterator[bytes]:
        yield head(size, count)
        raise AssertionError("more was read")

    with pytest.raises(InvalidInput, match="chunks have at most"):
        list(decode_frames(pieces()))


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_anything_else_is_refused_or_small_frames(body: bytes) -> None:
    try:
        found = list(decode_frames([body]))
    except InvalidInput:
        return
    assert encoded(*found) == body
