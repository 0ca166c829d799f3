"""Area ``artifacts``: large and small files through the gateway."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import fsspec
import psutil

from mlplat.artifacts.store import ArtifactStore
from mlplat.sdk.client import Client
from mlplat.sdk.known_files import KnownFiles
from mlplat.sdk.transfer import download, upload
from tests.benchmarks.result import Result
from tests.ceph_packages import ensure_ceph
from tests.platform import Platform
from tests.s3 import S3Server

LARGE_MB = 500
MEGABYTE = 1_000_000
SMALL = 1_000
#: Where a hundredth of the bytes is changed: in one stretch, and in so many.
STRETCHES = (1, 10)
SAMPLE_S = 0.1
#: Large files: the first bytes that a virtual machine writes since it gave memory back cost it ten times as much.
ROUNDS = 5


def run(platform: Platform) -> Iterator[Result]:
    """Yields the figures, on a running platform."""
    client = Client(platform.url)
    store = ArtifactStore(f"file://{platform.state_dir}/artifacts")
    with tempfile.TemporaryDirectory(dir=platform.state_dir) as name:
        folder = Path(name)
        large = folder / "large"
        afar = Client(platform.url)
        afar.give_up_near()
        with _Memory(platform) as memory:
            yield from _large(afar, large, "by the gateway")
        yield Result("gateway's memory meanwhile, at most", memory.peak_mb, "MB", bound="<= 300")
        yield from _large(client, large, "by the folder")
        first = _timed(partial(upload, afar, "bench/first", _filled(large)))
        yield from _again(client, folder, large, first)
        for count in STRETCHES:
            before = _stored(store)
            _change(large, count)
            upload(client, f"bench/changed-{count}", large)
            share = (_stored(store) - before) / (LARGE_MB * MEGABYTE)
            yield Result(
                f"new bytes, 1% changed in {count} places", share * 100, "%", bound="<= 5" if count == 1 else None
            )
        yield _small(client, folder)
    yield from _bucket()


def _large(client: Client, large: Path, way: str) -> Iterator[Result]:
    """A large file up and down, some times, each time another one beside its own peer."""
    peers, ups, downs = list[float](), list[float](), list[float]()
    copy = large.with_suffix(".copy")
    for number in range(ROUNDS):
        peers.append(_copy_and_sum(_filled(large)))
        ups.append(_timed(partial(upload, client, f"bench/{way}/{number}", large)))
        downs.append(_timed(partial(download, client, f"bench/{way}/{number}", copy)))
        assert _sha256(copy) == _sha256(large)
        copy.unlink()
    peer = LARGE_MB / median(peers)
    yield _rate(f"upload of {LARGE_MB} MB {way}", median(ups), peer, 400)
    yield _rate(f"download of {LARGE_MB} MB {way}", median(downs), peer, 500)


def _filled(file: Path) -> Path:
    """The file with random bytes, which the disk has when it returns: what follows is not to wait for them."""
    with file.open("wb") as out:
        for _ in range(LARGE_MB):
            out.write(os.urandom(MEGABYTE))
        os.fsync(out.fileno())
    time.sleep(2.1)  # what is younger is not trusted to stay as it is
    return file


def _bucket() -> Iterator[Result]:
    """The store in a bucket beside plain s3fs, on a real S3 server; nothing where that cannot be had."""
    if why := ensure_ceph():
        print(why)
        return
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        server = S3Server(Path(folder) / "s3")
        server.start()
        try:
            os.environ.update(server.environment)
            bucket = server.new_bucket()
            plain = fsspec.filesystem("s3")
            store = ArtifactStore(f"s3://{bucket}/store")
            body = os.urandom(LARGE_MB * MEGABYTE)
            pieces = [body[start : start + MEGABYTE] for start in range(0, len(body), MEGABYTE)]
            peer = LARGE_MB / _timed(lambda: plain.pipe_file(f"{bucket}/plain", body))
            own = LARGE_MB / _timed(lambda: store.write("bench/large", pieces))
            yield Result(f"{LARGE_MB} MB into a bucket, s3fs beside it", own, "MB/s", peer, f">= {0.8 * peer:.0f}")
            peer = LARGE_MB / _timed(lambda: plain.cat_file(f"{bucket}/plain"))
            own = LARGE_MB / _timed(lambda: sum(map(len, store.read("bench/large"))))
            yield Result(f"{LARGE_MB} MB from a bucket, s3fs beside it", own, "MB/s", peer, f">= {0.8 * peer:.0f}")
        finally:
            server.kill()


def _again(client: Client, folder: Path, large: Path, first: float) -> Iterator[Result]:
    known = KnownFiles(folder)
    second = _timed(lambda: upload(client, "bench/again", large, known))
    yield Result("upload of the same again, read once more", second / first * 100, "% of the first", bound="<= 20")
    third = _timed(lambda: upload(client, "bench/third", large, known))
    yield Result("upload of the same again, untouched", third / first * 100, "% of the first", bound="<= 20")


def _small(client: Client, folder: Path) -> Result:
    small = folder / "small"
    small.write_bytes(b"x" * 1_000)

    def send() -> None:
        for number in range(SMALL):
            upload(client, f"bench/small/{number}", small)

    return Result(f"{SMALL} uploads of 1 kB", _timed(send), "s", bound="<= 10")


def _rate(name: str, seconds: float, peer: float, bound: float) -> Result:
    """``peer``: MB/s of ``cp`` and ``sha256sum``, of which four fifths are enough."""
    return Result(name, LARGE_MB / seconds, "MB/s", peer, f">= {min(bound, 0.8 * peer):.0f}")


def _copy_and_sum(file: Path) -> float:
    """Seconds of ``cp`` and ``sha256sum``."""
    copy = file.with_suffix(".peer")
    began = time.perf_counter()
    for command in (["cp", str(file), str(copy)], ["sha256sum", str(file)]):
        subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - began
    copy.unlink()
    return seconds


def _change(file: Path, count: int) -> None:
    """Writes other bytes over a hundredth of a file, in ``count`` places."""
    size = file.stat().st_size
    with file.open("rb+") as out:
        for number in range(count):
            out.seek(size * number // count + 12_345)
            out.write(os.urandom(size // 100 // count))


def _stored(store: ArtifactStore) -> int:
    return sum(info.size for info in store.objects.walk(""))


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _sha256(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


class _Memory:
    """The most memory that a process of the gateway had, in MB of its proportional set (PSS)."""

    def __init__(self, platform: Platform) -> None:
        self._processes = [
            process
            for process in psutil.process_iter(["cmdline"])
            if "ServeReplica" in " ".join(process.info["cmdline"] or ())
        ]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak_mb = 0.0

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            for process in self._processes:
                self.peak_mb = max(self.peak_mb, process.memory_full_info().pss / MEGABYTE)
