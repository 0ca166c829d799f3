"""Cutting files by their content, hashing them on the way, and packing what gets smaller."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.artifacts.chunking import (
    WholeHash,
    cut,
    pack,
    unpack,
)
from mlplat.artifacts.digests import sha256
from mlplat.artifacts.folder import Folder
from mlplat.errors import InvalidInput

KIB, MIB = 1024, 1024 * 1024
AVERAGE = Folder.chunk_bytes
SMALLEST, LARGEST = AVERAGE // 4, 4 * AVERAGE
#: Content that has cuts of its own, content that never has one, and both in turns.
NOISE = random.Random(1).randbytes(24 * MIB)
ZEROS = bytes(12 * MIB)
MIXED = NOISE[: 5 * MIB] + ZEROS + NOISE[5 * MIB : 9 * MIB]
#: Where the window and the bounds of chunks are.
EDGES = sorted(
    {
        edge + delta
        for edge in (0, SMALLEST, LARGEST, 2 * LARGEST, 3 * LARGEST)
        for delta in (-1, 0, 1)
        if edge + delta >= 0
    }
)
few = settings(max_examples=25, deadline=None)


def pieces(body: bytes, sizes: Sequence[int]) -> Iterator[bytes]:
    """The body in pieces of these sizes, over and over."""
    start = turn = 0
    while start < len(body):
        size = sizes[turn % len(sizes)]
        yield body[start : start + size]
        start, turn = start + size, turn + 1


def digests(body: bytes, sizes: Sequence[int] = (MIB,)) -> list[str]:
    return [sha256(chunk) for chunk in cut(pieces(body, sizes), AVERAGE)]


#: Sizes of pieces; one of them is not 0, or the body would never end.
piece_sizes = st.tuples(
    st.lists(st.integers(0, 3 * MIB), max_size=5), st.integers(100 * KIB, 30 * MIB)
).map(lambda drawn: [*drawn[0], drawn[1]])  # fmt: skip
bodies = st.builds(
    lambda whole, start, size: whole[start : start + size],
    st.sampled_from([NOISE, ZEROS, MIXED]),
    st.integers(0, 5 * MIB),
    st.one_of(st.sampled_from(EDGES), st.integers(0, 24 * MIB)),
)


@few
@given(bodies, piece_sizes)
def test_chunks_are_the_file_and_do_not_depend_on_the_pieces(body: bytes, sizes: list[int]) -> None:
    chunks = list(cut(pieces(body, sizes), AVERAGE))
    assert b"".join(chunks) == body
    assert [sha256(chunk) for chunk in chunks] == digests(body, [len(body) or 1])
    assert all(len(chunk) <= LARGEST for chunk in chunks)
    assert all(len(chunk) >= SMALLEST for chunk in chunks[:-1])


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("whole", [NOISE, ZEROS], ids=["noise", "zeros"])
def test_files_about_as_large_as_a_window_are_cut_as_in_one_piece(whole: bytes, size: int) -> None:
    body = whole[:size]
    chunks = list(cut(pieces(body, [333_333]), AVERAGE))
    assert b"".join(chunks) == body
    assert [sha256(chunk) for chunk in chunks] == digests(body, [size or 1])


def test_no_file_has_no_chunks() -> None:
    assert list(cut([], AVERAGE)) == []
    assert list(cut([b"", b""], AVERAGE)) == []


def test_pieces_of_single_bytes_are_cut_the_same() -> None:
    body = NOISE[: 600 * KIB]
    assert digests(body, [1]) == digests(body)


@pytest.mark.parametrize("at", [0, 1, 300 * KIB, 5 * MIB])
@pytest.mark.parametrize("inserted", [b"x", NOISE[-70_000:]], ids=["byte", "more"])
def test_an_insertion_leaves_the_other_chunks_equal(at: int, inserted: bytes) -> None:
    before, after = digests(NOISE), digests(NOISE[:at] + inserted + NOISE[at:])
    assert len(set(after) - set(before)) <= 3


def test_a_removal_leaves_the_other_chunks_equal() -> None:
    assert len(set(digests(NOISE[100_001:])) - set(digests(NOISE))) <= 3


def test_a_chunk_stays_as_it_is_while_the_next_are_cut() -> None:
    chunks = cut(pieces(NOISE, [MIB]), AVERAGE)
    kept = [(chunk, bytes(chunk)) for chunk in chunks]
    assert all(chunk == copy for chunk, copy in kept)


def test_a_piece_that_fails_ends_the_chunks() -> None:
    def broken() -> Iterator[bytes]:
        yield NOISE[: 3 * MIB]
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        list(cut(broken(), AVERAGE))


@few
@given(st.lists(st.binary(max_size=3_000), max_size=20))
def test_the_whole_is_hashed_on_the_way(parts: list[bytes]) -> None:
    whole = WholeHash()
    assert list(whole.of(parts)) == parts
    assert whole.hexdigest() == hashlib.sha256(b"".join(parts)).hexdigest()


def test_hashing_keeps_up_with_large_pieces() -> None:
    whole = WholeHash()
    assert sum(len(piece) for piece in whole.of(pieces(NOISE, [MIB]))) == len(NOISE)
    assert whole.hexdigest() == sha256(NOISE)


def test_an_error_of_the_pieces_passes_through_the_hash() -> None:
    def broken() -> Iterator[bytes]:
        yield b"x"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        list(WholeHash().of(broken()))


@few
@given(st.one_of(st.binary(max_size=2_000), st.binary(max_size=50).map(lambda part: part * 5_000)))
def test_what_is_packed_is_a_fifth_smaller_and_comes_back(body: bytes) -> None:
    packed = pack(body)
    if packed is not None:
        assert len(packed) <= 0.8 * len(body)
        assert unpack(packed, len(body)) == body
        assert unpack(memoryview(packed), len(body)) == body
    assert pack(memoryview(body)) == packed


@pytest.mark.parametrize("size", [0, 1, 1_000, 64 * KIB, 128 * KIB, 128 * KIB + 1, MIB])
def test_noise_is_not_packed(size: int) -> None:
    assert pack(NOISE[:size]) is None


@pytest.mark.parametrize("size", [1_000, 64 * KIB, 128 * KIB, 128 * KIB + 1, MIB, LARGEST])
def test_text_is_packed(size: int) -> None:
    body = (b"epoch 17 loss 0.123 accuracy 0.987\n" * (size // 30))[:size]
    packed = pack(body)
    assert packed is not None
    assert unpack(packed, size) == body


def test_a_chunk_that_only_begins_well_is_not_packed() -> None:
    assert pack(bytes(64 * KIB) + NOISE[: 2 * MIB]) is None


def zstd(body: bytes) -> bytes:
    packed: bytes = pa.Codec("zstd").compress(body, asbytes=True)
    return packed


@pytest.mark.parametrize("size", [0, 1, 999, 1_001, 100_000])
def test_another_size_than_was_packed_is_refused(size: int) -> None:
    with pytest.raises(InvalidInput, match=r"not \d+ bytes compressed with zstd"):
        unpack(zstd(b"a" * 1_000), size)


def test_a_bomb_is_refused() -> None:
    bomb = zstd(bytes(256 * MIB))
    assert len(bomb) < 64 * KIB
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput):
            unpack(bomb, 1_000)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def test_what_is_cut_short_or_no_zstd_is_refused() -> None:
    packed = zstd(b"abc" * 1_000)
    for stored in (b"", b"x", packed[:4], packed[:-1], packed[1:], b"\0" * 3_000, packed + b"more"):
        with pytest.raises(InvalidInput):
            unpack(stored, 3_000)


@few
@given(st.integers(0), st.integers(1, 255))
def test_a_flipped_byte_raises_nothing_else(position: int, flip: int) -> None:
    packed = bytearray(zstd(b"abc" * 1_000))
    packed[position % len(packed)] ^= flip
    try:
        assert len(unpack(bytes(packed), 3_000)) == 3_000
    except InvalidInput:
        return
