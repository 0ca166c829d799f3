"""Files by key below a folder or in a bucket, over fsspec: where backups lie, and what they are made of.

A file appears when it is complete. On a disk it is on the platter by then, and its name after ``settle``.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError
from fsspec.implementations.local import LocalFileSystem

from mlplat.artifacts.bucket import open_filesystem
from mlplat.backup.model import is_key
from mlplat.durable import sync_folder
from mlplat.errors import InvalidInput, Unavailable

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Missing(Exception):
    """There is no such file in a tree."""


CHUNK_BYTES = 1024 * 1024
#: Nobody writes one file for so long.
LEFT_OVER_S = 24 * 3600


class Writer(io.RawIOBase):
    """Writes through and remembers how much it was, and the SHA-256."""

    def __init__(self, target: IO[bytes]) -> None:
        super().__init__()
        self._target = target
        self._hash = hashlib.sha256()
        self.bytes = 0

    def writable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """How much was written."""
        return self.bytes

    def write(self, data: Buffer, /) -> int:
        """All of it."""
        view = memoryview(data)
        self._hash.update(view)
        self._target.write(view)
        self.bytes += view.nbytes
        return view.nbytes

    @property
    def sha256(self) -> str:
        """Of what was written so far, in hex."""
        return self._hash.hexdigest()


class Tree:
    """Thread-safe, but for ``settle``.

    Args:
        url: ``file:///…``, ``s3://…``.
        scratch: where a disk's files are until they are complete; not among the keys.
        private: folders that it makes are closed to other users.
    """

    def __init__(self, url: str, *, scratch: str, private: bool = False) -> None:
        self.url = url
        self._fs: Any
        self._fs, self._root = open_filesystem(url)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._scratch = scratch.strip("/")
        self._mode = 0o700 if private else 0o777
        self._changed: set[Path] = set()
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path | None:
        """Where it is on this machine's disks; None: elsewhere."""
        return Path(self._root) if self._local else None

    def children(self) -> list[str]:
        """Names of files and folders at the top, sorted."""
        if not self._fs.isdir(self._root):
            return []
        entries = self._fs.ls(self._root, detail=False, refresh=True)
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in entries)

    def sizes(self, below: str = "") -> dict[str, int]:
        """All keys below a folder, with their bytes."""
        start = f"{self._root}/{below}".rstrip("/")
        found = self._fs.find(start, detail=True) if self._fs.isdir(start) else {}
        keys = {name.removeprefix(f"{self._root}/"): int(entry["size"]) for name, entry in found.items()}
        return {key: size for key, size in keys.items() if not key.startswith(f"{self._scratch}/")}

    def is_empty(self) -> bool:
        """Whether there is no key."""
        if not self._fs.isdir(self._root):
            return True
        for folder, _folders, files in self._fs.walk(self._root):
            if any(not f"{folder.rstrip('/')}/{name}".startswith(f"{self._root}/{self._scratch}/") for name in files):
                return False
        return True

    def open(self, key: str) -> IO[bytes]:
        """For reading.

        Raises:
            Missing: no such file.
        """
        try:
            opened: IO[bytes] = self._fs.open(self._full(key), "rb")
        except FileNotFoundError as error:
            raise Missing(key) from error
        return opened

    def read(self, key: str) -> Iterator[bytes]:
        """Its bytes in chunks; see ``open``."""
        with self.open(key) as source:
            while chunk := source.read(CHUNK_BYTES):
                yield chunk

    def read_small(self, key: str, limit: int) -> bytes:
        """All bytes of a file that may have so many.

        Raises:
            InvalidInput: it has more.
            Missing: no such file.
        """
        with self.open(key) as source:
            body = source.read(limit + 1)
        if len(body) > limit:
            raise InvalidInput(f"{key} has more than {limit} bytes")
        return body

    @contextmanager
    def writing(self, key: str) -> Iterator[Writer]:
        """Replaces a file when the block ends without an error."""
        full = self._full(key)
        if self._local:
            with self._writing_local(Path(full)) as writer:
                yield writer
            return
        target = self._fs.open(full, "wb", autocommit=False)
        try:
            yield Writer(target)
            target.close()
        except BaseException:
            target.discard()
            raise
        target.commit()

    def delete(self, key: str) -> None:
        """Removes a file."""
        self._fs.rm_file(self._full(key))

    def clear_scratch(self) -> None:
        """Removes what writers that were killed a day ago or earlier have left."""
        scratch = Path(self._root) / self._scratch
        if self._local and scratch.is_dir():
            for partial in scratch.iterdir():
                with suppress(FileNotFoundError):
                    if time.time() - partial.stat().st_mtime > LEFT_OVER_S:
                        partial.unlink()

    def settle(self) -> None:
        """Returns when the names of all files that were written are on disk, too."""
        changed, self._changed = self._changed, set()
        root = Path(self._root)
        above = {parent for folder in changed for parent in folder.parents if parent.is_relative_to(root)}
        for folder in changed | above | {root.parent}:
            if self._local and folder.is_dir():
                sync_folder(folder)

    def _full(self, key: str) -> str:
        if not is_key(key):
            raise InvalidInput(f"{key[:200]!r} does not name a file below {self.url}")
        return f"{self._root}/{key}"

    @contextmanager
    def _writing_local(self, target: Path) -> Iterator[Writer]:
        scratch = Path(self._root) / self._scratch
        self._make(scratch)
        partial = scratch / uuid.uuid4().hex
        try:
            with partial.open("wb") as out:
                yield Writer(out)
                out.flush()
                os.fsync(out.fileno())
            self._make(target.parent)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        with self._lock:
            self._changed.add(target.parent)

    def _make(self, folder: Path) -> None:
        missing: builtins.list[Path] = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for each in reversed(missing):
            each.mkdir(mode=self._mode, exist_ok=True)


@contextmanager
def plain_errors(url: str) -> Iterator[None]:
    """What goes wrong with a disk or a bucket, in one line.

    Raises:
        Unavailable: it did.
    """
    try:
        yield
    except Missing as error:
        raise Unavailable(f"{url}: {error} has disappeared") from error
    except (OSError, BotoCoreError, ClientError) as error:
        # s3fs' errors have no text, what they were made of has.
        cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error
        told = getattr(error, "strerror", None) or str(cause) or type(error).__name__
        place = getattr(error, "filename", None) or url
        raise Unavailable(f"{place}: {str(told).splitlines()[0]}") from error
