"""Files by path and blobs by digest, in a folder or a bucket.

Contract: a write is visible only when it is complete and durable, and replaces what was there; who reads meanwhile
reads one version to its end. Equal stretches of files are stored once. Whatever is read is checked against its
SHA-256. Every path is checked by ``safe_path``. Methods block and are thread-safe.
"""

from __future__ import annotations

import builtins
import hashlib
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain

from mlplat.artifacts.blobs import Blobs, blob_folders
from mlplat.artifacts.bucket import open_objects
from mlplat.artifacts.chunking import WholeHash, cut
from mlplat.artifacts.digests import sha256
from mlplat.artifacts.entry import (
    HEADER_BYTES,
    INLINE_BYTES,
    SURE_BYTES,
    Chunk,
    Entry,
    Header,
    check_chunks,
    check_digest,
    decode,
    decode_header,
    encode,
)
from mlplat.artifacts.folder import Folder
from mlplat.artifacts.frames import Frame
from mlplat.artifacts.layout import OWN, PLACE_KEY, UPLOADS
from mlplat.artifacts.model import ArtifactInfo, safe_path
from mlplat.artifacts.objects import ObjectInfo
from mlplat.errors import Conflict, Corrupted, InvalidInput, NotFound, StorageFull
from mlplat.parallel import in_order

#: Bytes of a piece that ``read`` gives at most.
CHUNK_BYTES = 1024 * 1024
#: A write that takes longer looks once more whether its chunks are there.
FRESH_S = 600.0
MAX_KNOWN_HEADERS = 100_000


@dataclass(frozen=True)
class StoredFile:
    """A file; ``path`` is relative to the folder that was asked for, ``stamp`` changes whenever it is written."""

    path: str
    size: int
    stamp: str


class MissingChunks(Conflict):
    """A file cannot be made of chunks that are not there: they have to be sent first."""


class ArtifactStore:
    """A folder (``file:///…``) or a bucket (``s3://…``)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.objects = open_objects(url)
        self.blobs = Blobs(self.objects)
        self._pool = ThreadPoolExecutor(2 * self.objects.parallel, thread_name_prefix="artifacts")
        #: Headers of entries that are too long for their size to be told from a listing, by key and stamp.
        self._headers: dict[tuple[str, str], Header] = {}

    def __reduce__(self) -> tuple[type[ArtifactStore], tuple[str]]:
        """Other processes open it anew."""
        return ArtifactStore, (self.url,)

    def prepare(self) -> None:
        """Makes ahead what the first writes would have to make; safe to repeat.

        Raises:
            StorageFull, Unavailable: the store is full, read-only or out of reach.
        """
        self.objects.make_folders(blob_folders())
        self.objects.write(PLACE_KEY, uuid.uuid4().hex.encode(), only_new=True)

    def place(self) -> tuple[str, str] | None:
        """The folder of a store that was prepared, and the text by which to know it again; None: it is a bucket."""
        if not isinstance(self.objects, Folder):
            return None
        text = self.objects.read(PLACE_KEY)
        return None if text is None else (self.objects.root, text.decode())

    def write(self, path: str, pieces: Iterable[bytes], digest: str | None = None, limit: int | None = None) -> Entry:
        """Stores a file.

        Args:
            path: where.
            pieces: its bytes.
            digest: the SHA-256 that they must have.
            limit: how many bytes there is room for.

        Raises:
            InvalidInput: the path is not allowed, something else than a file is there, or the digest is another.
            StorageFull, Unavailable: nothing was changed.
        """
        key = file_key(path)
        entry = self.make(pieces if limit is None else _bounded(pieces, limit))
        if digest is not None and digest != entry.sha256:
            raise InvalidInput(f"The bytes of {path!r} have the SHA-256 {entry.sha256} and should have {digest}.")
        self.store_entry(key, entry)
        return entry

    def make(self, pieces: Iterable[bytes]) -> Entry:
        """Stores the bytes of a file that has no path yet: where they are."""
        began = time.monotonic()
        pieces = iter(pieces)
        start = _first_bytes(pieces)
        if len(start) <= INLINE_BYTES:
            return Entry(len(start), sha256(start), start)
        whole = WholeHash()
        chunks = tuple(self._put_all(cut(whole.of(chain([start], pieces)), self.objects.chunk_bytes)))
        if time.monotonic() - began > FRESH_S:
            self._require(chunks)
        return Entry(sum(chunk.size for chunk in chunks), whole.hexdigest(), None, chunks)

    def write_inline(self, path: str, body: bytes) -> None:
        """Stores a file that is written again and again, such as the newest part of a log: not as blobs.

        Raises:
            InvalidInput, StorageFull, Unavailable: as ``write``.
        """
        self.objects.write(file_key(path), encode(Entry(len(body), sha256(body), body)))

    def put_entry(self, path: str, entry: Entry) -> None:
        """Makes a file of what ``make`` stored, or of chunks that are there.

        Raises:
            MissingChunks: some are not there any more.
        """
        key = file_key(path)
        self._require(entry.chunks)
        self.store_entry(key, entry)

    def store_entry(self, key: str, entry: Entry) -> None:
        """Stores an entry, whose chunks have been stored, under a key that has been checked."""
        self.blobs.sync(entry.chunks)
        self.objects.write(key, encode(entry))

    def missing(self, digests: Iterable[str]) -> builtins.list[str]:
        """Those of the chunks that have to be sent before a file can be made of them."""
        return [digest for digest, suffix in self._found(digests).items() if suffix is None]

    def put_frames(self, frames: Iterable[Frame]) -> Iterator[Chunk]:
        """Stores chunks that come with their digests.

        Raises:
            InvalidInput: the bytes of one have another; those before it are stored.
        """
        return in_order(self._pool, self.objects.parallel, (partial(self.blobs.put_named, *frame) for frame in frames))

    def assemble(self, path: str, size: int, digest: str, chunks: Sequence[tuple[str, int]]) -> Entry:
        """Makes a file of chunks that are there.

        Args:
            path: where.
            size: of the file, in bytes.
            digest: its SHA-256, which whoever reads all of it checks.
            chunks: the SHA-256 and size of each, in order.

        Raises:
            InvalidInput: a digest is none, a chunk too large, or the sizes do not add up.
            MissingChunks: some are not there (any more).
        """
        key = file_key(path)
        check_digest(digest)
        check_chunks([Chunk(each, count) for each, count in chunks], size)
        found = self._found(each for each, _count in chunks)
        gone = sum(suffix is None for suffix in found.values())
        if gone:
            raise MissingChunks(f"{gone} chunks of {path!r} are not there; send them first")
        entry = Entry(size, digest, None, tuple(Chunk(each, count, found[each] or "") for each, count in chunks))
        self.store_entry(key, entry)
        return entry

    def entry(self, path: str) -> Entry:
        """What is stored under a path.

        Raises:
            NotFound: no such file.
            Corrupted: the stored entry is damaged.
        """
        stored = self.objects.read(_key(path))
        if stored is None:
            raise NotFound(f"No such artifact: '{path}'")
        try:
            return decode(stored)
        except InvalidInput as error:
            raise Corrupted(f"The artifact '{path}' is corrupt: {error.message}") from error

    def read(self, path: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes ``start`` to ``end`` (exclusive) of a file, in pieces of at most ``CHUNK_BYTES``.

        Raises:
            NotFound: no such file.
            Corrupted: its bytes are not what was written; before any of the damaged chunk is given.
        """
        return self.read_entry(path, self.entry(path), start, end)

    def read_entry(self, path: str, entry: Entry, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """As ``read``, of a version of the file that is known."""
        end = entry.size if end is None else min(end, entry.size)
        if entry.body is not None:
            yield from _pieces(memoryview(entry.body)[start:end])
            return
        whole = hashlib.sha256()
        wanted = list(_overlapping(entry.chunks, start, end))
        bodies = in_order(
            self._pool,
            self.objects.parallel // 2,
            (partial(self._chunk, path, chunk) for chunk, _first, _last in wanted),
        )
        for number, ((_chunk, first, last), body) in enumerate(zip(wanted, bodies, strict=True), 1):
            if (start, end) == (0, entry.size):
                whole.update(body)
                if number == len(wanted) and whole.hexdigest() != entry.sha256:
                    raise Corrupted(f"The artifact '{path}' is corrupt: its bytes have another SHA-256")
            yield from _pieces(memoryview(body)[first:last])

    def has(self, path: str) -> bool:
        """Whether there is a file."""
        return self.objects.info(_key(path)) is not None

    def size(self, path: str) -> int:
        """Size of a file in bytes.

        Raises:
            NotFound: no such file.
            Corrupted: the stored entry is damaged.
        """
        info = self.objects.info(_key(path))
        if info is None:
            raise NotFound(f"No such artifact: '{path}'")
        return self._header(info).size

    def list(self, path: str) -> builtins.list[ArtifactInfo]:
        """Direct children of a folder, by name; a file or nothing there gives an empty list."""
        key = _key(path)
        found = [child for child in self.objects.children(key) if key or child.name not in OWN]
        infos = [child.info for child in found if child.info is not None]
        sizes = {info.key: size for info, size in zip(infos, self._sizes(infos), strict=True)}
        entries = [
            ArtifactInfo(child.name, child.info is None, None if child.info is None else sizes[child.info.key])
            for child in found
        ]
        return sorted(entries, key=lambda entry: entry.path)

    def files(self, path: str) -> builtins.list[StoredFile]:
        """All files in a folder at any depth, by path; a file or nothing there gives an empty list."""
        folder = file_key(path)
        infos = sorted(self.objects.walk(folder), key=lambda info: info.key)
        return [
            StoredFile(info.key.removeprefix(f"{folder}/"), size, info.stamp)
            for info, size in zip(infos, self._sizes(infos), strict=True)
        ]

    def usage(self, path: str) -> tuple[int, int]:
        """``(files, bytes)`` of a file or of everything in a folder; zeros when nothing is there."""
        key = file_key(path)
        own = self.objects.info(key)
        infos = [own] if own is not None else list(self.objects.walk(key))
        return len(infos), sum(self._sizes(infos))

    def delete(self, path: str) -> None:
        """Removes a file or a folder with all in it; nothing there is fine. The collector frees their chunks."""
        self.objects.delete(file_key(path))

    def put_blob(self, body: bytes) -> str:
        """Stores bytes under their SHA-256 and returns it, in hex; storing them again costs one look."""
        return self.blobs.put_whole(body)

    def get_blob(self, digest: str) -> bytes:
        """The bytes of a blob, verified.

        Raises:
            NotFound: no such blob.
            Corrupted: the stored bytes have another digest.
        """
        return self.blobs.get_whole(digest)

    def check_writable(self) -> None:
        """Writes and removes a small object.

        Raises:
            StorageFull, Unavailable: the store is full, read-only or out of reach.
        """
        probe = f"{UPLOADS}/probe-{uuid.uuid4().hex}"
        self.objects.write(probe, b"probe")
        self.objects.delete(probe)

    def _found(self, digests: Iterable[str]) -> dict[str, str | None]:
        """The suffixes of blobs by digest, None for those that are not there."""
        wanted = list(dict.fromkeys(digests))
        return dict(zip(wanted, self._pool.map(self.blobs.find, wanted), strict=True))

    def _put_all(self, chunks: Iterable[memoryview]) -> Iterator[Chunk]:
        """Stores chunks, several at once."""
        return in_order(self._pool, self.objects.parallel, (partial(self.blobs.put, chunk) for chunk in chunks))

    def _require(self, chunks: Sequence[Chunk]) -> None:
        wanted = list(dict.fromkeys(chunks))
        for chunk, is_there in zip(wanted, self._pool.map(self.blobs.still_there, wanted), strict=True):
            if not is_there:
                raise MissingChunks(
                    f"the write took too long: blob {chunk.sha256} was collected meanwhile; write again"
                )

    def _chunk(self, path: str, chunk: Chunk) -> bytes:
        try:
            return self.blobs.read(chunk)
        except Corrupted as error:
            raise Corrupted(f"The artifact '{path}' is corrupt: {error.message}") from error

    def _sizes(self, infos: Sequence[ObjectInfo]) -> Iterator[int]:
        """Sizes of files, most of which a listing tells."""
        return self._pool.map(self._size, infos)

    def _size(self, info: ObjectInfo) -> int:
        if info.size <= HEADER_BYTES + SURE_BYTES:
            return max(0, info.size - HEADER_BYTES)
        try:
            return self._header(info).size
        except (Corrupted, NotFound):  # whoever reads the file is told
            return info.size

    def _header(self, info: ObjectInfo) -> Header:
        known = self._headers.get((info.key, info.stamp))
        if known is None:
            start = self.objects.read(info.key, 0, HEADER_BYTES)
            if start is None:
                raise NotFound(f"No such artifact: '{info.key}'")
            try:
                known = decode_header(start)
            except InvalidInput as error:
                raise Corrupted(f"The artifact '{info.key}' is corrupt: {error.message}") from error
            if len(self._headers) >= MAX_KNOWN_HEADERS:
                self._headers.clear()
            self._headers[info.key, info.stamp] = known
        return known


def _key(path: str) -> str:
    safe = safe_path(path)
    if safe.split("/", 1)[0] in OWN:
        raise InvalidInput(f"Invalid path {path[:200]!r}: '{safe.split('/', 1)[0]}' is reserved.")
    return safe


def file_key(path: str) -> str:
    """The path of a file in normal form.

    Raises:
        InvalidInput: it is not allowed, empty, or the store's own.
    """
    key = _key(path)
    if not key:
        raise InvalidInput("Invalid path '': a file needs a name.")
    return key


def _bounded(pieces: Iterable[bytes], limit: int) -> Iterator[bytes]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > limit:
            raise StorageFull(f"there is room for {limit} bytes more, and the file has more")
        yield piece


def _first_bytes(pieces: Iterator[bytes]) -> bytes:
    """All bytes when there are at most ``INLINE_BYTES``, else a few more."""
    start = bytearray()
    for piece in pieces:
        start += piece
        if len(start) > INLINE_BYTES:
            break
    return bytes(start)


def _pieces(body: memoryview) -> Iterator[bytes]:
    for start in range(0, len(body), CHUNK_BYTES):
        yield bytes(body[start : start + CHUNK_BYTES])


def _overlapping(chunks: Sequence[Chunk], start: int, end: int) -> Iterator[tuple[Chunk, int, int]]:
    """The chunks of a range, each with where in it the range begins and ends."""
    offset = 0
    for chunk in chunks:
        first, last = max(0, start - offset), min(chunk.size, end - offset)
        if first < last:
            yield chunk, first, last
        offset += chunk.size
