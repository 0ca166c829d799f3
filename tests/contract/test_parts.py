"""Files that come in parts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlplat.artifacts.digests import sha256
from mlplat.artifacts.entry import INLINE_BYTES
from mlplat.artifacts.parts import MAX_PARTS, PartUploads
from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import Corrupted, InvalidInput, NotFound

NOISE = random.Random(5).randbytes(6 * 1024 * 1024)
SIZES = (0, 1, 1_000, INLINE_BYTES, INLINE_BYTES + 1, 300_000, 5_000_000)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> ArtifactStore:
    return ArtifactStore(f"file://{root}")


@pytest.fixture
def parts(store: ArtifactStore) -> PartUploads:
    return PartUploads(store)


def read(store: ArtifactStore, path: str) -> bytes:
    return b"".join(store.read(path))


def scratch(root: Path) -> list[Path]:
    return list((root / ".uploads").iterdir())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(SIZES), max_size=5), st.randoms())
def test_parts_that_came_in_any_order_are_the_file(
    store: ArtifactStore, parts: PartUploads, root: Path, sizes: list[int], order: random.Random
) -> None:
    bodies = {number: NOISE[number : number + size] for number, size in enumerate(sizes, 1)}
    upload = parts.begin()
    numbers = list(bodies)
    order.shuffle(numbers)
    digests = {number: parts.put(upload, number, [bodies[number]]) for number in numbers}
    assert digests == {number: sha256(body) for number, body in bodies.items()}
    entry = parts.join(upload, sorted(digests.items()), "run/file")
    body = b"".join(bodies.values())
    assert (entry.size, entry.sha256) == (len(body), sha256(body))
    assert read(store, "run/file") == body
    assert store.size("run/file") == len(body)
    assert [found.size for found in store.list("run")] == [len(body)]
    middle = len(body) // 2
    assert b"".join(store.read("run/file", middle - 5, middle + 5)) == body[max(0, middle - 5) : middle + 5]
    assert [file.name for file in (root / ".uploads" / upload).iterdir()] == ["0"], "it tells that the upload is joined"


def test_joining_again_finds_the_file(store: ArtifactStore, parts: PartUploads) -> None:
    """As a client does that has not heard of the first time."""
    upload = parts.begin()
    digest = parts.put(upload, 1, [b"bytes"])
    first = parts.join(upload, [(1, digest)], "file")
    assert parts.join(upload, [(1, digest)], "file").sha256 == first.sha256
    assert read(store, "file") == b"bytes"
    for call in (lambda: parts.join(upload, [(1, digest)], "other"), lambda: parts.put(upload, 2, [b"late"])):
        with pytest.raises(NotFound, match="No such upload"):
            call()


def test_parts_come_several_at_once(store: ArtifactStore, parts: PartUploads) -> None:
    upload = parts.begin()
    bodies = [NOISE[number : number + 400_000] for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        digests = list(pool.map(lambda number: parts.put(upload, number + 1, [bodies[number]]), range(12)))
    parts.join(upload, list(enumerate(digests, 1)), "file")
    assert read(store, "file") == b"".join(bodies)


def test_the_order_is_that_of_joining(store: ArtifactStore, parts: PartUploads) -> None:
    upload = parts.begin()
    for number in (1, 2, 70, MAX_PARTS):
        parts.put(upload, number, [f"{number} ".encode()])
    parts.join(upload, [(1, None), (2, None), (70, None), (MAX_PARTS, None)], "file")
    assert read(store, "file") == b"1 2 70 10000 "


def test_a_part_that_is_sent_again_replaces_the_first(store: ArtifactStore, parts: PartUploads) -> None:
    upload = parts.begin()
    parts.put(upload, 1, [b"first"])
    old = parts.put(upload, 2, [NOISE[:500_000]])
    assert parts.put(upload, 2, [NOISE[:500_000]]) == old
    new = parts.put(upload, 2, [b" second"])
    with pytest.raises(InvalidInput, match=f"part 2 of upload {upload} has the SHA-256 {new}, not {old}"):
        parts.join(upload, [(1, None), (2, old)], "file")
    assert store.list("") == []
    parts.join(upload, [(1, None), (2, new)], "file")
    assert read(store, "file") == b"first second"


def test_a_missing_part_is_told_and_may_still_come(store: ArtifactStore, parts: PartUploads) -> None:
    upload = parts.begin()
    parts.put(upload, 1, [b"a"])
    parts.put(upload, 3, [b"c"])
    wanted: list[tuple[int, str | None]] = [(1, None), (2, None), (3, None)]
    with pytest.raises(NotFound, match=f"No such part of upload {upload}: 2"):
        parts.join(upload, wanted, "file")
    assert store.list("") == []
    parts.put(upload, 2, [b"b"])
    parts.join(upload, wanted, "file")
    assert read(store, "file") == b"abc"


def test_a_part_with_another_digest_is_none(store: ArtifactStore, parts: PartUploads) -> None:
    upload = parts.begin()
    good = parts.put(upload, 1, [b"good"], sha256(b"good"))
    with pytest.raises(InvalidInput, match=f"should have {sha256(b'right')}"):
        parts.put(upload, 1, [b"wrong"], sha256(b"right"))
    with pytest.raises(InvalidInput):
        parts.put(upload, 2, [NOISE[:500_000]], sha256(b"right"))
    with pytest.raises(NotFound):
        parts.join(upload, [(1, None), (2, None)], "file")
    parts.join(upload, [(1, good)], "file")
    assert read(store, "file") == b"good"


def test_a_part_that_breaks_off_is_none(store: ArtifactStore, parts: PartUploads) -> None:
    def broken() -> Iterator[bytes]:
        yield NOISE[:500_000]
        raise ConnectionResetError

    upload = parts.begin()
    with pytest.raises(ConnectionResetError):
        parts.put(upload, 1, broken())
    with pytest.raises(NotFound, match="No such part"):
        parts.join(upload, [(1, None)], "file")
    assert store.list("") == []


def test_joining_replaces_what_was_there(store: ArtifactStore, parts: PartUploads) -> None:
    store.write("run/file", [b"before"])
    upload = parts.begin()
    parts.put(upload, 1, [b"after"])
    assert read(store, "run/file") == b"before"
    parts.join(upload, [(1, None)], "run/file")
    assert read(store, "run/file") == b"after"


def test_an_upload_ends_once(store: ArtifactStore, parts: PartUploads, root: Path) -> None:
    upload, other = parts.begin(), parts.begin()
    assert upload != other
    for each in (upload, other):
        parts.put(each, 1, [b"x"])
    parts.join(upload, [(1, None)], "file")
    parts.forget(other)
    parts.forget(other)
    for each in (upload, other):
        with pytest.raises(NotFound, match=f"No such upload: {each}"):
            parts.put(each, 2, [b"y"])
        with pytest.raises(NotFound, match=f"No such upload: {each}"):
            parts.join(each, [(1, None)], "other")
    assert [found.path for found in store.list("")] == ["file"]
    assert [file.name for file in scratch(root)] == [upload]


def test_uploads_do_not_mix(store: ArtifactStore, parts: PartUploads) -> None:
    one, other = parts.begin(), parts.begin()
    parts.put(one, 1, [b"one"])
    parts.put(other, 2, [b"other"])
    with pytest.raises(NotFound):
        parts.join(one, [(1, None), (2, None)], "file")
    parts.join(other, [(2, None)], "file")
    assert read(store, "file") == b"other"


def test_other_processes_go_on_with_an_upload(store: ArtifactStore, parts: PartUploads, root: Path) -> None:
    upload = parts.begin()
    other = PartUploads(ArtifactStore(f"file://{root}"))
    digest = other.put(upload, 1, [b"there"])
    parts.join(upload, [(1, digest)], "file")
    assert read(store, "file") == b"there"


def test_a_part_that_was_damaged_meanwhile_is_noticed(store: ArtifactStore, parts: PartUploads, root: Path) -> None:
    upload = parts.begin()
    small, large = parts.put(upload, 1, [b"small part"]), parts.put(upload, 2, [NOISE[:100_000]])
    file = root / ".uploads" / upload / "1"
    whole = file.read_bytes()
    for damaged in (whole.replace(b"small", b"smell"), whole[:-1], b"", whole.replace(b"inline", b"chunks")):
        file.write_bytes(damaged)
        for digest in (small, None):
            with pytest.raises(Corrupted, match=f"part 1 of upload {upload} is corrupt"):
                parts.join(upload, [(1, digest), (2, large)], "file")
    file.write_bytes(whole)
    [blob] = [path for path in (root / ".blobs").rglob("*") if path.is_file()]
    blob.write_bytes(b"other")
    with pytest.raises(Corrupted):
        parts.join(upload, [(1, small), (2, large)], "file")
    assert store.list("") == []


@pytest.mark.parametrize("number", [0, -1, MAX_PARTS + 1, 10**30])
def test_a_number_that_no_part_has_is_refused(parts: PartUploads, number: int) -> None:
    upload = parts.begin()
    with pytest.raises(InvalidInput, match="parts have numbers from 1 to"):
        parts.put(upload, number, [b"x"])
    with pytest.raises((NotFound, Corrupted)):
        parts.join(upload, [(number, None)], "file")


def test_no_file_has_more_parts_than_there_are_numbers(parts: PartUploads) -> None:
    upload = parts.begin()
    parts.put(upload, 1, [b"x"])
    with pytest.raises(InvalidInput, match="at most 10000 parts, not 10001"):
        parts.join(upload, [(1, None)] * (MAX_PARTS + 1), "file")


@pytest.mark.parametrize(
    "upload",
    [
        "",
        "x",
        "0" * 31,
        "0" * 33,
        "A" * 32,
        "../" + "0" * 29,
        "0" * 32 + "\n",
        "٠" * 32,
        "../../run",
        ".",
        "0" * 32 + "/1",
    ],
)
def test_an_id_that_nobody_gave_is_unknown(store: ArtifactStore, parts: PartUploads, root: Path, upload: str) -> None:
    store.write("run/1", [b"x"])
    calls: list[Callable[[], object]] = [
        lambda: parts.put(upload, 1, [b"bad"]),
        lambda: parts.join(upload, [(1, None)], "file"),
        lambda: parts.forget(upload),
    ]
    for call in calls:
        with pytest.raises(NotFound, match="No such upload"):
            call()
    assert read(store, "run/1") == b"x"
    assert scratch(root) == []


@pytest.mark.parametrize("path", ["", "../x", "/x", ".uploads/x", ".blobs/x"])
def test_a_path_that_is_not_allowed_is_refused(parts: PartUploads, root: Path, path: str) -> None:
    upload = parts.begin()
    parts.put(upload, 1, [b"x"])
    with pytest.raises(InvalidInput, match="Invalid path"):
        parts.join(upload, [(1, None)], path)
    assert [file.name for file in scratch(root)] == [upload]
