"""Files up to the platform and down from it: in chunks, several at once, each checked, none sent twice.

An upload asks which chunks the platform does not have, and sends those: what breaks off goes on where it was when it
is begun again, and what is there already costs its reading. A download checks what an earlier one left in the
``.part`` file beside the target, and fetches the rest.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import quote

from mlplat.artifacts.chunking import WholeHash, cut, pack, sha256
from mlplat.artifacts.entry import INLINE_BYTES
from mlplat.artifacts.frames import MEDIA_TYPE, Frame, encode_frame
from mlplat.errors import Conflict, Corrupted, InvalidInput
from mlplat.sdk.client import ARTIFACTS, Client
from mlplat.sdk.known_files import KnownFile, KnownFiles
from mlplat.sdk.part_files import part_of, write_at

NATIVE = "/api/v1/artifacts"
READ_BYTES = 1024 * 1024
#: Bytes of chunks that are asked about, sent or fetched together.
BATCH_BYTES = 8 * 1024 * 1024
WORKERS = 3
#: A file that is replaced, or whose chunks are collected, while it is transferred is begun anew so often.
MAX_ROUNDS = 3

T = TypeVar("T")
#: Called with the bytes that are done and the bytes of the whole.
OnProgress = Callable[[int, int], None]


class _Part(NamedTuple):
    """A chunk of a file that is being fetched."""

    sha256: str
    start: int
    end: int


def upload(
    client: Client, path: str, source: Path, known: KnownFiles | None = None, progress: OnProgress | None = None
) -> str:
    """Stores a file under a path of the artifact store; returns its SHA-256.

    Args:
        client: of the platform.
        path: where, below the store's root.
        source: the file.
        known: what earlier uploads found out about files: one that was not touched since is not even read.
        progress: told how far it is.

    Raises:
        InvalidInput: the path is not allowed, or the file changes while it is read.
        OSError: the source cannot be read.
    """
    began_s, before = time.time(), source.stat()
    found = known.find(before) if known is not None else None
    if found is not None and _assembled(client, path, found):
        if progress is not None:
            progress(found.size, found.size)
        return found.sha256
    unchanged = partial(_require_unchanged, source, before)
    file = upload_from(client, path, lambda: source.open("rb"), before.st_size, progress, unchanged)
    if known is not None:
        known.add(before, file, began_s)
    return file.sha256


def upload_from(
    client: Client,
    path: str,
    open_body: Callable[[], BinaryIO],
    size: int = 0,
    progress: OnProgress | None = None,
    check: Callable[[], None] = lambda: None,
) -> KnownFile:
    """Stores what ``open_body`` opens, about ``size`` bytes; it may be opened several times.

    ``check`` is called when all of it has been read, before the file appears, and raises what speaks against it.
    """
    told = _Told(progress)
    told.begin(size)
    for _ in range(MAX_ROUNDS):
        with open_body() as body:
            start = body.read(INLINE_BYTES + 1)
            if len(start) <= INLINE_BYTES:
                check()
                digest = put_whole(client, path, start)
                told.add(len(start))
                return KnownFile(len(start), digest, [])
            file = _send(client, start, body, told)
        check()
        if _assembled(client, path, file):
            return file
    raise Conflict(f"{path}: its chunks are collected as fast as they are sent")


def put_whole(client: Client, path: str, body: bytes) -> str:
    """Stores bytes in one request; returns their SHA-256. Parts of logs, which grow, always go so."""
    digest = sha256(body)
    client.put_bytes(f"{ARTIFACTS}/{quote(path)}", body, digest)
    return digest


def download(client: Client, path: str, target: Path, progress: OnProgress | None = None) -> str:
    """Fetches a file of the artifact store; returns its SHA-256. The target appears when all of it is there.

    Raises:
        NotFound: no such file.
        Corrupted: what came is not what was stored.
        OSError: the target cannot be written.
    """
    told = _Told(progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(MAX_ROUNDS):
        file = client.get(f"{NATIVE}/files/{quote(path)}")
        told.begin(file["size"])
        with part_of(target) as (part, descriptor):
            if _fetch(client, path, file, descriptor, told):
                part.replace(target)
                digest: str = file["sha256"]
                return digest
    raise Conflict(f"{path} is replaced as fast as it is fetched")


def _require_unchanged(source: Path, before: os.stat_result) -> None:
    after = source.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InvalidInput(f"{source} changed while it was being uploaded; upload it again")


def _send(client: Client, start: bytes, body: BinaryIO, told: _Told) -> KnownFile:
    whole = WholeHash()
    pieces = chain([start], iter(partial(body.read, READ_BYTES), b""))
    chunks = list[tuple[str, int]]()
    with ThreadPoolExecutor(WORKERS, "upload") as pool:
        batches = _batches(cut(whole.of(pieces)))
        for sent in _in_order(pool, (partial(_send_batch, client, batch) for batch in batches)):
            chunks += sent
            told.add(sum(size for _digest, size in sent))
    return KnownFile(sum(size for _digest, size in chunks), whole.hexdigest(), chunks)


def _send_batch(client: Client, chunks: Sequence[memoryview]) -> list[tuple[str, int]]:
    named = [(sha256(chunk), chunk) for chunk in chunks]
    answer = client.post(f"{NATIVE}/missing", {"sha256": [digest for digest, _chunk in named]})
    missing = set(answer["missing"])
    parts = list[bytes | memoryview]()
    for digest, chunk in named:
        if digest in missing:
            missing.remove(digest)  # once is enough
            parts += encode_frame(Frame(digest, len(chunk), pack(chunk) or chunk))
    if parts:
        client.post_bytes(f"{NATIVE}/chunks", b"".join(parts), MEDIA_TYPE)
    return [(digest, len(chunk)) for digest, chunk in named]


def _assembled(client: Client, path: str, file: KnownFile) -> bool:
    """False: chunks are missing."""
    if not file.chunks:
        return False
    body = {"size": file.size, "sha256": file.sha256, "chunks": file.chunks}
    try:
        client.put(f"{NATIVE}/files/{quote(path)}", body)
    except Conflict:
        return False
    return True


def _fetch(client: Client, path: str, file: dict[str, Any], descriptor: int, told: _Told) -> bool:
    """Any: the answer's JSON. False: the file was replaced meanwhile."""
    wanted = list[_Part]()
    end, there = 0, os.fstat(descriptor).st_size
    os.ftruncate(descriptor, file["size"])
    for digest, size in file["chunks"]:
        start, end = end, end + size
        if start < there and sha256(os.pread(descriptor, end - start, start)) == digest:
            told.add(end - start)
        else:
            wanted.append(_Part(digest, start, end))
    with ThreadPoolExecutor(WORKERS, "download") as pool:
        batches = _neighbours(wanted)
        calls = (partial(_fetch_batch, client, path, file["sha256"], batch, descriptor) for batch in batches)
        try:
            for fetched in _in_order(pool, calls):
                told.add(fetched)
        except Conflict:
            return False
    return True


def _fetch_batch(client: Client, path: str, version: str, parts: Sequence[_Part], descriptor: int) -> int:
    """The bytes that were fetched."""
    start, end = parts[0].start, parts[-1].end
    body = client.get_range(f"{ARTIFACTS}/{quote(path)}", start, end, version)
    view = memoryview(body)
    for part in parts:
        chunk = view[part.start - start : part.end - start]
        if sha256(chunk) != part.sha256:
            raise Corrupted(f"{path}: bytes {part.start} to {part.end} came damaged")
        write_at(descriptor, chunk, part.start)
    return end - start


def _neighbours(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Parts that follow one another, about ``BATCH_BYTES`` together."""
    batch = list[_Part]()
    for part in parts:
        if batch and (part.start != batch[-1].end or part.end - batch[0].start > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def _batches(chunks: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    batch, size = list[memoryview](), 0
    for chunk in chunks:
        batch.append(chunk)
        size += len(chunk)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_order(pool: ThreadPoolExecutor, calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What calls return, in their order; as many as there are workers are under way, and one waits."""
    waiting = deque[Future[T]]()
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class _Told:
    """Adds up what is done; what is done again is not told again."""

    def __init__(self, progress: OnProgress | None) -> None:
        self._progress = progress
        self._total = self._done = self._shown = 0

    def begin(self, total: int) -> None:
        """Nothing is done yet of so many bytes."""
        self._total, self._done = total, 0

    def add(self, count: int) -> None:
        """So many bytes more are done."""
        self._done += count
        done = min(self._done, self._total)
        if self._progress is not None and (done >= self._shown or done == self._total):
            self._shown = done
            self._progress(done, self._total)
