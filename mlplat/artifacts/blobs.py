"""Blobs: immutable bytes named by their SHA-256.

A blob lies under its digest, with a suffix when it is compressed (``.zst``), and with a generation (``.1``, ``.2`` …)
when an earlier one was condemned. The collector condemns blobs that nothing refers to, publishes their keys, waits
out the grace period, and removes those that still nothing refers to. What keeps it from removing a blob that somebody
is about to refer to, without any lock:

- A condemned key is never referred to anew: who stores the same bytes meanwhile writes the next generation.
- Who refers to a blob has looked at the condemned keys less than ``MAX_LOOK_AGE_S`` plus the time of one write ago;
  long writes look again before they are visible (``still_there``). That is far less than the grace period.

So when the collector, a grace period after it condemned a key, looks for references to it, it sees all that there
will ever be.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable

import msgspec

from mlplat.artifacts.chunking import pack, unpack
from mlplat.artifacts.entry import Chunk, check_digest
from mlplat.artifacts.layout import BLOBS, CONDEMNED_KEY, PACKED
from mlplat.artifacts.objects import Objects
from mlplat.errors import Corrupted, InvalidInput, NotFound, Overloaded

#: How old what this process knows about condemned blobs may be.
MAX_LOOK_AGE_S = 30.0
#: Suffixes of the generations. A third is needed only when two are condemned at once.
GENERATIONS = ("", ".1", ".2", ".3")


class Condemned(msgspec.Struct, frozen=True):
    """Keys of blobs that are to go, with the time (s since 1970) since when that is known to all."""

    keys: dict[str, float] = {}


class Blobs:
    """The blobs of a store. Thread-safe; methods block."""

    def __init__(self, objects: Objects, max_look_age_s: float = MAX_LOOK_AGE_S) -> None:
        self._objects = objects
        self._max_look_age_s = max_look_age_s
        self._lock = threading.Lock()
        self._condemned = Condemned()
        self._stamp = ""
        self._looked_at = float("-inf")

    def put(self, body: bytes | memoryview) -> Chunk:
        """Stores bytes, compressed when that pays; storing them again costs a look. See ``sync``."""
        digest = hashlib.sha256(body).hexdigest()
        found = self._find(digest) if self._objects.is_near else None
        if found is not None:
            return Chunk(digest, len(body), found)
        packed = pack(body)
        suffix = self._write(digest, PACKED if packed is not None else "", body if packed is None else packed)
        return Chunk(digest, len(body), suffix)

    def put_named(self, digest: str, size: int, stored: bytes | memoryview) -> Chunk:
        """Stores ``size`` bytes that come with their digest, compressed when fewer bytes come. See ``sync``.

        Raises:
            InvalidInput: they do not have that size and digest.
        """
        is_packed = len(stored) != size
        body = unpack(stored, size) if is_packed else stored
        if hashlib.sha256(body).hexdigest() != check_digest(digest):
            raise InvalidInput(f"the {size} bytes do not have the SHA-256 {digest}")
        found = self._find(digest) if self._objects.is_near else None
        if found is None:
            found = self._write(digest, PACKED if is_packed else "", stored)
        return Chunk(digest, size, found)

    def adopt(self, digest: str, copy: Callable[[str], bool]) -> bool:
        """Has ``copy`` write the bytes with this SHA-256, uncompressed, to the key that it gets; what it returns."""
        condemned = self._look().keys
        for generation in GENERATIONS:
            key = key_of(check_digest(digest), generation)
            if key not in condemned:
                return copy(key)
        raise _too_often(digest)

    def find(self, digest: str) -> str | None:
        """The suffix of a blob that may be referred to, None when there is none."""
        return self._find(check_digest(digest))

    def sync(self, chunks: Iterable[Chunk]) -> None:
        """The blobs of chunks, by whatever process they were stored, are durable when this returns."""
        self._objects.sync(key_of(chunk.sha256, chunk.suffix) for chunk in chunks)

    def still_there(self, chunk: Chunk) -> bool:
        """Whether the blob of a chunk is there and may be referred to."""
        key = key_of(chunk.sha256, chunk.suffix)
        return key not in self._look().keys and self._objects.info(key) is not None

    def read(self, chunk: Chunk) -> bytes:
        """The bytes of a chunk, verified.

        Raises:
            Corrupted: its blob is gone, or has other bytes or another size.
        """
        key = key_of(chunk.sha256, chunk.suffix)
        stored = self._objects.read(key)
        if stored is None:
            raise Corrupted(f"blob {chunk.sha256} is gone")
        try:
            body = unpack(stored, chunk.size) if PACKED in chunk.suffix else stored
        except InvalidInput as error:
            raise _corrupt(chunk.sha256) from error
        if hashlib.sha256(body).hexdigest() != chunk.sha256:
            raise _corrupt(chunk.sha256)
        if len(body) != chunk.size:  # whoever made the file said so
            raise Corrupted(f"blob {chunk.sha256} has {len(body)} bytes, not {chunk.size}")
        return body

    def put_whole(self, body: bytes) -> str:
        """Stores bytes that are referred to by their digest alone, which is returned; they stay uncompressed."""
        digest = hashlib.sha256(body).hexdigest()
        found = self._find(digest, packed=False)
        if found is None:
            found = self._write(digest, "", body)
        self._objects.sync([key_of(digest, found)])
        return digest

    def get_whole(self, digest: str) -> bytes:
        """What ``put_whole`` stored, verified.

        Raises:
            NotFound: no such blob.
            Corrupted: the stored bytes have another digest.
        """
        check_digest(digest)
        for generation in GENERATIONS:
            stored = self._objects.read(key_of(digest, generation))
            if stored is not None:
                if hashlib.sha256(stored).hexdigest() != digest:
                    raise _corrupt(digest)
                return stored
        raise NotFound(f"No such blob: {digest}")

    def _find(self, digest: str, *, packed: bool = True) -> str | None:
        condemned = self._look().keys
        for generation in GENERATIONS:
            suffixes = [generation, *([PACKED + generation] if packed else [])]
            free = [suffix for suffix in suffixes if key_of(digest, suffix) not in condemned]
            for suffix in free:
                if self._objects.info(key_of(digest, suffix)) is not None:
                    return suffix
            if len(free) == len(suffixes):
                return None
        return None

    def _write(self, digest: str, suffix: str, body: bytes | memoryview) -> str:
        condemned = self._look().keys
        for generation in GENERATIONS:
            key = key_of(digest, suffix + generation)
            if key not in condemned:
                digest_sent = None if PACKED in suffix else digest
                self._objects.write(key, body, only_new=True, sha256=digest_sent, named_later=True)
                return suffix + generation
        raise _too_often(digest)

    def _look(self) -> Condemned:
        """The condemned blobs, as they were a short while ago at most."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked_at >= self._max_look_age_s:
                info = self._objects.info(CONDEMNED_KEY)
                if info is None:
                    self._condemned, self._stamp = Condemned(), ""
                elif info.stamp != self._stamp:
                    self._condemned, self._stamp = read_condemned(self._objects), info.stamp
                self._looked_at = now
            return self._condemned


def read_condemned(objects: Objects) -> Condemned:
    """The blobs that are condemned now.

    Raises:
        Corrupted: nobody can tell.
    """
    stored = objects.read(CONDEMNED_KEY)
    try:
        return Condemned() if stored is None else msgspec.json.decode(stored, type=Condemned)
    except msgspec.DecodeError as error:
        raise Corrupted(f"{CONDEMNED_KEY} in the artifact store is damaged; remove it") from error


def blob_folders() -> list[str]:
    """Where blobs lie."""
    return [f"{BLOBS}/{number:02x}" for number in range(256)]


def key_of(digest: str, suffix: str = "") -> str:
    """Where a blob lies."""
    return f"{BLOBS}/{digest[:2]}/{digest}{suffix}"


def _corrupt(digest: str) -> Corrupted:
    return Corrupted(f"blob {digest} is corrupt: its bytes have another SHA-256")


def _too_often(digest: str) -> Overloaded:
    return Overloaded(f"blob {digest} was condemned {len(GENERATIONS)} times; the collector has to finish first")
