"""What uploads found out about files on this machine, so that a file that was not touched since is not read again.

A file counts as untouched while device, inode, size, and the times of the last write and the last change of its inode
are the same; the latter nobody can set. As in git's index, a file that was written a moment ago is not trusted, since
clocks of file systems are coarse. What is known is kept with a digest: disks forget, and SQLite would not notice.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path

import msgspec

from mlplat.artifacts.digests import sha256

#: More files than this: those that were added first are forgotten.
MAX_FILES = 100_000
#: Files that were this young when they were read, in seconds, may have changed without any of their facts changing.
MIN_AGE_S = 2.0
BUSY_TIMEOUT_S = 1.0
_SEAL_BYTES = 64
_SCHEMA = """
CREATE TABLE IF NOT EXISTS file (
  number INTEGER PRIMARY KEY AUTOINCREMENT, identity TEXT UNIQUE NOT NULL, facts TEXT NOT NULL, found BLOB NOT NULL
)
"""


class KnownFile(msgspec.Struct, frozen=True):
    """A file's size in bytes, its SHA-256, and SHA-256 and size of its chunks; small files have none."""

    size: int
    sha256: str
    chunks: list[tuple[str, int]]


class KnownFiles:
    """A database in ``folder``, shared by all processes. It is a cache: when it cannot be used, nothing is known."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "files.sqlite"
        self._lock = threading.Lock()

    def find(self, status: os.stat_result) -> KnownFile | None:
        """What is known of the file with this status."""
        key = _identity(status), _facts(status)
        with suppress(sqlite3.Error, OSError, msgspec.DecodeError), self._lock, closing(self._open()) as database:
            row = database.execute("SELECT found FROM file WHERE identity = ? AND facts = ?", key).fetchone()
            if row is not None and isinstance(row[0], bytes) and row[0] == _sealed(*key, row[0][_SEAL_BYTES:]):
                return msgspec.json.decode(row[0][_SEAL_BYTES:], type=KnownFile)
        return None

    def add(self, status: os.stat_result, found: KnownFile, began_s: float) -> None:
        """Remembers a file, the reading of which began at ``began_s`` (s since 1970)."""
        if began_s - max(status.st_mtime, status.st_ctime) < MIN_AGE_S:
            return
        key = _identity(status), _facts(status)
        with suppress(sqlite3.Error, OSError), self._lock, closing(self._open()) as database, database:
            database.execute(
                "REPLACE INTO file (identity, facts, found) VALUES (?, ?, ?)",
                (*key, _sealed(*key, msgspec.json.encode(found))),
            )
            database.execute("DELETE FROM file WHERE number <= (SELECT max(number) FROM file) - ?", (MAX_FILES,))

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S)
        database.execute(_SCHEMA)
        return database


def _identity(status: os.stat_result) -> str:
    return f"{status.st_dev}.{status.st_ino}"


def _facts(status: os.stat_result) -> str:
    return f"{status.st_size}.{status.st_mtime_ns}.{status.st_ctime_ns}"


def _sealed(identity: str, facts: str, body: bytes) -> bytes:
    return sha256(f"{identity} {facts} ".encode() + body).encode() + body
