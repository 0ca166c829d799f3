"""Objects as files of a local folder."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlplat.artifacts.layout import OWN, UPLOADS
from mlplat.artifacts.objects import Child, ObjectInfo
from mlplat.durable import sync_folder
from mlplat.errors import InvalidInput, StorageFull, Unavailable

#: A folder that is deleted while it is written, or the other way round, is tried again so often.
MAX_ROUNDS = 100
#: What deleting meets when somebody else writes or deletes in the same folder; rmtree has an error without a number.
_MEANWHILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, None}


class Folder:
    """Objects as files of a local folder. A link that leads out of it is never followed."""

    is_near = True
    chunk_bytes = 1024 * 1024
    parallel = 4

    def __init__(self, root: str) -> None:
        self._root = root.rstrip("/")
        self._real_root = os.path.realpath(self._root)

    @property
    def root(self) -> str:
        """The folder's path."""
        return self._root

    def make_folders(self, folders: Iterable[str]) -> None:
        """See ``Objects``."""
        with _errors_told(self._root):
            made = [Path(self._path(folder)) for folder in folders]
            parents = {folder.parent for folder in made}
            for parent in parents:
                _make_folder(parent)
            for folder in made:
                folder.mkdir(exist_ok=True)
            for parent in parents:
                sync_folder(parent)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes | None:
        """See ``Objects``."""
        path = Path(self._path(key))
        try:
            with _errors_told(self._root), path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                stop = size if end is None else min(end, size)
                if start:
                    file.seek(start)
                return _read_exactly(file, max(0, stop - start))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def write(
        self,
        key: str,
        body: bytes | memoryview,
        *,
        only_new: bool = False,
        sha256: str | None = None,
        named_later: bool = False,
    ) -> bool:
        """See ``Objects``."""
        del sha256  # nothing on the way could change the body
        target = Path(self._path(key))
        partial = Path(self._root, UPLOADS, uuid.uuid4().hex)
        try:
            with _errors_told(self._root):
                _write_durably(partial, body)
                _put(partial, target, only_new)
                if not named_later:
                    with suppress(FileNotFoundError):  # deleted already
                        sync_folder(target.parent)
        except FileExistsError as error:
            if only_new and target.is_file():
                return False
            raise _same_path(key) from error
        except (IsADirectoryError, NotADirectoryError) as error:
            raise _same_path(key) from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        return True

    def sync(self, keys: Iterable[str]) -> None:
        """See ``Objects``."""
        with _errors_told(self._root):
            for folder in {key.rpartition("/")[0] for key in keys}:
                with suppress(FileNotFoundError):
                    sync_folder(Path(self._root, folder))

    def info(self, key: str) -> ObjectInfo | None:
        """See ``Objects``."""
        path = self._path(key)
        with _errors_told(self._root):
            return self._info(key, path) if Path(path).is_file() else None

    def children(self, folder: str) -> list[Child]:
        """See ``Objects``."""
        path = self._path(folder)
        try:
            with _errors_told(self._root), os.scandir(path) as entries:
                found = [self._child(folder, entry) for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [child for child in found if child is not None]

    def walk(self, folder: str) -> Iterator[ObjectInfo]:
        """See ``Objects``."""
        for path, _folders, names in os.walk(self._path(folder), onerror=self._unless_gone):
            for name in names:
                full = os.path.join(path, name)  # noqa: PTH118 - a Path for each of a million files is slow
                info = self._info(full[len(self._root) + 1 :], full)
                if info is not None:
                    yield info

    def delete(self, key: str) -> None:
        """See ``Objects``."""
        target = Path(self._path(key))
        with _errors_told(self._root):
            for _ in range(MAX_ROUNDS):
                try:
                    if target.is_dir() and not target.is_symlink():
                        shutil.rmtree(target)
                    elif os.path.lexists(target):
                        target.unlink()
                    return
                except OSError as error:
                    if error.errno not in _MEANWHILE:
                        raise
        raise Unavailable(f"{key!r} is written as fast as it is deleted")

    def _child(self, folder: str, entry: os.DirEntry[str]) -> Child | None:
        if entry.is_dir():
            return Child(entry.name, None)
        info = self._info(f"{folder}/{entry.name}" if folder else entry.name, entry.path)
        return None if info is None else Child(entry.name, info)

    def _unless_gone(self, error: OSError) -> None:
        """What cannot be listed must not look empty: all that is not found is removed one day."""
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            with _errors_told(self._root):
                raise error

    @staticmethod
    def _info(key: str, path: str) -> ObjectInfo | None:
        try:
            status = os.stat(path)  # noqa: PTH116 - as above
        except FileNotFoundError:  # gone meanwhile, or a link to nowhere
            return None
        # Inode and change time cannot be set by anybody.
        return ObjectInfo(key, status.st_size, status.st_mtime, f"{status.st_ino}.{status.st_ctime_ns}")

    def _path(self, key: str) -> str:
        path = f"{self._root}/{key}" if key else self._root
        # What the store keeps for itself has names that it made itself.
        if key.partition("/")[0] in OWN or os.path.realpath(path).startswith(f"{self._real_root}/") or not key:
            return path
        raise InvalidInput(f"Invalid path {key[:200]!r}: a link leads out of the store.")


def _put(partial: Path, target: Path, only_new: bool) -> None:
    for _ in range(MAX_ROUNDS):
        try:
            if only_new:
                target.hardlink_to(partial)
            else:
                partial.replace(target)
        except FileNotFoundError:  # there is no such folder yet, or somebody deletes it
            with suppress(FileNotFoundError):
                _make_folder(target.parent)
        else:
            return
    raise Unavailable(f"{target.parent.name!r} is deleted as fast as it is written")


def _same_path(key: str) -> InvalidInput:
    return InvalidInput(f"a file and a folder cannot have the same path: {key.rpartition('/')[2]!r}")


@contextmanager
def _errors_told(root: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageFull(
                f"no room for artifacts: the disk of {root} is full. Free some, or delete and purge runs."
            ) from error
        if error.errno in {errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE}:
            raise Unavailable(f"the disk of {root} cannot be used: {error.strerror}") from error
        raise


def _read_exactly(file: Any, count: int) -> bytes:
    """Any: an unbuffered binary file; one read may give less than was asked for."""
    body: bytes = file.read(count)
    if len(body) == count:
        return body
    parts = [body]
    while body and sum(map(len, parts)) < count:
        body = file.read(count - sum(map(len, parts)))
        parts.append(body)
    return b"".join(parts)


def _write_durably(path: Path, body: bytes | memoryview) -> None:
    try:
        file = path.open("xb", buffering=0)
    except FileNotFoundError:
        _make_folder(path.parent)
        file = path.open("xb", buffering=0)
    with file:
        left = memoryview(body)
        while left:
            left = left[file.write(left) :]
        os.fdatasync(file.fileno())


def _make_folder(folder: Path) -> None:
    """Makes a folder and those above it; that they exist is durable. Raises FileNotFoundError when some are deleted."""
    try:
        folder.mkdir()
    except FileNotFoundError:
        _make_folder(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir()
    except FileExistsError:
        if folder.is_dir():
            return
        if os.path.lexists(folder):
            raise
        raise FileNotFoundError(folder) from None  # deleted already
    sync_folder(folder.parent)
