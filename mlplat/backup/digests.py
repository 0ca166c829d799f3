"""The digests of artifacts' bytes, which may be compressed."""

from __future__ import annotations

import hashlib
import io
from typing import IO

import pyarrow as pa

from mlplat.backup.model import Artifact, blob_name
from mlplat.backup.tree import CHUNK_BYTES, Writer

#: Stands for the digest of bytes that cannot be decompressed.
NONE = ""


def expected(artifact: Artifact) -> str:
    """The SHA-256 that its bytes must have, in hex; of a compressed blob what comes out of it must have that."""
    if artifact.sha256 is not None:
        return artifact.sha256
    name = blob_name(artifact.key)
    assert name is not None, artifact.key
    return name.sha256


def actual(source: IO[bytes], artifact: Artifact, sink: Writer | None = None) -> tuple[int, str]:
    """Bytes and SHA-256 of what there is, which is also written to ``sink``."""
    tee = _Tee(source, sink)
    name = blob_name(artifact.key) if artifact.sha256 is None else None
    if name is None or not name.compressed:
        return tee.drain(), tee.sha256
    digest = hashlib.sha256()
    try:
        with pa.input_stream(tee, compression="zstd") as body:
            while chunk := body.read(CHUNK_BYTES):
                digest.update(chunk)
    except (OSError, pa.ArrowException):
        if tee.error is not None:
            raise
        return tee.count, NONE
    return tee.drain(), digest.hexdigest()


class _Tee(io.RawIOBase):
    """Reads, and writes what it reads somewhere else. ``error`` is what reading or writing raised."""

    def __init__(self, source: IO[bytes], sink: Writer | None) -> None:
        super().__init__()
        self._source, self._sink = source, sink
        self._hash = hashlib.sha256()
        self.count = 0
        self.error: Exception | None = None

    def readable(self) -> bool:
        """Yes."""
        return True

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes."""
        try:
            chunk = self._source.read(size)
            if self._sink is not None:
                self._sink.write(chunk)
        except Exception as error:
            self.error = error
            raise
        self._hash.update(chunk)
        self.count += len(chunk)
        return chunk

    def drain(self) -> int:
        """Reads to the end; how much there was in all."""
        if not self.closed:
            while self.read(CHUNK_BYTES):
                pass
        return self.count

    def close(self) -> None:
        """Stays open: what reads it does not own it."""

    @property
    def sha256(self) -> str:
        """Of what was read, in hex."""
        return self._hash.hexdigest()
