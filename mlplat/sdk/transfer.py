"""Files up to the platform and down from it: in chunks, several at once, each checked, none sent twice.

An upload asks which chunks the platform does not have, and sends those: what breaks off goes on where it was when it
is begun again, and what is there already costs its reading. A download checks what an earlier one left in the
``.part`` file beside the target, and fetches the rest.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

from mlplat.artifacts.blobs import Blobs
from mlplat.artifacts.chunking import WholeHash, cut, pack
from mlplat.artifacts.digests import sha256
from mlplat.artifacts.entry import INLINE_BYTES
from mlplat.artifacts.frames import MEDIA_TYPE, Frame, encode_frame
from mlplat.errors import Conflict, Corrupted, InvalidInput
from mlplat.parallel import in_order
from mlplat.sdk import direct, near
from mlplat.sdk.client import ARTIFACTS, Client
from mlplat.sdk.known_files import KnownFile, KnownFiles
from mlplat.sdk.part_files import part_of, write_at

NATIVE = "/api/v1/artifacts"
READ_BYTES = 8 * 1024 * 1024
#: Bytes of chunks that are asked about, sent or fetched together.
BATCH_BYTES = 8 * 1024 * 1024
WORKERS = 4
#: A file that is replaced, or whose chunks are collected, while it is transferred is begun anew so often.
MAX_ROUNDS = 3

#: Called with the bytes that are done and the bytes of the whole.
OnProgress = Callable[[int, int], None]


class _Part(NamedTuple):
    """A chunk of a file that is being fetched."""

    sha256: str
    start: int
    end: int
    #: Where in the bucket it is; "": that is not known.
    url: str


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
                digest = put_at_once(client, path, start)
                told.add(len(start))
                return KnownFile(len(start), digest, [])
            file = _send(client, start, body, told)
        check()
        if _assembled(client, path, file):
            return file
        client.give_up_near()
    raise Conflict(f"{path}: its chunks are collected as fast as they are sent")


def put_at_once(client: Client, path: str, body: bytes) -> str:
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
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    told = _Told(progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(MAX_ROUNDS):
        urls = "true" if client.chunking().direct else None
        file = client.get(f"{NATIVE}/files/{quote(path)}", urls=urls)
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
    whole, blobs = WholeHash(), client.near()
    pieces = chain([start], iter(partial(body.read, READ_BYTES), b""))
    chunks = list[tuple[str, int]]()
    with ThreadPoolExecutor(WORKERS, "upload") as pool:
        batches = _batches(cut(whole.of(pieces), client.chunking().average))
        for sent in in_order(pool, WORKERS + 1, (partial(_send_batch, client, blobs, batch) for batch in batches)):
            chunks += sent
            told.add(sum(size for _digest, size in sent))
    return KnownFile(sum(size for _digest, size in chunks), whole.hexdigest(), chunks)


def _send_batch(client: Client, blobs: Blobs | None, chunks: Sequence[memoryview]) -> list[tuple[str, int]]:
    if blobs is not None and (sent := near.put(blobs, chunks)) is not None:
        return sent
    digests = [sha256(chunk) for chunk in chunks]
    named = dict(zip(digests, chunks, strict=True))
    is_direct = client.chunking().direct
    answer = client.post(f"{NATIVE}/missing", {"sha256": list(named), "urls": is_direct})
    missing = {digest: named[digest] for digest in answer["missing"]}
    if missing and not (is_direct and _sent_direct(client, answer["urls"], missing)):
        frames = (encode_frame(Frame(each, len(chunk), pack(chunk) or chunk)) for each, chunk in missing.items())
        client.post_parts(f"{NATIVE}/chunks", list(chain.from_iterable(frames)), MEDIA_TYPE)
    return [(digest, len(chunk)) for digest, chunk in zip(digests, chunks, strict=True)]


def _sent_direct(client: Client, urls: Mapping[str, str], chunks: Mapping[str, memoryview]) -> bool:
    """False: the bucket cannot be reached from here."""
    try:
        direct.send(urls, chunks)
    except direct.Unreachable:
        client.give_up_direct()
        return False
    client.post(f"{NATIVE}/accepted", {"chunks": [(digest, len(chunk)) for digest, chunk in chunks.items()]})
    return True


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
    urls = file.get("urls", [""] * len(file["chunks"]))
    for (digest, size), url in zip(file["chunks"], urls, strict=True):
        start, end = end, end + size
        if start < there and sha256(os.pread(descriptor, end - start, start)) == digest:
            told.add(end - start)
        else:
            wanted.append(_Part(digest, start, end, url))
    blobs = client.near()
    with ThreadPoolExecutor(WORKERS, "download") as pool:
        batches = _neighbours(wanted)
        calls = (partial(_fetch_batch, client, blobs, path, file["sha256"], batch, descriptor) for batch in batches)
        try:
            for fetched in in_order(pool, WORKERS + 1, calls):
                told.add(fetched)
        except Conflict:
            return False
    return True


def _fetch_batch(
    client: Client, blobs: Blobs | None, path: str, version: str, parts: Sequence[_Part], descriptor: int
) -> int:
    """The bytes that were fetched."""
    start, end = parts[0].start, parts[-1].end
    bodies = _fetched_elsewhere(client, blobs, parts)
    if bodies is not None:
        for part, body in zip(parts, bodies, strict=True):
            write_at(descriptor, memoryview(body), part.start)
        return end - start
    view = memoryview(client.get_range(f"{ARTIFACTS}/{quote(path)}", start, end, version))
    for part in parts:
        chunk = view[part.start - start : part.end - start]
        if sha256(chunk) != part.sha256:
            raise Corrupted(f"{path}: bytes {part.start} to {part.end} came damaged")
        write_at(descriptor, chunk, part.start)
    return end - start


def _fetched_elsewhere(client: Client, blobs: Blobs | None, parts: Sequence[_Part]) -> list[bytes] | None:
    """The bytes of parts, checked, from the folder or the bucket that they are in; None: the platform is the way."""
    chunks = [(part.sha256, part.end - part.start) for part in parts]
    if blobs is not None:
        return near.fetch(blobs, chunks)
    if not (parts[0].url and client.chunking().direct):
        return None
    try:
        return direct.fetch([part.url for part in parts], chunks)
    except direct.Unreachable:
        client.give_up_direct()
        return None


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
