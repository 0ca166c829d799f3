"""What lies under a file's path: damage of any byte is noticed before a wrong byte is served."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.artifacts.chunking import MAX_CHUNK_BYTES
from mlplat.artifacts.digests import sha256
from mlplat.artifacts.entry import (
    HEADER_BYTES,
    SURE_BYTES,
    Chunk,
    Entry,
    check_chunks,
    check_digest,
    decode,
    decode_header,
    encode,
)
from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import Corrupted, InvalidInput

D1, D2 = sha256(b"1"), sha256(b"2")
digests = st.binary(max_size=9).map(sha256)
suffixes = st.sampled_from(["", ".zst", ".1", ".3", ".zst.2", ".zst.123456789"])
chunks = st.builds(Chunk, digests, st.integers(1, MAX_CHUNK_BYTES), suffixes)


def inline(body: bytes) -> Entry:
    return Entry(len(body), sha256(body), body)


def of_chunks(*chunks: Chunk) -> Entry:
    return Entry(sum(chunk.size for chunk in chunks), D1, None, chunks)


def stored(kind: str = "chunks", size: str = "0", digest: str = D1, rest: bytes = b"[]") -> bytes:
    """An entry with a header made by hand."""
    return f"mlplat-artifact 1 {kind} {size} {digest}".encode().ljust(HEADER_BYTES - 1) + b"\n" + rest


@given(st.binary(max_size=10_000))
def test_a_small_file_comes_back(body: bytes) -> None:
    entry = inline(body)
    assert decode(encode(entry)) == entry
    assert len(encode(entry)) == HEADER_BYTES + len(body)


@given(st.lists(chunks, max_size=60))
def test_a_list_of_chunks_comes_back_and_tells_itself_by_its_length(found: list[Chunk]) -> None:
    entry = of_chunks(*found)
    assert decode(encode(entry)) == entry
    header = decode_header(encode(entry)[:HEADER_BYTES])
    assert (header.size, header.sha256, header.is_inline) == (entry.size, entry.sha256, False)
    assert len(encode(entry)) > HEADER_BYTES + SURE_BYTES


def test_a_large_file_may_be_inside() -> None:
    entry = inline(b"log " * 100_000)
    assert decode(encode(entry)) == entry


@given(st.binary(max_size=100), st.data())
def test_a_damaged_small_file_is_refused(body: bytes, data: st.DataObject) -> None:
    damaged = bytearray(encode(inline(body)))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(InvalidInput):
        decode(bytes(damaged))


@pytest.mark.parametrize("entry", [inline(b"some bytes"), of_chunks(Chunk(D1, 5, ".zst"), Chunk(D2, 7))])
def test_what_is_cut_short_is_refused(entry: Entry) -> None:
    whole = encode(entry)
    for end in range(HEADER_BYTES + 10):
        with pytest.raises(InvalidInput):
            decode(whole[:end])
    if entry.body is not None:
        with pytest.raises(InvalidInput, match="it has 11 bytes and had 10"):
            decode(whole + b"x")


@pytest.fixture(scope="module")
def body() -> bytes:
    return random.Random(3).randbytes(100_000)


def test_every_flipped_byte_of_a_list_of_chunks_is_noticed(tmp_path: Path, body: bytes) -> None:
    store = ArtifactStore(f"file://{tmp_path}")
    text = b"text " * 20_000
    packed, plain = store.blobs.put(text), store.blobs.put(body)
    store.put_entry("file", Entry(len(text + body), sha256(text + body), None, (packed, plain)))
    file = tmp_path / "file"
    whole = file.read_bytes()
    end = len(whole.rstrip()) + 3  # the spaces that fill it up are all alike
    refused = 0
    for position in range(end):
        for flip in (0x01, 0x10, 0x80):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            file.write_bytes(damaged)
            try:
                found = b"".join(store.read("file"))
            except Corrupted:
                refused += 1
            else:
                assert found == text + body, (position, flip)
    assert refused >= 3 * (end - 3)
    file.write_bytes(whole)
    assert b"".join(store.read("file")) == text + body


@pytest.mark.parametrize(
    "header",
    [
        stored(size="-1"),
        stored(size="0x1"),
        stored(size=""),
        stored(size="1" * 19),
        stored(size="٣"),
        stored(kind="other"),
        stored(kind="CHUNKS"),
        stored(digest=D1.upper()),
        stored(digest=D1[:-1]),
        stored(digest=D1 + "0"),
        stored().replace(b"mlplat-artifact 1", b"mlplat-artifact 2"),
        stored().replace(b" \n", b"x\n", 1),
        stored().replace(b"\n", b" ", 1),
        b" " + stored(),
        b"",
        b"\n",
        b"\0" * 500,
    ],
)
def test_a_header_that_nobody_wrote_is_refused(header: bytes) -> None:
    for call in (decode, decode_header):
        with pytest.raises(InvalidInput, match="its header is damaged"):
            call(header)


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"{}",
        b"null",
        b"[1]",
        b"[[]]",
        b'[["x"]]',
        b"[" * 100_000,
        b'[["\xff", 1]]',
        b'[["' + D1.encode() + b'", "5", ""]]',
        b'[["' + D1.encode() + b'", 5.5, ""]]',
        b'[["' + D1.encode() + b'", 5, ""]] x',
    ],
)
def test_a_list_that_nobody_wrote_is_refused(rest: bytes) -> None:
    with pytest.raises(InvalidInput):
        decode(stored(size="5", rest=rest))


@pytest.mark.parametrize(
    "suffix",
    [
        "/../../x", "../x", "x", ".", ".0", ".01", ".-1", ".1.1", ".zst.zst", ".1.zst", ".ZST", ".zst\n", ".1234567890",
        "\0", ".٣", " ",
    ],
)  # fmt: skip
def test_a_hostile_suffix_is_refused(suffix: str) -> None:
    with pytest.raises(InvalidInput, match="not a suffix of a blob"):
        check_chunks([Chunk(D1, 5, suffix)], 5)
    rest = msgspec.json.encode([(D1, 5, suffix)])
    with pytest.raises(InvalidInput):
        decode(stored(size="5", rest=rest))


@pytest.mark.parametrize("size", [0, -1, MAX_CHUNK_BYTES + 1, 10**18, 10**30])
def test_a_size_that_no_chunk_has_is_refused(size: int) -> None:
    with pytest.raises(InvalidInput, match=f"a chunk with {size} bytes"):
        check_chunks([Chunk(D1, size)], size)
    with pytest.raises(InvalidInput):
        check_chunks([Chunk(D1, size), Chunk(D2, 5)], size + 5)


def test_sizes_that_do_not_add_up_are_refused() -> None:
    check_chunks([], 0)
    check_chunks([Chunk(D1, 5), Chunk(D1, 5)], 10)
    for size in (0, 9, 11, -10):
        with pytest.raises(InvalidInput, match="the chunks have 10 bytes"):
            check_chunks([Chunk(D1, 5), Chunk(D1, 5)], size)


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "0" * 64 + "\n", "A" * 64, "g" * 64, "٠" * 64, "../" * 22])
def test_what_is_no_digest_is_refused(digest: str) -> None:
    for call in (lambda: check_digest(digest), lambda: check_chunks([Chunk(digest, 1)], 1)):
        with pytest.raises(InvalidInput, match="not a SHA-256"):
            call()
    assert check_digest(D1) == D1


@settings(deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_anything_else_raises_nothing_else(rest: bytes, is_list: bool) -> None:
    for body in (rest, stored(rest=rest, kind="chunks" if is_list else "inline", size=str(len(rest)))):
        try:
            decode(body)
        except InvalidInput:
            continue
