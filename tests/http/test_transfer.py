"""The SDK's uploads and downloads against a real server: what is there is not sent, what broke off goes on."""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from mlplat.artifacts.chunking import cut
from mlplat.artifacts.digests import sha256
from mlplat.artifacts.entry import INLINE_BYTES
from mlplat.artifacts.folder import Folder
from mlplat.errors import Conflict, Corrupted, InvalidInput, NotFound, Unavailable
from mlplat.sdk import known_files
from mlplat.sdk.client import ARTIFACTS, Client
from mlplat.sdk.known_files import KnownFiles
from mlplat.sdk.transfer import BATCH_BYTES, MAX_ROUNDS, NATIVE, download, put_at_once, upload, upload_from
from tests.contract.chdb import unique
from tests.faults.disks import MIB, small_disk

LARGEST = 4 * Folder.chunk_bytes
NOISE = random.Random(17).randbytes(3 * BATCH_BYTES)
TEXT = b"epoch 17 loss 0.123 accuracy 0.987\n" * 60_000
SIZES = (0, 1, INLINE_BYTES, INLINE_BYTES + 1, 300_000, LARGEST + 1, BATCH_BYTES + 5)


class Watched(Client):
    """A client that counts what goes over the wire. ``before`` is called before each request, and may break it off."""

    def __init__(self, url: str) -> None:
        super().__init__(url, retry_for_s=10.0)
        self.sent_bytes = self.asked = 0
        self.fetched: list[tuple[int, int]] = []
        self.before: Callable[[str], None] = lambda _path: None

    def post_parts(self, path: str, parts: Sequence[bytes | memoryview], content_type: str) -> Any:
        self.before(path)
        self.sent_bytes += sum(map(len, parts))
        return super().post_parts(path, parts, content_type)

    def put_bytes(self, path: str, body: bytes, sha256: str) -> None:
        self.before(path)
        self.sent_bytes += len(body)
        super().put_bytes(path, body, sha256)

    def post(self, path: str, body: Any, *, idempotency_key: str | None = None, by: str | None = None) -> Any:
        self.asked += path.endswith("/missing")
        return super().post(path, body, idempotency_key=idempotency_key, by=by)

    def put(self, path: str, body: Any) -> Any:
        self.before(path)
        return super().put(path, body)

    def get_range(self, path: str, start: int, end: int, version: str) -> bytes:
        self.before(path)
        self.fetched.append((start, end))
        return super().get_range(path, start, end, version)

    def content(self, path: str) -> bytes:
        """What the platform has under a path."""
        return self.get_bytes(f"{ARTIFACTS}/{path}")

    @property
    def fetched_bytes(self) -> int:
        return sum(end - start for start, end in self.fetched)


class Breaks:
    """Lets so many requests through, and breaks off then."""

    def __init__(self, count: int, part: str) -> None:
        self.left = count
        self._part = part

    def __call__(self, path: str) -> None:
        if self._part in path:
            self.left -= 1
            if self.left < 0:
                raise Unavailable("the connection broke")


class Progress:
    """What callbacks told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.told.append((done, total))

    def check(self, total: int) -> None:
        """It went to the total, and never back."""
        assert self.told[-1] == (total, total)
        assert {each for _done, each in self.told} == {total}
        done = [each for each, _total in self.told]
        assert done == sorted(done)
        assert done[0] >= 0


@pytest.fixture
def client(server_url: str) -> Watched:
    return Watched(server_url)


@pytest.fixture
def path() -> str:
    """Of a file that is not there yet."""
    return f"{unique('run')}/a b/ü%41#?.bin"


def fresh(size: int) -> bytes:
    """Bytes that the platform does not have: in each chunk there is something new."""
    key = random.Random(unique("seed")).randbytes(1_000)
    body = bytearray(NOISE[:size])
    for start in range(0, size, 50_000):
        body[start : start + len(key)] = key[: size - start]
    return bytes(body)


def written(file: Path, body: bytes) -> Path:
    file.write_bytes(body)
    return file


@pytest.mark.parametrize("size", SIZES)
def test_a_file_goes_up_and_comes_down(client: Watched, path: str, tmp_path: Path, size: int) -> None:
    body = fresh(size)
    up, down = Progress(), Progress()
    assert upload(client, path, written(tmp_path / "file", body), progress=up) == sha256(body)
    target = tmp_path / "new" / "folder" / "copy"
    assert download(client, path, target, down) == sha256(body)
    assert target.read_bytes() == body
    assert [file.name for file in target.parent.iterdir()] == ["copy"]
    if size:
        up.check(size)
        down.check(size)
    assert client.fetched_bytes == size


def test_what_gets_smaller_is_sent_so(client: Watched, path: str, tmp_path: Path) -> None:
    body = fresh(1_000) + TEXT
    upload(client, path, written(tmp_path / "file", body))
    assert client.sent_bytes < len(body) // 4
    download(client, path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == body


def test_the_second_upload_sends_no_chunk(client: Watched, path: str, tmp_path: Path) -> None:
    body = fresh(BATCH_BYTES + 2 * MIB)
    file = written(tmp_path / "file", body)
    upload(client, path, file)
    first, again = client.sent_bytes, Progress()
    assert first >= len(body)
    upload(client, unique("other"), file, progress=again)
    again.check(len(body))
    assert client.sent_bytes == first


def test_little_is_sent_of_a_file_that_changed_a_little(client: Watched, path: str, tmp_path: Path) -> None:
    body = fresh(2 * BATCH_BYTES)
    upload(client, path, written(tmp_path / "file", body))
    before = client.sent_bytes
    changed = b"a line at the front\n" + body[: 9 * MIB] + b"another" + body[9 * MIB :]
    upload(client, path, written(tmp_path / "file", changed))
    assert client.sent_bytes - before <= 4 * LARGEST
    download(client, path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == changed


def test_equal_chunks_of_one_file_are_sent_once(client: Watched, path: str, tmp_path: Path) -> None:
    part = fresh(2 * MIB)
    body = part * 3
    upload(client, path, written(tmp_path / "file", body))
    assert client.sent_bytes < 2.2 * len(part)
    download(client, path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == body


def test_an_upload_that_broke_off_goes_on(client: Watched, path: str, tmp_path: Path) -> None:
    body = fresh(len(NOISE))
    file = written(tmp_path / "file", body)
    client.before = Breaks(1, f"{NATIVE}/chunks")
    with pytest.raises(Unavailable):
        upload(client, path, file)
    with pytest.raises(NotFound):
        download(client, path, tmp_path / "copy")
    sent, client.before, progress = client.sent_bytes, Breaks(99, ""), Progress()
    assert BATCH_BYTES <= sent < len(body)
    upload(client, path, file, progress=progress)
    progress.check(len(body))
    assert client.sent_bytes <= len(body) * 1.01
    download(client, path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == body


def test_a_file_that_was_not_touched_is_not_read_again(
    client: Watched, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_files, "MIN_AGE_S", 0.0)
    body, known, progress = fresh(300_000), KnownFiles(tmp_path / "cache"), Progress()
    file = written(tmp_path / "file", body)
    upload(client, path, file, known)
    assert client.asked == 1
    assert upload(client, f"{unique('copy')}/x", file, known, progress) == sha256(body)
    assert (client.asked, progress.told) == (1, [(len(body), len(body))])
    file.chmod(0o600)
    file.chmod(0o644)
    copy = unique("copy")
    upload(client, copy, file, known)
    assert client.asked == 2, "its inode was touched"
    assert client.content(copy) == body


def test_a_known_file_whose_chunks_are_gone_is_sent_again(client: Watched, path: str, tmp_path: Path) -> None:
    body, known = fresh(300_000), KnownFiles(tmp_path / "cache")
    file = written(tmp_path / "file", body)
    found = upload_from(client, path, lambda: file.open("rb"))
    other = fresh(300_000)
    lost = type(found)(
        len(other), sha256(other), [(sha256(chunk), len(chunk)) for chunk in cut([other], Folder.chunk_bytes)]
    )
    known.add(file.stat(), lost, time.time() + 60)
    assert known.find(file.stat()) == lost
    assert upload(client, path, file, known) == sha256(body)


def test_a_file_that_changes_while_it_is_read_is_refused_and_does_not_appear(
    client: Watched, path: str, tmp_path: Path
) -> None:
    file = written(tmp_path / "file", fresh(len(NOISE)))

    def change(_path: str) -> None:
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))

    client.before = change
    known = KnownFiles(tmp_path / "cache")
    with pytest.raises(InvalidInput, match="changed while it was being uploaded"):
        upload(client, path, file, known)
    with pytest.raises(NotFound):
        download(client, path, tmp_path / "copy")
    assert known.find(file.stat()) is None


def test_a_file_that_gets_longer_while_it_is_read_is_refused(client: Watched, path: str, tmp_path: Path) -> None:
    file = written(tmp_path / "file", fresh(len(NOISE)))

    def append(request: str) -> None:
        if request.endswith("/chunks"):
            with file.open("ab") as log:
                log.write(b"more")

    client.before = append
    progress = Progress()
    with pytest.raises(InvalidInput, match="changed while it was being uploaded"):
        upload(client, path, file, progress=progress)
    done = [each for each, _total in progress.told]
    assert done == sorted(done)
    assert max(done) <= len(NOISE)


def test_a_body_is_opened_again_when_its_chunks_are_collected(client: Watched, path: str) -> None:
    body, opened, progress = fresh(300_000), list[BinaryIO](), Progress()

    def open_body() -> BinaryIO:
        opened.append(io.BytesIO(body))
        return opened[-1]

    def collect(request: str) -> None:
        if "/files/" in request and len(opened) < MAX_ROUNDS:
            raise Conflict("chunks are not there; send them first")

    client.before = collect
    assert upload_from(client, path, open_body, len(body), progress).sha256 == sha256(body)
    assert (len(opened), all(each.closed for each in opened)) == (MAX_ROUNDS, True)
    progress.check(len(body))

    def always(request: str) -> None:
        if "/files/" in request:
            raise Conflict("chunks are not there; send them first")

    client.before = always
    with pytest.raises(Conflict, match="collected as fast as they are sent"):
        upload_from(client, path, open_body, len(body))


def test_a_download_that_broke_off_goes_on(client: Watched, path: str, tmp_path: Path) -> None:
    body = fresh(len(NOISE))
    upload(client, path, written(tmp_path / "file", body))
    target = tmp_path / "down" / "copy"
    client.before = Breaks(2, ARTIFACTS)
    with pytest.raises(Unavailable):
        download(client, path, target)
    assert [file.name for file in target.parent.iterdir()] == [".copy.part"]
    had, client.before, progress = client.fetched_bytes, Breaks(99, ""), Progress()
    client.fetched.clear()
    assert had > 0
    assert download(client, path, target, progress) == sha256(body)
    progress.check(len(body))
    assert client.fetched_bytes <= len(body) - BATCH_BYTES // 2
    assert target.read_bytes() == body
    assert [file.name for file in target.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("left", ["equal", "flipped", "shorter", "longer", "other", "empty"])
def test_a_part_that_was_left_is_mended(client: Watched, path: str, tmp_path: Path, left: str) -> None:
    body = fresh(2 * BATCH_BYTES)
    upload(client, path, written(tmp_path / "file", body))
    flipped = bytearray(body)
    flipped[9 * MIB] ^= 1
    parts = {
        "equal": body,
        "flipped": bytes(flipped),
        "shorter": body[: 9 * MIB],
        "longer": body + b"more" * 1_000,
        "other": bytes(len(body)),
        "empty": b"",
    }
    (tmp_path / ".copy.part").write_bytes(parts[left])
    progress = Progress()
    assert download(client, path, tmp_path / "copy", progress) == sha256(body)
    assert (tmp_path / "copy").read_bytes() == body
    progress.check(len(body))
    most = {"equal": 0, "longer": 0, "flipped": LARGEST, "shorter": len(body) - 9 * MIB + LARGEST}
    assert client.fetched_bytes <= most.get(left, len(body))


def test_a_target_that_is_there_is_replaced_at_once(client: Watched, path: str, tmp_path: Path) -> None:
    body = fresh(300_000)
    put_at_once(client, path, body)
    target = written(tmp_path / "copy", b"old")
    client.before = lambda _path: None if target.read_bytes() == b"old" else pytest.fail("it is there too early")
    download(client, path, target)
    assert target.read_bytes() == body


def test_a_file_that_is_replaced_meanwhile_is_fetched_anew(client: Watched, path: str, tmp_path: Path) -> None:
    old, new = fresh(2 * BATCH_BYTES), fresh(2 * BATCH_BYTES)
    upload(client, path, written(tmp_path / "file", old))
    other, progress = Watched(client.url), Progress()
    replaced = written(tmp_path / "new", old[: len(old) // 2] + new[len(new) // 2 :])

    def replace(_path: str) -> None:
        client.before = lambda _path: None
        upload(other, path, replaced)

    (tmp_path / ".copy.part").write_bytes(old[: len(old) // 2])
    client.before = replace
    assert download(client, path, tmp_path / "copy", progress) == sha256(replaced.read_bytes())
    assert (tmp_path / "copy").read_bytes() == replaced.read_bytes()
    progress.check(len(old))


def test_a_file_that_is_replaced_all_the_time_is_given_up(client: Watched, path: str, tmp_path: Path) -> None:
    other = Watched(client.url)
    put_at_once(other, path, fresh(300_000))

    def replace(_path: str) -> None:
        put_at_once(other, path, fresh(300_000))

    client.before = replace
    with pytest.raises(Conflict, match="replaced as fast as it is fetched"):
        download(client, path, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_file_that_is_deleted_meanwhile_is_not_found(client: Watched, path: str, tmp_path: Path) -> None:
    put_at_once(client, path, fresh(300_000))
    client.before = lambda _path: Client(client.url).delete(f"{ARTIFACTS}/{path.partition('/')[0]}")
    with pytest.raises(NotFound):
        download(client, path, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_what_comes_damaged_is_no_file(
    client: Watched, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = fresh(BATCH_BYTES)
    put_at_once(client, path, body)
    whole = client.get_range

    def damaged(path: str, start: int, end: int, version: str) -> bytes:
        return whole(path, start, end, version)[:-1] + b"?"

    monkeypatch.setattr(client, "get_range", damaged)
    with pytest.raises(Corrupted, match="came damaged"):
        download(client, path, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    monkeypatch.setattr(client, "get_range", whole)
    download(client, path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == body


def test_downloads_of_one_target_do_not_disturb_one_another(client: Watched, tmp_path: Path) -> None:
    """Say of all processes of a node that fetch one model: each version is whole, whoever is last."""
    bodies = [fresh(BATCH_BYTES + 1_000 * number) for number in range(2)]
    paths = [unique("model") for _ in bodies]
    for each, body in zip(paths, bodies, strict=True):
        put_at_once(client, each, body)
    target = tmp_path / "shared" / "copy"

    def fetch(number: int) -> None:
        own = Client(client.url)
        for _ in range(3):
            assert download(own, paths[number % 2], target) == sha256(bodies[number % 2])
            assert target.read_bytes() in bodies

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fetch, range(4)))
    assert target.read_bytes() in bodies
    assert {file.name for file in target.parent.iterdir()} <= {"copy", ".copy.part"}


def test_the_longest_name_comes_down(client: Watched, tmp_path: Path) -> None:
    path, body = f"{unique('run')}/{'ü' * 127}x", fresh(300_000)
    put_at_once(client, path, body)
    target = tmp_path / path.rpartition("/")[2]
    client.before = Breaks(0, ARTIFACTS)
    with pytest.raises(Unavailable):
        download(client, path, target)
    client.before = lambda _path: None
    download(client, path, target)
    assert target.read_bytes() == body
    assert [file.name for file in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("size", [200_000, BATCH_BYTES])
def test_a_full_disk_gets_no_half_file(client: Watched, path: str, tmp_path: Path, size: int) -> None:
    body = fresh(size)
    put_at_once(client, path, body)
    with small_disk(tmp_path / "disk", 16 * MIB) as disk:
        disk.fill(leave_bytes=size // 2)
        target = disk.folder / "copy"
        with pytest.raises(OSError, match="No space left"):
            download(client, path, target)
        assert not target.exists()
        disk.free()
        download(client, path, target)
        assert target.read_bytes() == body


@pytest.mark.parametrize("bad", ["../x", "a/../../x", ".blobs/x", ""])
def test_a_path_that_is_not_allowed_is_refused(client: Watched, tmp_path: Path, bad: str) -> None:
    for size in (10, 300_000):
        with pytest.raises((InvalidInput, NotFound)):
            upload(client, bad, written(tmp_path / "file", fresh(size)))
    with pytest.raises((InvalidInput, NotFound)):
        download(client, bad, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_what_is_not_there_leaves_nothing(client: Watched, path: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        upload(client, path, tmp_path / "none")
    with pytest.raises(NotFound):
        download(client, path, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []
