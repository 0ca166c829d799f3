"""What the artifact store keeps its objects in, whatever that is."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlplat.artifacts.bucket import open_objects
from mlplat.artifacts.folder import Folder
from mlplat.artifacts.layout import UPLOADS
from mlplat.artifacts.objects import Child, Objects
from mlplat.errors import InvalidInput, StorageFull
from tests.conftest import short_folder
from tests.faults.disks import MIB, small_disk

WRITERS = 8
ROUNDS = 60
#: Keys that some file system, URL or pattern could take for something else.
ODD = (
    "a", "ü", "\u00e9", "e\u0301", "🧪", "a b", " a ", "a%41", "%", "a%2Fb", "#", "?x=1", "a&b", "a+b", "'", '"', "a;b",
    "a=b", "*", "[a]", "{a}", "~", "$HOME", "`a`", "-x", ".x", "..x", "x..", "...", "a:b", "a|b", "<a>", "١", "ﬀ", "A",
    "x" * 255,
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where objects are; every ``open`` gives another way there. ``has_folders``: a key is a file or a folder."""

    open: Callable[[], Objects]
    has_folders: bool


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place."""
    if request.param == "folder":
        return Place(lambda: Folder(f"{tmp_path}/objects"), has_folders=True)
    url = request.getfixturevalue("s3_url")
    return Place(lambda: open_objects(f"{url}/objects"), has_folders=False)


@pytest.fixture
def objects(place: Place) -> Objects:
    return place.open()


def keys(objects: Objects, folder: str = "") -> list[str]:
    """All objects below a folder, but for scratch."""
    return sorted(info.key for info in objects.walk(folder) if not info.key.startswith(f"{UPLOADS}/"))


def children(objects: Objects, folder: str) -> list[tuple[str, int | None]]:
    found = [child for child in objects.children(folder) if child.name != UPLOADS]
    return sorted((child.name, None if child.info is None else child.info.size) for child in found)


@pytest.mark.parametrize("kind", [bytes, memoryview])
@pytest.mark.parametrize("body", [b"", b"x", b"some bytes", bytes(range(256)) * 20_000], ids=len)
def test_what_was_written_is_read(objects: Objects, body: bytes, kind: Callable[[bytes], bytes | memoryview]) -> None:
    assert objects.write("deep/er/key", kind(body))
    assert objects.read("deep/er/key") == body
    info = objects.info("deep/er/key")
    assert info is not None
    assert (info.key, info.size) == ("deep/er/key", len(body))


def test_folders_that_are_made_ahead_hold_nothing_and_are_written_to(objects: Objects) -> None:
    for _ in range(2):
        objects.make_folders(["a/b/one", "a/b/two", "c"])
        assert keys(objects) == []
    assert objects.write("a/b/one/key", b"body")
    objects.make_folders(["a/b/one"])
    assert objects.read("a/b/one/key") == b"body"
    assert keys(objects) == ["a/b/one/key"]


def test_writing_again_replaces(objects: Objects) -> None:
    objects.write("key", b"a longer first version")
    before = objects.info("key")
    assert objects.write("key", b"second")
    assert objects.read("key") == b"second"
    after = objects.info("key")
    assert before is not None
    assert after is not None
    assert (before.stamp != after.stamp, after.modified_s >= before.modified_s) == (True, True)
    assert keys(objects) == ["key"]


def test_equal_sizes_have_other_stamps(objects: Objects) -> None:
    stamps = set()
    for body in (b"one", b"two", b"six"):
        objects.write("key", body)
        info = objects.info("key")
        assert info is not None
        assert objects.info("key") == info
        stamps.add(info.stamp)
    assert len(stamps) == 3


def test_listings_and_questions_tell_the_same_of_an_object(objects: Objects) -> None:
    objects.write("a/b", b"12345")
    info = objects.info("a/b")
    assert info is not None
    assert list(objects.walk("a")) == [info]
    assert objects.children("a") == [Child("b", info)]


def test_what_is_new_is_written_once(objects: Objects) -> None:
    assert objects.write("a/b", b"first", only_new=True)
    assert not objects.write("a/b", b"second", only_new=True)
    assert objects.read("a/b") == b"first"
    assert objects.write("a/b", b"third")
    objects.delete("a/b")
    assert objects.write("a/b", b"fourth", only_new=True)
    assert objects.read("a/b") == b"fourth"


def test_one_of_several_writers_of_something_new_wins(place: Place) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:
        for number in range(ROUNDS // 3):
            start = threading.Barrier(WRITERS)
            key = f"round/{number}"

            def write(writer: int, key: str = key, start: threading.Barrier = start) -> bool:
                own = place.open()
                start.wait(30)
                return own.write(key, bytes([writer]) * 100_000, only_new=True)

            won = list(pool.map(write, range(WRITERS)))
            assert won.count(True) == 1
            assert place.open().read(key) == bytes([won.index(True)]) * 100_000


def test_readers_see_one_version_or_the_other(place: Place) -> None:
    bodies = [bytes([number]) * (300_000 + number) for number in range(2)]
    place.open().write("key", bodies[0])
    done = threading.Event()

    def read() -> set[int]:
        own, seen = place.open(), set[int]()
        while not done.is_set():
            found = own.read("key")
            assert found in bodies
            info = own.info("key")
            assert info is not None
            assert info.size in {len(body) for body in bodies}
            seen.add(bodies.index(found))
        return seen

    with ThreadPoolExecutor(2) as pool:
        reading = [pool.submit(read) for _ in range(2)]
        try:
            for number in range(ROUNDS):
                place.open().write("key", bodies[number % 2])
        finally:
            done.set()
        assert all(future.result(30) for future in reading)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, None, b"0123456789"), (3, None, b"3456789"), (0, 4, b"0123"), (3, 4, b"3"), (9, 10, b"9"),
        (0, 10, b"0123456789"), (3, 3, b""), (5, 2, b""), (0, 0, b""), (8, 99, b"89"), (10, None, b""),
        (10, 11, b""), (99, None, b""), (99, 120, b""),
    ],
)  # fmt: skip
def test_a_range_is_read(objects: Objects, start: int, end: int | None, expected: bytes) -> None:
    objects.write("digits", b"0123456789")
    assert objects.read("digits", start, end) == expected
    objects.write("empty", b"")
    assert objects.read("empty", start, end) == b""
    assert objects.read("missing", start, end) is None


def test_what_is_not_there_is_nothing(objects: Objects) -> None:
    objects.write("folder/object", b"x")
    for key in ("missing", "folder", "folder/missing", "folder/object/below", "folde", "folder/objec"):
        assert objects.read(key) is None
        assert objects.info(key) is None
        objects.delete(key) if key != "folder" else None
    for key in ("missing", "folder/object", "folder/object/below", "folde"):
        assert list(objects.children(key)) == []
        assert list(objects.walk(key)) == []
    assert keys(objects) == ["folder/object"]


def test_an_empty_place_is_empty(objects: Objects) -> None:
    assert objects.children("") == []
    assert list(objects.walk("")) == []
    objects.delete("anything")


def test_children_are_objects_and_folders(objects: Objects) -> None:
    for key in ("run/b", "run/a", "run/sub/c", "run/sub/deeper/d", "runner/x", "top"):
        objects.write(key, key.encode())
    assert children(objects, "") == [("run", None), ("runner", None), ("top", 3)]
    assert children(objects, "run") == [("a", 5), ("b", 5), ("sub", None)]
    assert children(objects, "run/sub") == [("c", 9), ("deeper", None)]


def test_a_walk_finds_all_objects_below_a_folder(objects: Objects) -> None:
    written = sorted(["run/b", "run/sub/c", "run/sub/deeper/d", "runner/x", "top"])
    for key in written:
        objects.write(key, key.encode())
    assert keys(objects) == written
    assert keys(objects, "run") == written[:3]
    assert {info.key: info.size for info in objects.walk("run")} == {key: len(key) for key in written[:3]}


def test_many_objects_are_all_listed_and_deleted(objects: Objects) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda number: objects.write(f"many/{number}", b""), range(1_100)))
    assert len(keys(objects, "many")) == len(objects.children("many")) == 1_100
    objects.delete("many")
    assert objects.children("") == [] or children(objects, "") == []


def test_deleting_removes_an_object_or_a_folder_and_repeats_are_fine(objects: Objects) -> None:
    for key in ("keep/me", "gone/a", "gone/b/c", "gone-not", "single"):
        objects.write(key, b"x")
    for key in ("gone", "gone", "single", "single"):
        objects.delete(key)
    assert keys(objects) == ["gone-not", "keep/me"]


def test_nothing_is_remembered_of_a_place(place: Place) -> None:
    one, other = place.open(), place.open()
    assert (one.read("d/key"), one.info("d/key"), one.children("d")) == (None, None, [])
    other.write("d/key", b"first")
    assert (one.read("d/key"), children(one, "d"), keys(one)) == (b"first", [("key", 5)], ["d/key"])
    other.write("d/key", b"the second")
    info = one.info("d/key")
    assert info is not None
    assert (one.read("d/key"), info.size, children(one, "d")) == (b"the second", 10, [("key", 10)])
    other.delete("d")
    assert (one.read("d/key"), one.info("d/key"), one.children("d"), keys(one)) == (None, None, [], [])


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_names(objects: Objects, name: str) -> None:
    for key in ("odd/b", "b", "odd/ab"):
        objects.write(key, b"other")
    for key in (f"odd/{name}", f"f{name}/{name}"[:255]):
        body = key.encode()
        objects.write(key, body)
        assert objects.read(key) == body
        info = objects.info(key)
        assert info is not None
        assert (info.key, info.size) == (key, len(body))
        assert key in keys(objects)
        assert key.rpartition("/")[2] in dict(children(objects, key.rpartition("/")[0]))
        objects.delete(key)
        assert objects.read(key) is None
    assert keys(objects) == ["b", "odd/ab", "odd/b"]


def test_odd_names_are_all_different(objects: Objects) -> None:
    for name in ODD:
        objects.write(f"odd/{name}", name.encode())
    assert dict(children(objects, "odd")) == {name: len(name.encode()) for name in ODD}
    assert [objects.read(f"odd/{name}") for name in ODD] == [name.encode() for name in ODD]


def test_an_object_and_a_folder_cannot_have_the_same_key(place: Place) -> None:
    if not place.has_folders:
        pytest.skip("keys are not files here")
    objects = place.open()
    objects.write("a/b", b"object")
    for key in ("a", "a/b/c", "a/b/c/d"):
        for only_new in (False, True):
            with pytest.raises(InvalidInput, match="cannot have the same path"):
                objects.write(key, b"x", only_new=only_new)
    assert (keys(objects), objects.read("a/b")) == (["a/b"], b"object")
    assert objects.children(UPLOADS) == []


def test_writers_and_deleters_of_one_folder_do_not_disturb_one_another(place: Place) -> None:
    def delete(_deleter: int) -> None:
        own = place.open()
        for _ in range(ROUNDS * 5):
            own.delete("folder")

    def write(writer: int) -> None:
        own = place.open()
        for number in range(ROUNDS * 5):
            assert own.write(f"folder/{writer}/{number}", b"x")

    with ThreadPoolExecutor(5) as pool:
        deleting = pool.map(delete, range(2))
        list(pool.map(write, range(3)))
        list(deleting)
    place.open().delete("folder")
    assert keys(place.open()) == []


def test_listings_do_not_mind_what_goes_away_meanwhile(place: Place) -> None:
    done = threading.Event()

    def change() -> None:
        own = place.open()
        while not done.is_set():
            for number in range(5):
                own.write(f"folder/{number}/x", b"x")
            own.delete("folder")

    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(change)
        objects = place.open()
        try:
            for _ in range(ROUNDS):
                assert {child.name for child in objects.children("folder")} <= set("01234")
                assert {info.size for info in objects.walk("folder")} <= {1}
                assert objects.read("folder/0/x") in (None, b"x")
        finally:
            done.set()
        changing.result(30)


#: Run without the rights of root, by whom files are read that nobody may read.
_FORBIDDEN = """
import os, sys
from mlplat.artifacts.folder import Folder
from mlplat.errors import Unavailable
if os.getuid() == 0:
    os.setuid(65534)
objects = Folder(sys.argv[1])
assert [info.key for info in objects.walk("open")] == ["open/x"]
for call in (
    lambda: list(objects.walk("")),
    lambda: list(objects.walk("closed")),
    lambda: objects.children("closed"),
    lambda: objects.info("closed/x"),
    lambda: objects.read("closed/x"),
    lambda: objects.read("closed-file"),
    lambda: objects.write("closed/x", b"y"),
    lambda: objects.delete("closed/x"),
    lambda: objects.delete("closed"),
):
    try:
        found = call()
    except Unavailable as error:
        assert "cannot be used: Permission denied" in error.message, error
    else:
        raise AssertionError(found)
"""


def test_what_a_disk_does_not_give_does_not_look_empty() -> None:
    with short_folder() as root:
        objects = Folder(str(root))
        for key in ("open/x", "closed/x", "closed-file"):
            objects.write(key, b"x")
        for path in (root / "closed", root / "closed-file"):
            path.chmod(0)
        try:
            subprocess.run([sys.executable, "-c", _FORBIDDEN, root], check=True, timeout=60)
        finally:
            (root / "closed").chmod(0o700)
        assert keys(objects) == ["closed-file", "closed/x", "open/x"]


def test_a_full_disk_takes_nothing_and_keeps_what_it_has(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4 * MIB) as disk:
        objects = Folder(str(disk.folder))
        objects.write("before", b"kept")
        disk.fill(leave_bytes=MIB)
        for key in ("before", "new", "deep/er/new"):
            for only_new in (False, True):
                with pytest.raises(StorageFull, match="is full"):
                    objects.write(key, bytes(2 * MIB), only_new=only_new)
        assert (objects.read("before"), objects.info("new"), objects.children(UPLOADS)) == (b"kept", None, [])
        disk.fill()
        with pytest.raises(StorageFull):
            objects.write("small", b"x" * 100_000)
        objects.delete("before")
        disk.free()
        assert objects.write("new", bytes(2 * MIB))
        assert children(objects, "") == [("new", 2 * MIB)] or ("new", 2 * MIB) in children(objects, "")
