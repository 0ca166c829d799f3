"""Chunks that clients send straight to the bucket, and fetch from there.

They arrive beside the blobs. Before one becomes a blob, its bytes are known to be right: the server says that it has
checked their SHA-256, or they are read. So nobody can give a blob bytes that it should not have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from mlplat.artifacts.blobs import key_of
from mlplat.artifacts.bucket import Bucket
from mlplat.artifacts.chunking import MAX_CHUNK_BYTES
from mlplat.artifacts.entry import Entry
from mlplat.artifacts.layout import UPLOADS
from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput, NotFound

PARALLEL = 8


class DirectTransfers:
    """URLs into a store's bucket; there are none when the store has no bucket, or clients do not reach it."""

    def __init__(self, store: ArtifactStore, *, allowed: bool) -> None:
        self._store = store
        self._bucket = store.objects if allowed and isinstance(store.objects, Bucket) else None
        self._pool = ThreadPoolExecutor(PARALLEL, "direct")

    @property
    def are_possible(self) -> bool:
        """Whether there are URLs."""
        return self._bucket is not None

    def urls_to_write(self, digests: Sequence[str]) -> dict[str, str]:
        """Where to send chunks, by their SHA-256; ``accept`` makes blobs of what was sent."""
        bucket = self._bucket
        return {} if bucket is None else {each: bucket.url_to_write(_staged(each), each) for each in digests}

    def urls_to_read(self, entry: Entry) -> list[str]:
        """Where to fetch the chunks of a file, in order; those whose URL ends before ``?`` with ``.zst`` are packed."""
        bucket = self._bucket
        if bucket is None:
            return []
        return [bucket.url_to_read(key_of(chunk.sha256, chunk.suffix)) for chunk in entry.chunks]

    def accept(self, chunks: Sequence[tuple[str, int]]) -> None:
        """Makes blobs of chunks, SHA-256 and size of each, that were sent; blocks.

        Raises:
            InvalidInput: other bytes were sent; they are removed. Or the chunk is larger than chunks are.
            NotFound: nothing was sent, or that was accepted before.
        """
        list(self._pool.map(self._accept, chunks))

    def _accept(self, chunk: tuple[str, int]) -> None:
        digest, size = chunk
        bucket = self._bucket
        if bucket is None:
            raise InvalidInput("this platform's files do not go straight to a bucket")
        if not 0 < size <= MAX_CHUNK_BYTES:
            raise InvalidInput(f"a chunk with {size} bytes; chunks have at most {MAX_CHUNK_BYTES} bytes")
        staged = _staged(digest)
        is_sound = bucket.checked_size(staged, digest) == size
        if not (is_sound and self._store.blobs.adopt(digest, lambda key: bucket.copy(staged, key))):
            body = bucket.read(staged, 0, size + 1)
            if body is None:
                if self._store.blobs.find(digest) is not None:  # somebody else was faster
                    return
                raise NotFound(f"No bytes of chunk {digest} were sent")
            if len(body) != size or hashlib.sha256(body).hexdigest() != digest:
                bucket.delete(staged)
                raise InvalidInput(f"other bytes than those of chunk {digest} were sent")
            self._store.blobs.put_named(digest, size, body)
        bucket.delete(staged)


def _staged(digest: str) -> str:
    return f"{UPLOADS}/{digest}"
