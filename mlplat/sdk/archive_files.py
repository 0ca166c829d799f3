"""Reading the files of an archive: a folder, or a tar.

It is not trusted: names, kinds, sizes and digests are checked before anything of it is used, and nothing
is unpacked to disk.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from mlplat.errors import InvalidInput, NotFound
from mlplat.tracking.archive import (
    EXPERIMENT,
    MANIFEST,
    MAX_EXPERIMENT_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_ROW_GROUP_BYTES,
    ExperimentInfo,
    check_files,
    parse_experiment,
    parse_manifest,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: What is done, how much of it, of how much (None: not known).
Progress = Callable[[str, int, int | None], None]
CHUNK_BYTES = 1024 * 1024
BLOCK = tarfile.BLOCKSIZE
MAX_MEMBERS = 10_000_000
#: Headers that say more about the next member, such as a long name, are read into memory as a whole.
MAX_EXTENSION_BYTES = 1024 * 1024
_EXTENSIONS = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
               tarfile.GNUTYPE_LONGLINK}  # fmt: skip


def no_progress(_what: str, _done: int, _total: int | None) -> None:
    """Shows nothing."""


class Archive:
    """An archive whose names, kinds and sizes have been checked. Thread-safe."""

    def __init__(self, path: Path, places: dict[str, tuple[Path, int, int]]) -> None:
        """``places``: by name the file, offset in it and size."""
        self.path = path
        self._places = places
        if MANIFEST not in places:
            raise InvalidInput(f"{path} is not an exported experiment: it has no {MANIFEST}")
        body = self._read_small(MANIFEST, MAX_MANIFEST_BYTES)
        #: Names everything in the archive.
        self.digest = hashlib.sha256(body).hexdigest()
        self.manifest = parse_manifest(body)
        check_files(self.manifest, {name: size for name, (_file, _offset, size) in places.items()})

    def verify(self, progress: Progress = no_progress) -> None:
        """Reads every file and compares its digest.

        Raises:
            InvalidInput: one differs.
        """
        total, done = sum(entry.bytes for entry in self.manifest.files.values()), 0
        for name, entry in self.manifest.files.items():
            with self.open(name) as body:
                if hashlib.file_digest(body, "sha256").hexdigest() != entry.sha256:  # type: ignore[arg-type]
                    raise InvalidInput(f"{name!r} is corrupt: its SHA-256 is not the manifest's")
            done += entry.bytes
            progress("bytes verified", done, total)

    def experiment(self) -> ExperimentInfo:
        """What ``experiment.json`` says."""
        return parse_experiment(self._read_small(EXPERIMENT, MAX_EXPERIMENT_BYTES))

    def open(self, name: str) -> BinaryIO:
        """A file of the archive, seekable."""
        return _open_slice(*self._places[name])

    def batches(self, name: str, schema: pa.Schema, rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of a Parquet file, at most ``rows`` at a time.

        Raises:
            InvalidInput: not a Parquet file of that schema, or with row groups too large for memory.
        """
        try:
            with self.open(name) as body, pq.ParquetFile(body) as file:
                meta = file.metadata
                sizes = [meta.row_group(index).total_byte_size for index in range(meta.num_row_groups)]
                if max(sizes, default=0) > MAX_ROW_GROUP_BYTES:
                    raise InvalidInput(f"{name}: a row group has {max(sizes)} bytes, at most {MAX_ROW_GROUP_BYTES}")
                if not file.schema_arrow.remove_metadata().equals(schema):
                    raise InvalidInput(f"{name} has other columns than expected: {file.schema_arrow.names}")
                yield from file.iter_batches(rows)
        except (pa.ArrowException, OSError) as error:
            raise InvalidInput(f"{name} is not a readable Parquet file: {error}") from error

    def _read_small(self, name: str, limit: int) -> bytes:
        _file, _offset, size = self._places[name]
        if size > limit:
            raise InvalidInput(f"{name} has {size} bytes, at most {limit} are accepted")
        with self.open(name) as body:
            return body.read()


def open_archive(path: Path) -> Archive:
    """The archive at ``path``.

    Raises:
        NotFound: nothing is there.
        InvalidInput: it is no archive, or holds something that an archive may not hold.
    """
    path = path.resolve()
    if path.is_dir():
        return Archive(path, _folder_places(path))
    if not path.is_file():
        raise NotFound(f"no such archive: {path}")
    return Archive(path, _tar_places(path))


def _folder_places(root: Path) -> dict[str, tuple[Path, int, int]]:
    places: dict[str, tuple[Path, int, int]] = {}
    folders = [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif entry.is_file(follow_symlinks=False):
                    places[path.relative_to(root).as_posix()] = (path, 0, entry.stat(follow_symlinks=False).st_size)
                else:
                    raise InvalidInput(f"the archive may only hold files and folders: {path} is neither")
    return places


def _tar_places(path: Path) -> dict[str, tuple[Path, int, int]]:
    places: dict[str, tuple[Path, int, int]] = {}
    try:
        with path.open("rb") as body:
            _check_headers(body)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                name = member.name.removeprefix("./")
                if not member.isreg() or member.issparse():
                    raise InvalidInput(f"the archive may only hold files and folders: {name[:200]!r} is neither")
                if name in places:
                    raise InvalidInput(f"the archive has {name[:200]!r} twice")
                places[name] = (path, member.offset_data, member.size)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise InvalidInput(f"{path} is not a tar (compressed ones are to be unpacked first): {error}") from error
    end = path.stat().st_size
    for name, (_path, offset, size) in places.items():
        if size < 0 or offset + size > end:
            raise InvalidInput(f"the archive ends in the middle of {name[:200]!r}")
    return places


def _check_headers(body: BinaryIO) -> None:
    """Walks the headers, to refuse what ``tarfile`` would read into memory without a bound."""
    end = body.seek(0, os.SEEK_END)
    offset = count = 0
    while offset + BLOCK <= end:
        body.seek(offset)
        block = body.read(BLOCK)
        if not any(block):
            return
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if header.size < 0 or (header.type in _EXTENSIONS and header.size > MAX_EXTENSION_BYTES):
            raise InvalidInput("the archive has a header of a size that no archive needs")
        count += 1
        if count > MAX_MEMBERS:
            raise InvalidInput(f"the archive has more than {MAX_MEMBERS} members")
        offset += BLOCK + -(-header.size // BLOCK) * BLOCK if header.isreg() or header.type in _EXTENSIONS else BLOCK


class _Slice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size = file, offset, size
        self._file.seek(offset)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._offset

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._size}[whence]
        return self._file.seek(self._offset + max(0, base + position)) - self._offset

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        body = self._file.read(min(len(view), max(0, self._size - self.tell())))
        view[: len(body)] = body
        return len(body)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_slice(path: Path, offset: int, size: int) -> BinaryIO:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    raw = os.fdopen(descriptor, "rb")
    return io.BufferedReader(_Slice(raw, offset, size), CHUNK_BYTES)
