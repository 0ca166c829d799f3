"""How the artifact store keeps files: small ones in their entries, larger ones as chunks that equal files share."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlplat.artifacts import store as store_module
from mlplat.artifacts.blobs import MAX_LOOK_AGE_S, Blobs
from mlplat.artifacts.chunking import MAX_CHUNK_BYTES, cut
from mlplat.artifacts.digests import sha256
from mlplat.artifacts.entry import HEADER_BYTES, INLINE_BYTES, SURE_BYTES, Chunk, Entry
from mlplat.artifacts.folder import Folder
from mlplat.artifacts.frames import Frame
from mlplat.artifacts.store import CHUNK_BYTES, ArtifactStore, MissingChunks
from mlplat.errors import Corrupted, InvalidInput, NotFound

MIB = 1024 * 1024
NOISE = random.Random(7).randbytes(20 * MIB)
TEXT = b"epoch 17 loss 0.123 accuracy 0.987\n" * 60_000
AVERAGE = Folder.chunk_bytes
SMALLEST, LARGEST = AVERAGE // 4, 4 * AVERAGE
EDGES = (SURE_BYTES, INLINE_BYTES, SMALLEST, CHUNK_BYTES, LARGEST, 2 * LARGEST)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> ArtifactStore:
    return ArtifactStore(f"file://{root}")


def read(store: ArtifactStore, path: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join(store.read(path, start, end))


def until_corrupt(store: ArtifactStore, path: str) -> tuple[bytes, str]:
    """What is read of a file before its damage is noticed, and what is said then."""
    given = bytearray()
    try:
        for piece in store.read(path):
            given += piece
    except Corrupted as error:
        return bytes(given), error.message
    raise AssertionError(f"{path} was read to its end")


def blobs(root: Path) -> list[Path]:
    return sorted(path for path in (root / ".blobs").rglob("*") if path.is_file())


def stored_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def chunks_of(body: bytes) -> list[tuple[str, int]]:
    return [(sha256(chunk), len(chunk)) for chunk in cut([body], AVERAGE)]


def send(store: ArtifactStore, body: bytes) -> list[tuple[str, int]]:
    """Stores the chunks of a file, as a client does."""
    list(store.put_frames(Frame(sha256(chunk), len(chunk), chunk) for chunk in cut([body], AVERAGE)))
    return chunks_of(body)


@pytest.mark.parametrize("size", sorted({edge + delta for edge in EDGES for delta in (-1, 0, 1)}))
@pytest.mark.parametrize("whole", [NOISE, bytes(10 * MIB)], ids=["noise", "zeros"])
def test_files_of_all_sizes_are_read_and_listed(store: ArtifactStore, root: Path, whole: bytes, size: int) -> None:
    body = whole[:size]
    entry = store.write("run/file", [body[: size // 2], body[size // 2 :]])
    assert (entry.size, entry.sha256) == (size, sha256(body))
    assert store.entry("run/file") == entry
    assert read(store, "run/file") == body
    assert read(store, "run/file", size - 3) == body[-3:]
    assert max(map(len, store.read("run/file"))) <= CHUNK_BYTES
    assert (store.size("run/file"), store.usage("run"), store.usage("run/file")) == (size, (1, size), (1, size))
    assert [found.size for found in store.list("run")] == [size]
    assert [found.size for found in store.files("run")] == [size]
    assert bool(blobs(root)) == (size > INLINE_BYTES)


def test_a_file_that_gets_larger_and_smaller_is_listed_as_it_is(store: ArtifactStore) -> None:
    for size in (10, 100_000, SURE_BYTES + 1, INLINE_BYTES + 1, 3 * MIB, 0, 100_000):
        store.write("run/file", [NOISE[:size]])
        assert ([found.size for found in store.list("run")], store.size("run/file")) == ([size], size)
        assert read(store, "run/file") == NOISE[:size]


def test_files_that_are_written_whole_are_no_blobs(store: ArtifactStore, root: Path) -> None:
    for size in (0, 10, SURE_BYTES + 1, INLINE_BYTES + 1, 3 * MIB):
        store.write_inline("run/log", NOISE[:size])
        assert (read(store, "run/log"), read(store, "run/log", 5, 9)) == (NOISE[:size], NOISE[:size][5:9])
        assert ([found.size for found in store.list("run")], store.size("run/log")) == ([size], size)
    assert blobs(root) == []
    with pytest.raises(InvalidInput):
        store.write_inline("", b"x")


def test_equal_files_share_their_blobs(store: ArtifactStore, root: Path) -> None:
    store.write("one/file", [NOISE])
    before = blobs(root)
    for path in ("one/copy", "other/file"):
        store.write(path, [NOISE[:100], NOISE[100:]])
    assert blobs(root) == before
    store.delete("one")
    assert read(store, "other/file") == NOISE


def test_little_is_stored_of_a_file_that_changed_a_little(store: ArtifactStore, root: Path) -> None:
    store.write("before", [NOISE])
    before = stored_bytes(root)
    share = len(NOISE) // 100
    changed = NOISE[: 9 * MIB] + random.Random(8).randbytes(share) + NOISE[9 * MIB + share :]
    store.write("after", [changed])
    assert read(store, "after") == changed
    assert stored_bytes(root) - before <= 3 * LARGEST
    before = stored_bytes(root)
    store.write("longer", [b"a line at the front\n" + NOISE])
    assert stored_bytes(root) - before <= 2 * LARGEST


def test_what_gets_smaller_is_packed(store: ArtifactStore, root: Path) -> None:
    store.write("text", [TEXT])
    assert {path.suffix for path in blobs(root)} == {".zst"}
    assert stored_bytes(root) < len(TEXT) // 10
    assert read(store, "text") == TEXT
    assert read(store, "text", 1_000_000, 1_000_100) == TEXT[1_000_000:1_000_100]


@pytest.fixture(scope="module")
def ranged(tmp_path_factory: pytest.TempPathFactory) -> tuple[ArtifactStore, dict[str, bytes]]:
    """Files of one and of many chunks, equal chunks, packed ones, and small ones."""
    store = ArtifactStore(f"file://{tmp_path_factory.mktemp('ranges')}")
    bodies = {
        "noise": NOISE[: 7 * MIB],
        "zeros": bytes(9 * MIB),
        "text": TEXT,
        "one": NOISE[:100_000],
        "small": NOISE[:1_000],
        "empty": b"",
    }
    for path, body in bodies.items():
        store.write(path, [body])
    return store, bodies


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_range_is_the_slice(ranged: tuple[ArtifactStore, dict[str, bytes]], data: st.DataObject) -> None:
    store, bodies = ranged
    path = data.draw(st.sampled_from(sorted(bodies)))
    body = bodies[path]
    edges = [0, len(body)]
    for _digest, size in chunks_of(body):
        edges.append(edges[-1] + size if len(edges) > 2 else size)
    positions = st.one_of(
        st.integers(0, len(body) + 10),
        st.builds(lambda edge, by: max(0, edge + by), st.sampled_from(edges), st.integers(-2, 2)),
    )
    start, end = data.draw(positions), data.draw(st.one_of(st.none(), positions))
    assert read(store, path, start, end) == body[start:end]


def test_a_reader_that_stops_leaves_nothing_behind(store: ArtifactStore) -> None:
    store.write("file", [NOISE])
    for _ in range(20):
        reading = store.read("file")
        assert NOISE.startswith(next(reading))
        del reading
    assert read(store, "file") == NOISE


def test_many_read_and_write_at_once(store: ArtifactStore) -> None:
    bodies = {f"run/{number}": NOISE[number * MIB : number * MIB + 2_500_000] for number in range(12)}
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda path: store.write(path, [bodies[path]]), bodies))
        assert list(pool.map(lambda path: read(store, path), bodies)) == list(bodies.values())


def _gone(blob: Path) -> None:
    blob.unlink()


def _flipped(blob: Path) -> None:
    body = bytearray(blob.read_bytes())
    body[len(body) // 2] ^= 1
    blob.write_bytes(body)


def _shorter(blob: Path) -> None:
    blob.write_bytes(blob.read_bytes()[:-1])


def _longer(blob: Path) -> None:
    blob.write_bytes(blob.read_bytes() + b"x")


def _empty(blob: Path) -> None:
    blob.write_bytes(b"")


@pytest.mark.parametrize("harm", [_gone, _flipped, _shorter, _longer, _empty])
@pytest.mark.parametrize("body", [NOISE[: 6 * MIB], TEXT], ids=["noise", "text"])
def test_a_damaged_blob_is_named_with_the_file(
    store: ArtifactStore, root: Path, body: bytes, harm: Callable[[Path], None]
) -> None:
    entry = store.write("run/sub/file", [body])
    damaged = entry.chunks[-1]
    start = entry.size - damaged.size
    [blob] = [path for path in blobs(root) if path.name.startswith(damaged.sha256)]
    harm(blob)
    given, message = until_corrupt(store, "run/sub/file")
    assert message.startswith(f"The artifact 'run/sub/file' is corrupt: blob {damaged.sha256} is")
    assert body.startswith(given)
    assert len(given) <= start
    with pytest.raises(Corrupted, match="run/sub/file"):
        read(store, "run/sub/file", entry.size - 1)
    if len(entry.chunks) > 1:
        assert read(store, "run/sub/file", 0, start) == body[:start], "what is whole is read"
    assert store.size("run/sub/file") == len(body)


def test_a_damaged_entry_is_named_and_listed(store: ArtifactStore, root: Path) -> None:
    store.write("run/small", [b"some bytes"])
    store.write("run/middle", [NOISE[: SURE_BYTES + 10]])
    store.write("run/large", [NOISE[:MIB]])
    for name in ("small", "middle", "large"):
        file = root / "run" / name
        whole = file.read_bytes()
        for damaged in (b"", b"x", whole[: HEADER_BYTES + 3], b"x" + whole[1:]):
            file.write_bytes(damaged)
            with pytest.raises(Corrupted, match=f"The artifact 'run/{name}' is corrupt"):
                read(store, f"run/{name}")
            assert [found.path for found in store.list("run")] == ["large", "middle", "small"]
            assert all(found.size is not None and found.size >= 0 for found in store.list("run"))
            assert len(store.files("run")) == store.usage("run")[0] == 3
        file.write_bytes(whole)
    assert [found.size for found in store.list("run")] == [MIB, SURE_BYTES + 10, 10]
    assert read(store, "run/large") == NOISE[:MIB]


def test_a_file_that_goes_away_while_folders_are_listed_does_no_harm(store: ArtifactStore) -> None:
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            store.write("run/file", [NOISE[:100_000]])
            store.delete("run/file")

    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(change)
        try:
            for _ in range(200):
                assert {found.path for found in store.list("run")} <= {"file"}
                assert {found.path for found in store.files("run")} <= {"file"}
                try:
                    assert store.size("run/file") == 100_000
                except NotFound:
                    continue
        finally:
            done.set()
        changing.result(30)


@pytest.mark.parametrize("body", [b"small", NOISE[: 2 * MIB]], ids=["small", "large"])
def test_a_write_with_another_digest_leaves_what_was_there(store: ArtifactStore, body: bytes) -> None:
    with pytest.raises(InvalidInput, match=f"have the SHA-256 {sha256(body)} and should have {sha256(b'')}"):
        store.write("run/file", [body], sha256(b""))
    assert store.list("") == []
    with pytest.raises(NotFound):
        store.entry("run/file")
    store.write("run/file", [b"before"], sha256(b"before"))
    with pytest.raises(InvalidInput):
        store.write("run/file", [body], sha256(b""))
    assert read(store, "run/file") == b"before"
    store.write("run/file", [body], sha256(body))
    assert read(store, "run/file") == body


def test_a_file_is_made_of_chunks_that_are_there(store: ArtifactStore, root: Path) -> None:
    body = NOISE[: 9 * MIB] + TEXT
    wanted = chunks_of(body)
    assert store.missing(digest for digest, _size in wanted) == [digest for digest, _size in wanted]
    assert send(store, body) == wanted
    assert store.missing(digest for digest, _size in wanted) == []
    assert store.list("") == []
    entry = store.assemble("run/file", len(body), sha256(body), wanted)
    assert (entry.size, entry.sha256) == (len(body), sha256(body))
    assert read(store, "run/file") == body
    before = blobs(root)
    store.write("run/same", [body])
    assert blobs(root) == before, "clients and the store cut alike"


def test_missing_chunks_are_told_once_and_in_order(store: ArtifactStore) -> None:
    digests = [sha256(bytes([number])) for number in range(5)]
    store.blobs.put(b"\x02")
    assert store.missing([*digests, *reversed(digests)]) == [digests[0], digests[1], digests[3], digests[4]]
    assert store.missing([]) == []
    for digest in ("", "0" * 63, "../" + "0" * 61, "A" * 64):
        with pytest.raises(InvalidInput, match="not a SHA-256"):
            store.missing([digest])


def test_a_file_may_have_a_chunk_many_times(store: ArtifactStore, root: Path) -> None:
    part = NOISE[:300_000]
    store.blobs.put(part)
    body = part * 7
    store.assemble("file", len(body), sha256(body), [(sha256(part), len(part))] * 7)
    assert read(store, "file") == body
    assert read(store, "file", 299_999, 900_001) == body[299_999:900_001]
    assert len(blobs(root)) == 1


def test_a_file_of_no_chunks_is_empty(store: ArtifactStore) -> None:
    store.assemble("file", 0, sha256(b""), [])
    assert (read(store, "file"), store.size("file")) == (b"", 0)


def test_a_file_of_missing_chunks_is_refused(store: ArtifactStore) -> None:
    body = NOISE[: 6 * MIB]
    wanted = chunks_of(body)
    with pytest.raises(MissingChunks, match=f"{len(wanted)} chunks of 'file' are not there"):
        store.assemble("file", len(body), sha256(body), wanted)
    send(store, body[: 2 * MIB])
    with pytest.raises(MissingChunks):
        store.assemble("file", len(body), sha256(body), wanted)
    assert store.list("") == []


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (4, [5]), (6, [5]), (0, [5]), (-5, [5]), (5, []), (0, [0]), (5, [5, 0]), (5, [10, -5]), (-5, [-5]),
        (MAX_CHUNK_BYTES + 1, [MAX_CHUNK_BYTES + 1]), (10**18, [10**18]), (10**40, [10**40]),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused(store: ArtifactStore, size: int, sizes: list[int]) -> None:
    store.blobs.put(b"12345")
    with pytest.raises(InvalidInput):
        store.assemble("file", size, sha256(b"12345"), [(sha256(b"12345"), each) for each in sizes])
    assert store.list("") == []


@pytest.mark.parametrize("parts", [(b"1234", b"567890"), (b"a" * 5_000, b"b" * 7_000)], ids=["plain", "packed"])
def test_sizes_that_lie_are_noticed_on_read(store: ArtifactStore, parts: tuple[bytes, bytes]) -> None:
    for part in parts:
        store.blobs.put(part)
    body = b"".join(parts)
    half = len(body) // 2
    store.assemble("file", len(body), sha256(body), [(sha256(part), half) for part in parts])
    for start, end in ((0, None), (0, half), (half, None), (half - 1, half + 1)):
        with pytest.raises(Corrupted, match="The artifact 'file' is corrupt"):
            read(store, "file", start, end)


def test_a_digest_that_lies_is_noticed_by_who_reads_all(store: ArtifactStore) -> None:
    body = NOISE[: 6 * MIB]
    wanted = send(store, body)
    store.assemble("file", len(body), sha256(b"other"), wanted)
    given, message = until_corrupt(store, "file")
    assert message == "The artifact 'file' is corrupt: its bytes have another SHA-256"
    assert len(given) <= len(body) - wanted[-1][1]
    with pytest.raises(InvalidInput, match="not a SHA-256"):
        store.assemble("file", len(body), "x" * 64, wanted)


def test_chunks_with_another_digest_are_refused(store: ArtifactStore) -> None:
    good, bad = Frame(sha256(b"good"), 4, b"good"), Frame(sha256(b"good "), 3, b"bad")
    with pytest.raises(InvalidInput, match=r"the 3 bytes do not have the SHA-256"):
        list(store.put_frames([good, bad]))
    assert store.missing([good.sha256, bad.sha256]) == [bad.sha256]
    for frame in (Frame(sha256(b"good"), 5, b"good"), Frame("x" * 64, 4, b"good")):
        with pytest.raises(InvalidInput):
            list(store.put_frames([frame]))


@pytest.mark.parametrize("path", ["", "..", "/x", ".blobs/x", ".uploads/x", ".collector/condemned.json", "a\0"])
def test_a_file_elsewhere_is_refused(store: ArtifactStore, path: str) -> None:
    entry = store.make([b"x"])
    calls: list[Callable[[], object]] = [
        lambda: store.assemble(path, 0, sha256(b""), []),
        lambda: store.put_entry(path, entry),
        lambda: store.write_inline(path, b"x"),
    ]
    for call in calls:
        with pytest.raises(InvalidInput, match="Invalid path"):
            call()


def test_a_file_whose_blobs_are_gone_is_not_put(store: ArtifactStore, root: Path) -> None:
    entry = store.make([NOISE[: 2 * MIB]])
    blobs(root)[0].unlink()
    with pytest.raises(MissingChunks):
        store.put_entry("file", entry)
    with pytest.raises(MissingChunks):
        store.put_entry("file", Entry(5, sha256(b"12345"), None, (Chunk(sha256(b"12345"), 5),)))
    assert store.list("") == []


def test_a_write_that_takes_long_looks_again(store: ArtifactStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "FRESH_S", -1.0)

    def pieces() -> Iterator[bytes]:
        yield NOISE[: 16 * MIB]
        while not (found := blobs(root)):
            yield b"x" * LARGEST
        found[0].unlink()

    with pytest.raises(MissingChunks, match="write again"):
        store.write("file", pieces())
    assert store.list("") == []
    store.write("file", [NOISE])
    assert read(store, "file") == NOISE


def condemn(root: Path, *keys: str) -> None:
    (root / ".collector").mkdir(parents=True, exist_ok=True)
    body = ",".join(f'"{key}": 1.0' for key in keys)
    (root / ".collector" / "condemned.json").write_text(f'{{"keys": {{{body}}}}}')


def test_a_condemned_blob_is_not_referred_to_anew(store: ArtifactStore, root: Path) -> None:
    """Whoever looks at the condemned keys after they were published keeps clear of them."""
    old = store.write("old", [NOISE[:MIB]])
    condemn(root, *(f".blobs/{chunk.sha256[:2]}/{chunk.sha256}{chunk.suffix}" for chunk in old.chunks))
    assert 0 < MAX_LOOK_AGE_S < store_module.FRESH_S
    late = ArtifactStore(f"file://{root}")
    assert late.missing(chunk.sha256 for chunk in old.chunks) == [chunk.sha256 for chunk in old.chunks]
    new = late.write("new", [NOISE[:MIB]])
    assert [chunk.suffix for chunk in new.chunks] == [f"{chunk.suffix}.1" for chunk in old.chunks]
    assert late.missing(chunk.sha256 for chunk in old.chunks) == []
    for chunk in old.chunks:
        (root / ".blobs" / chunk.sha256[:2] / f"{chunk.sha256}{chunk.suffix}").unlink()
    assert read(late, "new") == NOISE[:MIB]
    with pytest.raises(MissingChunks):
        late.put_entry("again", old)


def test_condemned_keys_are_looked_at_again_when_they_are_old(store: ArtifactStore, root: Path) -> None:
    blobs_now = Blobs(store.objects, max_look_age_s=0.0)
    chunk = blobs_now.put(b"some bytes")
    for generation in ("", ".1", ".2"):
        assert blobs_now.find(chunk.sha256) == generation
        condemn(
            root,
            *(f".blobs/{chunk.sha256[:2]}/{chunk.sha256}{each}" for each in ("", ".1", ".2") if each <= generation),
        )
        assert blobs_now.find(chunk.sha256) is None
        assert not blobs_now.still_there(Chunk(chunk.sha256, 10, generation))
        blobs_now.put(b"some bytes")
    condemn(root)
    assert blobs_now.find(chunk.sha256) == ""


def test_a_damaged_list_of_condemned_keys_stops_writers(root: Path) -> None:
    (root / ".collector").mkdir(parents=True)
    (root / ".collector" / "condemned.json").write_text("{")
    store = ArtifactStore(f"file://{root}")
    with pytest.raises(Corrupted, match=r"condemned\.json in the artifact store is damaged"):
        store.write("file", [NOISE[:MIB]])
    assert store.list("") == []
