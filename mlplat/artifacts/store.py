"""Files by path and blobs by digest, over fsspec.

Contract: a write is visible only when it is complete, and replaces what was there. On a local
folder it is fsynced before it appears. Every path is checked by ``safe_path``. Methods block.
"""

from __future__ import annotations

import builtins
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mlplat.artifacts.model import ArtifactInfo, safe_path
from mlplat.errors import InvalidInput, NotFound

CHUNK_BYTES = 1024 * 1024
SINGLE_PUT_BYTES = 8 * 1024 * 1024
_BLOBS = ".blobs"
_UPLOADS = ".uploads"
_RESERVED = (_BLOBS, _UPLOADS)


@dataclass(frozen=True)
class StoredFile:
    """A file; ``path`` is relative to the folder that was asked for, ``stamp`` changes whenever it is written."""

    path: str
    size: int
    stamp: str


class ArtifactStore:
    """A folder (``file:///…``) or a bucket (``s3://…``). Thread-safe."""

    def __init__(self, url: str) -> None:
        self._fs: Any
        # Listings of a bucket are never cached: other processes write to it too.
        self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self._root = root.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    def write(self, path: str, chunks: Iterable[bytes]) -> int:
        """Stores a file and returns its size in bytes.

        Raises:
            InvalidInput: the path is not allowed, or something else than a file is there.
        """
        return self._write(self._file_path(path), chunks)

    def read(self, path: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes ``start`` to ``end`` (exclusive) of a file, in chunks.

        Raises:
            NotFound: no such file.
        """
        full = self._full(path)
        if not self._fs.isfile(full):
            raise NotFound(f"No such artifact: '{path}'")
        return self._read_chunks(full, start, end)

    def size(self, path: str) -> int:
        """Size of a file in bytes.

        Raises:
            NotFound: no such file.
        """
        full = self._full(path)
        if not self._fs.isfile(full):
            raise NotFound(f"No such artifact: '{path}'")
        return int(self._fs.size(full))

    def list(self, path: str) -> list[ArtifactInfo]:
        """Direct children of a folder, by name; a file or nothing there gives an empty list."""
        full = self._full(path)
        if not self._fs.isdir(full):
            return []
        entries = self._fs.ls(full, detail=True, refresh=True)
        found = [
            ArtifactInfo(name, entry["type"] == "directory", None if entry["type"] == "directory" else entry["size"])
            for entry in entries
            if (name := entry["name"].rstrip("/").rpartition("/")[2]) not in _RESERVED
        ]
        return sorted(found, key=lambda info: info.path)

    def files(self, path: str) -> builtins.list[StoredFile]:
        """All files in a folder at any depth, by path; a file or nothing there gives an empty list."""
        full = self._file_path(path)
        found = self._fs.find(full, detail=True).items()
        inside = ((name.removeprefix(f"{full}/"), entry) for name, entry in found if name.startswith(f"{full}/"))
        return [StoredFile(name, entry["size"], self._stamp(entry)) for name, entry in sorted(inside)]

    def usage(self, path: str) -> tuple[int, int]:
        """``(files, bytes)`` of a file or of everything in a folder; zeros when nothing is there."""
        sizes = [entry["size"] for entry in self._fs.find(self._file_path(path), detail=True).values()]
        return len(sizes), sum(sizes)

    def delete(self, path: str) -> None:
        """Removes a file or a folder with all in it; nothing there is fine."""
        full = self._file_path(path)
        if self._local:
            target = Path(full)
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            return
        for key in self._fs.find(full):  # fsspec's rm would take the path for a pattern
            self._fs.rm_file(key)

    def put_blob(self, body: bytes) -> str:
        """Stores bytes under their SHA-256 and returns it, in hex; storing them again costs one look."""
        digest = hashlib.sha256(body).hexdigest()
        full = self._blob_path(digest)
        if not self._fs.exists(full):
            self._write(full, [body])
        return digest

    def get_blob(self, digest: str) -> bytes:
        """The bytes of a blob, verified.

        Raises:
            NotFound: no such blob.
            InvalidInput: the stored bytes have another digest.
        """
        full = self._blob_path(digest)
        if not self._fs.exists(full):
            raise NotFound(f"No such blob: {digest}")
        body = b"".join(self._read_chunks(full, 0, None))
        if hashlib.sha256(body).hexdigest() != digest:
            raise InvalidInput(f"blob {digest} is corrupt: its bytes have another SHA-256")
        return body

    def check_writable(self) -> None:
        """Writes and removes a small file.

        Raises:
            OSError: the store is full, read-only or out of reach.
        """
        probe = f"{self._root}/{_UPLOADS}/probe-{uuid.uuid4().hex}"
        self._write(probe, [b"probe"])
        self._fs.rm(probe)

    def _full(self, path: str) -> str:
        safe = safe_path(path)
        if safe.split("/", 1)[0] in _RESERVED:
            raise InvalidInput(f"Invalid path {path[:200]!r}: '{safe.split('/', 1)[0]}' is reserved.")
        full = f"{self._root}/{safe}" if safe else self._root
        if self._local and not Path(full).resolve().is_relative_to(Path(self._root).resolve()):
            raise InvalidInput(f"Invalid path {path[:200]!r}: a link leads out of the store.")
        return full

    def _file_path(self, path: str) -> str:
        full = self._full(path)
        if full == self._root:
            raise InvalidInput("Invalid path '': a file needs a name.")
        return full

    def _blob_path(self, digest: str) -> str:
        if len(digest) != 64 or not all(character in "0123456789abcdef" for character in digest):
            raise InvalidInput(f"not a SHA-256 in hex: {digest[:80]!r}")
        return f"{self._root}/{_BLOBS}/{digest[:2]}/{digest}"

    def _write(self, full: str, chunks: Iterable[bytes]) -> int:
        if self._local:
            return self._write_local(Path(full), chunks)
        return self._write_object(full, iter(chunks))

    def _stamp(self, entry: Mapping[str, Any]) -> str:
        """On a disk the inode and the time of its last change, which nobody can set; in a bucket what that tells."""
        if self._local:
            try:
                status = Path(entry["name"]).stat()
            except FileNotFoundError:
                return "gone"
            return f"{status.st_ino}.{status.st_ctime_ns}"
        return f"{entry.get('ETag', '')}.{entry.get('LastModified', '')}"

    def _write_object(self, full: str, chunks: Iterator[bytes]) -> int:
        """One PUT for what is small, a multipart upload for the rest: either appears when it is complete."""
        first, size = [], 0
        for chunk in chunks:
            first.append(chunk)
            size += len(chunk)
            if size > SINGLE_PUT_BYTES:
                break
        else:
            self._fs.pipe_file(full, b"".join(first))
            return size
        target = self._fs.open(full, "wb", autocommit=False)
        try:
            for chunk in first:
                target.write(chunk)
            for chunk in chunks:
                size += target.write(chunk)
            target.close()
        except BaseException:
            target.discard()
            raise
        target.commit()
        return size

    def _write_local(self, target: Path, chunks: Iterable[bytes]) -> int:
        uploads = Path(self._root) / _UPLOADS
        uploads.mkdir(parents=True, exist_ok=True)
        partial = uploads / uuid.uuid4().hex
        size = 0
        try:
            with partial.open("wb") as out:
                for chunk in chunks:
                    size += out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(target)
        except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
            raise InvalidInput(f"a file and a folder cannot have the same path: {target.name!r}") from error
        finally:
            partial.unlink(missing_ok=True)
        return size

    def _read_chunks(self, full: str, start: int, end: int | None) -> Iterator[bytes]:
        with self._fs.open(full, "rb") as source:
            source.seek(start)
            left = None if end is None else max(0, end - start)
            while left is None or left > 0:
                chunk = source.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left))
                if not chunk:
                    return
                left = None if left is None else left - len(chunk)
                yield chunk
